"""Check that the core can be copied out, and that a folder imports only from those below it."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the commands down: a file imports from its own folder and from those after it.
LAYERS = [
    "train",
    "evaluate",
    "generate",
    "training",
    "adapters",
    "storage",
    "data",
    "model",
    "lora",
    "common",
]
OURS = {*LAYERS, "lesson", "benchmarks", "tests"}
COPIED_OUT = """
import torch
from torch import nn
from layer import LoRAConfig, LoRALinear

torch.manual_seed(0)
linear = nn.Linear(6, 4)
linear.requires_grad_(False)
adapted = LoRALinear(linear, LoRAConfig(r=2))
x = torch.randn(5, 6)
assert torch.equal(adapted(x), linear(x))
optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
for _ in range(2):
    adapted(x).square().sum().backward()
    optimizer.step()
change = adapted(x) - linear(x)
assert change.abs().max() > 1e-3
adapted.merge()
assert torch.allclose(adapted.unwrapped()(x), adapted(x))
"""


def imported(path: Path) -> set[str]:
    """Return the names of our modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name for name in names if name.partition(".")[0] in OURS}


def test_the_layer_copied_alone_into_an_empty_folder_adapts_a_linear_layer(tmp_path):
    shutil.copy(ROOT / "lora" / "layer.py", tmp_path)
    subprocess.run([sys.executable, "-c", COPIED_OUT], cwd=tmp_path, check=True)


@pytest.mark.parametrize("path", ["lora/layer.py", "model/gpt2.py"])
def test_the_layer_and_the_model_need_pytorch_alone(path):
    assert imported(ROOT / path) == set()


def test_lora_imports_nothing_but_lora():
    for path in (ROOT / "lora").glob("*.py"):
        assert {name.partition(".")[0] for name in imported(path)} <= {"lora"}, path


@pytest.mark.parametrize("folder", LAYERS[3:])
def test_no_folder_imports_from_one_above_it(folder):
    below = set(LAYERS[LAYERS.index(folder) :])
    for path in (ROOT / folder).glob("*.py"):
        assert {name.partition(".")[0] for name in imported(path)} <= below, path
