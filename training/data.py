"""Load the training text and the validation text of a run."""

from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError
from data.instructions import Instructions, read_examples
from data.tokenizer import Tokenizer, load_tokenizer
from data.tokens import Tokens, load_books
from data.windows import Dataset, Windows, check_block_size, split
from storage.weights import load_config
from training.options import Options

HELD_OUT = 0.1  # of the training part
MOST_HELD_OUT = 32  # windows or examples, because each short run scores them


class Data(NamedTuple):
    """The data of a run, and the tokenizer.

    A search for the learning rate trains on `short`, the beginning of the training part, and scores
    `held_out`, the end of the training part.
    """

    training: Dataset
    validation: Dataset
    short: Dataset
    held_out: Dataset
    tokenizer: Tokenizer


def load_data(options: Options, directory: Path) -> Data:
    """Load the book or the examples of --data, and split them into training and validation data.
    `directory` contains the base.
    """
    config = load_config(directory)
    check_block_size(options.block_size, config)
    tokenizer = load_tokenizer(directory, config.vocab_size)
    if options.data:
        return load_examples(options, options.data, tokenizer)
    return load_book(options, tokenizer)


def load_book(options: Options, tokenizer: Tokenizer) -> Data:
    block = options.block_size
    shift = options.label_shift
    training, validation = split(load_books(options.book, tokenizer), options.val_fraction)
    for name, part in (("training", training), ("validation", validation)):
        if len(part) < block + shift:
            raise UserError(
                f"{', '.join(map(str, options.book))}: the {name} part has {len(part):,} tokens, "
                f"but a window needs {block + shift}; use a longer book or a smaller block"
            )
    short, held_out = hold_out(training, block + shift, MOST_HELD_OUT * block)

    def windows(text: Tokens, stride: int) -> Windows:
        return Windows(text.ids, block, stride, shift, text.byte_counts)

    return Data(
        windows(training, options.stride),
        # Here the stride is the block size, so that a text is scored once.
        windows(validation, block),
        windows(short, options.stride),
        windows(held_out, block),
        tokenizer,
    )


def load_examples(options: Options, path: Path, tokenizer: Tokenizer) -> Data:
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
    short, held_out = hold_out(training, 1, MOST_HELD_OUT)
    return Data(
        Instructions(training),
        Instructions(validation),
        Instructions(short),
        Instructions(held_out),
        tokenizer,
    )


def hold_out(items: Any, least: int, most: int) -> tuple:
    """Return the items for short runs, and the last tenth of the items, at most `most`. If a part
    would have fewer than `least` items, both parts are all items."""
    short, held_out = split(items, HELD_OUT)
    if min(len(short), len(held_out)) < least:
        return items, items
    return short, held_out[-most:]
