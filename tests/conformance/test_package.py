"""The folder works when it is copied alone, and when it is installed. PyTorch is optional."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lora_conformance
from lora_conformance import vectors

FOLDER = Path(lora_conformance.__file__).parent
LAYER = re.search(r"^```python\n(.*?)^```", (FOLDER / "README.md").read_text(), re.M | re.S)[1]
MODULE = [sys.executable, "-m", "lora_conformance"]
# A module that is None in sys.modules cannot be imported.
BARE = [
    sys.executable,
    "-c",
    "import sys; sys.modules['torch'] = None\n"
    "from lora_conformance.__main__ import main; sys.exit(main(sys.argv[1:]))",
]


@pytest.fixture(scope="module", params=["copied", "installed"])
def site(request, tmp_path_factory):
    """Return a folder that contains the folder `lora_conformance`."""
    site = tmp_path_factory.mktemp(request.param)
    ignored = shutil.ignore_patterns("__pycache__", "build")
    if request.param == "copied":
        shutil.copytree(FOLDER, site / "lora_conformance", ignore=ignored)
    else:
        copy = shutil.copytree(FOLDER.parent, site / "source", ignore=ignored)
        offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
        command = (sys.executable, "-m", "pip", "install", *offline, "--target", site, copy)
        subprocess.run(command, check=True, capture_output=True)
        shutil.rmtree(copy)
    return site


def run(site, command, *arguments):
    """Run a command in an empty folder, with the site on the path."""
    (site / "empty").mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(site)}
    return subprocess.run(
        [*command, *map(str, arguments)],
        cwd=site / "empty",
        env=environment,
        capture_output=True,
        text=True,
    )


def test_compare_needs_no_pytorch(site, tmp_path):
    example = site / "lora_conformance" / "examples" / "numpy_layer.py"
    subprocess.run([sys.executable, example, tmp_path / "results"], check=True)
    ended = run(site, BARE, "compare", tmp_path / "results")
    assert ended.stderr == ""
    assert " 0 failed" in ended.stdout
    assert ended.returncode == 0


def test_the_bench_works_and_without_pytorch_it_asks_for_it(site, tmp_path):
    (tmp_path / "mine.py").write_text(LAYER)
    ended = run(site, MODULE, tmp_path / "mine.py", "new_adapter_changes_nothing")
    assert ended.returncode == 0, ended.stderr
    ended = run(site, BARE, tmp_path / "mine.py")
    assert ended.returncode == 2
    assert "error: the bench needs PyTorch" in ended.stderr.splitlines()[-1]


def test_the_package_has_every_file(site):
    kept = {p.relative_to(FOLDER) for p in FOLDER.rglob("*.*") if p.parent.name != "__pycache__"}
    found = {
        p.relative_to(site / "lora_conformance") for p in (site / "lora_conformance").rglob("*.*")
    }
    assert kept - found == set()


def test_git_ignores_what_pip_leaves_in_the_folder(tmp_path):
    shutil.copy(FOLDER.parents[1] / ".gitignore", tmp_path)
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    left = [
        "conformance/build/lib/lora_conformance/bench.py",
        "conformance/lora_conformance.egg-info/PKG-INFO",
    ]
    command = ["git", "-C", tmp_path, "check-ignore", *left]
    assert subprocess.run(command, capture_output=True, text=True).stdout.split() == left


def test_there_is_one_version():
    assert vectors.index()["version"] == lora_conformance.__version__
    changes = (FOLDER / "CHANGELOG.md").read_text()
    assert re.findall(r"^## (\S+)", changes, re.MULTILINE)[0] == lora_conformance.__version__
    assert "unreleased" not in changes


def test_an_adopters_folder_called_conformance_does_no_harm(site, tmp_path):
    (tmp_path / "conformance").mkdir()
    (tmp_path / "conformance" / "__init__.py").touch()
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [*MODULE, "--list"]
    assert (
        subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True).returncode == 0
    )
