"""Where do the bytes of a step go? `python -m lesson.experiments.memory`

Varied: full fine-tuning, and LoRA on c_attn at rank 8.
Fixed: a GPT-2 of 6 layers of width 512, in fp32, on 8 windows of 128 random tokens.
Measured: the resident memory that each stage of a first step adds, in a process of its own; beside
it the bytes counted by hand, as docs/lora.md does. Needs Linux.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch

from common.figures import BASE, FULL, LORA, OTHER
from lesson.experiments.common import panels, parse, save
from lora.inject import inject
from lora.layer import LoRAConfig
from model.fast import accelerate
from model.gpt2 import GPT2, GPT2Config

PARTS = {"weights": BASE, "activations": FULL, "gradients": OTHER, "AdamW moments": LORA}
KEPT = {"full": 16, "lora": 11}  # vectors of n_embd a token and layer: docs/lora.md counts them
CONFIG = GPT2Config(
    vocab_size=8192,
    n_positions=256,
    n_embd=512,
    n_layer=6,
    n_head=8,
    embd_pdrop=0,
    attn_pdrop=0,
    resid_pdrop=0,
)
BATCH = 8
BLOCK = 128
STATM = Path("/proc/self/statm")  # Linux: pages, the second number is resident


def predicted(method: str, config: GPT2Config, tokens: int, r: int = 8) -> dict[str, int]:
    """Count bytes by hand; of the activations, the terms above one part in a hundred."""
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
        "activations": 4 * tokens * C * KEPT[method] * L,
        "gradients": 4 * trained,
        "AdamW moments": 8 * trained,
    }


def resident() -> int:
    """Return the bytes of memory that this process holds."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measured(method: str, config: GPT2Config) -> dict[str, int]:
    """Return the bytes, but for temporary buffers, that each stage of a first step adds here."""
    before = resident()
    model = GPT2(config)
    if method == "lora":
        inject(model, LoRAConfig(lora_dropout=0.0))
    accelerate(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    made = resident()

    hidden = model.hidden(torch.randint(CONFIG.vocab_size, (BATCH, BLOCK)))
    forward = resident()

    hidden.square().mean().backward()
    del hidden
    backward = resident()

    optimizer.step()
    after = resident()
    return {
        "weights": made - before,
        "activations": forward - made,
        "gradients": backward - made,
        "AdamW moments": after - backward,
    }


def main(argv: Sequence[str] | None = None) -> dict:
    args = parse(__doc__, argv)
    if not STATM.exists():
        print("left out: resident memory is read from Linux's /proc")
        return {}

    config = CONFIG
    if args.short:
        config = replace(CONFIG, n_layer=2)
    data = {}
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # for the child: freed memory goes back
    with ProcessPoolExecutor(1, get_context("spawn")) as child:  # one for both
        for method in KEPT:
            child.submit(measured, method, replace(config, n_layer=1))  # warms up
            data[method] = {
                "predicted": predicted(method, config, BATCH * BLOCK),
                "measured": child.submit(measured, method, config).result(),
            }

    figure, axes = panels(
        f"Bytes by hand (dark) and measured (light); fp32, {config.n_layer} "
        f"layers of width {config.n_embd}, {BATCH * BLOCK:,} tokens",
        "full fine-tuning",
        "LoRA, c_attn, r = 8",
    )
    for axis, sides in zip(axes, data.values(), strict=True):
        for side, x, alpha in (("predicted", -0.2, 1), ("measured", 0.2, 0.55)):
            megabytes = [sides[side][part] / 1e6 for part in PARTS]
            bars = axis.bar(torch.arange(4) + x, megabytes, 0.38, color=PARTS.values(), alpha=alpha)
            axis.bar_label(bars, fmt="{:,.1f}", fontsize=8)
        axis.set_ylabel("MB")
        axis.set_xticks(range(4), PARTS, fontsize=9)
    axes[1].sharey(axes[0])
    return save(args, "memory", data, figure)


if __name__ == "__main__":
    main()
