"""A training step on a fake GPU.

Fake tensors have a shape, a type and the device `cuda`, but no data, and PyTorch applies its real
autocast rules to them. Fake tensors need a device guard, which a CPU build lacks, so a library
brings an empty guard. The backward pass does not work in this way.
"""

import ctypes
from dataclasses import replace
from itertools import product
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from benchmarks.gpu_memory import Case, block_bytes
from common.device import PRECISIONS, Device
from lora.inject import inject
from lora.layer import LoRAConfig
from model.gpt2 import GPT2, GPT2Config
from model.kernels import cuda_loss
from model.kernels import fast as ops
from model.kernels.fast import accelerate
from tests import runs

CONFIG = GPT2Config(vocab_size=331, n_positions=32, n_embd=32, n_layer=2, n_head=2)


def model_on_cuda(precision: str, method: str = "lora", layers: int = 2) -> GPT2:
    """Return a model, cast by `Device.cast_frozen`, with fake parameters on CUDA."""
    with unset_fake_temporarily():
        model = GPT2(replace(CONFIG, n_layer=layers))
        if method == "lora":
            inject(model, LoRAConfig(r=4))
        accelerate(model)
        Device.pick("cpu", precision).cast_frozen(model)
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            fake = torch.empty(p.shape, dtype=p.dtype, device="cuda")
            setattr(module, name, nn.Parameter(fake, requires_grad=p.requires_grad))
    return model


def check_loss(precision: str) -> None:
    """Check that the loss, the scores and a trained head's gradient run in the precision and return
    fp32, and that the head is padded with zeros.
    """
    model = model_on_cuda(precision)
    ids = torch.zeros(3, 32, dtype=torch.int64, device="cuda")
    with Device(torch.device("cuda"), precision).autocast():
        assert model.loss(ids, ids).dtype == torch.float32
        assert model.token_losses(ids, ids)[0].dtype == torch.float32
        head = nn.Parameter(torch.empty_like(model.wte.weight, dtype=torch.float32))
        hidden = model.hidden(ids).flatten(0, 1)
        assert cuda_loss.tied_cross_entropy(hidden, head, ids.flatten()).requires_grad
    item = PRECISIONS[precision].itemsize
    assert model.wte.weight.untyped_storage().nbytes() == 384 * 32 * item


def kept_bytes(precision: str, method: str, layers: int, windows: int) -> int:
    """Return the bytes, except parameters, that the model keeps for its backward pass."""
    model = model_on_cuda(precision, method, layers).train()
    ids = torch.zeros(windows, 32, dtype=torch.int64, device="cuda")
    attention = efficient_attention if precision == "fp32" else flash_attention
    with (
        Device(torch.device("cuda"), precision).autocast(),
        mock.patch.object(ops, "causal_attention", attention),
    ):
        return runs.kept_bytes(model, ids)


def efficient_attention(q, k, v, p):
    """Call the GPU's kernel for fp32. A CPU build would choose another kernel."""
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(q, k, v, None, True, p, True)[0]


def flash_attention(q, k, v, p):
    """Call the GPU's kernel for low precision."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, p, True)[0]


def check_block(precision: str, method: str) -> None:
    """Check that a block keeps the bytes per token of benchmarks/gpu_memory.py.

    Terms that do not grow with layers and tokens, such as casts of weights, cancel.
    """
    grown = {}
    for layers in (2, 3):
        few, many = (kept_bytes(precision, method, layers, windows) for windows in (3, 5))
        grown[layers] = many - few
    measured = (grown[3] - grown[2]) / (2 * 32)
    item = PRECISIONS[precision].itemsize
    expected = block_bytes(CONFIG, Case("", method, item), rank=4)
    assert measured == expected, (precision, method, measured, expected)


def check_all(guard: Path) -> None:
    """Load the library with the guard for this process, and check every case."""
    ctypes.CDLL(str(guard), ctypes.RTLD_GLOBAL)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False  # enables autocast
    torch.cuda.is_bf16_supported = lambda: True
    cuda_loss.card_memory = lambda device: 16 * 10**9
    with FakeTensorMode():
        for precision in PRECISIONS:
            check_loss(precision)
        for precision, method in product(("fp32", "bf16"), ("lora", "full")):
            check_block(precision, method)
