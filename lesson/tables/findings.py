"""The tables of docs/findings.md."""

from collections.abc import Iterator

from lesson.experiments.rates import vertex
from lesson.experiments.smollm2 import at_full_change
from lesson.experiments.sweep import best_rate
from lesson.tables.stored import rate, results, table


@table
def rate_ratios() -> Iterator[str]:
    """LoRA's best rate divided by full fine-tuning's best rate."""
    fixed, growing, _, full = results("scaling").values()
    tuned, _, tuned_full = (runs for name, runs in results("methods").items() if "make" not in name)
    yield "| LoRA | run | LoRA's best rate / full fine-tuning's best rate |"
    yield "|---|---|---:|"
    for label, loras, base in (
        ("all layers, rank 1, 8, 64, alpha 16 | 60 steps of 4 windows", fixed.values(), full),
        ("all layers, rank 1, 8, 64, alpha 2, 16, 128 | the same", growing.values(), full),
        ("`c_attn`, rank 20, alpha 16 | the same", [results("targets")["c_attn: r = 20"]], full),
        (
            "all layers, rank 8, alpha 16 | 249 steps of 2 windows (3 passes), "
            "[tuned runs](experiments.md#each-method-at-its-best-rate)",
            *([tuned], tuned_full),
        ),
    ):
        yield f"| {label} | {', '.join(f'{vertex(lora) / vertex(base):.0f}' for lora in loras)} |"


@table
def smollm2() -> Iterator[str]:
    trained = {
        "base, instructions": "on conversations: nothing",
        "full": "all weights",
        "LoRA": "LoRA on all linear layers, r = 8",
        "r = 1, alpha 16": "LoRA on all linear layers, r = 1",
        "r = 64, alpha 16": "LoRA on all linear layers, r = 64",
        "attention, r = 33": "LoRA on attention, r = 33",
        "MLP, r = 20": "LoRA on the MLP, r = 20 (as many parameters as the row above)",
        "r = 64, alpha 128": "LoRA on all linear layers, r = 64, alpha 128",
        "base, book": "on the book: nothing",
        "full, book": "all weights",
        "LoRA, book": "LoRA on all linear layers, r = 8",
    }
    yield "| trained | best rate | perplexity | KL, nats per token |"
    yield "|---|---:|---:|---:|"
    for name, label in trained.items():
        found = results("smollm2")[name]
        if name.startswith("base"):
            yield f"| {label} | | {found['perplexity']:.1f} | 0 |"
            continue
        lr = best_rate(found, at_full_change)
        perplexities = ", ".join(f"{seed[0]['perplexity']:.1f}" for seed in found[lr])
        kls = ", ".join(f"{seed[0]['kl']:.2f}" for seed in found[lr])
        yield f"| {label} | {rate(lr)} | {perplexities} | {kls} |"
