"""Write the test vectors: `python -m generators.vectors [--out DIRECTORY]`."""

import argparse
import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from generators.about import ABOUT
from generators.derive import (
    STEPS,
    AdamW,
    Array,
    DoRA,
    Fused,
    LoRA,
    adapted_rows,
    loss_and_gradient,
    matmul,
    round_to_bf16,
    round_to_nf4,
)
from lora_conformance.vectors import HERE, INDEX

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
# Grouped queries: q is twice as wide as k and v. q and v of [q, k, v]:
CONTIGUOUS = [list(range(8)), list(range(12, 16))]
# q, k and v of two groups of heads [q, k, v, q, k, v]:
INTERLEAVED = [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]]
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
    "lora-64": PLAIN | {"in": 64, "out": 64, "r": 16, "alpha": 24},
    "nf4-base": PLAIN | {"in": 64, "base": "nf4"},
    "fused-grouped": PLAIN | {"out": 16, "r": 2, "slices": [0, 2], "rows": CONTIGUOUS},
    "fused-interleaved": PLAIN | {"out": 16, "r": 2, "slices": [0, 1, 2], "rows": INTERLEAVED},
    "no-bias": PLAIN | {"bias": False},
    "dora-dropout": PLAIN | {"use_dora": True, "r": 2, "dropout": 0.5},
    "dora-rslora": PLAIN | {"use_dora": True, "r": 3, "use_rslora": True},
    "lora-96x40": PLAIN | {"in": 96, "out": 40, "r": 8, "alpha": 20},
    "dora-in-out-40x96": PLAIN
    | {"in": 40, "out": 96, "r": 6, "use_dora": True, "layout": "(in, out)"},
}
TWO_LAYERS = "two-layers"
LAYERS = [PLAIN | {"r": 1, "alpha": 2, "out": 7}, PLAIN | {"r": 3, "alpha": 12, "in": 7}]
EXPERTS = "experts"
MIXTURE = PLAIN | {"r": 2, "experts": 3}
ADAPTERS = [PLAIN | {"r": 2}, PLAIN | {"alpha": 10}, PLAIN | {"r": 3}]
SUMS = {
    f"sum-{name}": {
        "adapters": [settings | variant for settings in ADAPTERS],
        "weights": [1.0, -0.5, 2.0],
    }
    for name, variant in (
        ("lora", {}),
        ("rslora", {"use_rslora": True}),
        ("dora", {"use_dora": True}),
    )
}
LARGE = 1000  # with more weights, only the last of the ten steps is kept


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
        rows = adapted_rows(settings)
        shape = (sum(map(len, rows)),) if "rows" in settings else (len(rows), fan_out // 3)
        drawn |= {"A": draw(rng, len(rows), r, fan_in), "B": draw(rng, *shape, r)}
    else:
        drawn |= {"A": draw(rng, r, fan_in), "B": draw(rng, fan_out, r)}
    if settings["use_dora"]:
        drawn["m"] = 1 + draw(rng, fan_out) / 2
    if settings["dropout"]:
        drawn["mask"] = rng.integers(0, 2, (n, fan_in)).astype(np.float64)
    if settings["base"] == "nf4":
        drawn["W"] = round_to_nf4(drawn["W"])
        drawn["A"] /= 64  # so the update is small, as after training
    return drawn


def layer_of(settings: Mapping[str, Any], drawn: Mapping[str, Array]) -> LoRA | Fused:
    if settings["slices"]:
        return Fused(settings, drawn)
    return (DoRA if settings["use_dora"] else LoRA)(settings, drawn)


def one_layer(rng: np.random.Generator, settings: Mapping[str, Any]) -> dict[str, Array]:
    """Return a case's tensors."""
    made = inputs(rng, settings)
    if not settings.get("bias", True):
        made["b"] *= 0
    layer = layer_of(settings, made)
    made["y"] = layer.forward(made["x"])
    _, g = loss_and_gradient(made["y"], made["target"])
    made |= layer.gradients(made["x"], g)
    made["merged_W"] = layer.merged()
    if settings["base"] == "bf16":
        made["merged_W_bf16"] = round_to_bf16(made["merged_W"])
    if settings["base"] == "nf4":
        made["merged_W_nf4"] = round_to_nf4(made["merged_W"])

    steps = ten_steps([layer], made["x"], made["target"], [""])
    if made["W"].size > LARGE:
        steps = {k: v[-1:] if k.endswith("_steps") else v for k, v in steps.items()}
    made |= steps
    if settings["layout"] == "(in, out)":
        made |= {name: made[name].T for name in ("W", "merged_W")}
    if not settings.get("bias", True):
        del made["b"]
    return made


def experts(rng: np.random.Generator, settings: Mapping[str, Any]) -> dict[str, Array]:
    """Return the tensors of a mixture of experts, whose W is (experts, out, in), without a bias.

    Every expert gets the same x. A_peft and B_peft are A and B in the order of PEFT's files.
    """
    drawn = [inputs(rng, settings) for _ in range(settings["experts"])]
    x = drawn[0]["x"]
    layers = [LoRA(settings, one | {"b": np.zeros(settings["out"])}) for one in drawn]
    made = {name: np.stack([one[name] for one in drawn]) for name in ("W", "A", "B", "target")}
    made["A_peft"] = made["A"].reshape(-1, settings["in"])  # (experts * r, in)
    made["B_peft"] = made["B"].transpose(1, 2, 0).reshape(settings["out"], -1)  # (out, r * experts)
    made["y"] = np.stack([layer.forward(x) for layer in layers])
    _, g = loss_and_gradient(made["y"], made["target"])
    gradients = [layer.gradients(x, one) for layer, one in zip(layers, g, strict=True)]
    made |= {name: np.stack([one[name] for one in gradients]) for name in ("dA", "dB")}
    made["merged_W"] = np.stack([layer.merged() for layer in layers])
    made["dx"] = np.sum([one["dx"] for one in gradients], axis=0)
    return {"x": x} | made


def weighted_sum(rng: np.random.Generator, settings: Mapping[str, Any]) -> dict[str, Array]:
    """Return the tensors of several adapters of one layer. merged_W has the weighted sum of their
    updates.
    """
    drawn = [inputs(rng, one) for one in settings["adapters"]]
    made = {name: drawn[0][name] for name in ("x", "W", "b")}
    merged = made["W"]
    for i, (one, own, weight) in enumerate(
        zip(settings["adapters"], drawn, settings["weights"], strict=True)
    ):
        layer = layer_of(one, own | made)
        merged = merged + weight * (layer.merged() - made["W"])
        made |= {f"{name}{i}": own[name] for name in layer.trained}
    return made | {"y": matmul(made["x"], merged.T) + made["b"], "merged_W": merged}


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
    parser = argparse.ArgumentParser(prog="generators.vectors", description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, metavar="DIRECTORY")
    out = parser.parse_args(argv).out
    made = {name: one_layer(np.random.default_rng(7), s) for name, s in CASES.items()}
    made[TWO_LAYERS] = two_layers(np.random.default_rng(7))
    made[EXPERTS] = experts(np.random.default_rng(7), MIXTURE)
    made |= {name: weighted_sum(np.random.default_rng(7), s) for name, s in SUMS.items()}
    files = {}
    for name, tensors in made.items():
        contiguous = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
        data = save(contiguous)
        (out / f"{name}.safetensors").write_bytes(data)
        files[f"{name}.safetensors"] = sha256(data).hexdigest()
    cases = CASES | {TWO_LAYERS: {"layers": LAYERS}, EXPERTS: MIXTURE} | SUMS
    described = ABOUT | {"cases": cases, "sha256": files}
    (out / INDEX.name).write_text(json.dumps(described, indent=1) + "\n")


if __name__ == "__main__":
    main()
