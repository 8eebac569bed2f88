"""Where do the bytes of a step go? `python -m lesson.experiments.memory`

Varied: full fine-tuning, and LoRA on c_attn at rank 8.
Fixed: a GPT-2 124M with random weights, in fp32, on 16 windows of 128 random tokens. Their
values do not change the bytes. The step has no dropout and no head, because their memory depends on
the kernels. The loss is the mean square of the hidden states.
Measured: the bytes of the tensors that a step keeps, by purpose, beside the bytes counted by hand
as in docs/training.md.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from common.figures import INK, METHODS
from lesson.experiments.common import as_command, experiment, gradient, panels
from lesson.figures import shades
from lora.config import LoRAConfig
from lora.inject import inject
from model.gpt2 import GPT2, GPT2Config
from model.kernels.fast import set_kernels

NAMES = {"full": "full fine-\ntuning", "lora": "LoRA,\nc_attn,\nrank 8"}
KEPT = {"full": 16, "lora": 11}  # vectors of n_embd per token and layer (docs/training.md)
PARTS = ("weights", "gradients", "AdamW moments", "activations")
CONFIG = GPT2Config(embd_pdrop=0, attn_pdrop=0, resid_pdrop=0)
BATCH = 16
BLOCK = 128


def predicted(method: str, config: GPT2Config, tokens: int, r: int = 8) -> dict[str, int]:
    """Count bytes by hand. The count of activations leaves out terms below one percent."""
    C = config.n_embd
    L = config.n_layer
    base = L * (12 * C * C + 13 * C) + (config.vocab_size + config.n_positions + 2) * C
    adapter = 0
    trained = base
    if method == "lora":
        adapter = L * r * (C + 3 * C)
        trained = adapter
    return {
        "weights": 4 * (base + adapter),
        "gradients": 4 * trained,
        "AdamW moments": 8 * trained,
        "activations": 4 * tokens * C * KEPT[method] * L,
    }


def measured(method: str, config: GPT2Config) -> dict[str, int]:
    """Take a step. Return the bytes of the tensors that the step keeps, by part."""
    model = GPT2(config)
    if method == "lora":
        inject(model, LoRAConfig(target_modules=("c_attn",)))
    set_kernels(model, "fast")
    weights = list(model.parameters())
    trained = [p for p in weights if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)

    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.hidden(torch.randint(config.vocab_size, (BATCH, BLOCK)))
    of_weights = storages(weights)
    activations = {at: size for at, size in storages(kept).items() if at not in of_weights}

    hidden.square().mean().backward()
    optimizer.step()
    moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
    return {
        "weights": sum(of_weights.values()),
        "gradients": sum(storages(gradient(p) for p in trained).values()),
        "AdamW moments": sum(storages(moments).values()),
        "activations": sum(activations.values()),
    }


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return the bytes of storages by address, so that a view adds nothing."""
    found = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def measure() -> dict[str, Any]:
    data = {}
    for method in KEPT:
        data[method] = {
            "predicted": predicted(method, CONFIG, BATCH * BLOCK),
            "measured": measured(method, CONFIG),
        }
    return data


def draw(data: dict[str, Any]) -> Any:
    """Draw a bar for each method, with its parts and the error of the count by hand."""
    figure, (axis,) = panels(
        "The tensors of a training step of GPT-2 124M, in MB",
        f"Measured in fp32, {BATCH} windows of {BLOCK} tokens, AdamW, without dropout and without "
        "the head. In brackets: the error of a count by hand.",
        height=3.8,
    )
    for row, (method, sides) in enumerate(data.items()):
        whole = sum(sides["measured"].values()) / 1e6
        draw_bar(axis, row, sides, shades(METHODS[method], len(PARTS)))
        axis.text(whole, row, f"  {whole:,.0f} MB", va="center", fontsize=11)
    axis.set_yticks(range(len(data)), [NAMES[method] for method in data])
    axis.set(ylim=(1.5, -0.5), xmargin=0.15, xlabel="MB")
    axis.grid(visible=False, axis="y")
    return figure


def draw_bar(axis: Any, row: int, sides: dict[str, dict[str, int]], colours: list[str]) -> None:
    """Draw one method's parts side by side. Names of small parts are above the bar."""
    whole = sum(sides["measured"].values())
    left = 0
    small = []
    for part, colour in zip(PARTS, colours, strict=True):
        found = sides["measured"][part]
        axis.barh(row, found / 1e6, 0.5, left / 1e6, color=colour)
        words = describe(found, sides["predicted"][part])
        if found < 0.05 * whole:
            small.append(f"{part} {words}")
        else:
            words_colour = INK if part == PARTS[-1] else "w"
            style = {"color": words_colour, "ha": "center", "va": "center", "fontsize": 9}
            axis.text((left + found / 2) / 1e6, row, f"{part}\n{words}", **style)
        left += found
    if small:
        place = (sides["measured"]["weights"] / 1e6, row - 0.25)
        arrow = {"arrowstyle": "-|>", "color": INK}
        axis.annotate(", ".join(small), place, (0.01 * whole / 1e6, row - 0.42), arrowprops=arrow)


def describe(found: int, by_hand: int) -> str:
    """Return the megabytes, and the relative error of the count by hand."""
    digits = 2 if found < 1e7 else 0
    percent = round(100 * (by_hand / found - 1), 1) + 0.0  # avoids -0.0
    return f"{found / 1e6:,.{digits}f} ({percent:+.1f} %)"


def main(argv: Sequence[str] | None = None) -> dict:
    return experiment("memory", measure, draw, __doc__, argv)


if __name__ == "__main__":
    as_command(main)
