"""Load the training text and the validation text of a run."""

from pathlib import Path
from typing import NamedTuple

from common.errors import UserError
from data.instructions import Instructions, read_examples
from data.tokenizer import Tokenizer, load_tokenizer
from data.tokens import load_books
from data.windows import Dataset, Windows, check_block_size, split
from storage.weights import load_config
from training.options import Options


class Data(NamedTuple):
    """The training data and the validation data of a run, and the tokenizer."""

    training: Dataset
    validation: Dataset
    tokenizer: Tokenizer


def load_data(options: Options, directory: Path) -> Data:
    """Load the book or the examples of --data, and split them into training and validation data.
    `directory` contains the base.
    """
    config = load_config(directory)
    check_block_size(options.block_size, config)
    tokenizer = load_tokenizer(directory, config.vocab_size)
    if options.data:
        training, validation = split_examples(options, options.data, tokenizer)
        return Data(Instructions(training), Instructions(validation), tokenizer)

    block = options.block_size
    shift = options.label_shift
    training, validation = split(load_books(options.book, tokenizer), options.val_fraction)
    for name, part in (("training", training), ("validation", validation)):
        if len(part) < block + shift:
            raise UserError(
                f"{', '.join(map(str, options.book))}: the {name} part has {len(part):,} tokens, "
                f"but a window needs {block + shift}; use a longer book or a smaller block"
            )
    return Data(
        Windows(training.ids, block, options.stride, shift, training.byte_counts),
        # Here the stride is the block size, so that validation scores each token once.
        Windows(validation.ids, block, block, shift, validation.byte_counts),
        tokenizer,
    )


def split_examples(options: Options, path: Path, tokenizer: Tokenizer) -> tuple[list, list]:
    """Return the training examples and the validation examples."""
    training = read_examples(path, tokenizer, options.block_size)
    if options.val_data:
        validation = read_examples(options.val_data, tokenizer, options.block_size)
    else:
        training, validation = split(training, options.val_fraction)
    if not training or not validation:
        raise UserError(
            f"{path}: {len(training)} examples to train on and {len(validation)} to "
            "validate on; at least one of each is needed"
        )
    return training, validation
