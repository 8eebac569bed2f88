"""What `pip install` of a checkout puts on the path: `lora`, and nothing of a generic name."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
USE = """
import site, sys
sys.path.insert(0, sys.argv[1])
site.addsitedir(sys.argv[1])  # unlike PYTHONPATH, it reads what an editable install leaves there
from importlib.util import find_spec
import torch
from torch import nn
from lora.inject import inject, lora_layers
from lora.layer import LoRAConfig
from lora.variants import make_config, make_layer

model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))
x = torch.randn(3, 8)
expected = model(x)
inject(model, make_config(r=2, target_modules="all-linear", use_dora=True), make_layer)
assert torch.allclose(model(x), expected, atol=1e-6) and len(lora_layers(model)) == 2
for name in ("adapters", "common", "data", "lesson", "model", "tests", "training", "train"):
    assert find_spec(name) is None, name
"""


@pytest.mark.parametrize("build", ["build_wheel", "build_editable"])
def test_an_installed_checkout_has_lora_and_no_generic_name(tmp_path, build):
    """Build as pip does, and unpack the wheel as pip does, without pip or a network."""
    checkout = tmp_path / "checkout"
    for folder in ("lora", "model", "common", "data"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("mini"))
    for file in ("pyproject.toml", "README.md", "LICENSE", "train.py"):
        shutil.copy(ROOT / file, checkout)
    code = f"from setuptools.build_meta import {build}; {build}({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=checkout, capture_output=True)
    wheel = next(tmp_path.glob("*.whl"))
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    # -S: this environment may hold an editable install of its own. PYTHONPATH brings torch alone.
    command = (sys.executable, "-S", "-c", USE, str(tmp_path / "site"))
    environment = os.environ | {"PYTHONPATH": str(Path(torch.__file__).parents[1])}
    subprocess.run(command, check=True, cwd=elsewhere, env=environment)
