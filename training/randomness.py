"""The random generators of Python, NumPy and torch: seeded, and their states kept."""

import math
import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)  # CUDA's generators as well


def random_state() -> dict:
    """Of Python's, NumPy's and torch's CPU generator. A Gauss number in store that is none: NaN."""
    _, keys, gauss = random.getstate()
    _, numpy_keys, position, has_gauss, numpy_gauss = np.random.get_state()
    return {
        "python": list(keys),
        "python_gauss": math.nan if gauss is None else gauss,
        "numpy": numpy_keys.tolist(),
        "numpy_position": int(position),
        "numpy_gauss": float(numpy_gauss) if has_gauss else math.nan,
        "torch": torch.get_rng_state(),
    }


def set_random_state(state: dict) -> None:
    random.setstate(_python_state(state))
    np.random.set_state(_numpy_state(state))
    torch.set_rng_state(state["torch"])


def _python_state(state: dict) -> tuple:
    gauss = state["python_gauss"]
    return 3, tuple(state["python"]), None if math.isnan(gauss) else gauss


def _numpy_state(state: dict) -> tuple:
    gauss = state["numpy_gauss"]
    return ("MT19937", np.array(state["numpy"], dtype=np.uint32), state["numpy_position"],
            int(not math.isnan(gauss)), 0.0 if math.isnan(gauss) else gauss)


def check_random_state(state: dict) -> None:
    """Raises ValueError for a state that the generators, here ones to throw away, cannot take."""
    try:
        random.Random().setstate(_python_state(state))
        np.random.RandomState().set_state(_numpy_state(state))
        torch.Generator().set_state(state["torch"])
        if not 0 <= state["numpy_position"] <= len(state["numpy"]):  # NumPy would not look
            raise ValueError("NumPy's position is beyond its state")
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"a random generator's state is damaged ({error})") from error
