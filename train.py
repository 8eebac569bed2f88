"""Fine-tune GPT-2 on a book: `python train.py lora` or `python train.py full`.

One loop serves both methods; they differ in which parameters are trained and in what is saved.
"""

if __name__ == "__main__":  # before torch, whose import takes seconds
    import interrupts
    interrupts.end_in_one_line()

import argparse
import math
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from cli import parse_train_args, resume_command
from data.windows import Windows
from errors import RunError, run_command
from evaluate import Scores, evaluate, perplexity
from files import write_json
from hardware import (
    autocast,
    cast_frozen,
    device_name,
    keep_freed_memory,
    peak_memory_mb,
    pick_device,
    pick_precision,
    to_device,
)
from interrupts import end_at_once, on_signals, say
from lora.adapter import save_adapter
from lora.config import LoRAConfig
from lora.inject import adapter_disabled, count_parameters, describe_parameters
from model import ops
from model.checkpoint import save_gpt2
from model.gpt2 import GPT2
from model.hub import find_base
from plots import draw_loss
from training.build import build_model, load_data
from training.checkpoint import has_checkpoint
from training.directory import RUN, RunDirectory, check_out, check_space, options, refuse_source
from training.faults import describe_fault, ending_in_one_line, memory_advice
from training.identity import check_finished, run_identity
from training.interval import Interval
from training.parallel import ALONE, Ranks
from training.randomness import seed_everything
from training.state import Progress, bytes_needed, resume_training, save_training


def main() -> None:
    args, ranks = parse_train_args(__doc__), Ranks.of_torchrun()
    device = pick_device(args.device)
    keep_freed_memory()
    args.precision = pick_precision(args.precision, device)
    with ranks.joined(device):
        if ranks.first:
            check_out(args)
        if ranks.from_first(args.resume and (args.out / RUN).exists()):
            if ranks.first:
                check_finished(args)
            print(f"{args.out}: this run is finished; nothing to resume")
            return
        seed_everything(args.seed)
        with ranks.first_goes_first():
            args.base, base = find_base(args.base)
        model, lora_config = build_model(args, base)
        print(describe_parameters(model))
        windows, val_tokens = load_data(args, model)
        trainer = Trainer(args, model.to(device), lora_config, windows, val_tokens, ranks)
        refuse_source(args.out, "base", base)  # known by its directory only now
        if ranks.first:
            check_space(args.out, bytes_needed(trainer))
        identity = run_identity(args, base, windows.tokens, val_tokens)
        ranks.check_same(identity)
        with RunDirectory(args.out) if ranks.first else nullcontext() as directory:
            if directory:
                check_out(args)  # again: another run may have ended there meanwhile
            trainer.begin(directory, identity)
            trainer.run()


def learning_rate(step: int, total: int, peak: float, warmup_ratio: float) -> float:
    """Linear warm-up to `peak` over the first ceil(warmup_ratio * total) steps, then half a cosine
    to zero (Loshchilov & Hutter 2016, https://arxiv.org/abs/1608.03983). Steps count from 0, and
    the first already moves.
    """
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


class Trainer:
    """AMP, AdamW, warm-up and cosine, accumulation, clipping, validation, checkpoints."""

    def __init__(self, args: argparse.Namespace, model: GPT2, lora_config: LoRAConfig | None,
                 windows: Windows, val_tokens: np.ndarray, ranks: Ranks = ALONE):
        self.args, self.model, self.lora_config, self.ranks = args, model, lora_config, ranks
        self.windows, self.val_tokens = windows, val_tokens
        self.device = model.wte.weight.device
        cast_frozen(model, args.precision)
        self.trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trainable.values(), lr=args.lr,
                                           weight_decay=args.weight_decay, fused=True)
        # fp16's small gradients vanish: scale the loss up, and the gradients down before the step.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.precision == "fp16")
        # Without the loss, whose loop over chunks would be unrolled into a long program.
        self.hidden = torch.compile(model.hidden) if args.compile else model.hidden
        self.steps_per_epoch = math.ceil(len(windows) / args.batch_size)
        self.total_steps = min(args.epochs * self.steps_per_epoch, args.max_steps or math.inf)
        self.progress = Progress()
        self.interval = Interval(self.device, fp16=args.precision == "fp16")
        self.saved_step: int | None = None
        self.stop_signal: int | None = None

    def begin(self, directory: RunDirectory | None, identity: dict) -> None:
        """Start in an empty `--out` or, with --resume, where the run's checkpoint left it.

        Rank 0 has the directory; the others write nothing.
        """
        self.directory, self.identity = directory, identity
        out, resume = self.args.out, self.args.resume
        if not directory:
            seed_everything(self.args.seed + self.ranks.rank)  # dropouts of its own
        if self.ranks.from_first(resume and has_checkpoint(out)):
            resume_training(self)
            return
        if resume:
            print(f"{out}: the run has no checkpoint yet; starting from the beginning")
        if directory:
            directory.clear()

    def run(self) -> None:
        """Train from where the run stands to its end, and leave its files in `--out`."""
        advice = partial(memory_advice, self.args, self.model, self.device)
        with ending_in_one_line(advice, self.last_checkpoint):
            self.started = time.perf_counter() - self.progress.seconds
            if self.progress.step == 0:
                self.validate_base()
            self.train()
            if self.directory:
                self.finish()

    def train(self) -> None:
        """Every step to the last, and what is due between them."""
        on_signals(self.on_signal)
        self.saved_at = time.perf_counter()
        progress = self.progress
        self.model.train()
        with tqdm(total=self.total_steps, initial=progress.step, unit="step",
                  disable=None if self.directory else True) as bar:
            for batch in self.batches(progress.step):
                self.step(batch)
                bar.update()
                self.after_step(bar)

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
        mine = self.ranks.share(batch)
        total = torch.zeros((), device=self.device)
        for part in np.array_split(mine, max(1, min(args.grad_accum, len(mine)))):
            inputs, targets = self.windows.batch(part)  # (B, T) each
            inputs, targets = to_device(inputs, self.device), to_device(targets, self.device)
            with autocast(self.device, args.precision):
                loss = self.summed_loss(inputs, targets)
            # Over the whole batch's tokens: parts and ranks count by their tokens, not equally.
            self.scaler.scale(loss / tokens).backward()
            total += loss.detach()
        self.ranks.add_up([total, *(p.grad for p in self.trainable.values())])
        self.interval.loss += total
        self.scaler.unscale_(self.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(self.trainable.values(), args.clip or math.inf)
        lr = learning_rate(self.progress.step, self.total_steps, args.lr, args.warmup_ratio)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.tokens += tokens
        self.progress.step += 1
        self.interval.end_step(self.progress.step, tokens, grad_norm)

    def summed_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The sum over tokens of -log p(target), nats; a sum, so that parts of a batch add up."""
        hidden = self.hidden(inputs).flatten(0, 1)  # (B * T, C)
        return ops.tied_cross_entropy(hidden, self.model.wte.weight, targets.flatten())

    def after_step(self, bar: tqdm) -> None:
        """What is due between two steps: log, validate, save, stop."""
        args, step = self.args, self.progress.step
        epoch_ends = step % self.steps_per_epoch == 0 or step == self.total_steps
        validates = epoch_ends or (args.eval_every and step % args.eval_every == 0)
        if validates or step % args.log_every == 0:
            metrics = self.measure(bar)
            if validates:
                metrics |= self.validate()
            if self.directory:
                self.progress.metrics_bytes = self.directory.append(metrics)
        if epoch_ends or self.ranks.agree(self.checkpoint_is_due()):
            save_training(self)
        if stop := self.ranks.agree(self.stop_signal or 0):
            if self.saved_step != step:
                save_training(self)
            if self.directory:
                print(f"stopped after step {step}; go on with: "
                      f"{resume_command(self.ranks.launcher())}", file=sys.stderr)
            self.ranks.wait()  # torchrun ends the others as soon as one has ended
            sys.exit(128 + stop)

    def checkpoint_is_due(self) -> bool:
        every = self.args.checkpoint_every
        if isinstance(every, float):
            return time.perf_counter() - self.saved_at >= every
        return self.progress.step % every == 0

    def on_signal(self, number: int, frame) -> None:
        """The first signal lets the step end and saves; a second one stops at once."""
        if self.stop_signal:
            end_at_once(number, frame)
        self.stop_signal = number
        if self.directory:
            say("stopping once the step is done and saved; a second signal stops at once")

    def measure(self, bar: tqdm) -> dict:
        """The metrics of the steps since the last call. Raises RunError if one was faulty."""
        self.check()
        interval, progress = self.interval, self.progress
        total, tokens, seconds = interval.sums()
        loss, speed, lr = total / tokens, tokens / seconds, self.optimizer.param_groups[0]["lr"]
        skipped = {"skipped_steps": int(interval.skipped.item())} if interval.fp16 else {}
        bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.2e}, {speed:,.0f} tokens/s"
                            + "".join(f", {n} skipped" for n in skipped.values()))
        metrics = {"step": progress.step, "epoch": progress.step / self.steps_per_epoch,
                   "loss": loss, "lr": lr, "grad_norm": interval.grad_norm.item(),
                   "tokens_per_second": speed, **skipped}
        progress.training_seconds += seconds
        interval.restart()
        return metrics

    def check(self) -> None:
        """Raises RunError that names the first faulty step and its batch, if there was one."""
        if fault := self.interval.fault():
            step, what = fault
            windows = next(self.batches(step - 1)) * self.args.stride
            raise RunError(describe_fault(step, what, (step - 1) // self.steps_per_epoch, windows))

    def last_checkpoint(self) -> str:
        if self.saved_step is None:
            return "there is no checkpoint yet"
        return f"the last checkpoint is of step {self.saved_step}"

    def evaluate(self) -> Scores:
        args = self.args
        return evaluate(self.model, self.val_tokens, block_size=args.block_size,
                        label_shift=args.label_shift, precision=args.precision, ranks=self.ranks)

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
            if self.directory:
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
        self.directory.check()
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
            "tokens_per_second": progress.tokens / max(progress.training_seconds, 1e-9),
            "peak_memory_mb": peak_memory_mb(self.device),
            "device": self.ranks.times(device_name(self.device)),
            "precision": args.precision, "torch": torch.__version__,
            **({"skipped_steps": int(self.interval.skipped.item())} if self.interval.fp16 else {}),
        })
        print(f"best: val perplexity {perplexity(progress.best_val_loss):.3f} "
              f"(base {perplexity(progress.base_val_loss):.3f}) after {progress.seconds:.0f} s; "
              f"saved in {args.out}")


if __name__ == "__main__":
    run_command(main)
