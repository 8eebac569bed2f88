"""A LoRA layer in NumPy. Write its results for `python -m lora_conformance compare FOLDER`:

python numpy_layer.py FOLDER
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

# In a copy at another place, write the path of conformance/vectors here.
VECTORS = Path(__file__).resolve().parents[1] / "vectors"
CASES = ["lora", "lora-r1-alpha1", "lora-r2-alpha32", "rslora", "dropout"]


def layer(settings, t):
    """Return the results by name. To test your layer, call it here."""
    r, alpha = settings["r"], settings["alpha"]
    s = alpha / r**0.5 if settings["use_rslora"] else alpha / r
    keep = t["mask"] / (1 - settings["dropout"]) if "mask" in t else 1
    h = t["x"] * keep
    y = t["x"] @ t["W"].T + t["b"] + s * h @ t["A"].T @ t["B"].T
    g = 2 * (y - t["target"]) / y.size  # the gradient of the mean squared error
    return {
        "y": y,
        "dA": s * (g @ t["B"]).T @ h,
        "dB": s * g.T @ (h @ t["A"].T),
        "dx": g @ t["W"] + s * (g @ t["B"] @ t["A"]) * keep,
        "merged_W": t["W"] + s * t["B"] @ t["A"],
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    settings = json.loads((VECTORS / "vectors.json").read_text())["cases"]
    for case in CASES:
        results = layer(settings[case], load_file(VECTORS / f"{case}.safetensors"))
        # safetensors would save a transposed array in the wrong order
        contiguous = {name: np.ascontiguousarray(value) for name, value in results.items()}
        save_file(contiguous, folder / f"{case}.safetensors")
