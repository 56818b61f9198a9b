"""Installed from a wheel, outside the clone: the commands, the notebooks and the parameter files that come along."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import nbformat
import pytest
from processes import ROOT


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and an sdist."""
    folder = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=ROOT)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The folder of the programs of an environment that has the wheel, and the dependencies of this one."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    packages = sysconfig.get_path("purelib", vars={"base": str(folder)})
    with open(f"{packages}/dependencies.pth", "w") as file:
        file.write(
            sysconfig.get_path("purelib")
        )  # .pth files that lie there, such as that of this clone, have no effect
    run(folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", built[0])
    return folder / "bin"


def run(*command, cwd=None, status=0):
    # The templates of nbconvert are data of this environment, where the dependencies are.
    environment = {**os.environ, "JUPYTER_PATH": f"{sys.prefix}/share/jupyter"}
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def tracked(*folders):
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.split())


def test_both_have_every_file(built):
    wheel, sdist = built
    package = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    shipped = {f"sdnb/{name}" for name in tracked("notebooks", "params")}
    assert package == tracked("sdnb") | shipped
    with tarfile.open(sdist) as archive:
        assert tracked() <= {name.partition("/")[2] for name in archive.getnames()}


def test_the_main_job_from_the_wheel(installed, tmp_path):
    sdnb, python = installed / "sdnb", installed / "python"
    where = run(python, "-c", "import sdnb; print(sdnb.__file__)", cwd=tmp_path)
    assert str(installed.parent) in where

    assert "there are no runs in" in run(sdnb, "runs", cwd=tmp_path)
    small = dict(steps=2, train_batch_size=1, gradient_accumulation_steps=1, validation_prompts="None")
    flags = [f"--{name}={value}" for name, value in small.items()]
    said = run(sdnb, "train", "params/demo.yaml", *flags, cwd=tmp_path)
    assert "images/s per CPU rank" in said
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name in run(sdnb, "runs", cwd=tmp_path)
    assert "no confidence interval" in run(sdnb, "compare", "published", folder, cwd=tmp_path)
    assert (folder / f"{folder.name}.html").as_posix() in run(sdnb, "report", folder, cwd=tmp_path)

    said = run(sdnb, "lab", "--version", cwd=tmp_path)
    assert "copied notebooks/" in said and "copied params/" in said
    assert "copied" not in run(sdnb, "lab", "--version", cwd=tmp_path), "only once"
    given = [word for name, value in small.items() for word in ("-p", name, value)]
    run(python, "-m", "papermill", "notebooks/train.ipynb", "out.ipynb", *given, cwd=tmp_path)
    assert len([*(tmp_path / "runs").glob("*/results.json")]) == 2
    assert nbformat.read(tmp_path / "out.ipynb", as_version=4).metadata.papermill.exception is None


def test_a_sweep_from_the_wheel(installed, tmp_path):
    (tmp_path / "grid.yaml").write_text(
        "pretrained_model_name_or_path: tiny\ndataset_name: openmoji\nresolution: 64\nsteps: 2\n"
        "gradient_accumulation_steps: 1\nvalidation_loss_steps: 0\ngrid: {train_batch_size: [1, 2]}\n"
    )
    said = run(installed / "sdnb", "sweep", "grid.yaml", cwd=tmp_path)
    assert (tmp_path / "runs" / "grid" / "grid.html").exists(), said
