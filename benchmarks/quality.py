"""Time to quality: the seconds of training until the validation perplexity reaches a target.

`python -m benchmarks.quality` trains mini on the default book in fp32 with each arm and seed in
turn. An arm is a side (this project, or PEFT's and transformers' model in a plain loop) and the
options of `train.py`, which both sides share, with their batches. The targets are close to the last
perplexities of the reference run's LoRA and full fine-tuning. Each arm validates after every
twentieth part of its steps. Only the steps are timed, not start-up and validation. Each run has a
separate process. On our side the process keeps freed memory, as in `train.py`.
"""

import json
import math
import statistics
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import ours
from benchmarks.parity_report import versions
from benchmarks.speed import machine_name
from common.cli import Parser, number, print_table
from common.device import tune_process
from common.errors import run_command
from common.figures import BASE, FULL, LORA, OTHER, PAGE_WIDTH, can_draw, save_figure, subplots
from common.files import read_json, write_json
from data.windows import Batch
from storage.hub import find_base
from training.options import ROOT

TARGETS = (41, 35)
VALIDATIONS = 20
REFERENCE = ("lora", "--recipe", "reference")
BEST = ("lora", "--recipe", "best")
# Rates of the documentation: TRL's "PEFT integration" and PEFT's "Quicktour"
TRL, PEFT = "2e-4", "1e-3"
ARMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "LoRA, best recipe, here": ("ours", BEST),
    "LoRA, best recipe, PEFT": ("theirs", BEST),
    "LoRA, reference, here": ("ours", REFERENCE),
    "LoRA, reference, PEFT": ("theirs", REFERENCE),
    "LoRA, reference at 2e-4, PEFT": ("theirs", (*REFERENCE, "--lr", TRL)),
    "LoRA, reference at 1e-3, PEFT": ("theirs", (*REFERENCE, "--lr", PEFT)),
    "full, reference, here": ("ours", ("full",)),
    "full, reference, transformers": ("theirs", ("full",)),
}
Curve = list[tuple[int, float, float]]  # steps, seconds of training, perplexity


def main(argv: Sequence[str] | None = None) -> None:
    opts = parse_args(argv)
    if opts.arm:
        print(json.dumps(train(opts.arm, opts.seeds[0], opts.max_steps)))
        return

    path = opts.out / f"quality-{machine_name('cpu')}.json"
    if not opts.draw:
        write_json(path, measure(opts))
    results = read_json(path)
    print_table(*table(results["runs"]))
    if can_draw():
        save_figure(draw(results["runs"]), path.with_suffix(".png"))


def parse_args(argv: Sequence[str] | None) -> Namespace:
    parser = Parser(prog="benchmarks.quality", description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=number(int, 0), default=[42, 2, 3], metavar="N")
    parser.add_argument("--max-steps", type=number(int, 1), metavar="N", help="of each run")
    parser.add_argument("--arm", choices=ARMS, help="run this arm in this process, with one seed")
    parser.add_argument("--draw", action="store_true", help="draw the saved figures again")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR"
    )
    return parser.parse_args(argv)


def measure(opts: Namespace) -> dict[str, Any]:
    """Return the curve of each arm with each seed, in turn."""
    runs: dict[str, list[Curve]] = {arm: [] for arm in ARMS}
    for seed in opts.seeds:
        for arm in ARMS:
            command = [sys.executable, "-m", "benchmarks.quality", "--arm", arm]
            command += ["--seeds", str(seed)]
            if opts.max_steps:
                command += ["--max-steps", str(opts.max_steps)]
            ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            curve = json.loads(ended.stdout.splitlines()[-1])
            steps, seconds, perplexity = curve[-1]
            print(
                f"{arm}, seed {seed}: {steps} steps, {seconds:.1f} s, perplexity {perplexity:.2f}"
            )
            runs[arm].append(curve)
    facts = {"threads": torch.get_num_threads(), "versions": versions(), "seeds": opts.seeds}
    return {**facts, "runs": runs}


def train(arm: str, seed: int, max_steps: int | None) -> Curve:
    """Train. Return the steps, the seconds and the perplexity at each validation."""
    side, words = ARMS[arm]
    more = ("--max-steps", max_steps) if max_steps else ()
    trainer = ours.Trainer(
        ours.options(*words, *more, base="mini", precision="fp32", device="cpu", seed=seed)
    )
    step, validate = (trainer.step, lambda: trainer.evaluate().perplexity)
    if side == "ours":
        tune_process()
    else:
        step, validate = stock(trainer)

    every = max(1, trainer.total_steps // VALIDATIONS)
    seconds = 0.0
    curve = []
    for done, batch in enumerate(trainer.batches(), 1):
        start = time.perf_counter()
        step(batch)
        seconds += time.perf_counter() - start
        if done % every == 0 or done == trainer.total_steps:
            curve.append((done, seconds, validate()))
    return curve


def stock(trainer: ours.Trainer) -> tuple[Any, Any]:
    """Return a step and a validation of the plain loop, for this trainer's options and batches."""
    from benchmarks import peft_loop  # not imported on our side

    warnings.simplefilter("ignore")  # of the libraries, about each other
    base = str(find_base("mini")[1])
    options = replace(trainer.options, base=base)
    model = peft_loop.build(options)
    stock_step = peft_loop.make_step(model, options, options.precision)
    rates = (
        peft_loop.learning_rate(i, trainer.total_steps, options) for i in range(trainer.total_steps)
    )
    text = trainer.data.validation.tokens

    def step(batch: Batch) -> None:
        [(inputs, targets)] = batch.micro_batches()  # (B, T) each
        stock_step(inputs, targets, next(rates))

    def validate() -> float:
        perplexity = math.exp(peft_loop.evaluate(model, text, options.block_size))
        model.train()
        return perplexity

    return step, validate


def seconds_to(curve: Curve, target: float) -> float:
    """Return the seconds at the first validation with the target or less, or infinity."""
    return next((seconds for _, seconds, found in curve if found <= target), math.inf)


def table(runs: dict[str, list[Curve]]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows, with the median (least..most) over the seeds."""
    header = ["arm", "steps", *(f"seconds to {target}" for target in TARGETS), "all", "perplexity"]
    rows = []
    for arm, curves in runs.items():
        reached = [[seconds_to(curve, target) for curve in curves] for target in TARGETS]
        seconds = [curve[-1][1] for curve in curves]
        last = [curve[-1][2] for curve in curves]
        numbers = [spread(values) for values in (*reached, seconds, last)]
        rows.append([arm, str(curves[0][-1][0]), *numbers])
    return header, rows


def spread(values: list[float]) -> str:
    if math.isinf(max(values)):
        return "not reached" if math.isinf(min(values)) else "not by all"
    return f"{statistics.median(values):.1f} ({min(values):.1f}..{max(values):.1f})"


def draw(runs: dict[str, list[Curve]]) -> Any:
    """Draw perplexity by seconds: a line for each seed, our arms solid and the others dashed."""
    figure, axis = subplots(figsize=(PAGE_WIDTH, 4.4))
    figure.suptitle("Time to quality: perplexity on the book's validation part (mini, two cores)")
    for target in TARGETS:
        axis.axhline(target, color=BASE, linewidth=0.8)
    for arm, curves in runs.items():
        side, words = ARMS[arm]
        colour = {BEST: LORA, REFERENCE: OTHER, ("full",): FULL}.get(words)
        if colour is None:  # the rates of the documentation are in the table
            continue
        for i, curve in enumerate(curves):
            _, seconds, perplexity = zip(*curve, strict=True)
            line = "-" if side == "ours" else "--"
            axis.plot(seconds, perplexity, line, color=colour, label=arm if i == 0 else None)
    axis.set(xscale="log", xlabel="seconds of training steps", ylabel="perplexity")
    axis.legend()
    return figure


if __name__ == "__main__":
    run_command(main)
