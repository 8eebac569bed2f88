"""Provide what experiments share: options, a trainer on mini, data saved beside a picture."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from common.device import Device
from common.figures import BLUE, GREY, RED, YELLOW, pyplot, save_figure  # noqa: F401 (for all)
from lora.adapter import load_adapter
from lora.inject import lora_layers
from model.hub import find_base
from model.tokenizer_files import load_tokenizer
from model.weights import load_gpt2
from train import Trainer
from training.build import build_model, load_data
from training.options import ROOT, parse_options


def parse(description: str, argv: list[str] | None, seeds: int = 0, **paths: str):
    """Read an experiment's options; `paths` names further ones, each a path with a default."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a small version, in seconds")
    parser.add_argument("--out", type=Path, help="default: docs/figures; --short: runs/figures")
    if seeds:
        parser.add_argument("--seeds", type=int, default=seeds, help="how many (%(default)s)")
    for name, default in paths.items():
        parser.add_argument(f"--{name}", type=Path, default=ROOT / default, metavar="RUN")
    args = parser.parse_args(argv)
    args.out = args.out or ROOT / ("runs" if args.short else "docs") / "figures"
    return args


def trainer(method: str = "lora", seed: int = 0, precision: str = "fp32",
            **options: object) -> Trainer:
    """Make what `train.py` trains: mini on the default book, on the CPU, no dropout."""
    chosen = replace(parse_options("-", [method, "--base", "mini"]), lora_dropout=0.0, seed=seed,
                     **options)
    directory = find_base("mini")[1]
    torch.manual_seed(seed)
    model, _ = build_model(chosen, directory)
    model.train()
    tokenizer = load_tokenizer(directory, model.config.vocab_size)
    return Trainer(chosen, Device.pick("cpu", precision, train=True), model, tokenizer,
                   *load_data(chosen, model.config, tokenizer))


def mean_loss(made: Trainer, batch) -> Tensor:
    """The mean loss over the tokens of these windows, nats."""
    inputs, targets = made.windows.batch(batch)  # (B, T) each
    return made.summed_loss(inputs, targets) / targets.numel()


def updates(model: nn.Module) -> dict[str, Tensor]:
    """Every LoRA layer's scaling * B A (out, in), by the name of the weight it is added to."""
    return {f"{name}.weight": layer.delta_weight() for name, layer in lora_layers(model).items()}


def adapter_updates(run: Path) -> dict[str, Tensor]:
    """The updates of a run's adapter on mini."""
    model = load_gpt2(find_base("mini")[1])
    load_adapter(model, run)
    return updates(model)


def save(args: argparse.Namespace, name: str, data: dict, figure) -> None:
    """Write NAME.json, a line a key, with five digits a number, and NAME.png."""
    args.out.mkdir(parents=True, exist_ok=True)
    data = json.loads(json.dumps(data), parse_float=lambda text: float(f"{float(text):.5g}"))
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in data.items())
    (args.out / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    save_figure(figure, args.out / f"{name}.png")
    print(f"saved {args.out / name}.json and .png")


def panels(count: int, title: str):
    """A figure of `count` panels in a row."""
    figure, (axes,) = pyplot.subplots(1, count, figsize=(max(7.2, 4.9 * count), 4.2),
                                      layout="constrained", squeeze=False)
    figure.suptitle(title, fontsize=12)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes
