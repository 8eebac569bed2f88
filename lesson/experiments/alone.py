"""Full fine-tuning of the four layers alone? `python -m lesson.experiments.alone`

Varied: the peak learning rate, in factors of two.
Fixed: mini, the default book, full fine-tuning of the weights of c_attn, c_proj and c_fc with all
else frozen; 249 steps of 16 windows of 128 tokens, as `train.py lora` takes.
Measured: the least of the three validation perplexities, with three seeds.
"""

from collections.abc import Sequence

from lesson.experiments.changes import is_layer
from lesson.experiments.common import Trainer, parse
from lesson.experiments.sweep import at_best, learned, scored, tune

PROTOCOL = {"batch_size": 16, "block_size": 128, "stride": 16, "max_steps": 249}
GUESS = 4e-4


def learned_by_the_layers_alone(made: Trainer) -> dict[str, float]:
    """Train the four layers' weights and nothing else; return what `learned` returns."""
    for name, parameter in made.model.named_parameters():
        parameter.requires_grad_(is_layer(name))
    alone = Trainer(made.options, made.model, made.data, made.device)
    return learned(alone)


def main(argv: Sequence[str] | None = None) -> dict:
    args = parse(__doc__, argv)
    runs = tune(
        "full", GUESS, args.seeds, args.short, learned_by_the_layers_alone, at_best, **PROTOCOL
    )
    return scored(runs, at_best)


if __name__ == "__main__":
    main()
