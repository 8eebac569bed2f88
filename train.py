"""Fine-tune GPT-2 on a book: `python train.py lora` or `python train.py full`.

One loop serves both methods; they differ in which parameters are trained and in what is saved.
"""

import argparse
import math
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from cli import parse_train_args, resume_command
from data.tokens import file_sha256, load_tokens
from data.windows import Windows, split
from errors import RunError, UserError, run_command
from evaluate import Scores, check_block_size, evaluate, perplexity
from files import write_json
from hardware import (
    autocast,
    cast_frozen,
    device_name,
    peak_memory_mb,
    pick_device,
    pick_precision,
)
from lora.adapter import load_adapter, save_adapter
from lora.config import LoRAConfig
from lora.inject import adapter_disabled, count_parameters, describe_parameters, inject
from model import ops
from model.checkpoint import has_weights, load_config, load_gpt2, save_gpt2
from model.gpt2 import GPT2
from model.hub import find_base
from plots import draw_loss
from run_directory import (
    RUN,
    append_metrics,
    check_out,
    cut_metrics,
    options,
    read_checkpoint,
    start_afresh,
    write_checkpoint,
)


def main() -> None:
    args = parse_train_args(__doc__)
    check_out(args)
    if args.resume and (args.out / RUN).exists():
        print(f"{args.out}: this run is finished; nothing to resume")
        return
    device = pick_device(args.device)
    args.precision = pick_precision(args.precision, device)
    torch.manual_seed(args.seed)
    args.base, directory = find_base(args.base)
    model, lora_config = build_model(args, directory)
    print(describe_parameters(model))
    windows, val_tokens = load_data(args, model)
    trainer = Trainer(args, model.to(device), lora_config, windows, val_tokens)
    if args.resume:
        trainer.resume()
    else:
        start_afresh(args.out, directory)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, trainer.on_signal)
    trainer.run()


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
    model.gradient_checkpointing = args.gradient_checkpointing
    if args.method == "full":
        return model, None
    if args.init_adapter:
        config = load_adapter(model, args.init_adapter)
        vars(args).update(asdict(config))  # run.json tells what was trained
        return model, config
    config = LoRAConfig(args.r, args.lora_alpha, args.lora_dropout, tuple(args.target_modules))
    try:
        inject(model, config)
    except ValueError as error:
        raise UserError(f"--r, --target-modules: {error}") from error
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


def summed_loss(model: GPT2, inputs: Tensor, targets: Tensor) -> Tensor:
    """The sum over tokens of -log p(target), nats; a sum, so that parts of a batch add up."""
    hidden = model.hidden(inputs).flatten(0, 1)  # (B * T, C)
    return ops.tied_cross_entropy(hidden, model.wte.weight, targets.flatten())


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
    tokens: int = 0  # trained on so far
    training_seconds: float = 0.0  # in training steps alone
    seconds: float = 0.0  # wall clock, validation and saving included
    base_val_loss: float = math.nan
    best_val_loss: float = math.inf
    best_val_bits_per_byte: float = math.inf
    metrics_bytes: int = 0  # length of metrics.jsonl


class Trainer:
    """AMP, AdamW, warm-up and cosine, accumulation, clipping, validation, checkpoints."""

    def __init__(self, args: argparse.Namespace, model: GPT2, lora_config: LoRAConfig | None,
                 windows: Windows, val_tokens: np.ndarray):
        self.args, self.model, self.lora_config = args, model, lora_config
        self.windows, self.val_tokens = windows, val_tokens
        self.device = model.wte.weight.device
        cast_frozen(model, args.precision)
        self.trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trainable.values(), lr=args.lr,
                                           weight_decay=args.weight_decay, fused=True)
        # fp16's small gradients vanish: scale the loss up, and the gradients down before the step.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.precision == "fp16")
        self.summed_loss = torch.compile(summed_loss) if args.compile else summed_loss
        self.steps_per_epoch = math.ceil(len(windows) / args.batch_size)
        self.total_steps = min(args.epochs * self.steps_per_epoch, args.max_steps or math.inf)
        self.book_hash = file_sha256(args.book)  # now: the file may change while we train
        self.progress = Progress()
        self.interval = Interval(self.device)
        self.stop_signal: int | None = None

    def run(self) -> None:
        """Train from where the run stands to its end, and leave its files in `--out`."""
        progress = self.progress
        self.started = time.perf_counter() - progress.seconds
        if progress.step == 0:
            self.validate_base()
        self.model.train()
        with tqdm(total=self.total_steps, initial=progress.step, unit="step", disable=None) as bar:
            for batch in self.batches(progress.step):
                self.step(batch)
                bar.update()
                self.after_step(bar)
        self.finish()

    def batches(self, step: int) -> Iterator[np.ndarray]:
        """The windows of every step from `step` to the last, epoch after epoch in its own order."""
        while step < self.total_steps:
            epoch, position = divmod(step, self.steps_per_epoch)
            order = self.windows.epoch_order(self.args.seed, epoch)
            for start in range(position * self.args.batch_size, len(order), self.args.batch_size):
                if step == self.total_steps:
                    return
                yield order[start : start + self.args.batch_size]
                step += 1

    def step(self, batch: np.ndarray) -> None:
        """One optimizer step on these windows, computed in `--grad-accum` parts."""
        args, tokens = self.args, len(batch) * self.args.block_size
        for part in np.array_split(batch, min(args.grad_accum, len(batch))):
            inputs, targets = (x.to(self.device) for x in self.windows.batch(part))  # (B, T) each
            with autocast(self.device, args.precision):
                loss = self.summed_loss(self.model, inputs, targets)
            # Over the whole batch's tokens: parts count by their tokens, not equally.
            self.scaler.scale(loss / tokens).backward()
            self.interval.loss += loss.detach()
        self.scaler.unscale_(self.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(self.trainable.values(), args.clip or math.inf)
        lr = learning_rate(self.progress.step, self.total_steps, args.lr, args.warmup_ratio)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.interval.tokens += tokens
        self.interval.grad_norm = grad_norm
        self.progress.tokens += tokens
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
            self.progress.metrics_bytes = append_metrics(args.out, metrics)
        saves = epoch_ends or (args.checkpoint_every and step % args.checkpoint_every == 0)
        if saves or self.stop_signal:
            self.save_checkpoint()
        if self.stop_signal:
            print(f"stopped after step {step}; go on with: {resume_command()}", file=sys.stderr)
            sys.exit(128 + self.stop_signal)

    def on_signal(self, number: int, frame) -> None:
        """The first signal lets the step end and saves; a second one stops at once."""
        self.stop_signal = number
        signal.signal(number, signal.default_int_handler)

    def measure(self, bar: tqdm) -> dict:
        """The metrics of the steps since the last call. Raises RunError on a non-finite loss."""
        interval, progress = self.interval, self.progress
        total, tokens, seconds = interval.sums()
        loss, speed, lr = total / tokens, tokens / seconds, self.optimizer.param_groups[0]["lr"]
        if not math.isfinite(loss):
            raise RunError(f"the loss is {loss} at step {progress.step}; lower --lr or use fp32")
        bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.2e}, {speed:,.0f} tokens/s")
        metrics = {"step": progress.step, "epoch": progress.step / self.steps_per_epoch,
                   "loss": loss, "lr": lr, "grad_norm": interval.grad_norm.item(),
                   "tokens_per_second": speed}
        progress.training_seconds += seconds
        interval.restart()
        return metrics

    def evaluate(self) -> Scores:
        args = self.args
        return evaluate(self.model, self.val_tokens, block_size=args.block_size,
                        label_shift=args.label_shift, precision=args.precision)

    def validate_base(self) -> None:
        """The base's own loss, against which the run is measured."""
        with adapter_disabled(self.model):
            scores = self.evaluate()
        self.progress.base_val_loss = scores.loss
        print(f"base: val {scores}", flush=True)
        self.interval.restart()

    def validate(self) -> dict:
        """Score the validation part; keep the model if it is the best so far."""
        scores, progress = self.evaluate(), self.progress
        better = scores.loss < progress.best_val_loss
        if better:
            progress.best_val_loss = scores.loss
            progress.best_val_bits_per_byte = scores.bits_per_byte
            self.save_best()
        tqdm.write(f"step {progress.step}/{self.total_steps}: val {scores}"
                   + (", best so far" if better else ""))
        self.interval.restart()  # validation is not training time
        return {"val_loss": scores.loss, "val_perplexity": scores.perplexity,
                "val_bits_per_byte": scores.bits_per_byte}

    def save_best(self) -> None:
        if self.lora_config:
            save_adapter(self.model, self.lora_config, self.args.out, self.args.base)
        else:
            save_gpt2(self.model, self.args.out)

    def finish(self) -> None:
        """Draw `loss.png` and write `run.json`, whose presence says that the run is complete."""
        progress, args = self.progress, self.args
        progress.seconds = time.perf_counter() - self.started
        draw_loss(args.out, args.method, progress.base_val_loss)
        trainable, total = count_parameters(self.model)
        write_json(args.out / RUN, {
            "method": args.method, "base": args.base, "options": options(args),
            "trainable_parameters": trainable, "total_parameters": total,
            "trainable_percent": 100 * trainable / total,
            "base_val_loss": progress.base_val_loss,
            "best_val_loss": progress.best_val_loss,
            "best_val_perplexity": perplexity(progress.best_val_loss),
            "best_val_bits_per_byte": progress.best_val_bits_per_byte,
            "steps": progress.step, "seconds": progress.seconds,
            "tokens_per_second": progress.tokens / progress.training_seconds,
            "peak_memory_mb": peak_memory_mb(self.device), "device": device_name(self.device),
            "precision": args.precision, "torch": torch.__version__,
        })
        print(f"best: val perplexity {perplexity(progress.best_val_loss):.3f} "
              f"(base {perplexity(progress.base_val_loss):.3f}) after {progress.seconds:.0f} s; "
              f"saved in {args.out}")

    def save_checkpoint(self) -> None:
        """All that the next step depends on, without the frozen base."""
        self.progress.seconds = time.perf_counter() - self.started
        sums, cuda = self.interval.sums(), self.device.type == "cuda"
        write_checkpoint(self.args, self.book_hash, {
            "interval": sums,
            "progress": asdict(self.progress),
            "parameters": {name: p.detach() for name, p in self.trainable.items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if cuda else None,
        })
        self.interval.restart(*sums)  # saving is not training time

    def resume(self) -> None:
        """Take up the run where its checkpoint left it. Raises UserError if this is another run."""
        state = read_checkpoint(self.args, self.book_hash)
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.progress = Progress(**state["progress"])
        self.interval.restart(*state["interval"])
        cut_metrics(self.args.out, self.progress.metrics_bytes)
        print(f"resuming after step {self.progress.step} of {self.total_steps}")


class Interval:
    """Sums over the steps since `restart`, kept on the device so that no step waits for it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.restart()

    def restart(self, loss: float = 0.0, tokens: int = 0, seconds: float = 0.0) -> None:
        self.loss = torch.tensor(loss, device=self.device)
        self.grad_norm = torch.zeros((), device=self.device)  # of the last step
        self.tokens = tokens
        self.began = time.perf_counter() - seconds

    def sums(self) -> tuple[float, int, float]:
        """What `restart` takes to go on: loss summed over tokens, tokens, seconds."""
        return self.loss.item(), self.tokens, time.perf_counter() - self.began


if __name__ == "__main__":
    run_command(main)
