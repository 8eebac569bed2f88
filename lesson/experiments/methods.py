"""Which method, each at its best rate? `python -m lesson.experiments.methods`

Varied: the trained weights. These are all weights, the weights of c_attn, c_proj and c_fc, or LoRA
of rank 8 on these layers.
Fixed: mini, the default book, no dropout, and the size of `--recipe best`: three epochs of batches
of 2 windows of 128 tokens without overlap.
Measured: the least perplexity after an epoch, with seed 0 at the best rate and the two rates beside
it, and with three seeds at the best rate. Also measured: three commands with default settings, in
fp32.
"""

from collections.abc import Callable, Sequence
from typing import Any

from lesson.experiments.common import Steps, as_command, experiment, spread, train_options
from lesson.experiments.sweep import (
    ALL,
    Runs,
    at_best,
    best_rate,
    finetune,
    learned,
    scored,
    search_with_first_seed,
    stored,
)

SIZE: dict[str, Any] = {"batch_size": 2, "stride": 128, "max_steps": 249}


def learned_by_the_layers_alone(made: Steps) -> dict[str, float]:
    """Train only the four layers' weights. Return the result of `learned`."""
    for name, parameter in made.model.named_parameters():
        parameter.requires_grad_(name.startswith("h.") and parameter.ndim == 2)
    made.set_up()
    return learned(made)


# The trained weights: the method, the first rate to try, the measure, and LoRA's options.
METHODS: dict[str, tuple[str, float, Callable[[Steps], Any], dict[str, Any]]] = {
    "LoRA, all four layers of a block": ("lora", 4e-3, learned, {"target_modules": ALL}),
    "the four layers' weights alone": ("full", 5e-4, learned_by_the_layers_alone, {}),
    "full: all weights": ("full", 5e-4, learned, {}),
}
COMMANDS = {"make train-lora": "lora", "make train-full": "full"}


def command_run(method: str) -> Runs:
    """Return the perplexity of the saved model by the rate."""
    found = stored(train_options(method, {"device": "cpu", "precision": "fp32"}))
    return {found["lr"]: [found["perplexity"]]}


def method_runs(
    method: str,
    guess: float,
    how: Callable[[Steps], Any],
    options: dict[str, Any],
) -> Runs:
    """Return the perplexities by rate, with every seed at the best rate."""

    def run(lr: float, seeds: Sequence[int]) -> list[Any]:
        return finetune(method, seeds, how, lr=lr, **SIZE, **options)

    return scored(search_with_first_seed(run, guess, at_best), at_best)


def measure() -> dict[str, Runs]:
    """Return the perplexities by command or trained weights, and by rate."""
    data = {}
    for command, method in COMMANDS.items():
        data[command] = command_run(method)
        print(f"{command}: {data[command]}", flush=True)
    for trained, (method, guess, how, options) in METHODS.items():
        runs = method_runs(method, guess, how, options)
        best = best_rate(runs)
        print(f"{trained}: {spread(runs[best])} at {best:g}", flush=True)
        data[trained] = runs
    return data


def main(argv: Sequence[str] | None = None) -> dict:
    return experiment("methods", measure, None, __doc__, argv)


if __name__ == "__main__":
    as_command(main)
