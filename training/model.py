"""Load the model of a run, ready to train."""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.device import Device
from common.errors import UserError, as_failure
from lora import inject, load_adapter
from lora.quantised import LAYERS
from model.gpt2 import GPT2, KVCache
from model.kernels.fast import set_kernels
from storage.weights import find_weights, load_config, load_gpt2
from training.options import Options, adapter_config
from training.plan import Plan


def load_model(plan: Plan) -> GPT2:
    """Load the base, for LoRA add the adapter, and make the model ready to train: choose the
    kernels, and apply --compile.
    """
    options = plan.options
    model = load_base(options, plan.base_directory, plan.device)
    if options.method == "lora":
        add_adapter(model, options, plan.identity.base_sha256)  # freezes the base
    model.train()
    set_kernels(model, options.kernels)
    plan.processes.broadcast(*(p for p in model.parameters() if p.requires_grad))
    if options.compile:
        compile_hidden(model, 0 if options.data else plan.micro_batch_size)
    if not plan.processes.is_main:
        torch.manual_seed(options.seed + plan.processes.number)  # for different dropout masks
    return model


def load_base(options: Options, directory: Path, device: Device) -> GPT2:
    """Load the base on the device. For LoRA, linear layers and embeddings are in the run's
    precision. For full fine-tuning, all weights are in fp32. Full fine-tuning of a base without a
    weights file starts from random weights.

    Seed torch with `options.seed`, which determines the initial A and the dropout masks.
    """
    torch.manual_seed(options.seed)
    if options.method == "lora":
        quantised = LAYERS[options.quantise] if options.quantise else None
        model = load_gpt2(directory, device.dtype, quantised)
    elif find_weights(directory):
        model = load_gpt2(directory)
    else:
        print(f"{directory} has no weights: starting from random initialisation")
        model = GPT2(load_config(directory))
    if options.base_dropout is not None:
        model.set_dropout(options.base_dropout)
    model.gradient_checkpointing = options.gradient_checkpointing
    return model.to(device.torch_device)


def add_adapter(model: GPT2, options: Options, base_sha256: Mapping[str, str]) -> None:
    """Freeze the base, and add a new adapter or the adapter given with `--init-adapter`.

    Raises UserError if the adapter given with `--init-adapter` records the hash of another base.
    `base_sha256` contains the hash of this base.
    """
    if options.init_adapter:
        with as_failure():
            load_adapter(model, options.init_adapter, base_sha256["weights"])
    else:
        try:
            inject(model, adapter_config(options))
        except ValueError as error:
            raise UserError(f"--r, --layers, --target-modules: {error}") from error


def compile_hidden(model: GPT2, rows: int) -> None:
    """Compile `model.hidden`, which takes most of the time of a step.

    The loss is not compiled, because the compiler would unroll the loop over chunks. In training, a
    batch of fewer rows is padded to `rows`, to avoid recompilation.
    """
    plain = model.hidden
    compiled = torch.compile(plain)

    def hidden(idx: Tensor, cache: KVCache | None = None) -> Tensor:
        if not model.training:
            return plain(idx, cache)
        padded = F.pad(idx, (0, 0, 0, max(0, rows - len(idx))))
        return compiled(padded)[: len(idx)]

    model.hidden = hidden  # type: ignore[method-assign]
