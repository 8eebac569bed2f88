"""Rates on SmolLM2-135M-Instruct: `python -m lesson.experiments.other_model`

Varied: the peak learning rate of `make example`: the rate that its search finds, half and twice
this rate, and on until the best rate lies between two others. On the book also the format of the
base: fp32 or NF4.
Fixed: 40 steps of 8 windows of 128 tokens or 8 conversations, LoRA of rank 8 and alpha 16 on all
linear layers, dropout 0.05, and the precision that the command chooses on this CPU.
Measured: the perplexity on the validation part before training and after every 10 steps, the
perplexity of the saved adapter in stock PEFT on the unquantised base, and the peak memory of the
process. All seeds at the rates that they find, and seed 0 at other rates. With seed 0, also
samples at the rate found.

`make example` installs the weights. Results are kept in runs/experiments. A run with a known result
is not repeated.
"""

import argparse
import json
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any

from common.device import Device
from lesson.examples import any_model
from lesson.experiments import sweep
from lesson.experiments.common import as_command, experiment, settings, spread
from lesson.experiments.quantised_memory import apart
from lesson.experiments.sweep import search
from training.options import ROOT

MODEL: str | None = None  # SmolLM2
TASKS = {"conversations": ("--data", "data/instructions.jsonl"), "book": ()}


def finetune(words: Sequence[str], sampled: bool) -> dict[str, Any]:
    """Train as `make example` with these options. Return the scores, and samples if asked."""
    with TemporaryDirectory() as out:
        args = any_model.parse([*words, "--out", out, "--device", "cpu"])
        if args.data:
            args.data = ROOT / args.data
        device = Device.pick(args.device, args.precision, train=True)
        model, tokenizer, task = any_model.prepare(args, device)
        search = any_model.search_rate
        lr = args.lr or search(model, task.training, args.steps, device).rate
        found: dict[str, Any] = {"lr": lr, "precision": device.precision}
        found["base"] = any_model.perplexity(model, task.validation, device)
        if sampled:
            found["base's samples"] = any_model.samples(model, tokenizer, task, device)
        found["trained"] = any_model.train(model, task, lr, device, args)
        found["peak_mb"] = device.peak_memory_mb()
        in_peft = any_model.load_in_peft(model, device, args)
        found["in PEFT"] = any_model.perplexity(in_peft, task.validation, device)
        if sampled:
            found["samples"] = any_model.samples(in_peft, tokenizer, task, device)
        return found


def run(
    task: str, *options: str, seed: int = 0, short: bool = False, sampled: bool = False
) -> dict[str, Any]:
    """Return the result of a run. A stored result is returned at once."""
    words = [*TASKS[task], *options, "--seed", str(seed)]
    if MODEL:
        words += ["--model", MODEL]
    if short:
        words += ["--steps", "2"]
    decides = {"measure": "other_model", "words": words, "sampled": sampled}
    key = json.dumps(decides | settings())
    return sweep.remembered(key, lambda: apart(finetune, words, sampled))


def score(result: dict[str, Any]) -> float:
    """Return the perplexity of the saved adapter, the lowest."""
    return min(result["trained"])


def rates(task: str, seeds: Sequence[int], short: bool) -> dict[str, Any]:
    """Return a run for each seed at the rate that it finds, and runs at other rates (seed 0)."""
    searched = [run(task, seed=seed, short=short, sampled=seed == 0) for seed in seeds]
    rate = searched[0]["lr"]

    def at(lr: float, _: Sequence[int]) -> list[dict[str, Any]]:
        return searched[:1] if lr == rate else [run(task, "--lr", f"{lr:g}")]

    ladder = search(at, rate, seeds[:1], score, short)
    found = ", ".join(f"{result['lr']:g}" for result in searched)
    print(f"{task}: {spread(list(map(score, searched)))} at {found}")
    return {
        "searched": searched,
        "other rates": {lr: x for lr, [x] in ladder.items() if lr != rate},
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the results by task."""
    data: dict[str, Any] = {task: rates(task, args.seeds, args.short) for task in TASKS}
    return data | {"book, NF4": run("book", "--quantise", "nf4", short=args.short)}


def main(argv: Sequence[str] | None = None) -> dict:
    return experiment("other_model", measure, None, __doc__, argv)


if __name__ == "__main__":
    as_command(main)
