"""The tables of docs/findings.md."""

from collections.abc import Iterator, Sequence

from lesson.experiments.intruders import kl_at, scaled
from lesson.experiments.rates import vertex
from lesson.experiments.smollm2 import at_full_change
from lesson.experiments.sweep import best_rate
from lesson.tables.stored import at_best, gap, means, range_at_best, rate, results, table


@table
def rate_ratios() -> Iterator[str]:
    """LoRA's best rate divided by full fine-tuning's best rate."""
    fixed, growing, _, full = results("scaling").values()
    shares = results("regret")["by share"]
    little, little_full = (shares[name]["2048"]["validation"] for name in ("r = 8", "full"))
    tuned, _, tuned_full = (runs for name, runs in results("methods").items() if "make" not in name)
    yield "| LoRA | run | LoRA's best rate / full fine-tuning's best rate |"
    yield "|---|---|---:|"
    for label, loras, base in (
        ("all layers, rank 1, 8, 64, alpha 16 | 60 steps of 4 windows", fixed.values(), full),
        ("all layers, rank 1, 8, 64, alpha 2, 16, 128 | the same", growing.values(), full),
        ("`c_attn`, rank 20, alpha 16 | the same", [results("targets")["c_attn: r = 20"]], full),
        (
            "all layers, rank 8, alpha 16 | 240 steps of 1 window on a sixteenth of the book "
            "(23 passes)",
            *([little], little_full),
        ),
        (
            "all layers, rank 8, alpha 16 | 249 steps of 2 windows (3 passes), "
            "[tuned runs](experiments.md#each-method-at-its-best-rate)",
            *([tuned], tuned_full),
        ),
    ):
        yield f"| {label} | {', '.join(f'{vertex(lora) / vertex(base):.0f}' for lora in loras)} |"


@table
def gaps_by_batch() -> Iterator[str]:
    full, large, small = results("regret")["by batch"].values()
    yield "| windows per step (steps) | full | r = 64 | gap | r = 8 | gap |"
    yield "|---|---:|---:|---:|---:|---:|"
    for windows, runs in full.items():
        cells = [range_at_best(runs)]
        for lora in (large[windows], small[windows]):
            cells += [range_at_best(lora), f"{gap(lora, runs):.2f}"]
        yield f"| {windows} ({240 // int(windows)}) | {' | '.join(cells)} |"


@table
def gaps_by_share() -> Iterator[str]:
    methods = results("regret")["by share"]
    texts = {"128": "all (21,230, 1.4)", "2048": "a sixteenth (1,340, 23)"}
    yield "| text (tokens, passes) | | full | r = 64 | r = 8 | r = 1 |"
    yield "|---|---|---:|---:|---:|---:|"
    for share, label in texts.items():
        losses = [f"{at_best(found[share]['training']):.2f}" for found in methods.values()]
        full, *lora = (found[share]["validation"] for found in methods.values())
        cells = [f"{at_best(runs):.1f} ({gap(runs, full):.2f})" for runs in lora]
        yield f"| {label} | training loss | {' | '.join(losses)} |"
        yield f"| | perplexity (gap) | {at_best(full):.1f} | {' | '.join(cells)} |"


RUNS = {  # of the table of intruders
    "c_attn, r = 8": "`c_attn`, r = 8, 8e-3",
    "r = 1": "r = 1, 8e-3",
    "r = 1, half the rate": "r = 1, 4e-3",
    "r = 8": "r = 8, 8e-3",
    "r = 8, half the rate": "r = 8, 4e-3",
    "r = 64": "r = 64, 8e-3",
    "r = 64, half the rate": "r = 64, 4e-3",
    "full": "full, 1e-3",
    "full, half the rate": "full, 5e-4",
    "full, an eighth of the rate": "full, 1.25e-4",
}


@table
def intruders() -> Iterator[str]:
    yield (
        "| run, rate | intruders, by seed | as trained: perplexity, KL "
        "| intruders x 0.75: perplexity, KL | control: KL "
        "| the whole change x 0.9: perplexity, KL |"
    )
    yield "|---|---:|---|---|---:|---|"
    found = results("intruders")
    for name, label in RUNS.items():
        seeds = found[name]
        counts = ", ".join(str(seed["intruders"]) for seed in seeds)
        trained, less, *_ = zip(*scaled(seeds, "change scaled"), strict=True)
        cells = f"| {label} | {counts} | {both(trained)} |"
        if all(seed["intruders scaled"] for seed in seeds):
            shrunk = means([seed["intruders scaled"]["0.75"] for seed in seeds])
            control = kl_at(shrunk[0], seeds)
            yield f"{cells} {both(shrunk)} | {control:.3f} | {both(less)} |"
        else:
            yield f"{cells} | | {both(less)} |"


def both(scores: Sequence[float]) -> str:
    perplexity, kl = scores
    return f"{perplexity:.1f}, {kl:.3f}"


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
