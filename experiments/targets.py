"""Compare target layers at one number of parameters: `python -m experiments.targets`.

Ranks are such that every choice trains 122,880 numbers on mini; alpha is 2 r. Two learning rates
each, of which the better counts.
"""

from experiments.common import RED, panels, parse, save
from experiments.sweep import finetune

RANKS = {("c_attn",): 20, ("attn.c_proj",): 40, ("c_fc",): 16, ("mlp.c_proj",): 16,
         ("c_fc", "mlp.c_proj"): 8, ("c_attn", "c_proj", "c_fc"): 5}
RATES = (3e-3, 1e-2)


def main(argv: list[str] | None = None) -> dict:
    args = parse(__doc__, argv, seeds=3)
    figure, (axis,) = panels(1, "Which layers? 122,880 numbers each (mini, 60 steps; bar: seeds)")
    data = {}
    for targets, r in RANKS.items():
        name = f"{', '.join(targets)}: r = {r}"
        data[name] = {lr: finetune("lora", args.seeds, args.short, r=r, lora_alpha=2 * r, lr=lr,
                                   target_modules=targets) for lr in RATES[args.short:]}
        best = min(data[name].values(), key=sum)
        mean = sum(best) / len(best)
        axis.plot([min(best), max(best)], [name, name], color=RED, linewidth=5)
        axis.annotate(f"{mean:.1f}", (mean, name), xytext=(0, 7), textcoords="offset points",
                      ha="center")
    axis.set(xlabel="validation perplexity at the better learning rate", ylim=(-0.5, 5.7))
    save(args, "targets", data, figure)
    return data


if __name__ == "__main__":
    main()
