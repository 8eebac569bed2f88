"""AdamW without the import of PyTorch's compiler, and the scaler of the loss in fp16."""

from inspect import unwrap

import torch
from torch import nn

from common.device import Device
from lora import loraplus_groups, trained_parameters
from training.options import Settings


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101), for a training
    loop that does not compile the optimizer.

    PyTorch wraps the five methods below to hide them from torch.compile. The first call of a
    wrapper imports torch._dynamo and sympy, which takes longer than the import of torch. So this
    class unwraps the methods. If a method has no wrapper, `unwrap` returns the method unchanged.
    """

    add_param_group = unwrap(torch.optim.AdamW.add_param_group)
    load_state_dict = unwrap(torch.optim.AdamW.load_state_dict)
    state_dict = unwrap(torch.optim.AdamW.state_dict)
    zero_grad = unwrap(torch.optim.AdamW.zero_grad)
    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))


def parameter_groups(model: nn.Module, settings: Settings) -> list[dict]:
    """Return parameter groups for AdamW. `lr_scale` multiplies a group's learning rate. All scales
    are 1, except for B under LoRA+.
    """
    ratio = settings.loraplus_lr_ratio
    if ratio is None:
        return [{"params": list(trained_parameters(model).values()), "lr_scale": 1.0}]
    groups = loraplus_groups(model, 1.0, ratio)
    return [{"params": group["params"], "lr_scale": group["lr"]} for group in groups]


def grad_scaler(device: Device) -> torch.amp.GradScaler:
    """Return a scaler of the loss for fp16. In other precisions the scaler does nothing."""
    kind = device.torch_device.type
    scaler = torch.amp.GradScaler(kind, enabled=device.precision == "fp16")
    # The first call of `scale` initialises the scaler. A process without windows would never call
    # `scale` during training, so call it here.
    scaler.scale(torch.zeros((), device=device.torch_device))
    return scaler
