"""Declare each option of `train.py` once: its type, default and help; read the command line."""

import json
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path

from common.cli import BASE, DEVICE, PRECISION, Parser, number, steps_or_seconds, typed_options
from common.errors import UserError
from lora.layer import LoRAConfig
from lora.targets import target_modules

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "data" / "book.txt"
# What differs between the methods. These defaults, and those of epochs, weight decay, warm-up and
# the adapter, are the reference run's (docs/reference-run.md).
DEFAULTS = {
    "lora": {"batch_size": 16, "lr": 3e-4, "out": ROOT / "runs" / "lora"},
    "full": {"batch_size": 64, "lr": 3e-5, "out": ROOT / "runs" / "full"},
}


def option(default: object = None, type: object = None, help: str | None = None, **more: object):
    """Declare a field that argparse reads as an option; a default of False makes a switch."""
    kind = {"action": "store_true"} if default is False else {"type": type}
    return field(default=default, metadata=kind | {"help": help} | more)


def layers(text: str) -> range:
    """Parse one block's number, or a range of blocks, A-B."""
    first, dash, last = text.partition("-")
    low = number(int, 0, 511)(first)
    return range(low, number(int, low, 511)(last if dash else first) + 1)


@dataclass(frozen=True)
class Options:
    """Hold what a run was asked for. Frozen: `dataclasses.replace` makes another."""

    method: str
    base: str = option(**BASE)
    # data
    book: tuple[Path, ...] | None = option(
        (BOOK,),
        Path,
        "UTF-8 text files, or directories of .txt files (default: data/book.txt)",
        nargs="+",
        metavar="FILE",
    )
    data: Path | None = option(
        None,
        Path,
        "conversations in JSON lines, in place of a book; their "
        "completions are scored (data/instructions.py)",
        metavar="FILE",
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
        None, number(int, 1), "end here if the epochs do not end sooner; the schedule ends here too"
    )
    batch_size: int = option(16, number(int, 1), "windows per step")
    grad_accum: int = option(
        1,
        number(int, 1),
        "parts in which a step's batch is computed, to "
        "save memory; the result is the same but for the dropouts' draws",
    )
    lr: float = option(3e-4, number(float, 1e-12, 10.0), "peak of the learning rate")
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
        "all of the base's dropouts; default: its config's",
    )
    seed: int = option(
        42, number(int, 0, 2**63 - 1), "for the adapter's start, the order of windows and dropout"
    )
    compile: bool = option(False, help="torch.compile the model")
    gradient_checkpointing: bool = option(
        False, help="compute activations twice instead of keeping them: saves memory"
    )
    device: str = option(**DEVICE)
    precision: str = option(**PRECISION)
    allow_tf32: bool = option(False, help="fp32 matmuls in TF32 on CUDA: faster, less exact")
    # run
    out: Path = option(ROOT / "runs" / "lora", Path, "directory of what the run leaves")
    eval_every: int | None = option(
        None, number(int, 1), "validate every N steps, and not only after each epoch"
    )
    log_every: int = option(10, number(int, 1), "write a line of metrics.jsonl every so many steps")
    checkpoint_every: int | float = option(
        600.0,
        steps_or_seconds,
        "save every N steps, or after "
        "a time such as 90s or 10m (default: 10m), besides "
        "after an epoch",
        metavar="N",
    )
    resume: bool = option(False, help="resume the run in --out")
    overwrite: bool = option(False, help="replace the run in --out")
    # LoRA only
    r: int = option(8, number(int, 1), "rank")
    lora_alpha: float = option(16, number(int, 1, 1e6), "the update is scaled by alpha / r")
    lora_dropout: float = option(0.05, number(float, 0.0, 1.0, below=True), "dropout of A's input")
    target_modules: tuple[str, ...] = option(
        ("c_attn",),
        nargs="+",
        metavar="NAME",
        help="linear layers to adapt, slices of c_attn such "
        "as c_attn.q, or all-linear (default: c_attn)",
    )
    use_rslora: bool = option(False, help="scale by alpha / sqrt(r) in place of alpha / r")
    layers_to_transform: tuple[int, ...] | None = option(
        None,
        layers,
        "adapt only these blocks, such as 6-11, or 0 2 4",
        nargs="+",
        metavar="A-B",
        also=["--layers"],
    )
    rank_pattern: dict = field(default_factory=dict)  # these two come with --init-adapter alone
    alpha_pattern: dict = field(default_factory=dict)
    use_dora: bool = option(
        False, help="DoRA: train each weight's magnitude apart from its direction"
    )
    init_lora_weights: bool | str = option(
        True,
        str,
        "PiSSA: start from W's largest singular vectors (default: LoRA's own start)",
        choices=("pissa",),
    )
    loraplus_lr_ratio: float | None = option(
        None, number(float, 1.0, 1e4), "LoRA+: ratio of B's learning rate to A's"
    )
    freeze_a: bool = option(False, help="LoRA-FA: train B alone; saves memory")
    init_adapter: Path | None = option(
        None,
        Path,
        "start from this adapter; it brings its own rank, alpha, dropout, targets and kind",
        metavar="DIR",
    )

    @property
    def lora_config(self) -> LoRAConfig:
        return LoRAConfig(**{f.name: getattr(self, f.name) for f in fields(LoRAConfig)})

    def as_json(self) -> dict:
        """Return all of the method's options with their values, in JSON's types."""
        values = {
            f.name: getattr(self, f.name)
            for f in fields(self)[1:]
            if self.method == "lora" or f.name not in LORA_ONLY
        }
        return json.loads(json.dumps(values, default=str))  # a path as a string


LORA_ONLY = {"init_adapter", "loraplus_lr_ratio", "freeze_a", *(f.name for f in fields(LoRAConfig))}


def flag(field: Field) -> str:
    return f"--{field.name.replace('_', '-')}"


def parse_options(description: str, argv: Sequence[str] | None = None) -> Options:
    """Read `train.py`'s command line. Raises UserError for options that are wrong or clash."""
    parser = Parser(prog="train.py", description=description)
    methods = parser.add_subparsers(dest="method", required=True)
    for method, defaults in DEFAULTS.items():
        sub = methods.add_parser(method)
        state, source = sub.add_mutually_exclusive_group(), sub.add_mutually_exclusive_group()
        groups = {"resume": state, "overwrite": state, "book": source, "data": source}
        for f in fields(Options)[1:]:
            if f.metadata and (method == "lora" or f.name not in LORA_ONLY):
                settings = f.metadata | {"default": defaults.get(f.name, f.default)}
                if settings["default"] not in (None, False) and "default: " not in settings["help"]:
                    settings["help"] += " (default: %(default)s)"
                names = flag(f), *settings.pop("also", ())
                groups.get(f.name, sub).add_argument(*names, **settings)
    values = vars(parser.parse_args(argv))
    if values["method"] == "lora":
        values["target_modules"] = target_modules([*values["target_modules"]])
    if values.get("layers_to_transform"):
        values["layers_to_transform"] = sorted(set().union(*values["layers_to_transform"]))
    if values["data"]:
        values["book"] = None  # and not its default
    options = Options(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
    )
    typed = typed_options(argv)
    if options.val_data and (not options.data or "--val-fraction" in typed):
        raise UserError("--val-data: needs --data, and no --val-fraction")
    if options.data and typed & {"--stride", "--label-shift"}:
        raise UserError("--stride and --label-shift are for books: an example is one row")
    pissa = options.init_lora_weights == "pissa"
    if options.freeze_a and (options.loraplus_lr_ratio or options.init_adapter or pissa):
        raise UserError(
            "--freeze-a cannot be combined with --loraplus-lr-ratio, --init-adapter "
            "or --init-lora-weights pissa"
        )
    if options.init_adapter and typed & {"--layers", *map(flag, fields(LoRAConfig))}:
        raise UserError(
            "--init-adapter brings its own rank, alpha, dropout, targets and kind of "
            "LoRA; leave those options out"
        )
    return options
