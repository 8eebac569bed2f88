"""Declare each option of `train.py` once: its type, default and help; read the command line."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import (
    BASE,
    DEVICE,
    NONE,
    PRECISION,
    QUANTISE,
    Interval,
    Parser,
    number,
    steps_or_seconds,
)
from common.errors import UserError
from common.files import without_place
from training.recipe import ADAPTERS, BEST, REFERENCE

if TYPE_CHECKING:
    from lora.layer import LoRAConfig

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "data" / "book.txt"
# What differs between the methods. These defaults, and those of epochs, weight decay, warm-up and
# the adapter, are the reference run's (docs/reference-run.md).
DEFAULTS: dict[str, dict[str, Any]] = {
    "lora": {"batch_size": 16, "lr": 3e-4, "out": ROOT / "runs" / "lora"},
    "full": {"batch_size": 64, "lr": 3e-5, "out": ROOT / "runs" / "full"},
}


def option(default: Any = None, type: Any = None, help: str = "", **settings: Any) -> Any:
    """Declare a field that argparse reads as an option; a default of False makes a switch.

    `settings` are argparse's, and `names` (other names), `method` (the only one that has the
    option) and `excludes` (a group of options, of which one can be given).
    """
    if default is False:
        settings["action"] = "store_true"
    else:
        settings["type"] = type
    return field(default=default, metadata={"help": help, **settings})


def blocks(text: str) -> range:
    """Parse one block's number, or a range of blocks, A-B."""
    first, dash, last = text.partition("-")
    low = number(int, 0, 511)(first)
    high = number(int, low, 511)(last) if dash else low
    return range(low, high + 1)


@dataclass(frozen=True)
class Options:
    """Hold what a run was asked for."""

    method: str
    lora: "LoRAConfig | None" = None  # None: full fine-tuning; LORA_OPTIONS declares its options
    base: str = option(**BASE)

    # data
    book: tuple[Path, ...] = option(
        (BOOK,),
        Path,
        "UTF-8 text files, or directories of .txt files (default: data/book.txt)",
        nargs="+",
        metavar="FILE",
        excludes="source",
    )
    data: Path | None = option(
        None,
        Path,
        "conversations in JSON lines, in place of a book; their completions are scored "
        "(data/instructions.py)",
        metavar="FILE",
        excludes="source",
    )
    val_data: Path | None = option(
        None,
        Path,
        "validate on these (default: on the last --val-fraction of --data)",
        metavar="FILE",
    )
    block_size: int = option(128, number(int, 1), "tokens per window")
    stride: int = option(16, number(int, 1), "tokens from one training window's start to the next")
    val_fraction: float = option(
        0.1,
        number(float, 0.001, 0.9),
        "share of the book or data, at its end, that is the validation part",
    )
    label_shift: int = option(
        1, number(int, 1, 2), "1: next token; 2: the reference run's measure", metavar="{1,2}"
    )

    # training
    epochs: int = option(3, number(int, 1), "passes over the training windows")
    max_steps: int | None = option(
        None,
        number(int, 1),
        "end here if the epochs do not end sooner; the schedule ends here too",
    )
    batch_size: int = option(16, number(int, 1), "windows per step")
    grad_accum: int = option(
        1,
        number(int, 1),
        "parts in which a step's batch is computed, to save memory; the result is the same but "
        "for the dropouts' draws",
    )
    lr: float | None = option(  # None: the best recipe's, which depends on the data
        3e-4,
        number(float, 1e-12, 10.0),
        "peak of the learning rate (default: lora, the recipe's; full, 3e-05)",
    )
    weight_decay: float = option(0.01, number(float, 0.0, 10.0), "AdamW's")
    warmup_ratio: float = option(
        0.06,
        number(float, 0.0, 1.0, below=True),
        "share of the steps in which the rate rises to its peak",
    )
    clip: float = option(1.0, number(float, 0.0), "clip gradients to this norm; 0: no clipping")
    base_dropout: float | None = option(
        None,
        number(float, 0.0, 1.0, below=True),
        "all of the base's dropouts (default: its config's)",
    )
    seed: int = option(
        42, number(int, 0, 2**63 - 1), "for the adapter's start, the order of windows and dropout"
    )
    compile: bool = option(False, help="torch.compile the model; not on a CPU, where it is slower")
    no_cuda_graph: bool = option(
        False, help="launch kernels one by one, not a part's forward and backward pass as one graph"
    )
    gradient_checkpointing: bool = option(
        False, help="compute activations twice instead of keeping them: saves memory"
    )
    device: str = option(**DEVICE)
    precision: str = option(**PRECISION)
    allow_tf32: bool = option(False, help="fp32 matmuls in TF32 on CUDA: faster, less exact")

    # the run
    out: Path = option(ROOT / "runs" / "lora", Path, "directory of what the run leaves")
    eval_every: int | None = option(
        None, number(int, 1), "validate every N steps, and not only after each epoch"
    )
    log_every: int = option(10, number(int, 1), "write a line of metrics.jsonl every so many steps")
    checkpoint_every: Interval = option(
        steps_or_seconds("10m"),
        steps_or_seconds,
        "save every N steps, or after a time such as 90s or 10m, besides after an epoch "
        "(default: 10m)",
        metavar="N",
    )
    resume: bool = option(False, help="resume the run in --out", excludes="state")
    overwrite: bool = option(False, help="replace the run in --out", excludes="state")

    # how an adapter is trained
    recipe: str | None = option(
        help="what --target-modules, --lora-alpha and --lr are if they are not given. reference: "
        "c_attn, 16, 3e-4, as in the reference run. best: c_attn c_proj c_fc, 16 whatever the "
        "rank, and 0.035 / (steps * passes^2)^(1/3), from 5e-4 to 8e-3; passes: how often the "
        "run reads a token of its training part, 8 times an epoch where windows of 128 start "
        "every 16 tokens (default: best for --data, reference for a book)",
        choices=tuple(ADAPTERS),
        method="lora",
    )
    loraplus_lr_ratio: float | None = option(
        None,
        number(float, 1.0, 1e4),
        "LoRA+: ratio of B's learning rate to A's",
        method="lora",
    )
    freeze_a: bool = option(False, help="LoRA-FA: train B alone; saves memory", method="lora")
    riemannian: bool = option(
        False,
        help="precondition the gradients of A and B, so that a step depends on B A alone",
        method="lora",
    )
    quantise: str | None = option(
        help="hold the blocks' frozen linear layers in 4 bits (nf4: QLoRA) or 8 (int8) a weight "
        "(default: none; with --init-adapter, as when it was trained)",
        choices=QUANTISE["choices"],
        names=["--quantize"],
        method="lora",
    )
    init_adapter: Path | None = option(
        None,
        Path,
        "start from this adapter; it brings its own rank, alpha, dropout, targets and kind",
        metavar="DIR",
        method="lora",
    )

    @property
    def peak_lr(self) -> float:
        """Return `lr`, which `resolve` has filled in if the recipe chooses it."""
        assert self.lr is not None
        return self.lr

    def as_json(self) -> dict[str, Any]:
        """Return all of the method's options with their values, in JSON's types."""
        values = {f.name: getattr(self, f.name) for f in options_of(self.method)}
        if self.lora:
            from lora.variants import config_fields

            values |= config_fields(self.lora)
        return json.loads(json.dumps(values, default=_as_text))


def _as_text(value: object) -> str:
    """Return a path, or an interval, for a file that may be published."""
    return without_place(value) if isinstance(value, Path) else str(value)


# The options of an adapter's hyper-parameters: argparse's settings by field of `LoRAConfig` or of
# a variant's config. The recipe has the defaults.
LORA_OPTIONS: dict[str, dict[str, Any]] = {
    "r": {"type": number(int, 1), "help": "rank", "names": ["--rank"]},
    "lora_alpha": {"type": number(int, 1, 1e6), "help": "the update is scaled by alpha / r"},
    "lora_dropout": {
        "type": number(float, 0.0, 1.0, below=True),
        "help": "dropout of A's input",
    },
    "target_modules": {
        "nargs": "+",
        "metavar": "NAME",
        "help": "linear layers to adapt, slices of c_attn such as c_attn.q, or all-linear "
        "(default: the recipe's)",
    },
    "use_rslora": {
        "action": "store_true",
        "help": "scale by alpha / sqrt(r) in place of alpha / r",
    },
    "layers_to_transform": {
        "type": blocks,
        "nargs": "+",
        "metavar": "A-B",
        "names": ["--layers"],
        "help": "adapt only these blocks, such as 6-11, or 0 2 4",
    },
    "use_dora": {
        "action": "store_true",
        "help": "DoRA: train each weight's magnitude apart from its direction",
    },
    "init_lora_weights": {
        "choices": ("pissa", "lora_ga"),
        "help": "start from the largest singular vectors of W (PiSSA), or of its gradient over the "
        "first 8 batches (LoRA-GA; default: LoRA's own start)",
    },
}


def options_of(method: str) -> list[Field]:
    """Return the fields of `Options` that are options of the method."""
    declared = [f for f in fields(Options) if f.metadata]
    return [f for f in declared if f.metadata.get("method", method) == method]


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def make_parser(description: str | None) -> Parser:
    """Return the parser of `train.py`'s command line; it sets only what is typed."""
    parser = Parser(prog="train.py", description=description)
    methods = parser.add_subparsers(dest="method", required=True)
    for method, defaults in DEFAULTS.items():
        command = methods.add_parser(method)
        groups: dict[str, Any] = {
            "source": command.add_mutually_exclusive_group(),
            "state": command.add_mutually_exclusive_group(),
        }
        for f in options_of(method):
            place = groups.get(f.metadata.get("excludes", ""), command)
            _add(place, f.name, f.metadata, defaults.get(f.name, f.default))
        if method == "lora":
            for name, settings in LORA_OPTIONS.items():
                _add(command, name, settings, ADAPTERS[REFERENCE].get(name))
    return parser


def _add(place: Any, name: str, settings: Mapping[str, Any], default: object) -> None:
    """Add an option to a parser or a group of it; its help ends with its default."""
    ours = ("names", "method", "excludes", "default")
    known = {key: value for key, value in settings.items() if key not in ours}
    has_value = default is not None and not isinstance(default, bool)
    if has_value and "default: " not in known["help"]:
        known["help"] += f" (default: {default})"
    names = [flag(name), *settings.get("names", ())]
    place.add_argument(*names, dest=name, default=argparse.SUPPRESS, **known)


def parse_command_line(
    description: str | None, argv: Sequence[str] | None = None
) -> dict[str, Any]:
    """Return what is typed, by the options' names, without importing torch.

    Raises UserError for options that are wrong or clash.
    """
    typed = vars(make_parser(description).parse_args(argv))
    _refuse_clashes(typed)
    return typed


def parse_options(description: str | None, argv: Sequence[str] | None = None) -> Options:
    """Read `train.py`'s command line. Raises UserError for options that are wrong or clash."""
    typed = parse_command_line(description, argv)
    for name, value in typed.items():
        if isinstance(value, list):
            typed[name] = tuple(value)
    if "data" in typed:
        typed["book"] = ()

    method = typed["method"]
    defaults = DEFAULTS[method]
    if method == "full":
        return Options(**defaults | typed)

    typed.setdefault("recipe", BEST if "data" in typed else REFERENCE)
    if typed["recipe"] == BEST:
        defaults = defaults | {"lr": None}
    lora_fields = {name: typed.pop(name) for name in LORA_OPTIONS if name in typed}
    lora = _lora_config(ADAPTERS[typed["recipe"]] | lora_fields)
    return Options(lora=lora, **defaults | typed)


def _lora_config(typed: dict[str, Any]) -> "LoRAConfig":
    """Return the config that these options ask for."""
    from lora.targets import target_modules  # they import torch
    from lora.variants import make_config

    if "target_modules" in typed:
        typed["target_modules"] = target_modules(typed["target_modules"])
    if "layers_to_transform" in typed:
        numbers = set().union(*typed["layers_to_transform"])
        typed["layers_to_transform"] = tuple(sorted(numbers))
    try:
        return make_config(**typed)
    except ValueError as error:
        raise UserError(f"--use-dora, --init-lora-weights: {error}") from error


def _refuse_clashes(typed: Mapping[str, Any]) -> None:
    """Raise UserError for options that cannot be given together."""
    if "val_data" in typed and ("data" not in typed or "val_fraction" in typed):
        raise UserError("--val-data: needs --data, and no --val-fraction")
    if "data" in typed and ("stride" in typed or "label_shift" in typed):
        raise UserError("--stride and --label-shift are for books: an example is one row")

    if typed.get("quantise", NONE) != NONE and "init_lora_weights" in typed:
        raise UserError("--quantise cannot be combined with --init-lora-weights, as in PEFT")
    needs_a = {"loraplus_lr_ratio", "riemannian", "init_adapter", "init_lora_weights"}
    if "freeze_a" in typed and not needs_a.isdisjoint(typed):
        raise UserError(
            "--freeze-a cannot be combined with --loraplus-lr-ratio, --riemannian, "
            "--init-adapter or --init-lora-weights"
        )
    if "init_adapter" in typed and not LORA_OPTIONS.keys().isdisjoint(typed):
        raise UserError(
            "--init-adapter brings its own rank, alpha, dropout, targets and kind of LoRA; "
            "leave those options out"
        )
