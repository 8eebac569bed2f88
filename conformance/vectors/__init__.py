"""The test vectors: a safetensors file of fp64 tensors for each case, described in `vectors.json`.

`python -m conformance.vectors` writes them again, byte for byte.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

HERE = Path(__file__).parent
INDEX = HERE / "vectors.json"


def cases() -> dict[str, dict[str, Any]]:
    """Return the settings of every case by name."""
    return json.loads(INDEX.read_text())["cases"]


def tensors(case: str) -> dict[str, np.ndarray]:
    """Return a case's tensors by name."""
    return load_file(HERE / f"{case}.safetensors")
