"""How does the best rate fall with steps and passes? `python -m lesson.experiments.rates`

Varied: the steps, the windows a step, the share of the book and so the passes over it, the rank.
Fixed: mini, LoRA on all four layers, alpha 16 whatever the rank.
Measured: the best learning rate, by the best of three validation perplexities, with three seeds.
"""

from typing import Any

# A run's name: the rate to begin with, the ranks to try, the options that set it apart.
# A stride of 64 reads the whole training part, one of 256 every fourth window, 1024 every 16th.
RUNS: dict[str, tuple[float, tuple[int, ...], dict[str, Any]]] = {
    "60 steps of 8, the book": (8e-3, (8, 1, 64), {}),
    "60 steps of 8, a quarter": (4e-3, (8, 1, 64), {"stride": 256}),
    "60 steps of 8, a sixteenth": (2e-3, (8,), {"stride": 1024}),
    "240 steps of 2, the book": (4e-3, (8, 1, 64), {"batch_size": 2, "max_steps": 240}),
    "240 steps of 2, a quarter": (
        2e-3,
        (8,),
        {"batch_size": 2, "max_steps": 240, "stride": 256},
    ),
    "240 steps of 2, a sixteenth": (
        1e-3,
        (8,),
        {"batch_size": 2, "max_steps": 240, "stride": 1024},
    ),
    "240 steps of 8, the book": (2e-3, (8,), {"max_steps": 240}),
    "15 steps of 32, the book": (1.6e-2, (8,), {"batch_size": 32, "max_steps": 15}),
    "960 steps of 2, the book": (1e-3, (8,), {"batch_size": 2, "max_steps": 960}),
    "240 steps of 8, the book, rank 64": (2e-3, (64,), {"max_steps": 240}),
}
