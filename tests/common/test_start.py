"""A command imports what it needs: no torch for its help or a mistake, no compiler for a step."""

import re
import subprocess
import sys

import pytest

from common.cli import NONE, PRECISION, QUANTISE
from common.device import PRECISIONS
from lora.layer import LoRAConfig
from lora.quantised import LAYERS
from lora.variants import config_fields
from tests.fault.runs import ROOT
from tests.runs import arguments
from training.recipe import ADAPTERS, REFERENCE

IMPORTED = re.compile(r"^import time:[ \d|]+ (\S+)$", re.MULTILINE)
# A command that prints the collector's state while it runs.
COLLECTING = """
import gc, sys
from common.errors import run_command
from common.options import parse_generate
from common.start import before_torch

def main(argv=None):
    print(gc.isenabled(), gc.get_freeze_count() > 0)

sys.argv = ["generate.py", "--prompt", "x"]
before_torch(parse_generate, "-")
print(gc.isenabled())
run_command(main)
"""


def imports(status: int, *command: object) -> set[str]:
    """Return the modules that Python imports for a command, which must end with `status`."""
    words = [str(word) for word in command]
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == status, ended.stderr[-1000:]
    modules = set(IMPORTED.findall(ended.stderr))
    assert "argparse" in modules or words[0] == "-c"
    return modules


@pytest.mark.parametrize(
    ("status", "line"),
    [
        (0, "train.py --help"),
        (0, "train.py lora --help"),
        (0, "evaluate.py --help"),
        (0, "generate.py --help"),
        (2, "train.py"),
        (2, "train.py lora --lr x"),
        (2, "train.py full --val-data x"),
        (2, "evaluate.py --stride 129"),
        (2, "evaluate.py --compare runs --batch-size 2"),
        (2, "generate.py --prompt x --with-base"),
    ],
)
def test_neither_help_nor_a_mistake_imports_torch(status, line):
    assert not {"torch", "numpy", "tqdm", "tiktoken"} & imports(status, *line.split())


def test_neither_a_training_step_nor_a_token_imports_the_compiler(base, book, tmp_path):
    needed = imports(0, "-c", "import torch")
    argv = arguments("lora", base, book, tmp_path, "--max-steps", 1)
    step = imports(0, "train.py", *argv) - needed
    token = imports(0, "generate.py", "--base", base, "--prompt", "x", "--max-new-tokens", 1)
    token -= needed
    assert "torch.optim" in step | needed and "model.sampling" in token
    others = {"torch._dynamo", "torch._inductor", "sympy", "huggingface_hub", "tokenizers"}
    assert not others & step
    assert not (others | {"matplotlib"}) & token


def test_the_garbage_collector_rests_during_the_imports_alone():
    ended = subprocess.run(
        [sys.executable, "-c", COLLECTING], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ended.stdout.split() == ["False", "True", "True"]


def test_what_the_options_say_without_torch_is_true():
    assert PRECISION["choices"] == ("auto", *PRECISIONS)
    assert QUANTISE["choices"] == (*LAYERS, NONE)
    defaults = config_fields(LoRAConfig())
    assert defaults | ADAPTERS[REFERENCE] == defaults
