PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STEPS ?= 101
RUN ?= runs/$(shell date +%Y-%m-%d-%H%M%S)-demo
RUN := $(RUN)
# Any other settings for papermill, such as PARAMS="-p num_processes 2" or PARAMS="-f params/reference.yaml"
PARAMS ?=
# Options for JupyterLab, such as LAB="--no-browser --port 9000"
LAB ?=

.PHONY: help train test lint lab clean
.DEFAULT_GOAL := help

help: ## Show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10
	@echo
	@echo 'Settings: STEPS=$(STEPS) RUN=runs/NAME PARAMS="-p name value …" PYTHON=$(PYTHON) VENV=$(VENV)'

train: $(VENV)/.installed ## Train the embedded model on the embedded data, and write the HTML report
	@mkdir -p "$(RUN)"
	$(BIN)/papermill notebooks/train.ipynb "$(RUN)/train.ipynb" -p steps $(STEPS) -p output_dir "$(abspath $(RUN))" $(PARAMS)
	@$(BIN)/python -m sdnb.report "$(RUN)/train.ipynb"

test: $(VENV)/.installed ## Run all tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2 --dist loadgroup

lint: $(VENV)/.installed ## Check style and common mistakes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lab: $(VENV)/.installed ## Open JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir=notebooks $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB)

clean: ## Remove the environment; runs stay
	rm -rf $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'error: $(PYTHON) is older than Python 3.10: give another, as in make PYTHON=python3.11 …'; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo 'error: no virtual environment can be made; on Debian and Ubuntu: apt-get install python3-venv'; exit 1; }
	@echo 'Installing into $(VENV): a few minutes, once'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@
