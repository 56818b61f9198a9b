PYTHON ?= python3
VENV ?= .venv
# torch 2.1.0 and other packages of early 2024, for Python 3.10 or 3.11
VENV_2024 ?= .venv-2024
TESTS_2024 = audit cache certify checkpoints config device_kinds flags hub launch links logs lora onednn_linear parity pretraining report results run_folder run_plots seal steady stopping streaming threads tiny train
# The tests without training runs
TESTS_FAST = audit cache comparison config data device device_kinds encoding_cache flags importing links live logs models peaks project report results run run_folder run_plots steady
# One test worker per core
PYTEST = -q -n logical --dist worksteal --durations=10
BIN := $(VENV)/bin
STEPS ?= 101
RUN ?= runs/$(shell date +%Y-%m-%d-%H%M%S)-demo
RUN := $(RUN)
# Additional settings for papermill, such as PARAMS="-p num_processes 2" or PARAMS="-f params/reference.yaml"
PARAMS ?=
# Options for JupyterLab, such as LAB="--no-browser --port 9000"
LAB ?=

# REFERENCE is the path of the reference's train_text_to_image.py. BENCH_PYTHON is the Python of an environment that has
# sdnb's dependencies and torchvision. BENCH has options of benchmarks/speed.py, such as
# BENCH="--model tiny small-unet --pairs 5"
REFERENCE ?=
BENCH_PYTHON ?= $(BIN)/python
BENCH ?=

# The grid of settings for make sweep
GRID ?= params/sweep-batch.yaml

.PHONY: help train sweep test test-fast test-2024 lint bench lab clean
.DEFAULT_GOAL := help

help: ## Show this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12
	@echo
	@echo 'Settings: STEPS=$(STEPS) RUN=runs/NAME PARAMS="-p name value …" PYTHON=$(PYTHON) VENV=$(VENV)'

train: $(VENV)/.installed ## Train the embedded model on the embedded data, and write an HTML report
	@mkdir -p "$(RUN)"
	@$(BIN)/papermill --engine sdnb --no-progress-bar notebooks/train.ipynb "$(RUN)/train.ipynb" -p steps $(STEPS) -p output_dir "$(abspath $(RUN))" $(PARAMS)
	@$(BIN)/sdnb report "$(RUN)/train.ipynb"

sweep: $(VENV)/.installed ## Run the grid of settings in GRID=params/sweep-….yaml, and compare the runs
	$(BIN)/sdnb sweep "$(GRID)"

test: $(VENV)/.installed ## Run all tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(PYTEST)

test-fast: $(VENV)/.installed ## Run the tests without training runs; takes about two minutes
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(PYTEST) $(addprefix tests/test_,$(addsuffix .py,$(TESTS_FAST)))

test-2024: $(VENV_2024)/.installed ## Run the tests of training, parity and resuming with package versions of early 2024
	HF_HUB_OFFLINE=1 $(VENV_2024)/bin/python -m pytest $(PYTEST) $(addprefix tests/test_,$(addsuffix .py,$(TESTS_2024)))

lint: $(VENV)/.installed ## Check style, imports, types and common mistakes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/mypy

bench: $(VENV)/.installed ## Compare the speed of sdnb with REFERENCE's, or without it measure each technique; takes an hour on an idle machine
	$(BIN)/python benchmarks/speed.py $(if $(REFERENCE),--reference "$(REFERENCE)" --python "$(BENCH_PYTHON)") $(BENCH)

lab: $(VENV)/.installed ## Open JupyterLab in the folder of the notebooks
	$(BIN)/sdnb lab $(LAB)

clean: ## Remove the virtual environments, and keep the runs
	rm -rf $(VENV) $(VENV_2024)

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt)

$(VENV_2024)/.installed: pyproject.toml constraints-2024.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info >= (3, 12))' || \
		{ echo 'error: torch 2.1.0 needs Python 3.10 or 3.11; choose one, as in make PYTHON=python3.11 …'; exit 1; }
	$(call install,$(VENV_2024),constraints-2024.txt)

# $(call install,environment,constraints)
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'error: $(PYTHON) is older than Python 3.10; choose a newer one, as in make PYTHON=python3.11 …'; exit 1; }
	@$(PYTHON) -m venv $(1) || \
		{ echo 'error: cannot create a virtual environment; on Debian and Ubuntu: apt-get install python3-venv'; exit 1; }
	@echo 'Installing into $(1): this takes a few minutes, only once'
	@$(1)/bin/python -m pip install --quiet --disable-pip-version-check -c $(2) -e '.[test]'
	@touch $(1)/.installed
endef
