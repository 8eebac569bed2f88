"""The reference run, repeated: its table beside ours, and what the same models really predict.

`python -m benchmarks.reference` trains LoRA and then the whole base by the reference's protocol
(`reference_protocol.py`) and scores both by its measure and as language models, by the next token.
`--demonstrate` shows on the CPU, in minutes, what that measure measures; docs/reference-run.md
explains it. Without `--book` the text is pseudo-Latin from `--seed`, as the reference's was filler.
"""

import itertools
import math
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.parity_report import machine
from benchmarks.pseudo_latin import pseudo_latin
from benchmarks.reference_demo import demonstrate
from benchmarks.reference_protocol import (
    BATCH_SIZE,
    BLOCK,
    METHODS,
    SCORED,
    VAL_FRACTION,
    check_base,
    load_best,
    reference_loss,
    run_train,
    token_scores,
    train_arguments,
    window_indices,
)
from cli import ROOT, Parser, add_base_options, number, parse_train_args, print_table
from data.tokens import load_tokens
from data.windows import split
from errors import UserError, run_command
from evaluate import perplexity
from files import write_json, write_text
from hardware import PRECISIONS, device_name, pick_device
from model.checkpoint import load_config
from model.hub import find_base
from train import Trainer, build_model, load_data
from training.checkpoint import has_checkpoint, read_checkpoint
from training.directory import CHECKPOINT, METRICS, PREVIOUS, RUN, check_out, options
from training.identity import check_finished, refuse_other_options

PUBLISHED = {  # trainable parameters, share of all, best validation loss, its perplexity
    "lora": ("294,912", "0.2364 %", "0.2261", "1.2537"),
    "full": ("about 124.7 million", "-", "-", "1.1211"),
}
COLUMNS = ("", "trainable", "share", "best val loss", "perplexity", "next-token loss", "perplexity")
TIMED_STEPS = 3


def main() -> None:
    opts = parse_args()
    if opts.make_text:
        return make_text(opts)
    opts.device = pick_device(opts.device)
    opts.base, opts.directory = find_base(opts.base)
    check_base(opts)
    facts = demonstrate(opts) if opts.demonstrate else repeat(opts)
    facts |= {"base": Path(opts.base).name, "seed": opts.seed, "precision": opts.precision,
              "device": device_name(opts.device), "machine": machine(),
              "threads": torch.get_num_threads(), "torch": torch.__version__}
    write_json(opts.json or Path(__file__).with_name(
        "reference-demo.json" if opts.demonstrate else "reference.json"), facts)


def parse_args() -> Namespace:
    parser = Parser(prog="benchmarks.reference", description=__doc__.splitlines()[0])
    add_base_options(parser)
    parser.add_argument("--book", type=Path, default=None,
                        help="UTF-8 text file (default: pseudo-Latin of --words words)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "reference", metavar="DIR",
                        help="where the runs lora/ and full/ go, and the made text")
    parser.add_argument("--max-steps", type=number(int, 1), default=None, metavar="N",
                        help="end each run here, and the schedule with it")
    parser.add_argument("--val-windows", type=number(int, 1), default=None, metavar="N",
                        help="score only so many validation windows by the reference's measure, "
                             "evenly spaced (default: all)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--precision", default="fp32", choices=tuple(PRECISIONS))
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=42)
    parser.add_argument("--words", type=number(int, 100), default=5000,
                        help="of the made text (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE",
                        help="where the figures go (default: beside this program)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--make-text", type=Path, metavar="FILE", help="only write the made text")
    what.add_argument("--demonstrate", action="store_true",
                      help="show what the measure measures, by short LoRA runs on texts of its own")
    state = parser.add_mutually_exclusive_group()
    state.add_argument("--resume", action="store_true", help="go on with the runs in --out")
    state.add_argument("--overwrite", action="store_true", help="replace what is there")
    return parser.parse_args()


def make_text(opts: Namespace) -> None:
    if opts.make_text.exists() and not opts.overwrite:
        raise UserError(f"--make-text {opts.make_text}: exists; --overwrite replaces it")
    text = pseudo_latin(opts.words, opts.seed)
    write_text(opts.make_text, text)
    print(f"{opts.make_text}: {len(text.split()):,} words of pseudo-Latin from seed {opts.seed}")


def repeat(opts: Namespace) -> dict:
    """Train, score and print; returns the figures."""
    began = time.perf_counter()
    name = opts.book.name if opts.book else f"pseudo-Latin, {opts.words} words"
    if not opts.book:
        opts.book = opts.out / f"pseudo-latin-{opts.words}-{opts.seed}.txt"
        write_text(opts.book, pseudo_latin(opts.words, opts.seed))
    check_runs(opts)
    tokens = load_tokens(opts.book, load_config(opts.directory).vocab_size)
    print(f"base {Path(opts.base).name}, {name}: {len(tokens):,} tokens, {opts.precision}, "
          f"{machine()}")
    announce(opts)
    runs = {method: run_train(arguments(opts, method)) for method in METHODS}
    val_tokens = split(tokens, VAL_FRACTION)[1]
    figures = {method: score(opts, method, val_tokens) for method in ("base", *METHODS)}
    for method, run in runs.items():
        figures[method] |= {key: run[key] for key in ("trainable_parameters", "total_parameters",
                                                      "trainable_percent", "steps", "seconds")}
    windows = {what: len(window_indices(val_tokens, count))
               for what, count in (("scored", opts.val_windows), ("all", None))}
    report(opts, figures, windows)
    return {"book": name, "tokens": len(tokens), "max_steps": opts.max_steps,
            "val_windows": windows, "protocol": {m: " ".join(o) for m, o in METHODS.items()},
            "published": PUBLISHED, "here": figures,
            "seconds": round(time.perf_counter() - began, 1)}


def arguments(opts: Namespace, method: str) -> list[str]:
    """`train.py`'s, with `--resume` only for a run that has begun."""
    out = opts.out / method
    begun = any((out / name).exists() for name in (RUN, CHECKPOINT, PREVIOUS, METRICS))
    more = ["--overwrite"] * opts.overwrite + ["--resume"] * (opts.resume and begun)
    return train_arguments(opts, method, out, *more)


def check_runs(opts: Namespace) -> None:
    """Refuse, before anything is timed, to lose a run or to go on with one of other options."""
    for method in METHODS:
        args = parse_train_args("-", arguments(opts, method))
        check_out(args)
        if args.resume and (args.out / RUN).exists():
            check_finished(args)
        elif args.resume and has_checkpoint(args.out):
            then = read_checkpoint(args.out)[0]["run"]
            refuse_other_options(then["method"], then["options"], method, options(args))


def announce(opts: Namespace) -> None:
    """Measure a few steps of each method, and say how long all of this will take."""
    seconds, parts = 0.0, []
    for method in METHODS:
        trainer = make_trainer(opts, method)
        steps = min(trainer.total_steps, opts.max_steps or math.inf)
        step, window = measure_speed(trainer)
        windows = len(window_indices(trainer.val_tokens, opts.val_windows))
        seconds += steps * step + 1.5 * windows * window  # the base is scored as well
        parts.append(f"{method} {steps:,} steps at {step:.2g} s")
    print(f"{', '.join(parts)}, validation 3 x {windows:,} windows: about {duration(seconds)} "
          "in all", flush=True)


def make_trainer(opts: Namespace, method: str) -> Trainer:
    """A trainer of the whole run, to be timed and thrown away."""
    args = parse_train_args("-", train_arguments(opts, method, opts.out / method))
    args.max_steps = None
    torch.manual_seed(args.seed)
    model, config = build_model(args, opts.directory)
    windows, val_tokens = load_data(args, model)
    return Trainer(args, model.to(opts.device), config, windows, val_tokens)


def measure_speed(trainer: Trainer) -> tuple[float, float]:
    """Seconds a training step and seconds a scored window."""
    batch, size = next(trainer.batches(0)), trainer.args.batch_size
    trainer.model.train()
    trainer.step(batch)  # the first also warms up
    trainer.interval.sums()  # waits for the device
    trainer.interval.restart()
    for _ in range(TIMED_STEPS):
        trainer.step(batch)
    step = trainer.interval.sums()[2] / TIMED_STEPS
    trainer.model.eval()
    began, count = time.perf_counter(), len(window_indices(trainer.val_tokens, size))
    reference_loss(trainer.model, trainer.val_tokens, size, size, trainer.args.precision)
    return step, (time.perf_counter() - began) / count


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


def score(opts: Namespace, method: str, val_tokens) -> dict:
    """The reference's measure and the honest one, of the base or of what a run kept."""
    model = load_best(opts, method, opts.out / method)
    loss = reference_loss(model, val_tokens, BATCH_SIZE.get(method, BATCH_SIZE["lora"]),
                          opts.val_windows, opts.precision)
    next_token = token_scores(model, val_tokens, 1, opts.precision)
    return {"reference_loss": loss, "reference_perplexity": perplexity(loss),
            "next_token": asdict(next_token) | {"perplexity": next_token.perplexity}}


def report(opts: Namespace, figures: dict, windows: dict) -> None:
    print()
    rows = [("base", "0", "0 %", *losses(figures["base"]))]
    for method in METHODS:
        ours = figures[method]
        rows += [(f"{method}, published", *PUBLISHED[method], "-", "-"),
                 (f"{method}, here", f"{ours['trainable_parameters']:,}",
                  f"{ours['trainable_percent']:.4f} %", *losses(ours))]
    print_table(COLUMNS, rows)
    part = "all" if windows["scored"] == windows["all"] else f"only {windows['scored']:,} of the"
    print(f"""
best val loss: the reference's measure, on {part} {windows["all"]:,} validation windows at stride 1:
    {SCORED} of {BLOCK} positions, each on the token after the next; the mean of batch losses
next-token loss: each token of the validation part once; the mean over tokens
as in the reference: windows, labels, batch sizes, optimiser, schedule, epochs, measure
not as there: the draws of order, dropout and A; the epoch kept is the best on each token once""")
    if opts.max_steps:
        print(f"--max-steps {opts.max_steps}: not the whole run; do not compare with the published")


def losses(figures: dict) -> tuple[str, str, str, str]:
    next_token = figures["next_token"]
    pairs = ((figures["reference_loss"], figures["reference_perplexity"]),
             (next_token["loss"], next_token["perplexity"]))
    return tuple(itertools.chain.from_iterable((f"{loss:.4f}", f"{value:.4f}")
                                               for loss, value in pairs))


if __name__ == "__main__":
    run_command(main)
