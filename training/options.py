"""Declare every option of `train.py` once, with type, default and help."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from common.cli import (
    BASE_OPTION,
    DEVICE_OPTION,
    KERNELS_OPTION,
    NONE,
    PRECISION_OPTION,
    QUANTISE_OPTION,
    Interval,
    Parser,
    number,
    steps_or_seconds,
)
from common.errors import UserError, as_failure
from common.files import display_path
from lora.config import LoRAConfig
from lora.targets import target_modules

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "data" / "book.txt"
# The fields of `Options` declare the defaults of LoRA in the reference run (docs/reference-run.md).
# These defaults of full fine-tuning differ.
DEFAULTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"batch_size": 64, "lr": 3e-5, "out": ROOT / "runs" / "full"},
}

REFERENCE = "reference"
BEST = "best"
SEARCHED = "found by a short search"


def recipe(name: str, block_size: int) -> dict[str, Any]:
    """Return the defaults that a recipe changes. An explicit option wins."""
    if name == REFERENCE:
        return {}
    return {
        "target_modules": ("c_attn", "c_proj", "c_fc"),
        "lr": None,
        "batch_size": 2,
        "stride": block_size,  # windows do not overlap
    }


def option(default: Any = None, type: Any = None, help: str = "", **settings: Any) -> Any:
    """Declare a field that argparse reads as an option. A default of False makes a switch.

    `settings` are passed to argparse, except these five keys:

    - `names` lists other names of the option.
    - `method` names the only method that has the option.
    - `excludes` names a group of options that exclude each other.
    - `lora` marks a field of `LoRAConfig`.
    - `may_change` allows a resumed run to change the value. If the value is a path, the content
      must be the same.
    """
    if default is False:
        settings["action"] = "store_true"
    else:
        settings["type"] = type
    return field(default=default, metadata={"help": help, **settings})


def lora_option(default: Any = None, type: Any = None, help: str = "", **settings: Any) -> Any:
    """Declare an option that is a field of `LoRAConfig`."""
    return option(default, type, help, method="lora", lora=True, **settings)


def blocks(text: str) -> range:
    """Parse the number of a block, such as 6, or a range of blocks, such as 6-11."""
    first, dash, last = text.partition("-")
    low = number(int, 0, 511)(first)
    high = number(int, low, 511)(last) if dash else low
    return range(low, high + 1)


@dataclass(frozen=True)
class Options:
    """The options of a run: typed by the user, set by a recipe, or the defaults below."""

    method: str
    base: str = option(**BASE_OPTION, may_change=True)

    # data
    book: tuple[Path, ...] = option(
        (BOOK,),
        Path,
        "UTF-8 text files, or directories of .txt files (default: data/book.txt)",
        nargs="+",
        metavar="FILE",
        excludes="source",
        may_change=True,
    )
    data: Path | None = option(
        None,
        Path,
        "conversations in JSON lines instead of a book. Only the completions are scored "
        "(data/instructions.py)",
        metavar="FILE",
        excludes="source",
        may_change=True,
    )
    val_data: Path | None = option(
        None,
        Path,
        "conversations to validate on (default: the last --val-fraction of --data)",
        metavar="FILE",
        may_change=True,
    )
    block_size: int = option(128, number(int, 1), "tokens per window")
    stride: int = option(
        16,
        number(int, 1),
        "tokens from the start of a training window to the start of the next",
    )
    val_fraction: float = option(
        0.1,
        number(float, 0.001, 0.9),
        "validate on this share of the book or data, taken from the end",
    )
    label_shift: int = option(
        1, number(int, 1, 2), "1: predict the next token. 2: the token after that", metavar="{1,2}"
    )

    # training
    epochs: int = option(3, number(int, 1), "passes over the training windows")
    max_steps: int | None = option(
        None,
        number(int, 1),
        "stop after this many steps. The learning rate schedule also ends there",
    )
    batch_size: int = option(16, number(int, 1), "windows per step")
    grad_accum: int = option(
        1,
        number(int, 1),
        "split a batch into at most this many micro-batches, to save memory. Only rounding and "
        "dropout masks change",
    )
    lr: float | None = option(  # None: `find_rate` in lora/rate.py finds it
        3e-4, number(float, 1e-12, 10.0), "peak learning rate"
    )
    weight_decay: float = option(0.01, number(float, 0.0, 10.0), "weight decay of AdamW")
    warmup_ratio: float = option(
        0.06,
        number(float, 0.0, 1.0, below=True),
        "share of the steps in which the learning rate rises to its peak",
    )
    clip: float = option(1.0, number(float, 0.0), "clip gradients to this norm. 0: no clipping")
    base_dropout: float | None = option(
        None,
        number(float, 0.0, 1.0, below=True),
        "probability of every dropout of the base (default: from its config)",
    )
    seed: int = option(
        42, number(int, 0, 2**63 - 1), "seed of initial weights, the order of windows, and dropout"
    )
    device: str = option(**DEVICE_OPTION, may_change=True)
    precision: str = option(**PRECISION_OPTION)  # `Device.pick` resolves auto
    kernels: str = option(**KERNELS_OPTION)
    compile: bool = option(False, help="compile the model with torch.compile. Refused on a CPU")
    gradient_checkpointing: bool = option(
        False,
        help="recompute activations in the backward pass instead of keeping them, to save memory",
        may_change=True,
    )
    allow_tf32: bool = option(
        False, help="compute fp32 matmuls in TF32 on CUDA, which is less exact"
    )

    # the run
    out: Path = option(
        ROOT / "runs" / "lora", Path, "directory that the run writes to", may_change=True
    )
    eval_every: int | None = option(
        None, number(int, 1), "validate every N steps as well as after each epoch"
    )
    log_every: int = option(
        10, number(int, 1), "write a line of metrics.jsonl every N steps", may_change=True
    )
    checkpoint_every: Interval = option(
        steps_or_seconds("10m"),
        steps_or_seconds,
        "save a checkpoint every N steps, or at intervals such as 90s or 10m. Also save after an "
        "epoch if the last checkpoint is at least 10 s old (default: 10m)",
        metavar="N",
        may_change=True,
    )
    resume: bool = option(False, help="resume the run in --out", excludes="state", may_change=True)
    overwrite: bool = option(
        False, help="replace the run in --out", excludes="state", may_change=True
    )

    # the adapter
    recipe: str | None = option(
        help="a set of defaults (docs/howto.md). reference: as in the reference run. best: small "
        "batches, all layers of a block, and a learning rate that fits the text (default: best for "
        "a new adapter on --data, otherwise reference)",
        choices=(REFERENCE, BEST),
        method="lora",
    )
    r: int = lora_option(8, number(int, 1), "rank", names=["--rank"])
    lora_alpha: float = lora_option(16, number(int, 1, 10**6), "the update is scaled by alpha / r")
    lora_dropout: float = lora_option(
        0.05, number(float, 0.0, 1.0, below=True), "dropout on the input of A"
    )
    target_modules: tuple[str, ...] | str = lora_option(
        ("c_attn",),
        None,
        "linear layers to adapt, slices of c_attn such as c_attn.q, or all-linear",
        nargs="+",
        metavar="NAME",
    )
    use_rslora: bool = lora_option(False, help="scale by alpha / sqrt(r) instead of alpha / r")
    layers_to_transform: tuple[int, ...] | None = lora_option(
        None,
        blocks,
        "adapt only these blocks, such as 6-11, or 0 2 4",
        nargs="+",
        metavar="A-B",
        names=["--layers"],
    )
    use_dora: bool = lora_option(
        False, help="DoRA: train each weight's magnitude separately from its direction"
    )
    init_lora_weights: bool | str = lora_option(
        True,
        help="pissa: start from singular vectors of W (default: random A, zero B)",
        choices=("pissa",),
    )
    quantise: str | None = option(
        help="store the blocks' frozen linear layers in 4 bits (nf4: QLoRA) or 8 bits (int8) per "
        "weight (default: none, or as in the training of --init-adapter)",
        choices=QUANTISE_OPTION["choices"],
        names=["--quantize"],
        method="lora",
    )
    init_adapter: Path | None = option(
        None,
        Path,
        "start from this adapter, with its rank, alpha, dropout, targets and variant",
        metavar="DIR",
        method="lora",
        may_change=True,
    )

    def as_json(self) -> dict[str, Any]:
        """Return the values of all options of the method, as JSON types."""
        values = {f.name: getattr(self, f.name) for f in options_of(self.method)}
        return json.loads(json.dumps(values, default=_as_text))


def _as_text(value: object) -> str:
    """Return a path or an `Interval` as text. The text may be published, so a path must not be
    absolute."""
    return display_path(value) if isinstance(value, Path) else str(value)


def options_of(method: str) -> list[Field]:
    """Return the fields of `Options` that are options of the method."""
    declared = [f for f in fields(Options) if f.metadata]
    return [f for f in declared if f.metadata.get("method", method) == method]


LORA_FIELDS = tuple(f.name for f in options_of("lora") if f.metadata.get("lora"))
MAY_CHANGE = {f.name for f in options_of("lora") if f.metadata.get("may_change")}


def adapter_config(options: Options) -> LoRAConfig:
    """Return the adapter's hyper-parameters. Raises UserError for options that exclude each
    other.
    """
    with as_failure():
        return LoRAConfig(**{name: getattr(options, name) for name in LORA_FIELDS})


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def make_parser(description: str | None) -> Parser:
    """Return the parser for `train.py`. The parser sets only the options that the user typed."""
    parser = Parser(prog="train.py", description=description)
    methods = parser.add_subparsers(dest="method", required=True)
    for method in DEFAULTS:
        command = methods.add_parser(method)
        groups: dict[str, Any] = {
            "source": command.add_mutually_exclusive_group(),
            "state": command.add_mutually_exclusive_group(),
        }
        for f in options_of(method):
            group = groups.get(f.metadata.get("excludes", ""), command)
            _add(group, f.name, f.metadata, describe_default(method, f))
    return parser


def describe_default(method: str, option: Field) -> str:
    """Return the default for the help text: one value, or the value of each recipe. An empty text
    means that the option is off."""
    default = DEFAULTS[method].get(option.name, option.default)
    if method == "lora":
        best = recipe(BEST, Options.block_size)
        if option.name in best:
            return f"{_shown(default)}; with --recipe best: {_shown(best[option.name])}"
    return "" if default is None or isinstance(default, bool) else _shown(default)


def _shown(value: Any) -> str:
    if value is None:
        return SEARCHED
    return " ".join(map(_as_text, value)) if isinstance(value, tuple) else _as_text(value)


def _add(group: Any, name: str, settings: Mapping[str, Any], default: str) -> None:
    """Add an option to a parser or a group of options. The help ends with the default."""
    ours = ("names", "method", "excludes", "lora", "may_change")
    known = {key: value for key, value in settings.items() if key not in ours}
    if default and "default: " not in known["help"]:
        known["help"] += f" (default: {default})"
    names = [flag(name), *settings.get("names", ())]
    group.add_argument(*names, dest=name, default=argparse.SUPPRESS, **known)


def parse_options(description: str | None, argv: Sequence[str] | None = None) -> Options:
    """Read the command line of `train.py`. Raises UserError for options that are wrong or clash."""
    typed = vars(make_parser(description).parse_args(argv))
    _refuse_clashes(typed)
    for name, value in typed.items():
        if isinstance(value, list):
            typed[name] = tuple(value)
    if "data" in typed:
        typed["book"] = ()

    defaults = DEFAULTS[typed["method"]]
    if typed["method"] == "lora":
        on_data = "data" in typed and "init_adapter" not in typed
        typed.setdefault("recipe", BEST if on_data else REFERENCE)
        block_size = typed.get("block_size", Options.block_size)
        defaults = defaults | recipe(typed["recipe"], block_size)
        if "target_modules" in typed:
            typed["target_modules"] = target_modules(typed["target_modules"])
        if "layers_to_transform" in typed:
            numbers = set().union(*typed["layers_to_transform"])
            typed["layers_to_transform"] = tuple(sorted(numbers))
    options = Options(**defaults | typed)
    if options.method == "lora":
        adapter_config(options)  # refuses options that exclude each other
    return options


def _refuse_clashes(typed: Mapping[str, Any]) -> None:
    """Raise UserError for options that cannot be given together."""
    if "val_data" in typed and ("data" not in typed or "val_fraction" in typed):
        raise UserError("--val-data: needs --data, and excludes --val-fraction")
    if "data" in typed and ("stride" in typed or "label_shift" in typed):
        raise UserError("--stride and --label-shift are for books: an example is one row")

    if typed.get("quantise", NONE) != NONE and "init_lora_weights" in typed:
        raise UserError("--quantise cannot be combined with --init-lora-weights, as in PEFT")
    if "init_adapter" in typed and not set(LORA_FIELDS).isdisjoint(typed):
        raise UserError(
            "--init-adapter sets the rank, alpha, dropout, targets and variant; "
            "leave these options out"
        )
