"""Where a step's gradients lie in fp16's and bf16's range: `python -m experiments.gradients`.

One batch of the default book, LoRA on mini in fp32, B perturbed so that A's gradient is not zero.
Draws docs/figures/gradients.png and saves its data beside it.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from common.device import Device
from model.hub import find_base
from model.tokenizer_files import load_tokenizer
from train import Trainer, build_model, load_data
from training.options import parse_options
from training.report import pyplot, save_figure

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures"
FP16_SMALLEST, FP16_NORMAL, FP16_LARGEST = -24, -14, 16  # powers of two: subnormal, normal, above
SCALE = 16  # GradScaler starts at 2^16


def gradients(batch_size: int, seed: int) -> np.ndarray:
    """Return every trained parameter's gradient in the first step, of the mean loss over tokens."""
    options = replace(parse_options("-", ["lora", "--base", "mini", "--base-dropout", "0"]),
                      batch_size=batch_size, lora_dropout=0.0, seed=seed)
    _, directory = find_base(options.base)
    torch.manual_seed(seed)
    model, _ = build_model(options, directory)
    tokenizer = load_tokenizer(directory, model.config.vocab_size)
    trainer = Trainer(options, Device.pick("cpu", "fp32"), model, tokenizer,
                      *load_data(options, model.config, tokenizer))
    for key, parameter in trainer.parameters.items():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.01)
    inputs, targets = trainer.windows.batch(next(trainer.batches()))
    (trainer.summed_loss(inputs, targets) / targets.numel()).backward()
    return torch.cat([p.grad.flatten() for p in trainer.parameters.values()]).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, default=FIGURES)
    args = parser.parse_args()
    powers = np.log2(np.abs(gradients(args.batch_size, args.seed)) + 2.0**-60)
    lost = float((powers < FP16_SMALLEST - 1).mean())  # rounds to zero in fp16
    coarse = float(((powers >= FP16_SMALLEST - 1) & (powers < FP16_NORMAL)).mean())
    scaled = float((powers + SCALE < FP16_NORMAL).mean())
    result = {"gradients": len(powers), "median_log2": float(np.median(powers)),
              "zero_in_fp16": lost, "subnormal_in_fp16": coarse,
              "below_normal_after_scaling": scaled, "seed": args.seed}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gradients.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    draw(powers, args.out / "gradients.png")


def draw(powers: np.ndarray, path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    bins = np.arange(-45, 20)
    axes.hist(powers, bins, color="#d1495b", alpha=0.8, label="gradients of A and B, one step")
    axes.hist(powers + SCALE, bins, color="#00798c", alpha=0.5, label="the same, loss times 2^16")
    axes.axvspan(FP16_SMALLEST, FP16_NORMAL, color="#edae49", alpha=0.3,
                 label="fp16 subnormal: fewer bits")
    axes.axvspan(-45, FP16_SMALLEST, color="#6c757d", alpha=0.3, label="fp16: zero")
    axes.axvspan(FP16_LARGEST, 20, color="#30343f", alpha=0.4, label="fp16: infinity")
    axes.set(xlabel="log2 of a gradient's size", ylabel="how many", xlim=(-45, 20),
             title="bf16 reaches from 2^-133 to 2^128: this whole picture and more")
    axes.legend(loc="upper left", fontsize=8)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
