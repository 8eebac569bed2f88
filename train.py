"""Fine-tune GPT-2 on a book: `python train.py lora` or `python train.py full`.

One loop serves both methods; they differ in which parameters are trained and in what is saved.
"""

if __name__ == "__main__":  # before torch, whose import takes seconds
    from common import signals

    signals.install_exit_handlers()

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from adapters.files import save_adapter
from common.device import Device, tune_process
from common.errors import UserError, run_command
from data.windows import scored_positions
from evaluate import Scores, evaluate
from lora.inject import adapter_disabled
from lora.plus import parameter_groups
from model import fast as ops
from model.hub import find_base
from model.tokenizer_files import load_tokenizer, save_tokenizer
from model.weights import save_gpt2
from training.build import build_model, load_data
from training.directory import refuse_used_directory
from training.identity import run_identity
from training.meter import Meter, Progress
from training.options import Options, parse_options
from training.ranks import ALONE, Ranks
from training.report import count_parameters, describe_parameters
from training.session import Session


def main(argv: Sequence[str] | None = None) -> None:
    tune_process()
    options, ranks = parse_options(__doc__, argv), Ranks.of_torchrun()
    device = Device.pick(options.device, options.precision, train=True)
    with ranks.joined(device.torch_device):
        if ranks.first:
            refuse_used_directory(options)
        device.set_tf32(options.allow_tf32)
        if options.compile:
            device.check_compiler()
        if options.gradient_checkpointing and device.torch_device.type == "mps":  # pytorch#127676
            raise UserError(
                "--gradient-checkpointing: on MPS, dropouts would draw other masks the "
                "second time; use --grad-accum to save memory"
            )
        with ranks.first_goes_first():
            name, directory = find_base(options.base)
        if ranks.first:
            refuse_used_directory(replace(options, base=str(directory)))  # a name's directory, too
        options = replace(options, base=name, precision=device.precision)
        trainer = Trainer(options, directory, device, ranks)
        print(describe_parameters(trainer.model))
        identity = run_identity(
            trainer.options, directory, trainer.windows.tokens, trainer.validation.tokens
        )
        with Session(trainer.options, device, ranks, identity) as session:
            if not session.finished:
                train(trainer, session)


def learning_rate(step: int, total: int, peak: float, warmup_ratio: float) -> float:
    """Rise linearly to `peak` over the first ceil(warmup_ratio * total) steps, then fall along half
    a cosine towards zero (Loshchilov & Hutter 2016, https://arxiv.org/abs/1608.03983). Steps count
    from 0; the rate of step 0 is not zero.
    """
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


class Trainer:
    """Hold the model built from the base in `directory`, the data, and what a step needs: mixed
    precision, AdamW, warm-up and cosine, accumulation, clipping.
    """

    def __init__(self, options: Options, directory: Path, device: Device, ranks: Ranks = ALONE):
        torch.manual_seed(options.seed)
        model, config = build_model(options, directory, device.dtype)
        if config:  # --init-adapter brings its own LoRA options
            options = replace(options, **asdict(config))
        self.options, self.device, self.ranks = options, device, ranks
        self.tokenizer = load_tokenizer(directory, model.config.vocab_size)
        self.windows, self.validation = load_data(options, model.config, self.tokenizer)
        self.model = device.place(model).train()  # on the device; frozen weights in `precision`
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        ranks.broadcast(self.parameters.values())
        # One group, or two under LoRA+; each has `scale`, the factor of its learning rate.
        groups = parameter_groups(self.parameters, options.loraplus_lr_ratio)
        self.optimizer = torch.optim.AdamW(
            groups, lr=options.lr, weight_decay=options.weight_decay, fused=True
        )
        # Small gradients vanish in fp16: scale the loss up, and gradients down before the step.
        fp16 = device.precision == "fp16"
        self.scaler = torch.amp.GradScaler(device.torch_device.type, enabled=fp16)
        # The loss is not compiled: its loop over chunks would be unrolled into a long program.
        self.hidden = torch.compile(model.hidden) if options.compile else model.hidden
        self.steps_per_epoch = math.ceil(len(self.windows) / options.batch_size)
        self.total_steps = min(options.epochs * self.steps_per_epoch, options.max_steps or math.inf)
        self.progress, self.meter = Progress(), Meter(device.torch_device, fp16)

    def batches(self, step: int = 0) -> Iterator[np.ndarray]:
        """Yield each step's window indices (B,), from `step` on; each epoch has its own order."""
        size, order = self.options.batch_size, None
        for number in range(step, self.total_steps):
            epoch, position = divmod(number, self.steps_per_epoch)
            if order is None or position == 0:
                order = self.windows.epoch_order(self.options.seed, epoch)
            yield order[position * size : (position + 1) * size]

    def step(self, batch: np.ndarray) -> None:
        """Take one optimizer step on the windows `batch` (B,), computed in `--grad-accum` parts."""
        options, tokens = self.options, self.windows.scored_tokens(batch)
        mine = np.array_split(batch, self.ranks.count)[self.ranks.rank]  # all, but under torchrun
        total = torch.zeros((), device=self.device.torch_device)
        for part in np.array_split(mine, max(1, min(options.grad_accum, len(mine)))):
            with self.device.autocast():
                loss = self.summed_loss(*self.windows.batch(part))
            # Divide by the whole batch's tokens, so that the parts' and ranks' gradients add up.
            self.scaler.scale(loss / tokens).backward()
            total += loss.detach()
        self.ranks.all_reduce([total, *(p.grad for p in self.parameters.values())])
        self.scaler.unscale_(self.optimizer)  # before clipping, which compares true norms
        grad_norm = nn.utils.clip_grad_norm_(self.parameters.values(), options.clip or math.inf)
        lr = learning_rate(self.progress.step, self.total_steps, options.lr, options.warmup_ratio)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.meter.end_step(self.progress.step, total, tokens, grad_norm)

    def summed_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of -log p(target) over the tokens, in nats; a batch's parts add up.

        `inputs` and `targets` (B, T) are on the CPU.
        """
        if not len(inputs):  # a rank without windows, which attention may refuse (pytorch#133780)
            return 0 * sum(p.sum() for p in self.parameters.values())  # gradients of 0
        hidden = self.hidden(self.device.copy(inputs)).flatten(0, 1)  # (B * T, C)
        targets = targets.flatten()
        if self.options.data:  # only completions are scored; of a window, every token is
            scored = scored_positions(targets)
            hidden, targets = hidden[self.device.copy(scored)], targets[scored]
        return ops.tied_cross_entropy(hidden, self.model.wte.weight, self.device.copy(targets))

    def measure(self) -> dict:
        """Return the metrics of the steps since the last call."""
        metrics, step = self.meter.measure(), self.progress.step
        return {
            "step": step,
            "epoch": step / self.steps_per_epoch,
            "loss": metrics.pop("loss"),
            "lr": self.optimizer.param_groups[0]["lr"],
            **metrics,
        }

    def evaluate(self) -> Scores:
        return evaluate(
            self.model,
            self.validation.evaluation_batches(),
            self.tokenizer,
            self.device,
            self.ranks,
        )


def train(trainer: Trainer, session: Session) -> None:
    """Take every step; validate, log and save when due."""
    options, progress, meter = trainer.options, trainer.progress, trainer.meter
    trained = nn.ParameterDict(
        {  # torch allows no dot in these names
            name.replace(".", "/"): p for name, p in trainer.parameters.items()
        }
    )
    session.watch(
        parameters=trained,
        optimizer=trainer.optimizer,
        scaler=trainer.scaler,
        progress=progress,
        meter=meter,
    )
    session.resume(trainer.total_steps)
    if progress.step == 0:  # else the checkpoint has the base's loss
        with adapter_disabled(trainer.model):
            scores = trainer.evaluate()
        progress.base_val_loss = progress.start_val_loss = scores.loss
        print(f"base: val {scores}", flush=True)
        if scores.loss > 1.01 * math.log(trainer.model.config.vocab_size):
            print(
                "warning: the base predicts this text worse than by guessing; is it plain text, "
                "in a language that the base has seen?"
            )
        if options.init_adapter:
            progress.start_val_loss = validate(trainer, session)["val_loss"]  # the best so far
        meter.restart()
    for batch in session.steps(trainer.batches(progress.step)):
        trainer.step(batch)
        step = progress.step
        epoch_ends = step % trainer.steps_per_epoch == 0 or step == trainer.total_steps
        validates = epoch_ends or (options.eval_every and step % options.eval_every == 0)
        if validates or step % options.log_every == 0:
            metrics = trainer.measure()
            if validates:
                metrics |= validate(trainer, session)
            session.log(metrics)
            meter.restart()  # validation is not training time
        meter.began += session.after_step(epoch_ends)  # nor is saving a checkpoint
    session.finish(count_parameters(trainer.model) | progress.report() | meter.report())


def validate(trainer: Trainer, session: Session) -> dict:
    """Score the validation part; save the model if it is the best so far."""
    options, progress, scores = trainer.options, trainer.progress, trainer.evaluate()
    better = scores.loss < progress.best_val_loss
    if better:
        progress.best_val_loss, progress.best_val_bits_per_byte = scores.loss, scores.bits_per_byte
        if trainer.ranks.first and options.method == "lora":
            save_adapter(
                trainer.model,
                options.lora_config,
                options.out,
                options.base,
                session.identity["base_sha256"]["weights"],
            )
        elif trainer.ranks.first:
            save_gpt2(trainer.model, options.out, end_of_text=trainer.tokenizer.end_of_text)
            save_tokenizer(trainer.tokenizer, options.out)
    tqdm.write(
        f"step {progress.step}/{trainer.total_steps}: val {scores}"
        + (", best so far" if better else "")
    )
    return {
        "val_loss": scores.loss,
        "val_perplexity": scores.perplexity,
        "val_bits_per_byte": scores.bits_per_byte,
    }


if __name__ == "__main__":
    run_command(main)
