"""Build the model and load the data that a run's options name."""

from pathlib import Path

import torch

from data.instructions import Instructions, load_instructions
from data.windows import Windows, check_block_size, load_windows
from lora.fa import freeze_a
from lora.layer import LoRAConfig
from lora.load import add_adapter
from model.gpt2 import GPT2, GPT2Config
from model.tokenizer import Tokenizer
from model.weights import find_weights, load_config, load_gpt2
from training.options import Options

Data = Windows | Instructions


def build_model(options: Options, directory: Path,
                dtype: torch.dtype = torch.float32) -> tuple[GPT2, LoRAConfig | None]:
    """Return the base (for LoRA in `dtype`, frozen and adapted) and the adapter's config."""
    if options.method == "full" and not find_weights(directory):
        print(f"{directory} holds no weights: starting from random initialisation")
        model = GPT2(load_config(directory))
    else:
        model = load_gpt2(directory, dtype if options.method == "lora" else torch.float32)
    if options.base_dropout is not None:
        model.set_dropout(options.base_dropout)
    model.gradient_checkpointing = options.gradient_checkpointing
    if options.method == "full":
        return model, None
    config = add_adapter(model, directory, options.lora_config, options.init_adapter)
    if options.freeze_a:
        freeze_a(model)
    return model, config


def load_data(options: Options, config: GPT2Config,
              tokenizer: Tokenizer) -> tuple[Data, Data]:
    """Load the training and the validation part of the book or, with --data, of the examples."""
    check_block_size(options.block_size, config)
    if options.data:
        return load_instructions(options.data, options.val_data, tokenizer, options.block_size,
                                 options.val_fraction)
    return load_windows(options.book, tokenizer, block_size=options.block_size,
                        stride=options.stride, label_shift=options.label_shift,
                        val_fraction=options.val_fraction)
