"""The tables of the other pages."""

from collections.abc import Iterator
from statistics import mean

from benchmarks import speed
from lesson.experiments.common import spread
from lesson.tables.stored import benchmark, results, table


@table
def initialisation() -> Iterator[str]:
    runs = results("initialisation")["runs"]
    yield "| start | first loss | first norm of dA | first norm of dB | loss after 11 steps |"
    yield "|---|---:|---:|---:|---:|"
    for start, seeds in runs.items():
        first = [mean(run[what][0] for run in seeds) for what in ("loss", "A", "B")]
        last = [run["loss"][-1] for run in seeds]
        cells = [f"{x:.3f}".replace("0.000", "0") for x in first]
        if start == "both random":
            cells[0] = f"**+{cells[0]}**"
        end = spread(last, 3)
        if start == "both zero":
            cells[1:] = [f"**{x}**" for x in cells[1:]]
            assert not any(last)
            end = "**0 exactly**"
        yield f"| {start} | {' | '.join(cells)} | {end} |"


@table
def quantised_memory() -> Iterator[str]:
    found = results("quantised_memory")
    yield "| base | peak GB | peak GB with `--gradient-checkpointing` |"
    yield "|---|---:|---:|"
    for name, label in (("bf16", "bf16"), ("nf4", "NF4")):
        peaks = [found[key]["peak_mb"] / 1e3 for key in (name, f"{name}, checkpointing")]
        yield f"| {label} | {peaks[0]:.2f} | {peaks[1]:.2f} |"


@table
def quantised_losses() -> Iterator[str]:
    data = results("quantisation")
    yield "| base | error of the weights | loss before training | loss after training |"
    yield "|---|---:|---:|---:|"
    for kind, seeds in data["losses"].items():
        error = "0"
        if kind != "fp32":
            error = f"{100 * mean(data['error by layer'][kind].values()):.1f} %"
        before = spread([run["base"] for run in seeds], 4)
        after = spread([run["trained"] for run in seeds], 4)
        yield f"| {kind.replace('nf', 'NF')} | {error} | {before} | {after} |"


@table
def reference_runs() -> Iterator[str]:
    yield (
        "| text | added options | steps | token after next: base | LoRA | next token: base | LoRA |"
    )
    yield "|---|---|---:|---:|---:|---:|---:|"
    for name, label in (
        ("pseudo-latin", "pseudo-Latin |"),
        ("next-token", "pseudo-Latin | `--label-shift 1`"),
        ("three-passes", "pseudo-Latin | `--stride 128 --max-steps 93`"),
        ("english", "English | the same, and `--book data/book.txt`"),
    ):
        found = benchmark(f"reference-{name}")["here"]
        cells = [
            digits(found[model][loss]["perplexity"])
            for loss in ("reference", "next_token")
            for model in ("base", "lora")
        ]
        yield f"| {label} | {found['lora']['steps']} | {' | '.join(cells)} |"


def digits(perplexity: float) -> str:
    """Print at least four digits."""
    if perplexity < 10:
        return f"{perplexity:.3f}"
    if perplexity < 10_000:
        return f"{perplexity:,.1f}"
    return f"{perplexity:,.0f}"


@table
def race() -> Iterator[str]:
    yield f"| {' | '.join(speed.COLUMNS)} |"
    yield "|---|---:|---:|---:|---:|---:|"
    for cells in speed.table(benchmark("speed")["measurements"]):
        yield f"| {' | '.join(cells)} |"


@table
def bytes_counted() -> Iterator[str]:
    labels = (
        "weights | all",
        "gradients | trained",
        "AdamW's two moments | 2 x trained",
        "activations kept for the backward pass "
        "| 16 or 11 vectors of C numbers per token and block",
    )
    full, lora = ([*side["predicted"].values()] for side in results("memory").values())
    yield "| | numbers | full | LoRA, `c_attn` |"
    yield "|---|---|---:|---:|"
    for label, a, b in zip(
        (*labels, "total |"), (*full, sum(full)), (*lora, sum(lora)), strict=True
    ):
        yield f"| {label} | {megabytes(a)} | {megabytes(b)} |"


def megabytes(count: int) -> str:
    if count < 1e7:
        return f"{count / 1e6:.1f}"
    return f"{count / 1e6:,.0f}"
