"""Check the CUDA path on a CPU: fake CUDA tensors' types, gradients on `meta`, Dynamo's graphs."""

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
import torch._dynamo  # now: it would take a mock of a function of torch for the function
import torch.nn.functional as F

from lora.inject import inject
from lora.layer import LoRAConfig
from lora.variants import make_config
from model.gpt2 import GPT2
from model.kernels import cuda_loss, fast
from model.kernels.fast import accelerate
from tests.helpers import Operations
from tests.model.fake_cuda import CONFIG, blocks_that_fit, cases_that_hold

GUARD = """
#include <c10/core/impl/FakeGuardImpl.h>
using Guard = c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>;
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, new Guard());
"""


def test_on_cuda_the_stream_is_fp32_and_a_block_keeps_the_bytes_that_the_table_says(tmp_path):
    """Run `fake_cuda.py` in a process of its own: a second guard would end this one."""
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
        start = "fork"  # it need not import torch again
    with ProcessPoolExecutor(1, get_context(start)) as child:
        assert len(child.submit(cases_that_hold, guard).result()) == 6
        assert child.submit(blocks_that_fit).result() == 6


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_step_without_data_takes_the_branches_of_a_gpu_and_leaves_gradients(method):
    """`meta` is not the CPU: fused attention, `F.dropout`, `F.linear`. It has no autocast."""
    no_autocast = mock.patch.object(torch, "is_autocast_enabled", lambda device: False)
    cuda = mock.patch.object(fast, "loss", cuda_loss)
    card = mock.patch.object(cuda_loss, "card_memory", lambda device: 16 * 10**9)
    with torch.device("meta"), no_autocast, cuda, card:
        model = GPT2(CONFIG).train()
        if method == "lora":
            inject(model, LoRAConfig(r=4))
        accelerate(model)
        ids = torch.zeros(3, 32, dtype=torch.int64)
        model.loss(ids, ids).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == {"lora": 4, "full": 28}[method]
    for name, parameter in trained.items():
        assert parameter.grad.shape == parameter.shape and parameter.grad.is_meta, name


def test_the_gradients_of_q_k_and_v_are_put_together_by_one_kernel():
    with torch.device("meta"):
        attention = GPT2(CONFIG).h[0].attn
        attention.attend = lambda q, k, v: q + k * v  # `meta` would take attention apart
        x = torch.zeros(3, 32, 32, requires_grad=True)
        y = attention(x)
    with Operations() as seen:
        y.sum().backward()
    assert seen.names.count("cat") == 1
    assert not {"stack", "clone", "copy_", "select_backward", "add"} & set(seen.names), seen.names


def operations_of(layers: int) -> tuple[Counter, Counter]:
    """Count a LoRA step's operations without data, forward and backward, as CUDA would run them."""

    def attend(q, k, v, p):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, p, True)[0]

    with (
        torch.device("meta"),
        mock.patch.object(torch, "is_autocast_enabled", lambda device: False),
        mock.patch.object(F, "dropout", lambda x, p: torch.native_dropout(x, p, True)[0]),
        mock.patch.object(fast, "causal_attention", attend),
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
    """In fp32: bf16 adds 5 casts forward and 7 back. Attention's backward pass is 3 kernels."""
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


def graphs_made(batches: tuple[int, ...], checkpointing: bool, **fields: object) -> list[int]:
    """Train on batches of these sizes; return how many graphs Dynamo has made after each."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model = GPT2(CONFIG).train()
    inject(model, make_config(r=4, **fields))
    accelerate(model)
    model.gradient_checkpointing = checkpointing
    hidden = torch.compile(model.hidden, backend=count, fullgraph=True)  # a break would raise
    made = []
    for batch in batches:
        hidden(torch.zeros(batch, 32, dtype=torch.int64)).sum().backward()
        made.append(len(graphs))
    assert all(p.grad.any() for n, p in model.named_parameters() if ".lora_B." in n)
    return made


def test_dynamo_makes_few_graphs_of_changing_batches():
    """It makes one of 16 windows, one of any number, and one of a single window."""
    assert graphs_made((16, 14, 13, 1, 16), checkpointing=False) == [1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    "fields", [{"use_dora": True}, {"target_modules": ("c_attn.q", "c_attn.v")}]
)
def test_dynamo_makes_one_whole_graph_of_the_variants_with_checkpointing(fields):
    assert graphs_made((16,), checkpointing=True, **fields) == [1]
