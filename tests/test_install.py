"""What `pip install` of a checkout gives: `lora`, which needs PyTorch and safetensors."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
IMPORT = """
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

new = {name.partition(".")[0] for name in set(sys.modules) - loaded}
assert new <= ALLOWED, new
model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))
inject(model, make_config(r=2, target_modules="all-linear", use_dora=True))
save_adapter(model, "adapter")
unwrap(model)
load_adapter(model, "adapter")
merge(model)
"""
USE = """
import sys
import peft, torch, transformers
import lora
from lora import LoRAConfig, inject, load_adapter, merge, save_adapter, unwrap

assert lora.__file__.startswith(sys.argv[1])
config = transformers.LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2,
)
torch.manual_seed(0)
model = transformers.LlamaForCausalLM(config).eval()
ids = torch.arange(24).view(2, 12)
base = model(ids).logits

inject(model, LoRAConfig(r=4, target_modules="all-linear"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
for _ in range(3):
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
expected = model(ids).logits
assert not torch.allclose(expected, base, atol=0.01)
save_adapter(model, "adapter")
unwrap(model)
assert torch.equal(model(ids).logits, base)

load_adapter(model, "adapter")
assert torch.equal(model(ids).logits, expected)
merge(model)
assert torch.allclose(model(ids).logits, expected, atol=1e-5)
torch.manual_seed(0)
theirs = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM(config).eval(), "adapter")
assert torch.allclose(theirs(ids).logits, expected, atol=1e-5)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return a directory into which pip has installed a copy of the checkout."""
    checkout = tmp_path_factory.mktemp("checkout")
    for folder in ("lora", "model", "common"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("mini"))
    for file in ("pyproject.toml", "README.md", "LICENSE", "train.py"):
        shutil.copy(ROOT / file, checkout)
    target = tmp_path_factory.mktemp("site")
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    command = (sys.executable, "-m", "pip", "install", *offline, "--target", target, checkout)
    subprocess.run(command, check=True, capture_output=True)
    return target


def test_an_installed_checkout_has_lora_and_no_generic_name(site):
    names = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"lora"}
    assert (site / "lora" / "variants" / "dora.py").exists()


@pytest.mark.parametrize("script", [IMPORT, USE], ids=["torch and safetensors alone", "with PEFT"])
def test_lora_works_outside_the_checkout(site, tmp_path, script):
    environment = os.environ | {"PYTHONPATH": str(site)}  # before an editable install
    command = (sys.executable, "-W", "ignore", "-c", script, str(site))
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
