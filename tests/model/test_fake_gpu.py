"""Check the CUDA path on a CPU: types on fake CUDA tensors and launches on `meta`."""

import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch._dynamo  # imported first: later it would capture the mocks
import torch.nn.functional as F

from lora.inject import inject
from lora.layer import LoRAConfig
from model.gpt2 import GPT2
from model.kernels import fast
from model.kernels.fast import accelerate
from tests.helpers import Operations
from tests.model.fake_cuda import CONFIG, check_all, flash_attention

GUARD = """
#include <c10/core/impl/FakeGuardImpl.h>
using Guard = c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>;
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, new Guard());
"""


def test_on_cuda_a_block_keeps_the_bytes_that_the_table_says_and_the_loss_is_fp32(tmp_path):
    """Run `fake_cuda.py` in a separate process, because a second guard would abort this one."""
    if torch.__version__ < "2.9" and torch.version.cuda:
        pytest.skip("torch 2.8 built for CUDA asks the driver which attention kernel to take")
    if not shutil.which("g++"):
        pytest.skip("no g++")
    if torch.cuda.is_available():
        pytest.skip("a GPU has a guard of its own")
    source = tmp_path / "guard.cpp"
    source.write_text(GUARD)
    guard = tmp_path / "guard.so"
    folder = Path(torch.__file__).parent
    paths = (f"-I{folder / 'include'}", source, "-o", guard, f"-L{folder / 'lib'}", "-lc10")
    subprocess.run(["g++", "-shared", "-fPIC", "-std=c++20", *paths], check=True)

    start = "spawn"
    if sys.platform == "linux":
        start = "fork"  # a fork need not import torch again
    with ProcessPoolExecutor(1, get_context(start)) as child:
        child.submit(check_all, guard).result()


def operations_of(layers: int) -> tuple[Counter, Counter]:
    """Count a LoRA step's operations, forward and backward, as on CUDA, without data."""
    with (
        torch.device("meta"),
        mock.patch.object(torch, "is_autocast_enabled", lambda device: False),
        mock.patch.object(F, "dropout", lambda x, p: torch.native_dropout(x, p, True)[0]),
        mock.patch.object(fast, "causal_attention", flash_attention),
    ):
        model = GPT2(replace(CONFIG, n_layer=layers)).train()
        inject(model, LoRAConfig(r=4))
        accelerate(model)
        with Operations() as forward:
            hidden = model.hidden(torch.zeros(3, 32, dtype=torch.int64))
        with Operations() as backward:
            hidden.backward(torch.empty_like(hidden))
    return Counter(forward.names), Counter(backward.names)


def test_a_block_launches_what_the_page_says():
    """The numbers are for fp32. bf16 adds 5 casts forward and 7 backward. Attention's backward
    pass is 3 kernels.
    """
    two = operations_of(2)
    three = operations_of(3)
    forward = three[0] - two[0]
    backward = three[1] - two[1]
    assert forward == {
        "native_layer_norm": 2,
        "addmm": 4,
        "mm": 2,
        "native_dropout": 3,
        "_scaled_dot_product_flash_attention": 1,
        "gelu": 1,
        "mul": 1,
        "add": 3,
    }
    assert backward == {
        "native_layer_norm_backward": 2,
        "mm": 8,
        "native_dropout_backward": 3,
        "_scaled_dot_product_flash_attention_backward": 1,
        "gelu_backward": 1,
        "mul": 1,
        "add": 3,
        "cat": 1,
    }
    assert forward.total() + 5 == 22 and backward.total() + 7 + 2 == 29
