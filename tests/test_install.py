"""`pip install` of a checkout gives only `lora`, which needs PyTorch and safetensors."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
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


def test_lora_installed_alone_works_outside_the_checkout(tmp_path):
    checkout = tmp_path / "checkout"
    for folder in ("lora", "model", "common"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("mini"))
    for file in ("pyproject.toml", "README.md", "LICENSE", "train.py"):
        shutil.copy(ROOT / file, checkout)
    site = tmp_path / "site"
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    command = (sys.executable, "-m", "pip", "install", *offline, "--target", site, checkout)
    subprocess.run(command, check=True, capture_output=True)
    names = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"lora"}  # no generic name

    environment = os.environ | {"PYTHONPATH": str(site)}  # before an editable install
    command = (sys.executable, "-W", "ignore", "-c", USE, str(site))
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
