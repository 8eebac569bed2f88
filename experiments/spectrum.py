"""Is the change of fine-tuning of low rank? `python -m experiments.spectrum --full RUN --lora RUN`.

Needs both runs (`make train-lora train-full`) on mini; `--short` makes its own. Takes the singular
values of W(full) - W(base) and of LoRA's scaling * B A, beside a random matrix of the same shape,
and the full model's perplexity when the change of each block's matrices is cut to rank k.
"""

import torch
from torch import Tensor

from experiments import common
from experiments.common import BLUE, GREY, RED, YELLOW, panels, parse, save
from model.weights import load_gpt2

SEEN = {"attn.c_attn": BLUE, "mlp.c_proj": YELLOW}
RANKS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
QUICK = {"batch_size": 4, "block_size": 128, "stride": 128, "max_steps": 8, "lr": 1e-3}


def energy(change: Tensor) -> Tensor:
    """The share of the squared norm that the k largest singular values hold, k = 1, 2, ..."""
    squares = torch.linalg.svdvals(change).square().cumsum(0)
    return squares / squares[-1]


@torch.no_grad()
def truncated(made, base: dict[str, Tensor], full: dict[str, Tensor], ranks) -> dict[int, float]:
    """The perplexity by the rank of the change of the blocks' matrices; the rest is full's."""
    made.model.load_state_dict(full)
    parts = {name: torch.linalg.svd(full[name] - base[name], full_matrices=False)
             for name, p in base.items() if name.startswith("h.") and p.ndim == 2}
    result = {}
    for k in ranks:
        for name, (u, s, vh) in parts.items():
            made.model.get_parameter(name).copy_(base[name] + (u[:, :k] * s[:k]) @ vh[:k])
        result[k] = made.evaluate().perplexity
    return result


@torch.no_grad()
def main(argv: list[str] | None = None) -> dict:
    args = parse(__doc__, argv, full="runs/full", lora="runs/lora")
    made, adapted = (common.trainer(method, **QUICK) for method in ("full", "lora"))
    base = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    if args.short:
        for run in (made, adapted):
            for batch in run.batches():
                with torch.enable_grad():
                    run.step(batch)
        full = {name: p.clone() for name, p in made.model.named_parameters()}
        lora = common.updates(adapted.model)
    else:
        full = dict(load_gpt2(args.full).named_parameters())
        lora = common.adapter_updates(args.lora)
    torch.manual_seed(0)
    data = {"random": {}, "full": {}, "lora": {}}
    figure, (left, right) = panels(2, "How near to low rank is the change of fine-tuning? (mini)")
    for target, colour in SEEN.items():
        names = [name for name in base if name.endswith(f"{target}.weight")]
        for kind, changes, line in (("full", {n: full[n] - base[n] for n in names}, "-"),
                                    ("lora", {n: lora[n] for n in names if n in lora}, ":"),
                                    ("random", {"": torch.randn_like(base[names[0]])}, "--")):
            if not changes:
                continue  # LoRA's defaults adapt c_attn only
            shares = torch.stack([energy(change) for change in changes.values()]).mean(0)
            data[kind][target] = shares.tolist()
            print(f"{target}: {kind}: 8 hold {shares[7]:.1%}, 32 hold {shares[31]:.1%}")
            left.plot(range(1, len(shares) + 1), 100 * shares, line, label=f"{target}: {kind}",
                      color=RED if kind == "lora" else colour, linewidth=2)
    left.set(xscale="log", xlabel="k largest singular values", ylim=(0, 103),
             title="their share of the change's squared norm, %")
    left.set_xticks(RANKS[1:], RANKS[1:])
    left.minorticks_off()
    left.legend(fontsize=8)
    cut = data["truncated"] = truncated(made, base, full, (0, 32, 256) if args.short else RANKS)
    right.plot([max(k, 0.5) for k in cut], cut.values(), "o-", color=BLUE)
    right.axhline(cut[256], color=GREY, linestyle="--", label="uncut")
    right.set(xscale="log", xlabel="rank to which each block matrix's change is cut",
              title="perplexity after full fine-tuning, cut")
    right.set_xticks([0.5, *RANKS[1:]], RANKS)
    right.legend()
    right.minorticks_off()
    save(args, "spectrum", data, figure)
    print("perplexity by rank:", cut)
    return data


if __name__ == "__main__":
    main()
