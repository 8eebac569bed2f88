"""Build the model and load the data that a run's options name."""

from pathlib import Path

import torch

from adapters.files import load_adapter
from common.errors import UserError
from common.files import file_sha256
from data.instructions import Instructions, read_examples
from data.tokens import load_books
from data.windows import Windows, check_block_size, split
from lora.fa import freeze_a
from lora.inject import inject
from lora.layer import LoRAConfig
from model.gpt2 import GPT2, GPT2Config
from model.tokenizer import Tokenizer
from model.weights import find_weights, load_config, load_gpt2, weights_path
from training.options import Options

Data = Windows | Instructions


def build_model(
    options: Options, directory: Path, dtype: torch.dtype = torch.float32
) -> tuple[GPT2, LoRAConfig | None]:
    """Return the base and None or, for LoRA, the adapted base in `dtype` and the config."""
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
    if options.init_adapter:
        config = load_adapter(model, options.init_adapter, file_sha256(weights_path(directory)))
    else:
        config = options.lora_config
        try:
            inject(model, config)
        except ValueError as error:
            raise UserError(f"--r, --layers, --target-modules: {error}") from error
    if options.freeze_a:
        freeze_a(model)
    return model, config


def load_data(options: Options, config: GPT2Config, tokenizer: Tokenizer) -> tuple[Data, Data]:
    """Load the training and the validation part of the book or, with --data, of the examples.

    Raises UserError as `load_books` and `read_examples` do, and for a part that is too short.
    """
    block, shift = options.block_size, options.label_shift
    check_block_size(block, config)
    if options.data:
        examples = read_examples(options.data, tokenizer, block)
        train, val = split(examples, options.val_fraction)
        if options.val_data:
            train, val = examples, read_examples(options.val_data, tokenizer, block)
        if not (train and val):
            raise UserError(
                f"{options.data}: {len(train)} examples to train on and {len(val)} to "
                "validate on; both need one"
            )
        return Instructions(train), Instructions(val)
    train, val = split(load_books(options.book, tokenizer), options.val_fraction)
    for name, part in (("training", train), ("validation", val)):
        if len(part) < block + shift:
            raise UserError(
                f"{', '.join(map(str, options.book))}: its {name} part is "
                f"{len(part):,} tokens, and a window needs {block + shift}; use a "
                "longer book or a smaller block"
            )
    # Validation scores each token once, whatever the training windows' stride.
    return Windows(train, block, options.stride, shift), Windows(val, block, block, shift)
