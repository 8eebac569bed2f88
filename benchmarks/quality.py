"""Time to quality: the seconds of training until the validation perplexity reaches a target.

`python -m benchmarks.quality` measures two things on mini in fp32 on the CPU, and multiplies them.

1. The steps that a run needs: this project trains with each seed on one thread, and validates after
   every twentieth part of the steps. A plain loop around PEFT's or transformers' model gets the
   same batches, learning rates and losses (`make parity`), so it needs the same number of steps.
2. The seconds per step, on all threads: this project and the plain loop take steps in turn, each in
   a separate process, for several rounds. On our side the process keeps freed memory, as in
   `train.py`. Run this part with nothing else on the machine (`--only seconds`).

Start-up and validation do not count. The targets are near the last perplexities of the reference
run's LoRA and full fine-tuning. The command does not measure known figures again, so it can be
interrupted and started again.
"""

import json
import math
import os
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

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
WARM_UP, TIMED_SECONDS = 2, 5
REFERENCE = ("lora", "--recipe", "reference")
RUNS: dict[str, tuple[str, ...]] = {
    "LoRA, best": ("lora", "--recipe", "best"),
    "LoRA, reference": REFERENCE,
    "full, reference": ("full",),
    # with the learning rates of PEFT's "Quicktour" and of TRL's "PEFT Integration"
    "LoRA, reference, lr 1e-3": (*REFERENCE, "--lr", "1e-3"),
    "LoRA, reference, lr 2e-4": (*REFERENCE, "--lr", "2e-4"),
}
COLOURS = dict(zip(RUNS, (LORA, OTHER, FULL), strict=False))  # the picture shows these runs
SIDES = ("here", "there")
Curve = list[tuple[int, float]]  # (steps, perplexity)
Work = Callable[[Batch], object]


def main(argv: Sequence[str] | None = None) -> None:
    opts = parse_args(argv)
    if opts.run:
        found = seconds(opts) if opts.side else curve(opts)
        print(json.dumps(found))
        return

    short = "short-" if opts.max_steps else ""
    path = opts.out / f"{short}quality-{machine_name('cpu')}.json"
    empty: dict[str, Any] = {"versions": versions(), "curves": {}, "seconds": {}}
    results = read_json(path) if path.exists() else empty
    if "curves" in opts.only:
        measure_curves(opts, results["curves"], lambda: write_json(path, results))
    if "seconds" in opts.only:
        measure_seconds(opts, results["seconds"], lambda: write_json(path, results))
    print_table(*table(results))
    if can_draw():
        save_figure(draw(results), path.with_suffix(".png"))


def parse_args(argv: Sequence[str] | None) -> Namespace:
    parser = Parser(prog="benchmarks.quality", description=__doc__)
    parts = ("curves", "seconds")
    parser.add_argument("--only", nargs="*", choices=parts, default=parts, metavar="PART")
    parser.add_argument("--seeds", nargs="+", type=number(int, 0), default=[42, 2, 3], metavar="N")
    parser.add_argument("--rounds", type=number(int, 1), default=3, metavar="N")
    parser.add_argument("--max-steps", type=number(int, 1), metavar="N", help="of each run")
    parser.add_argument("--run", choices=RUNS, help="measure this run in this process, one seed")
    parser.add_argument("--side", choices=SIDES, help="with --run: seconds per step")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR"
    )
    return parser.parse_args(argv)


def measure_curves(opts: Namespace, curves: dict[str, Any], save: Callable[[], None]) -> None:
    """Measure the missing curves, on one thread each, several at a time.

    The runs with learning rates from other documentation use only the first seed.
    """
    first, *others = map(str, opts.seeds)
    wanted = [(run, first) for run in RUNS]
    wanted += [(run, seed) for seed in others for run in COLOURS]
    missing = [(run, seed) for run, seed in wanted if seed not in curves.setdefault(run, {})]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda each: apart(opts, *each, OMP_NUM_THREADS="1"), missing)
        for (run, seed), points in zip(missing, found, strict=True):
            curves[run][seed] = points
            save()
            print(f"{run}, seed {seed}: perplexity {points[-1][1]:.2f}", flush=True)


def measure_seconds(opts: Namespace, times: dict[str, Any], save: Callable[[], None]) -> None:
    """Measure the seconds per step of each run on both sides, in turn."""
    for run in COLOURS:  # the learning rate does not change the time
        times[run] = {side: [] for side in SIDES}
    for _ in range(opts.rounds):
        for run in COLOURS:
            for side in SIDES:
                times[run][side].append(apart(opts, run, "0", "--side", side))
                print(f"{run}, {side}: {times[run][side][-1]:.3g} s per step", flush=True)
        save()


def apart(opts: Namespace, run: str, seed: str, *more: str, **environment: str) -> Any:
    """Measure with this command in another process. Return the measurement."""
    command = [sys.executable, "-m", "benchmarks.quality", "--run", run, "--seeds", seed, *more]
    if opts.max_steps:
        command += ["--max-steps", str(opts.max_steps)]
    ended = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, check=True, env=os.environ | environment
    )
    return json.loads(ended.stdout.splitlines()[-1])


def make_trainer(opts: Namespace) -> ours.Trainer:
    more = ("--max-steps", opts.max_steps) if opts.max_steps else ()
    shared = {"base": "mini", "precision": "fp32", "device": "cpu", "seed": opts.seeds[0]}
    return ours.Trainer(ours.options(*RUNS[opts.run], *more, **shared))


def curve(opts: Namespace) -> Curve:
    """Train. Return the perplexity at each validation."""
    trainer = make_trainer(opts)
    every = max(1, trainer.total_steps // VALIDATIONS)
    points = []
    for done, batch in enumerate(trainer.batches(), 1):
        trainer.step(batch)
        if done % every == 0 or done == trainer.total_steps:
            points.append((done, trainer.evaluate().perplexity))
    return points


def seconds(opts: Namespace) -> float:
    """Return the median seconds per step, after steps that warm up."""
    trainer = make_trainer(opts)
    if opts.side == "here":
        tune_process()
        step: Work = trainer.step
    else:
        step = stock_step(trainer)

    times: list[float] = []
    for i, batch in enumerate(trainer.batches()):
        start = time.perf_counter()
        step(batch)
        if i >= WARM_UP:
            times.append(time.perf_counter() - start)
        if sum(times) > TIMED_SECONDS:
            break
    return median(times)


def stock_step(trainer: ours.Trainer) -> Work:
    """Return a step of the plain loop, with this trainer's options and batches."""
    from benchmarks import peft_loop  # slow to import, and our side does not need it

    warnings.simplefilter("ignore")  # libraries warn about each other
    options = replace(trainer.options, base=str(find_base("mini")[1]))
    step = peft_loop.make_step(peft_loop.build(options), options, options.precision)
    rates = (peft_loop.learning_rate(i, trainer.total_steps, options) for i in range(10**6))

    def on_batch(batch: Batch) -> float:
        [(inputs, targets)] = batch.micro_batches()  # (B, T) each
        return step(inputs, targets, next(rates))

    return on_batch


def steps_to(points: Curve, target: float) -> float:
    """Return the steps at the first validation with the target or less, or infinity."""
    return next((steps for steps, found in points if found <= target), math.inf)


def table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the header, and a row for each run: median (least..most) of seeds and rounds."""
    header = ["run", "last perplexity", "their time / ours"]
    header += [f"seconds to {target}, {side}" for target in TARGETS for side in SIDES]
    rows = []
    for run, curves in results["curves"].items():
        times = results["seconds"].get(run.partition(", lr")[0], {})
        pairs = zip(times.get("there", []), times.get("here", []), strict=True)
        row = [run, spread([points[-1][1] for points in curves.values()])]
        row.append(spread([theirs / mine for theirs, mine in pairs], 2))
        for target in TARGETS:
            steps = [steps_to(points, target) for points in curves.values()]
            row += [spread([n * s for n in steps for s in times.get(side, [])]) for side in SIDES]
        rows.append(row)
    return header, rows


def spread(values: list[float], digits: int = 1) -> str:
    if not values:
        return ""
    if math.isinf(max(values)):
        return "not reached" if math.isinf(min(values)) else "not with each seed"
    least, middle, most = (
        f"{value:.{digits}f}" for value in (min(values), median(values), max(values))
    )
    return f"{middle} ({least}..{most})"


def draw(results: dict[str, Any]) -> Any:
    """Draw perplexity by seconds, with a line for each seed. The plain loop has dashed lines."""
    figure, axis = subplots(figsize=(PAGE_WIDTH, 4.4))
    figure.suptitle("Time to quality: perplexity on the book's validation part (mini, fp32)")
    for target in TARGETS:
        axis.axhline(target, color=BASE, linewidth=0.8)
    for run, by_side in results["seconds"].items():
        curves = results["curves"].get(run, {})
        for side, line in zip(SIDES, ("-", "--"), strict=True):
            label: str | None = f"{run}, {'this project' if side == 'here' else 'plain loop'}"
            for points in curves.values():
                steps, perplexity = zip(*points, strict=True)
                x = [n * median(by_side[side]) for n in steps]
                axis.plot(x, perplexity, line, color=COLOURS[run], label=label, linewidth=1.2)
                label = None
    axis.set(xscale="log", xlabel="seconds of training steps", ylabel="perplexity")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.legend()
    return figure


if __name__ == "__main__":
    run_command(main)
