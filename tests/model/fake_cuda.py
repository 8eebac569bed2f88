"""A training step on a GPU that is not there: `python -m tests.model.fake_cuda GUARD.so`.

Fake tensors have a shape, a type and the device `cuda`, and no data; PyTorch runs its real rules of
autocast on them. They need a device guard, which a build for the CPU lacks: GUARD.so brings
an empty one. Backward does not work so. Prints what `test_fake_gpu.py` checks, as JSON.
"""

import ctypes
import json
import sys
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from common.device import PRECISIONS, Device
from lora.inject import inject
from lora.layer import LoRAConfig
from model import fast as ops
from model.gpt2 import GPT2, GPT2Config

CONFIG = GPT2Config(vocab_size=331, n_positions=32, n_embd=32, n_layer=2, n_head=2)


def model_on_cuda(precision: str) -> GPT2:
    """Return a model as `Device.hold` casts it, each parameter replaced by a fake one on CUDA."""
    with unset_fake_temporarily():
        model = GPT2(CONFIG)
        inject(model, LoRAConfig(r=4))
        Device.pick("cpu", precision).hold(model)
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="cuda"),
                                               requires_grad=p.requires_grad))
    return model


def step(precision: str, gradients: bool) -> dict:
    """Return the type of every tensor between the modules, of the loss and of the parameters."""
    device, types = Device(torch.device("cuda"), precision), {}

    def look(name: str):
        def hook(module, inputs, output):
            tensors = {"in": inputs[0], "out": output}
            assert {t.device.type for t in tensors.values()} == {"cuda"}, name
            types[name] = {key: str(t.dtype) for key, t in tensors.items()}
        return hook

    model = model_on_cuda(precision).train(gradients)
    for name, module in model.named_modules():
        if name.startswith(("h.1", "ln_f")):
            module.register_forward_hook(look(name))
    ids = torch.zeros(3, 32, dtype=torch.int64, device="cuda")
    attention = mock.Mock(side_effect=ops.causal_attention)
    with (torch.set_grad_enabled(gradients), device.autocast(),
          mock.patch.object(ops, "causal_attention", attention)):
        hidden = model.hidden(ids).flatten(0, 1)
        loss = (ops.tied_cross_entropy if gradients else ops.score)(
            hidden, model.wte.weight, ids.flatten())
        if gradients:  # of a trained head, too
            head = nn.Parameter(torch.empty_like(model.wte.weight, dtype=torch.float32))
            assert ops.tied_cross_entropy(hidden, head, ids.flatten()).requires_grad
    types["attention"] = {"in": str(attention.call_args.args[0].dtype)}
    types["loss"] = {"out": str((loss if gradients else loss[0]).dtype)}
    return types


if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False  # else autocast is off
    torch.cuda.is_bf16_supported = lambda: True
    with FakeTensorMode():
        print(json.dumps({
            f"{precision} {'trained' if gradients else 'scored'}": step(precision, gradients)
            for precision in PRECISIONS for gradients in (True, False)}))
