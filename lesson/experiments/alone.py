"""Full fine-tuning of the four layers alone? `python -m lesson.experiments.alone`

Varied: the trained weights. These are all weights, the weights of c_attn, c_proj and c_fc, or LoRA
of rank 8 on these layers.
Fixed: mini, the default book, 249 steps of 16 windows of 128 tokens, as in `train.py lora`.
Measured: the least of the three validation perplexities, with three seeds. The layers alone run at
the best rate and at the two rates beside it. The others run at the best rate in
docs/experiments.md.
"""

from collections.abc import Sequence
from typing import Any

from lesson.experiments.changes import is_layer
from lesson.experiments.common import Trainer, parse, spread, write_data
from lesson.experiments.sweep import ALL, Runs, at_best, best_rate, finetune, learned, scored, tune

SIZE: dict[str, Any] = {"batch_size": 16, "block_size": 128, "stride": 16, "max_steps": 249}
GUESS = 2e-4


def learned_by_the_layers_alone(made: Trainer) -> dict[str, float]:
    """Train only the four layers' weights. Return the result of `learned`."""
    for name, parameter in made.model.named_parameters():
        parameter.requires_grad_(is_layer(name))
    made.set_up()
    return learned(made)


def main(argv: Sequence[str] | None = None) -> dict[str, Runs]:
    args = parse(__doc__, argv)
    alone = tune(
        "full", GUESS, args.seeds, args.short, learned_by_the_layers_alone, at_best, **SIZE
    )
    full = finetune("full", args.seeds, args.short, lr=2e-4, **SIZE)
    lora = finetune("lora", args.seeds, args.short, lr=1e-3, target_modules=ALL, **SIZE)
    data = {
        "all weights": scored({2e-4: full}, at_best),
        "the four layers alone": scored(alone, at_best),
        "LoRA, r = 8": scored({1e-3: lora}, at_best),
    }
    for trained, runs in data.items():
        rate = best_rate(runs)
        print(f"{trained}: {spread(runs[rate])} at {rate:g}")
    write_data(args.out / "alone.json", data)
    return data


if __name__ == "__main__":
    main()
