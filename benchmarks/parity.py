"""Is this LoRA LoRA? The same training by this project and by PEFT, compared number by number.

`python -m benchmarks.parity` trains one base on one book twice, from the same initial adapter and
on the same batches: here by `train.py`'s own step, there by the loop in `peft_loop.py`. It
exits with 1 when a figure is above what it may be. `draws` seeds the dropouts, which both sides
draw in one order (`GPT2` in model/gpt2.py).
"""

import math
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from model.plain import plain_operations
from torch import Tensor, nn

from adapters.files import adapter_tensors, save_adapter
from adapters.merge import merge, unwrap
from benchmarks import ours, peft_loop
from benchmarks.parity_report import Report, largest, machine, relative, root_mean_square, snapshot
from common.cli import DEVICE, Parser, number
from common.device import Device
from common.errors import UserError, run_command
from model.hub import find_base
from model.weights import load_config, save_gpt2
from train import Trainer
from training.options import BOOK, Options
from training.report import count_parameters

CLOSE = 1e-5  # relative: the same computation, up to the order of its sums
LAST_BIT = 2.0**-23  # relative: fp32's unit in the last place
DROPOUT = ("--base-dropout", "0.1")  # GPT-2's own, on any base; mini's config turns them off
NO_DROPOUT = ("--base-dropout", "0", "--lora-dropout", "0")
DRAWS = (1, 2, 3)  # of the PEFT runs whose spread is measured; ours have 0
RESUMED_STEPS = 10


def main(argv: Sequence[str] | None = None) -> int:
    opts = parse_args(argv)
    torch.set_float32_matmul_precision("highest")  # an image may switch TF32 on
    began, report = time.perf_counter(), Report()
    print(
        f"base {opts.name}, {opts.steps} steps of {opts.batch_size} x {opts.block_size} tokens, "
        f"{machine()}; here: this project, there: PEFT and transformers"
    )
    compare(opts, report)
    report.facts |= {
        "base": opts.name,
        "book": opts.book.name,
        "steps": opts.steps,
        "batch_size": opts.batch_size,
        "block_size": opts.block_size,
        "device": Device.pick(opts.device).name,
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - began, 1),
    }
    report.write(opts.out)
    broken = report.broken()
    print(
        f"\nparity is broken: {'; '.join(broken)}"
        if broken
        else f"\nparity holds: {len(report.checks)} checks in {report.facts['seconds']:.0f} s"
    )
    return 1 if broken else 0


def compare(opts: Namespace, report: Report) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # PEFT's and transformers', about each other
    here, there = exact(opts, report)
    if opts.exact_only:
        return
    with TemporaryDirectory() as folder:
        exchange(opts, report, Path(folder), here, there)
        resume(opts, report, Path(folder))
    trained_path(opts, report)
    full(opts, report)


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = Parser(prog="benchmarks.parity", description=__doc__)
    parser.add_argument("--base", default="mini", metavar="B", help="as train.py's (default: mini)")
    parser.add_argument("--book", type=Path, default=BOOK, help="UTF-8 text file")
    parser.add_argument(
        "--steps",
        type=number(int, 1),
        default=50,
        help="far fewer leave the spread of PEFT's seeds to chance",
    )
    parser.add_argument("--batch-size", type=number(int, 1), default=2)
    parser.add_argument("--block-size", type=number(int, 1), default=128)
    parser.add_argument("--device", **DEVICE | {"help": "of all but the bit-exact part (CPU)"})
    parser.add_argument("--exact-only", action="store_true", help="only the bit-exact part")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent,
        metavar="DIR",
        help="where parity.json and parity.png go",
    )
    opts = parser.parse_args(argv)
    base, opts.directory = find_base(opts.base)
    opts.name = Path(base).name
    if opts.block_size >= load_config(opts.directory).n_positions:
        raise UserError(
            f"--block-size {opts.block_size}: must be below the base's n_positions, "
            "for transformers' own loss needs one token more"
        )
    return opts


@contextmanager
def to_the_bit() -> Iterator[None]:
    """Use PyTorch's own operations on one thread: more split sums, and not every time alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with plain_operations():
            yield
    finally:
        torch.set_num_threads(threads)


def store_as_conv1d(model: nn.Module) -> None:
    """Store the frozen projections as transformers does, (in, out): a BLAS may add up the products
    with a transposed matrix in another order.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.weight.data = module.weight.data.t().contiguous().t()


def train_options(opts: Namespace, method: str, *more: str) -> Options:
    """Return the options of one run: with all dropouts; `train.py`'s defaults for all the rest."""
    return ours.options(
        method,
        "--base",
        opts.directory,
        "--book",
        opts.book,
        "--precision",
        "fp32",
        "--max-steps",
        opts.steps,
        "--epochs",
        opts.steps,
        "--device",
        opts.device,
        "--batch-size",
        opts.batch_size,
        "--block-size",
        opts.block_size,
        *DROPOUT,
        *more,
    )


@dataclass
class Run:
    """Hold the results of one training run. `means`, on PEFT's side, is each step's mean loss."""

    losses: list[float]  # nats a token, a step each
    initial: dict[str, Tensor]  # the adapter before the first step
    adapter: dict[str, Tensor]  # and after the last
    model: nn.Module
    means: list[float] | None = None


def train_here(args: Options, draws: int, as_conv1d: bool = False) -> tuple[Run, Trainer]:
    trainer = ours.make_trainer(args)
    if as_conv1d:
        store_as_conv1d(trainer.model)
    adapter = adapter_tensors(trainer.model)
    initial = snapshot(adapter)
    torch.manual_seed(draws)
    losses = [ours.step(trainer, batch) for batch in trainer.batches(0)]
    return Run(losses, initial, snapshot(adapter), trainer.model), trainer


def train_there(args: Options, trainer: Trainer, draws: int) -> Run:
    """Run the plain loop on the batches of `trainer`."""
    model = peft_loop.build(args).to(Device.pick(args.device).torch_device)
    initial = snapshot(peft_loop.adapter_tensors(model))
    torch.manual_seed(draws)
    losses, means = peft_loop.train(model, args, trainer.windows.tokens, list(trainer.batches(0)))
    return Run(losses, initial, snapshot(peft_loop.adapter_tensors(model)), model, means)


def train_both(args: Options, as_conv1d: bool = False) -> tuple[Run, Run]:
    here, trainer = train_here(args, 0, as_conv1d)
    return here, train_there(args, trainer, draws=0)


@to_the_bit()
def exact(opts: Namespace, report: Report) -> tuple[Run, Run]:
    """Check that in fp32, on one thread, no bit differs from the seeded adapter to the trained."""
    args = train_options(opts, "lora", "--device", "cpu")
    print(
        f"\nexact: fp32, CPU, one thread, dropout {args.base_dropout} in the base and "
        f"{args.lora_dropout} in LoRA"
    )
    here, there = train_both(args, as_conv1d=True)
    counted = count_parameters(here.model)
    counts = (
        (counted["trainable_parameters"], counted["total_parameters"]),
        there.model.get_nb_trainable_parameters(),
    )
    report.facts["parameters"] = dict(zip(("trainable", "all"), counts[0], strict=True))
    for what, n, m in zip(("trainable", "all"), *counts, strict=True):
        report.check(f"{what} parameters, {n:,} here and {m:,} there", abs(n - m), 0)
    compare_exactly(report, "exact", here, there)
    # What PEFT's side minimises is the mean; dividing a sum may round it otherwise.
    report.check(
        "exact: loss of every step, by cross_entropy's mean there, relative",
        relative(here.losses, there.means),
        LAST_BIT,
    )
    return here, there


def compare_exactly(report: Report, name: str, here: Run, there: Run) -> None:
    report.curve(name, here.losses, there.losses)
    report.check(f"{name}: adapter before the first step", largest(here.initial, there.initial), 0)
    report.check(f"{name}: loss of every step", relative(here.losses, there.losses), 0)
    report.check(f"{name}: adapter after the last step", largest(here.adapter, there.adapter), 0)


def exchange(opts: Namespace, report: Report, folder: Path, here: Run, there: Run) -> None:
    """Let each side read what the other wrote: adapters, and models with the adapter merged."""
    print("\nfiles exchanged: validation loss (perplexity), each file scored by both sides")
    config = train_options(opts, "lora").lora_config
    save_adapter(here.model, config, folder / "ours", str(opts.directory))
    there.model.save_pretrained(folder / "peft")
    merge(here.model)
    unwrap(here.model)
    save_gpt2(here.model, folder / "ours merged")
    there.model.merge_and_unload().save_pretrained(folder / "peft merged")
    compare_readings(opts, report, "base", {"base": (opts.directory, None)})
    compare_readings(
        opts,
        report,
        "adapter",
        {
            "trained there": (opts.directory, folder / "peft"),
            "trained here": (opts.directory, folder / "ours"),
            "trained and merged there": (folder / "peft merged", None),
            "trained and merged here": (folder / "ours merged", None),
        },
    )


@torch.no_grad()
def compare_readings(
    opts: Namespace, report: Report, what: str, sources: dict[str, tuple[Path, Path | None]]
) -> None:
    """Check that these files hold one model, by both evaluators' losses on the validation part and
    both sides' logits on its first window.
    """
    device, losses, logits = Device.pick(opts.device, "fp32"), [], []
    tokens = ours.data(train_options(opts, "lora"))[1].tokens
    ids = torch.from_numpy(tokens[None, : opts.block_size].astype(np.int64)).to(device.torch_device)
    for name, (base, adapter) in sources.items():
        here = ours.load(base, adapter, device)
        there = peft_loop.load(base, adapter).to(device.torch_device)
        scores = {
            "here": ours.evaluate(here, tokens, opts.directory, device, opts.block_size).loss,
            "there": peft_loop.evaluate(there, tokens, opts.block_size),
        }
        print(
            f"    {name:25}"
            + "".join(
                f" {side} {loss:.7f} ({math.exp(loss):.5f}) " for side, loss in scores.items()
            )
        )
        report.facts.setdefault("validation_losses", {})[name] = scores
        losses += scores.values()
        logits += [here(ids).cpu(), there(input_ids=ids).logits.cpu()]  # (1, T, V) each
    report.check(f"{what}: validation losses, relative", np.ptp(losses) / min(losses), CLOSE)
    logits, reference = torch.stack(logits), logits[1]  # the first source as read there
    report.check(
        f"{what}: logits, relative to the largest",
        ((logits - reference).abs().max() / reference.abs().max()).item(),
        CLOSE,
    )


@to_the_bit()
def resume(opts: Namespace, report: Report, folder: Path) -> None:
    """Go on here from the adapter that PEFT saved, and there from the one saved here."""
    print(f"\nresumed: {RESUMED_STEPS} more steps, each side from the other's adapter file")
    args = {
        name: train_options(
            opts,
            "lora",
            "--device",
            "cpu",
            "--max-steps",
            str(RESUMED_STEPS),
            "--init-adapter",
            str(folder / name),
        )
        for name in ("peft", "ours")
    }
    here, trainer = train_here(args["peft"], 0, as_conv1d=True)
    compare_exactly(report, "resumed", here, train_there(args["ours"], trainer, draws=0))


def trained_path(opts: Namespace, report: Report) -> None:
    """Check the path that users train on: any device, all threads, fp32 and bf16 or fp16."""
    fp32, device = None, Device.pick(opts.device)
    print(f"\nas trained: {device.name}, {torch.get_num_threads()} threads")
    for precision in ("fp32", device.precision if device.is_cuda else "bf16"):  # not emulated
        options = ("lora", "--precision", precision)
        here, there = train_both(train_options(opts, *options, *NO_DROPOUT))
        name, fp32 = f"{precision}, no dropout", fp32 or there.losses
        report.curve(name, here.losses, there.losses)
        # Both sides round; what one rounding does is measured on PEFT itself.
        allowed = CLOSE if precision == "fp32" else 2 * relative(there.losses, fp32)
        report.check(
            f"{name}: loss of every step, relative", relative(here.losses, there.losses), allowed
        )
        compare_independent_draws(report, train_options(opts, *options))


def compare_independent_draws(report: Report, args: Options) -> None:
    """Compare runs whose dropouts are drawn anew: our curve may lie as far from the mean of PEFT's
    curves as those lie apart, both as root mean squares over the steps.
    """
    here, trainer = train_here(args, draws=0)
    curves = np.array([train_there(args, trainer, draws).losses for draws in DRAWS])
    mean, spread = curves.mean(axis=0), np.ptp(curves, axis=0)
    name = f"{args.precision}, independent dropout"
    report.curve(name, here.losses, mean.tolist(), spread=spread.tolist())
    report.check(
        f"{name}: loss, from PEFT's mean",
        root_mean_square(here.losses - mean),
        root_mean_square(spread),
    )


def full(opts: Namespace, report: Report) -> None:
    """Train all weights. Four a block are stored transposed there: their gradients add up in
    another order; where a gradient is tiny, Adam makes a whole step of its rounding.
    """
    print("\nfull fine-tuning, fp32, no dropout")
    here, there = train_both(train_options(opts, "full", "--base-dropout", "0"))
    report.curve("full", here.losses, there.losses)
    report.check("full: loss of every step, relative", relative(here.losses, there.losses), CLOSE)


if __name__ == "__main__":
    run_command(main)
