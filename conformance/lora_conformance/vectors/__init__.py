"""The test vectors: a safetensors file of fp64 tensors for each case, described in `vectors.json`.

`python -m generators.vectors` writes them again, byte for byte.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

HERE = Path(__file__).parent
INDEX = HERE / "vectors.json"


def index() -> dict[str, Any]:
    return json.loads(INDEX.read_text())


def cases() -> dict[str, dict[str, Any]]:
    """Return the settings of every case by name."""
    return index()["cases"]


def tensors(case: str) -> dict[str, np.ndarray]:
    """Return a case's tensors by name."""
    return load_file(HERE / f"{case}.safetensors")


def results(case: str) -> dict[str, np.ndarray]:
    """Return a case's tensors without the inputs. A name may end in a layer's number."""
    inputs = index()["inputs"]
    return {k: v for k, v in tensors(case).items() if re.sub(r"\d$", "", k) not in inputs}


def tolerance(name: str, dtype: str) -> float:
    """Return the largest error of a result in this type of safetensors."""
    about = index()
    return 0.0 if name in about["exact"] else about["tolerances"][dtype]["tolerance"]
