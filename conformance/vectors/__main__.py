"""Write the test vectors: `python -m conformance.vectors [--out DIRECTORY]`."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from conformance.derive import (
    BETA1,
    BETA2,
    EPS,
    LR,
    STEPS,
    WEIGHT_DECAY,
    AdamW,
    Array,
    DoRA,
    Fused,
    LoRA,
    loss_and_gradient,
    round_to_bf16,
)
from conformance.vectors import HERE, INDEX

PLAIN = {
    "in": 6,
    "out": 5,
    "r": 4,
    "alpha": 6,
    "use_rslora": False,
    "use_dora": False,
    "dropout": 0.0,
    "layout": "(out, in)",
    "slices": [],
    "base": "fp64",
}
CASES = {
    "lora": PLAIN,
    "lora-r1-alpha1": PLAIN | {"r": 1, "alpha": 1},
    "lora-r2-alpha32": PLAIN | {"r": 2, "alpha": 32},
    "rslora": PLAIN | {"use_rslora": True},
    "dora": PLAIN | {"use_dora": True, "r": 2},
    "dropout": PLAIN | {"dropout": 0.5},
    "in-out": PLAIN | {"layout": "(in, out)"},
    "in-out-square": PLAIN | {"layout": "(in, out)", "out": 6},
    "dora-in-out-square": PLAIN | {"layout": "(in, out)", "out": 6, "use_dora": True, "r": 2},
    "fused-qv": PLAIN | {"out": 12, "r": 2, "slices": [0, 2]},
    "bf16-base": PLAIN | {"base": "bf16"},
}
TWO_LAYERS = "two-layers"
LAYERS = [PLAIN | {"r": 1, "alpha": 2, "out": 7}, PLAIN | {"r": 3, "alpha": 12, "in": 7}]

ABOUT = {
    "format": "All tensors are fp64 and row-major. `cases` has the settings of each case. The "
    "tensors are in the file of the case's name.",
    "tensors": {
        "x": "input (n, in)",
        "W, b": "the frozen base. W is in the case's layout, (out, in) or (in, out)",
        "A, B": "factors (r, in) and (out, r). Fused: (slices, r, in) and (slices, out / 3, r)",
        "m": "DoRA's magnitude (out,), no longer at its start",
        "mask": "dropout's mask (n, in). Kept elements are divided by 1 - dropout",
        "y": "output (n, out)",
        "target": "L = mean((y - target)^2)",
        "dA, dB, dm, dx": "gradients of L. DoRA's norm counts as a constant",
        "merged_W": "W with the update, in the case's layout",
        "merged_W_bf16": "bf16 bases: merged_W rounded once to bf16",
        "losses": "L before each of the ten steps",
        "A_steps, B_steps, m_steps": "the parameters after each step, (10, ...)",
    },
    "two-layers": "y = layer1(relu(layer0(x))). The names of tensors end in the layer's number.",
    "steps": {
        "optimizer": "AdamW on the same batch, with the same mask",
        "lr": LR,
        "betas": [BETA1, BETA2],
        "eps": EPS,
        "weight_decay": WEIGHT_DECAY,
        "count": STEPS,
    },
}


def draw(rng: np.random.Generator, *shape: int) -> Array:
    """Return multiples of 1/64 between -1 and 1, which are also exact in bf16."""
    return rng.integers(-64, 65, shape) / 64


def inputs(rng: np.random.Generator, settings: Mapping[str, Any], n: int = 7) -> dict[str, Array]:
    """Draw x, W (out, in), b, A, B, the target, and other tensors that the settings need."""
    fan_in, fan_out, r = settings["in"], settings["out"], settings["r"]
    drawn = {
        "x": draw(rng, n, fan_in),
        "W": draw(rng, fan_out, fan_in),
        "b": draw(rng, fan_out),
        "target": draw(rng, n, fan_out),
    }
    if settings["slices"]:
        count = len(settings["slices"])
        drawn |= {"A": draw(rng, count, r, fan_in), "B": draw(rng, count, fan_out // 3, r)}
    else:
        drawn |= {"A": draw(rng, r, fan_in), "B": draw(rng, fan_out, r)}
    if settings["use_dora"]:
        drawn["m"] = 1 + draw(rng, fan_out) / 2
    if settings["dropout"]:
        drawn["mask"] = rng.integers(0, 2, (n, fan_in)).astype(np.float64)
    return drawn


def layer_of(settings: Mapping[str, Any], drawn: Mapping[str, Array]) -> LoRA | Fused:
    if settings["slices"]:
        return Fused(settings, drawn)
    return (DoRA if settings["use_dora"] else LoRA)(settings, drawn)


def one_layer(rng: np.random.Generator, settings: Mapping[str, Any]) -> dict[str, Array]:
    """Return a case's tensors."""
    made = inputs(rng, settings)
    layer = layer_of(settings, made)
    made["y"] = layer.forward(made["x"])
    _, g = loss_and_gradient(made["y"], made["target"])
    made |= layer.gradients(made["x"], g)
    made["merged_W"] = layer.merged()
    if settings["base"] == "bf16":
        made["merged_W_bf16"] = round_to_bf16(made["merged_W"])

    made |= ten_steps([layer], made["x"], made["target"], [""])
    if settings["layout"] == "(in, out)":
        made |= {name: made[name].T for name in ("W", "merged_W")}
    return made


def two_layers(rng: np.random.Generator) -> dict[str, Array]:
    """Return the tensors of two layers of different rank and alpha, with a ReLU between."""
    drawn = [inputs(rng, settings) for settings in LAYERS]
    layers = [layer_of(*pair) for pair in zip(LAYERS, drawn, strict=True)]
    x, target = drawn[0]["x"], drawn[1]["target"]
    made = {"x": x, "target": target, "y": chain(layers, x)[-1]}
    gradients = chain_gradients(layers, x, target)[1]
    for i, layer in enumerate(layers):
        made |= {f"{name}{i}": layer.t[name] for name in ("W", "b", "A", "B")}
        made |= {f"{name}{i}": gradients[i][name] for name in ("dA", "dB")}
        made[f"merged_W{i}"] = layer.merged()
    made["dx"] = gradients[0]["dx"]
    return made | ten_steps(layers, x, target, ["0", "1"])


def chain(layers: list[Any], x: Array) -> list[Array]:
    """Return the input of each layer, and the output."""
    values = [x]
    for i, layer in enumerate(layers):
        if i > 0:
            values[-1] = np.maximum(values[-1], 0)  # ReLU
        values.append(layer.forward(values[-1]))
    return values


def chain_gradients(layers: list[Any], x: Array, target: Array) -> tuple[float, list[Any]]:
    """Return the loss, and each layer's gradients."""
    values = chain(layers, x)
    loss, g = loss_and_gradient(values[-1], target)
    found: list[Any] = []
    for layer, inner in zip(reversed(layers), reversed(values[:-1]), strict=True):
        found.insert(0, layer.gradients(inner, g))
        g = found[0]["dx"] * (inner > 0)  # through the ReLU
    return loss, found


def ten_steps(layers: list[Any], x: Array, target: Array, names: list[str]) -> dict[str, Array]:
    """Train the layers. Return the losses, and every parameter after each step."""
    optimizers = [AdamW() for _ in layers]
    start = [dict(layer.t) for layer in layers]
    losses = []
    seen: dict[str, list[Array]] = {}
    for _ in range(STEPS):
        loss, gradients = chain_gradients(layers, x, target)
        losses.append(loss)
        for layer, optimizer, found, suffix in zip(
            layers, optimizers, gradients, names, strict=True
        ):
            parameters = {name: layer.t[name] for name in layer.trained}
            optimizer.step(parameters, found)
            layer.t |= parameters
            for name, value in parameters.items():
                seen.setdefault(f"{name}_steps{suffix}", []).append(value)
    for layer, tensors in zip(layers, start, strict=True):
        layer.t = tensors
    return {"losses": np.array(losses)} | {name: np.stack(value) for name, value in seen.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="conformance.vectors", description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, metavar="DIRECTORY")
    out = parser.parse_args(argv).out
    made = {name: one_layer(np.random.default_rng(7), s) for name, s in CASES.items()}
    made[TWO_LAYERS] = two_layers(np.random.default_rng(7))
    for name, tensors in made.items():
        contiguous = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
        save_file(contiguous, out / f"{name}.safetensors")
    described = ABOUT | {"cases": CASES | {TWO_LAYERS: {"layers": LAYERS}}}
    (out / INDEX.name).write_text(json.dumps(described, indent=1) + "\n")


if __name__ == "__main__":
    main()
