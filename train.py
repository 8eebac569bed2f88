"""Fine-tune GPT-2 on a book: `python train.py lora` or `python train.py full`.

One loop serves both methods; they differ in which parameters are trained and in what is saved.
"""

import argparse
import json
import math
import shlex
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from cli import BOOK, ROOT, Parser, add_base_options, add_device_options, number
from data.tokens import file_sha256, load_tokens
from data.windows import Windows, split
from errors import RunError, UserError, run_command
from evaluate import Scores, check_block_size, evaluate
from files import atomic_path, write_json
from hardware import autocast, peak_memory_mb, pick_device, pick_precision
from lora.adapter import load_adapter, save_adapter
from lora.config import LoRAConfig
from lora.inject import adapter_disabled, count_parameters, describe_parameters, inject
from model.checkpoint import has_weights, load_config, load_gpt2, save_gpt2
from model.gpt2 import GPT2
from model.hub import find_base
from plots import draw_loss

# Everything that a run writes; `--overwrite` removes these names and no others.
RUN_FILES = ("run.json", "metrics.jsonl", "loss.png", "checkpoint.pt", "adapter_config.json",
             "adapter_model.safetensors", "config.json", "model.safetensors")
# Options that may change when a run is resumed, for they do not change its result.
HARMLESS = {"out", "device", "log_every", "checkpoint_every", "resume", "overwrite"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="train.py", description=__doc__.splitlines()[0])
    methods = parser.add_subparsers(dest="method", required=True)
    for method, batch_size, lr in (("lora", 16, 3e-4), ("full", 64, 3e-5)):
        sub = methods.add_parser(method, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        add_base_options(sub)
        _add_data_options(sub)
        _add_training_options(sub, batch_size, lr)
        _add_run_options(sub, ROOT / "runs" / method)
        if method == "lora":
            _add_lora_options(sub)
    return parser.parse_args(argv)


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--book", type=Path, default=BOOK, help="UTF-8 text file")
    parser.add_argument("--block-size", type=number(int, 1), default=128, help="tokens a window")
    parser.add_argument("--stride", type=number(int, 1), default=32,
                        help="a training window starts every so many tokens")
    parser.add_argument("--val-fraction", type=number(float, 0.001, 0.9), default=0.1)
    parser.add_argument("--label-shift", type=int, choices=(1, 2), default=1,
                        help="1: next token; 2: the reference run's measure")


def _add_training_options(parser: argparse.ArgumentParser, batch_size: int, lr: float) -> None:
    parser.add_argument("--epochs", type=number(int, 1), default=3)
    parser.add_argument("--max-steps", type=number(int, 1), default=None,
                        help="end here if the epochs do not end sooner; the schedule ends here too")
    parser.add_argument("--batch-size", type=number(int, 1), default=batch_size,
                        help="windows a step")
    parser.add_argument("--grad-accum", type=number(int, 1), default=1,
                        help="parts a step's batch is computed in: saves memory, same result")
    parser.add_argument("--lr", type=number(float, 1e-12, 10.0), default=lr)
    parser.add_argument("--weight-decay", type=number(float, 0.0, 10.0), default=0.01)
    parser.add_argument("--warmup-ratio", type=number(float, 0.0, 1.0, below=True), default=0.06)
    parser.add_argument("--clip", type=number(float, 0.0), default=1.0,
                        help="largest gradient norm; 0 does not clip")
    parser.add_argument("--base-dropout", type=number(float, 0.0, 1.0, below=True), default=None,
                        help="all of the base's dropouts; default: its config's")
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=42)
    parser.add_argument("--compile", action="store_true", help="torch.compile the loss")
    add_device_options(parser)


def _add_run_options(parser: argparse.ArgumentParser, out: Path) -> None:
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--eval-every", type=number(int, 1), default=None,
                        help="validate every so many steps, besides after each epoch")
    parser.add_argument("--log-every", type=number(int, 1), default=10)
    parser.add_argument("--checkpoint-every", type=number(int, 1), default=None,
                        help="save every so many steps, besides after each epoch")
    state = parser.add_mutually_exclusive_group()
    state.add_argument("--resume", action="store_true", help="go on with the run in --out")
    state.add_argument("--overwrite", action="store_true", help="replace the run in --out")


def _add_lora_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--r", type=number(int, 1), default=8, help="rank")
    parser.add_argument("--lora-alpha", type=number(float, 1e-6, 1e6), default=16)
    parser.add_argument("--lora-dropout", type=number(float, 0.0, 1.0, below=True), default=0.05)
    parser.add_argument("--target-modules", nargs="+", default=["c_attn"], metavar="NAME")
    parser.add_argument("--init-adapter", type=Path, default=None, metavar="DIR",
                        help="start from this adapter; it brings its own rank, alpha and targets")


def main() -> None:
    args = parse_args()
    check_out(args)
    if args.resume and (args.out / "run.json").exists():
        print(f"{args.out}: this run is finished; nothing to resume")
        return
    device = pick_device(args.device)
    args.precision = pick_precision(args.precision, device)
    torch.manual_seed(args.seed)
    args.base, directory = find_base(args.base)
    model, lora_config = build_model(args, directory)
    print(describe_parameters(model))
    train_windows, val_tokens = load_data(args, model)
    trainer = Trainer(args, model.to(device), lora_config, train_windows, val_tokens)
    if args.resume:
        trainer.resume()
    else:
        start_afresh(args.out)
    trainer.run()


def check_out(args: argparse.Namespace) -> None:
    """Refuse an output directory that would lose something. Raises UserError."""
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is a file; name a directory")
    if Path(args.base).is_dir() and args.out.resolve() == Path(args.base).resolve():
        raise UserError(f"--out {args.out}: is the base's own directory; name another")
    held = [name for name in RUN_FILES if (args.out / name).exists()]
    if args.resume and not {"checkpoint.pt", "run.json"} & set(held):
        raise UserError(f"--resume: {args.out} holds no checkpoint; start without --resume")
    if held and not (args.resume or args.overwrite):
        raise UserError(f"--out {args.out}: holds a run ({held[0]}); use --resume to go on, "
                        "--overwrite to replace it, or another --out")


def start_afresh(out: Path) -> None:
    """An empty run directory, old results removed. Raises UserError if it cannot be written."""
    with atomic_path(out / "metrics.jsonl"):
        pass
    for name in RUN_FILES:
        if name != "metrics.jsonl":
            (out / name).unlink(missing_ok=True)


def build_model(args: argparse.Namespace, directory: Path) -> tuple[GPT2, LoRAConfig | None]:
    """The base with its dropouts set and, for LoRA, the adapter in place and all else frozen."""
    if args.method == "full" and not has_weights(directory):
        print(f"{directory} holds no weights: starting from random initialisation")
        model = GPT2(load_config(directory))
        model.init_weights()
    else:
        model = load_gpt2(directory)
    if args.base_dropout is not None:
        model.set_dropout(args.base_dropout)
    if args.method == "full":
        return model, None
    if args.init_adapter:
        return model, load_adapter(model, args.init_adapter)
    config = LoRAConfig(args.r, args.lora_alpha, args.lora_dropout, tuple(args.target_modules))
    try:
        inject(model, config)
    except ValueError as error:
        raise UserError(str(error)) from error
    return model, config


def load_data(args: argparse.Namespace, model: GPT2) -> tuple[Windows, np.ndarray]:
    """The training windows and the validation part. Raises UserError when either is too short."""
    check_block_size(args.block_size, model.config)
    train_part, val_part = split(load_tokens(args.book, model.config.vocab_size), args.val_fraction)
    for name, part in (("training", train_part), ("validation", val_part)):
        if len(part) < args.block_size + args.label_shift:
            raise UserError(f"{args.book}: its {name} part is {len(part):,} tokens, less than one "
                            f"window of {args.block_size}; use a longer book or a smaller block")
    return Windows(train_part, args.block_size, args.stride, args.label_shift), val_part


def summed_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The sum over tokens of -log p(target), nats; a sum, so that parts of a batch add up."""
    logits = model(inputs).flatten(0, 1)  # (B * T, V)
    return F.cross_entropy(logits.float(), targets.flatten(), reduction="sum")


def learning_rate(step: int, total: int, peak: float, warmup_ratio: float) -> float:
    """Linear warm-up to `peak` over the first ceil(warmup_ratio * total) steps, then half a cosine
    to zero (Loshchilov & Hutter 2016, https://arxiv.org/abs/1608.03983). Steps count from 0, and
    the first already moves.
    """
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


@dataclass
class Progress:
    """What a run knows of itself besides its tensors; saved with every checkpoint."""

    step: int = 0
    base_val_loss: float = math.nan
    best_val_loss: float = math.inf
    best_val_bits_per_byte: float = math.inf
    seconds: float = 0.0  # wall clock, validation and saving included
    training_seconds: float = 0.0  # in training steps alone
    metrics_bytes: int = 0  # length of metrics.jsonl


class Trainer:
    """AMP, AdamW, warm-up and cosine, accumulation, clipping, validation, checkpoints."""

    def __init__(self, args, model: GPT2, lora_config, windows: Windows, val_tokens: np.ndarray):
        self.args, self.model, self.lora_config = args, model, lora_config
        self.windows, self.val_tokens = windows, val_tokens
        self.device = model.wte.weight.device
        self.trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trainable.values(), lr=args.lr,
                                           weight_decay=args.weight_decay, fused=True)
        # fp16's small gradients vanish: scale the loss up, and the gradients down before the step.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.precision == "fp16")
        self.summed_loss = torch.compile(summed_loss) if args.compile else summed_loss
        self.steps_per_epoch = math.ceil(len(windows) / args.batch_size)
        self.total_steps = min(args.epochs * self.steps_per_epoch, args.max_steps or math.inf)
        self.progress = Progress()
        self.stop_signal: int | None = None

    def run(self) -> None:
        """Train from where the run stands to its end, and leave its files in `--out`."""
        self.started = time.perf_counter() - self.progress.seconds
        if self.progress.step == 0:
            self.validate_base()
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self.on_signal)
        self.model.train()
        self.interval = Interval(self.device)
        with tqdm(total=self.total_steps, initial=self.progress.step, unit="step",
                  disable=None) as bar:
            while self.progress.step < self.total_steps:
                self.step()
                bar.update()
                self.after_step(bar)
        self.finish()

    def on_signal(self, number: int, frame) -> None:
        """The first signal lets the step end and saves; a second one stops at once."""
        self.stop_signal = number
        signal.signal(number, signal.default_int_handler)

    def step(self) -> None:
        """One optimizer step on one batch of windows, computed in `--grad-accum` parts."""
        args = self.args
        epoch, position = divmod(self.progress.step, self.steps_per_epoch)
        if position == 0 or not hasattr(self, "order"):
            self.order = self.windows.epoch_order(args.seed, epoch)
        batch = self.order[position * args.batch_size : (position + 1) * args.batch_size]
        tokens = len(batch) * args.block_size
        for part in np.array_split(batch, min(args.grad_accum, len(batch))):
            inputs, targets = self.windows.batch(part)
            with autocast(self.device, args.precision):
                loss = self.summed_loss(self.model, inputs.to(self.device), targets.to(self.device))
            # Divided by the whole batch's tokens: parts are weighted by tokens, not equally.
            self.scaler.scale(loss / tokens).backward()
            self.interval.add_loss(loss)
        self.scaler.unscale_(self.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(self.trainable.values(), args.clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.progress.step, self.total_steps, args.lr,
                                        args.warmup_ratio)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.interval.add_step(tokens, grad_norm)
        self.progress.step += 1

    def after_step(self, bar: tqdm) -> None:
        """What is due between two steps: log, validate, save, stop."""
        args, step = self.args, self.progress.step
        epoch_ends = step % self.steps_per_epoch == 0 or step == self.total_steps
        validates = epoch_ends or (args.eval_every and step % args.eval_every == 0)
        if validates or step % args.log_every == 0:
            metrics = self.measure(bar)
            if validates:
                metrics |= self.validate()
            self.log(metrics)
        saves = epoch_ends or (args.checkpoint_every and step % args.checkpoint_every == 0)
        if saves or self.stop_signal:
            self.save_checkpoint()
        if self.stop_signal:
            command = shlex.join(["python", *sys.argv])
            tqdm.write(f"stopped after step {step}; go on with: {command} --resume", sys.stderr)
            sys.exit(128 + self.stop_signal)

    def measure(self, bar: tqdm) -> dict:
        """The metrics of the steps since the last call. Raises RunError on a non-finite loss."""
        loss, grad_norm, tokens_per_second, seconds = self.interval.read()
        step = self.progress.step
        if not math.isfinite(loss):
            raise RunError(f"the loss is {loss} at step {step}; try a lower --lr or "
                           "--precision fp32")
        self.progress.training_seconds += seconds
        lr = self.optimizer.param_groups[0]["lr"]
        bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.2e}, {tokens_per_second:,.0f} tokens/s")
        return {"step": step, "epoch": step / self.steps_per_epoch, "loss": loss, "lr": lr,
                "grad_norm": grad_norm, "tokens_per_second": tokens_per_second}

    def evaluate(self) -> Scores:
        args = self.args
        return evaluate(self.model, self.val_tokens, block_size=args.block_size,
                        label_shift=args.label_shift, precision=args.precision)

    def validate_base(self) -> None:
        """The base's own loss, against which the run is measured."""
        with adapter_disabled(self.model):
            scores = self.evaluate()
        self.progress.base_val_loss = scores.loss
        print(f"base: val loss {scores.loss:.4f}, perplexity {scores.perplexity:.3f}, "
              f"{scores.bits_per_byte:.4f} bits per byte", flush=True)

    def validate(self) -> dict:
        """Score the validation part; keep the model if it is the best so far."""
        scores, progress = self.evaluate(), self.progress
        better = scores.loss < progress.best_val_loss
        if better:
            progress.best_val_loss = scores.loss
            progress.best_val_bits_per_byte = scores.bits_per_byte
            self.save_best()
        tqdm.write(f"step {progress.step}/{self.total_steps}: val loss {scores.loss:.4f}, "
                   f"perplexity {scores.perplexity:.3f}, {scores.bits_per_byte:.4f} bits per byte"
                   + (", best so far" if better else ""))
        self.interval.restart()
        return {"val_loss": scores.loss, "val_perplexity": scores.perplexity,
                "val_bits_per_byte": scores.bits_per_byte}

    def save_best(self) -> None:
        if self.lora_config:
            save_adapter(self.model, self.lora_config, self.args.out, self.args.base)
        else:
            save_gpt2(self.model, self.args.out)

    def log(self, metrics: dict) -> None:
        with open(self.args.out / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
            self.progress.metrics_bytes = file.tell()

    def finish(self) -> None:
        """Write `run.json` and `loss.png`; their presence says that the run is complete."""
        progress, args = self.progress, self.args
        progress.seconds = time.perf_counter() - self.started
        trainable, total = count_parameters(self.model)
        tokens = self.total_steps * args.batch_size * args.block_size
        draw_loss(args.out, args.method, progress.base_val_loss)
        write_json(args.out / "run.json", {
            "method": args.method, "base": args.base, "options": options(args),
            "trainable_parameters": trainable, "total_parameters": total,
            "trainable_percent": 100 * trainable / total,
            "base_val_loss": progress.base_val_loss, "best_val_loss": progress.best_val_loss,
            "best_val_perplexity": math.exp(progress.best_val_loss),
            "best_val_bits_per_byte": progress.best_val_bits_per_byte,
            "steps": progress.step, "seconds": progress.seconds,
            "tokens_per_second": tokens / progress.training_seconds,
            "peak_memory_mb": peak_memory_mb(self.device), "device": device_name(self.device),
            "precision": args.precision, "torch": torch.__version__,
        })
        print(f"best val loss {progress.best_val_loss:.4f} "
              f"(perplexity {math.exp(progress.best_val_loss):.3f}; base "
              f"{math.exp(progress.base_val_loss):.3f}) after {progress.seconds:.0f} s; "
              f"saved in {args.out}")

    def save_checkpoint(self) -> None:
        """All that the next step depends on, without the frozen base, written atomically."""
        self.progress.seconds = time.perf_counter() - self.started
        state = {
            "progress": asdict(self.progress),
            "options": options(self.args), "book": file_sha256(self.args.book),
            "parameters": {n: p.detach() for n, p in self.trainable.items()},
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }
        with atomic_path(self.args.out / "checkpoint.pt") as temporary:
            torch.save(state, temporary)

    def resume(self) -> None:
        """Take up the run where its checkpoint left it. Raises UserError if this is another run."""
        path = self.args.out / "checkpoint.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises whatever its unpickler meets
            raise UserError(f"{path}: cannot be read ({type(error).__name__})") from error
        now = options(self.args)
        for name, value in state["options"].items():
            if name not in HARMLESS and now.get(name) != value:
                raise UserError(f"--resume: {name} was {value!r} and is now {now.get(name)!r}; "
                                "repeat the run's own options")
        if state["book"] != file_sha256(self.args.book):
            raise UserError(f"--resume: {self.args.book} has changed since the run began")
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"]:
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        self.progress = Progress(**state["progress"])
        with open(self.args.out / "metrics.jsonl", "rb+") as file:
            file.truncate(self.progress.metrics_bytes)  # lines of steps that are run again
        print(f"resuming after step {self.progress.step} of {self.total_steps}")


class Interval:
    """Sums over the steps since the last reading, kept on the device: no wait between steps."""

    def __init__(self, device: torch.device):
        self.device = device
        self.restart()

    def restart(self) -> None:
        self.loss = torch.zeros((), device=self.device)
        self.tokens = 0
        self.began = time.perf_counter()

    def add_loss(self, loss: Tensor) -> None:
        self.loss += loss.detach()

    def add_step(self, tokens: int, grad_norm: Tensor) -> None:
        self.tokens += tokens
        self.grad_norm = grad_norm

    def read(self) -> tuple[float, float, float, float]:
        """Mean loss a token, the last gradient norm, tokens per second, seconds; start anew."""
        loss, grad_norm = self.loss.item() / self.tokens, self.grad_norm.item()
        seconds = time.perf_counter() - self.began
        tokens_per_second = self.tokens / seconds
        self.restart()
        return loss, grad_norm, tokens_per_second, seconds


def options(args: argparse.Namespace) -> dict:
    """Every option's value, as JSON holds it."""
    return {name: str(value) if isinstance(value, Path) else value
            for name, value in vars(args).items() if name != "method"}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


if __name__ == "__main__":
    run_command(main)
