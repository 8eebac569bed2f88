"""Build the model and load the data that a run's options name."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from adapters.quantisation import choose_quantisation
from common.device import Device
from common.errors import UserError
from common.files import file_sha256
from data.instructions import Instructions, read_examples
from data.tokenizer import Tokenizer
from data.tokenizer_files import load_tokenizer
from data.tokens import load_books
from data.windows import Windows, check_block_size, split
from lora.files import load_adapter
from lora.inject import inject
from lora.peft_config import load_adapter_config
from lora.quantised import LAYERS
from lora.variants import make_layer
from lora.variants.fa import freeze_a
from lora.variants.lora_ga import LoRAGAConfig
from model.gpt2 import GPT2
from storage.hf_compat import portable_name
from storage.weights import find_weights, load_config, load_gpt2, weights_path
from training.options import Options
from training.recipe import BEST, best_rate


@dataclass(frozen=True)
class Data:
    """What a run trains on, what it validates on, and the tokenizer of both."""

    training: Windows | Instructions
    validation: Windows | Instructions
    tokenizer: Tokenizer


def resolve(asked: Options, base: str, device: Device, data: Data) -> Options:
    """Return the options with the base, the precision, an initial adapter's config and
    quantisation, and the recipe's rate filled in. Raises UserError for LoRA-GA in fp16.
    """
    lora = asked.lora
    adapters = []
    if asked.init_adapter:
        lora = load_adapter_config(asked.init_adapter)
        adapters.append(asked.init_adapter)
    if isinstance(lora, LoRAGAConfig) and device.precision == "fp16":
        raise UserError(
            "--init-lora-weights lora_ga: in fp16, small gradients vanish and large ones overflow; "
            "use --precision bf16 or fp32"
        )
    quantise = choose_quantisation(asked.quantise, adapters)
    options = replace(
        asked,
        base=portable_name(base),
        precision=device.precision,
        lora=lora,
        quantise=quantise,
        lr=choose_rate(asked, data),
    )
    if options.recipe == BEST:
        print(describe_recipe(options))
    return options


def choose_rate(asked: Options, data: Data) -> float:
    """Return the peak rate that was asked for, or else the best recipe's."""
    if asked.lr is not None:
        return asked.lr
    training = data.training
    _, steps = count_steps(asked, len(training))
    windows = min(asked.epochs * len(training), steps * asked.batch_size)
    passes = training.passes_per_epoch * windows / len(training)
    return best_rate(steps, passes)


def count_steps(options: Options, windows: int) -> tuple[int, int]:
    """Return the steps of an epoch of so many windows, and those of the run."""
    per_epoch = math.ceil(windows / options.batch_size)
    total = options.epochs * per_epoch
    if options.max_steps:
        total = min(total, options.max_steps)
    return per_epoch, total


def describe_recipe(options: Options) -> str:
    assert options.lora
    layers = options.lora.target_modules
    names = layers if isinstance(layers, str) else " ".join(layers)
    return f"recipe best: lr {options.lr:g}, layers {names}, alpha {options.lora.lora_alpha:g}"


def prepare_device(options: Options, device: Device) -> None:
    """Set the device up for a run. Raises UserError for what it cannot do."""
    device.set_tf32(options.allow_tf32)
    if options.compile:
        if device.torch_device.type == "cpu":
            raise UserError("--compile: on a CPU it makes steps slower (docs/speed.md); omit it")
        device.check_compiler()
    if options.gradient_checkpointing and device.torch_device.type == "mps":  # pytorch#127676
        raise UserError(
            "--gradient-checkpointing: on MPS, dropouts would draw other masks the "
            "second time; use --grad-accum to save memory"
        )


def build_model(
    options: Options,
    directory: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> GPT2:
    """Build the model from the base in `directory`: for LoRA, adapted and with matrices in `dtype`.

    The base is on `device` when it is adapted: PiSSA decomposes each layer's W, which takes minutes
    on a CPU if the base is large. Seeds torch with `options.seed`, which decides how A starts.
    """
    torch.manual_seed(options.seed)
    model = load_base(options, directory, dtype).to(device)
    if options.base_dropout is not None:
        model.set_dropout(options.base_dropout)
    model.gradient_checkpointing = options.gradient_checkpointing
    if options.lora is None:
        return model

    if options.init_adapter:
        load_adapter(model, options.init_adapter, file_sha256(weights_path(directory)))
    else:
        try:
            inject(model, options.lora, make_layer)
        except ValueError as error:
            raise UserError(f"--r, --layers, --target-modules: {error}") from error
    if options.freeze_a:
        freeze_a(model)
    return model


def load_base(options: Options, directory: Path, dtype: torch.dtype) -> GPT2:
    """Load the base: for LoRA in `dtype`; for full fine-tuning in fp32, or, if it holds no weights,
    with random ones.
    """
    if options.method == "lora":
        kind = options.quantise
        return load_gpt2(directory, dtype, LAYERS[kind] if kind else None)
    if find_weights(directory):
        return load_gpt2(directory)
    print(f"{directory} holds no weights: starting from random initialisation")
    return GPT2(load_config(directory))


def load_data(options: Options, directory: Path) -> Data:
    """Load the two parts of the book or, with --data, of the examples.

    Raises UserError as `load_books` and `read_examples` do, and for a part that is too short.
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
                f"{', '.join(map(str, options.book))}: its {name} part is {len(part):,} tokens, "
                f"and a window needs {block + shift}; use a longer book or a smaller block"
            )
    return Data(
        Windows(training, block, options.stride, shift),
        # Validation scores each token once, whatever the training windows' stride.
        Windows(validation, block, block, shift),
        tokenizer,
    )


def split_examples(options: Options, path: Path, tokenizer: Tokenizer) -> tuple[list, list]:
    """Return the examples of `path` to train on, and those to validate on."""
    training = read_examples(path, tokenizer, options.block_size)
    if options.val_data:
        validation = read_examples(options.val_data, tokenizer, options.block_size)
    else:
        training, validation = split(training, options.val_fraction)
    if not training or not validation:
        raise UserError(
            f"{path}: {len(training)} examples to train on and {len(validation)} to "
            "validate on; both need one"
        )
    return training, validation
