"""The data of the short runs that search the learning rate."""

import math

import numpy as np

from data.windows import Batch, Dataset
from training.plan import Plan

SHORT_STEPS = 24
MOST_PASSES = 6  # of a short run, or it would have too few different batches


def short_run_data(plan: Plan) -> tuple[list[Batch], Dataset]:
    """Return the batches of a short run, and the data that scores the run. Both are parts of the
    training data.
    """
    data, held_out = plan.data.training.hold_out()
    steps = min(plan.total_steps, SHORT_STEPS)
    size = plan.options.batch_size
    order = data.epoch_order(plan.options.seed, 0)
    order = short_order(order, steps * size, plan.passes)
    batches = [plan.batch(order[i : i + size], data) for i in range(0, len(order), size)]
    return batches, held_out


def short_order(order: np.ndarray, count: int, passes: float) -> np.ndarray:
    """Return `count` indices for a short run: the first of `order`, as often as the whole run reads
    its text.

    A model that reads a text again learns it by heart, unless the rate is low, and the short run
    must show this too.
    """
    times = min(max(1, round(passes)), MOST_PASSES)
    return np.resize(order[: math.ceil(count / times)], count)
