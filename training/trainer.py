"""`Trainer`: the values that a training step needs, for GPT-2 and for any module with a loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.device import Device
from common.processes import ALONE, Processes
from lora import trained_parameters
from model.gpt2 import GPT2
from training.plan import Plan

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Trainer:
    """A model, and the other values that `train_step` in train.py reads or changes.

    A `Trainer` needs no files and no plan, so it also works in a notebook:

        model = inject(load_gpt2("model/mini"), LoRAConfig())
        trainer = make_trainer(model)
        for batch in batches(Windows(tokens, block_size=128, stride=128), size=2):
            train_step(trainer, batch, lr=2e-3)
        save_adapter(model, "runs/mine", "./model/mini")

    `loss(inputs, targets)` returns the loss, summed over the targets, as a scalar with a gradient.
    """

    model: Any  # GPT2, or another nn.Module
    loss: Loss
    optimizer: torch.optim.Optimizer  # `train_step` sets the learning rate
    scaler: torch.amp.GradScaler  # scales the loss in fp16, and does nothing in other precisions
    device: Device
    processes: Processes
    clip: float  # the largest norm of the gradient. 0: no clipping


def make_trainer(
    model: Any,
    loss: Loss | None = None,
    device: Device | None = None,
    processes: Processes = ALONE,
    weight_decay: float = 0.01,
    clip: float = 1.0,
) -> Trainer:
    """Make a trainer for the parameters that require gradients, with the defaults of `train.py`.

    The model must be on the device (default: the CPU, in fp32). The default loss is `model.loss`,
    as in `model/gpt2.py`. Raises ValueError if no parameter requires a gradient.
    """
    device = device or Device.pick("cpu", "fp32")
    trained = list(trained_parameters(model).values())
    return Trainer(
        model,
        loss or model.loss,
        torch.optim.AdamW(trained, weight_decay=weight_decay, fused=True),
        device.grad_scaler(),
        device,
        processes,
        clip,
    )


def trainer_for(plan: Plan, model: GPT2) -> Trainer:
    """Make the trainer of a run, for the model of `load_model`."""
    return make_trainer(
        model,
        device=plan.device,
        processes=plan.processes,
        weight_decay=plan.options.weight_decay,
        clip=plan.options.clip,
    )
