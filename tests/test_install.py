"""The wheel contains only `lora`, with types, and needs only PyTorch and safetensors."""

import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from zipfile import ZipFile

import pytest

import lora

ROOT = Path(__file__).resolve().parents[1]
OFFLINE = ("--no-deps", "--no-index", "--disable-pip-version-check")
USE = """
import builtins, sys

ALLOWED = {*sys.stdlib_module_names, "lora", "safetensors", "torch"}
plain_import = builtins.__import__

def checked_import(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "").partition(".")[0]
    if importer in ("lora", "safetensors"):
        assert level or name.partition(".")[0] in ALLOWED, (importer, name)
    return plain_import(name, globals, locals, fromlist, level)

sys.modules["numpy"] = None  # PyTorch can do without
import torch
from torch import nn

loaded = set(sys.modules)
builtins.__import__ = checked_import
from lora import *
import lora

assert lora.__file__.startswith(sys.argv[1])
new = {name.partition(".")[0] for name in set(sys.modules) - loaded}
assert new <= ALLOWED, new
model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))
x = torch.randn(3, 8)
base = model(x)
inject(model.eval(), LoRAConfig(r=2, target_modules="all-linear", use_dora=True))
for layer in lora_layers(model).values():
    nn.init.normal_(layer.lora_B.weight)
expected = model(x)
assert not torch.allclose(expected, base)
save_adapter(model, "adapter")
unwrap(model)
assert torch.equal(model(x), base)
load_adapter(model, "adapter")
assert torch.equal(model(x), expected)
merge(model)
assert torch.allclose(model(x), expected, atol=1e-5)
"""


def pip(*arguments: object) -> None:
    subprocess.run((sys.executable, "-m", "pip", *arguments), check=True, capture_output=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from a copy, because setuptools writes into the directory."""
    directory = tmp_path_factory.mktemp("wheel")
    checkout = directory / "checkout"
    for folder in ("lora", "model", "common"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("mini"))
    for file in ("pyproject.toml", "README.md", "LICENSE", "train.py"):
        shutil.copy(ROOT / file, checkout)
    pip("wheel", *OFFLINE, "--no-build-isolation", "--wheel-dir", directory, checkout)
    return next(directory.glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """Install the wheel into an empty environment, beside the packages of this one."""
    environment = tmp_path_factory.mktemp("environment")
    command = (sys.executable, "-m", "venv", "--without-pip", environment)
    subprocess.run(command, check=True)
    site = next(environment.glob("lib/python*/site-packages"))
    pip("install", *OFFLINE, "--target", site, wheel)
    (site / "torch.pth").write_text(sysconfig.get_path("purelib"))
    return site


def test_the_wheel_contains_only_lora_with_its_types_and_licence(wheel):
    with ZipFile(wheel) as file:
        names = set(file.namelist())
    assert {name.partition("/")[0] for name in names} == {
        "lora",
        f"gpt2_lora-{lora.__version__}.dist-info",
    }
    assert "lora/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lora").glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources


def test_one_version_and_the_needs_of_the_library(wheel):
    with ZipFile(wheel) as file:
        [name] = [name for name in file.namelist() if name.endswith("/METADATA")]
        metadata = email.message_from_bytes(file.read(name))
    changelog = re.search(
        r"^## \[(.*)\] - (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    citation = dict(
        re.findall(r"^([\w-]+): (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    )
    assert metadata["Version"] == lora.__version__ == changelog[1] == citation["version"]
    assert citation["date-released"] == changelog[2]
    assert metadata["License-Expression"] == citation["license"] == "MIT"
    needs = [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
    assert [re.split(r"[^\w-]", need)[0] for need in needs] == ["torch", "safetensors"]


def test_lora_installed_alone_works_outside_the_checkout(site, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(site)}  # before an editable install
    command = (sys.executable, "-W", "ignore", "-c", USE, str(site))
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
