"""What a run trains: the model with its adapter, and the windows of the book."""

import argparse
from dataclasses import asdict
from pathlib import Path

import numpy as np

from data.tokens import load_tokens
from data.windows import Windows, split
from errors import UserError
from evaluate import check_block_size
from lora.adapter import load_adapter
from lora.config import LoRAConfig
from lora.inject import inject
from model.checkpoint import has_weights, load_config, load_gpt2
from model.gpt2 import GPT2


def build_model(args: argparse.Namespace, directory: Path) -> tuple[GPT2, LoRAConfig | None]:
    """The base with its dropouts set and, for LoRA, the adapter in place and all else frozen."""
    if args.method == "full" and not has_weights(directory):
        print(f"{directory} holds no weights: starting from random initialisation")
        model = GPT2(load_config(directory))
        model.init_weights()
    else:
        model = load_gpt2(directory)
    if args.base_dropout is not None:
        model.set_dropout(args.base_dropout)
    model.gradient_checkpointing = args.gradient_checkpointing
    if args.method == "full":
        return model, None
    if args.init_adapter:
        config = load_adapter(model, args.init_adapter)
        vars(args).update(asdict(config))  # run.json tells what was trained
        return model, config
    config = LoRAConfig(args.r, args.lora_alpha, args.lora_dropout, tuple(args.target_modules))
    try:
        inject(model, config)
    except ValueError as error:
        raise UserError(f"--r, --target-modules: {error}") from error
    return model, config


def load_data(args: argparse.Namespace, model: GPT2) -> tuple[Windows, np.ndarray]:
    """The training windows and the validation part. Raises UserError when either is too short."""
    check_block_size(args.block_size, model.config)
    train_part, val_part = split(load_tokens(args.book, model.config.vocab_size), args.val_fraction)
    for name, part in (("training", train_part), ("validation", val_part)):
        if len(part) < args.block_size + args.label_shift:
            raise UserError(f"{args.book}: its {name} part is {len(part):,} tokens, less than one "
                            f"window of {args.block_size}; use a longer book or a smaller block")
    return Windows(train_part, args.block_size, args.stride, args.label_shift), val_part
