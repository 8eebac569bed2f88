"""Fine-tune GPT-2 on a book: `python train.py lora` or `python train.py full`.

One loop serves both methods; they differ in which parameters are trained and in what is saved.
"""

if __name__ == "__main__":
    from common.start import before_torch
    from training.options import parse_command_line

    before_torch(parse_command_line, __doc__)

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common.device import Device, tune_process
from common.errors import run_command
from data.instructions import CHAT_TEMPLATE
from data.windows import scored_positions
from evaluate import Scores, evaluate
from lora.files import save_adapter
from lora.inject import adapter_disabled
from lora.variants.lora_ga import GradientStart, LoRAGAConfig
from lora.variants.plus import parameter_groups
from lora.variants.riemannian import precondition
from model.gpt2 import GPT2
from model.kernels.fast import accelerate
from storage.hf_compat import save_tokenizer
from storage.hub import find_base
from storage.weights import save_gpt2
from training.build import Data, build_model, count_steps, load_data, prepare_device, resolve
from training.directory import refuse_inputs_as_output, refuse_used_directory
from training.graph import GraphedBackward, can_capture
from training.identity import run_identity
from training.meter import Meter, Progress
from training.optimizer import AdamW
from training.options import Options, parse_options
from training.ranks import ALONE, Ranks
from training.report import count_parameters, describe_parameters
from training.session import Session
from training.start import start_along_gradient


def main(argv: Sequence[str] | None = None) -> None:
    tune_process()
    asked = parse_options(__doc__, argv)
    ranks = Ranks.of_torchrun()
    device = Device.pick(asked.device, asked.precision, train=True)
    with ranks.joined(device.torch_device):
        if ranks.first:
            refuse_used_directory(asked)
        prepare_device(asked, device)
        with ranks.first_goes_first():
            base, directory = find_base(asked.base)
        if ranks.first:
            refuse_inputs_as_output(asked, directory)

        data = load_data(asked, directory)
        options = resolve(asked, base, device, data)
        trainer = make_trainer(options, directory, data, device, ranks)
        print(describe_parameters(trainer.model))
        tokens = data.training.tokens, data.validation.tokens
        identity = run_identity(options, directory, *tokens)
        with Session(options, device, ranks, identity) as session:
            if not session.finished:
                train(trainer, session)


def make_trainer(
    options: Options, directory: Path, data: Data, device: Device, ranks: Ranks = ALONE
) -> "Trainer":
    """Build the model from the base in `directory`, and make it fast."""
    model = build_model(options, directory, device.dtype, device.torch_device)
    accelerate(model)
    return Trainer(options, model, data, device, ranks)


def learning_rate(step: int, total: int, peak: float, warmup_ratio: float) -> float:
    """Return a step's rate: it rises linearly to `peak` over the first ceil(warmup_ratio * total)
    steps, then falls along half a cosine towards zero (Loshchilov & Hutter 2016,
    https://arxiv.org/abs/1608.03983). Steps count from 0; the rate of step 0 is not zero.
    """
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


class Trainer:
    """Hold the model, the data, and what a step needs: mixed precision, AdamW, warm-up and cosine,
    accumulation, clipping.
    """

    def __init__(
        self, options: Options, model: GPT2, data: Data, device: Device, ranks: Ranks = ALONE
    ):
        self.options = options
        self.data = data
        self.device = device
        self.ranks = ranks
        self.model = model.train()
        device.place(model)  # on the device; frozen weights in `precision`
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        ranks.broadcast(self.parameters.values())

        # One group, or two under LoRA+; each has `scale`, the factor of its learning rate.
        groups = parameter_groups(self.parameters, options.loraplus_lr_ratio)
        self.optimizer = AdamW(
            groups, lr=options.peak_lr, weight_decay=options.weight_decay, fused=True
        )
        # Small gradients vanish in fp16: scale the loss up, and gradients down before the step.
        fp16 = device.precision == "fp16"
        self.scaler = torch.amp.GradScaler(device.torch_device.type, enabled=fp16)
        # The scaler makes its scale at its first loss, and a rank may have none.
        self.scaler.scale(torch.zeros((), device=device.torch_device))
        self.hidden = model.hidden
        self.backward_of_part = self.eager_backward

        # The most windows that a rank computes at a time.
        largest_batch = min(options.batch_size, len(data.training))
        share = math.ceil(largest_batch / ranks.count)
        self.part_size = math.ceil(share / options.grad_accum)

        self.steps_per_epoch, self.total_steps = count_steps(options, len(data.training))
        self.progress = Progress()
        self.meter = Meter(fp16)

        if isinstance(options.lora, LoRAGAConfig):
            start_along_gradient(model, self.batches(), data.training, self.backward, ranks)
        if options.compile:  # not the loss: its loop over chunks would be a long program
            self.hidden = torch.compile(model.hidden)
        if can_capture(options, device):
            self.backward_of_part = GraphedBackward(
                self.eager_backward,
                self.parameters.values(),
                shape=(self.part_size, options.block_size),
                tokens=largest_batch * options.block_size,
            )

    def batches(self, step: int = 0) -> Iterator[np.ndarray]:
        """Yield each step's window indices (B,), from `step` on; each epoch has its own order."""
        size = self.options.batch_size
        order = None
        for number in range(step, self.total_steps):
            epoch, position = divmod(number, self.steps_per_epoch)
            if order is None or position == 0:
                order = self.data.training.epoch_order(self.options.seed, epoch)
            yield order[position * size : (position + 1) * size]

    def step(self, batch: np.ndarray) -> None:
        """Take one optimizer step on the windows `batch` (B,), computed in `--grad-accum` parts."""
        options = self.options
        tokens = self.data.training.scored_tokens(batch)
        total_loss = self.backward(batch, tokens)
        self.ranks.all_reduce([total_loss, *self.gradients()])

        self.scaler.unscale_(self.optimizer)  # before clipping, which compares true norms
        grad_norm = nn.utils.clip_grad_norm_(self.parameters.values(), options.clip or math.inf)
        if options.riemannian:
            precondition(self.model)
        lr = learning_rate(
            self.progress.step, self.total_steps, options.peak_lr, options.warmup_ratio
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

        self.progress.step += 1
        self.meter.end_step(self.progress.step, total_loss, tokens, grad_norm)

    def backward(self, batch: np.ndarray, tokens: int) -> Tensor:
        """Add the gradients of the loss / `tokens` on this rank's windows; return the summed loss.

        `tokens` are the whole batch's, so that the parts' and ranks' gradients add up.
        """
        total_loss = torch.zeros((), device=self.device.torch_device)
        for part in self.parts(batch):
            total_loss += self.backward_of_part(*self.data.training.batch(part), tokens)
        return total_loss

    def eager_backward(self, inputs: Tensor, targets: Tensor, tokens: int) -> Tensor:
        """Add the gradients of a part's loss / `tokens`; return the summed loss."""
        with self.device.autocast():
            loss = self.summed_loss(inputs, targets)
        self.scaler.scale(loss / tokens).backward()
        return loss.detach()

    def parts(self, batch: np.ndarray) -> list[np.ndarray]:
        """Split this rank's share of a batch into parts; without torchrun it is all of it."""
        mine = np.array_split(batch, self.ranks.count)[self.ranks.rank]
        if not len(mine):  # there are fewer windows than ranks
            return []
        return np.array_split(mine, min(self.options.grad_accum, len(mine)))

    def summed_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of -log p(target) over the scored tokens, in nats.

        `inputs` and `targets` (B, T) are on the CPU, or where the model is.
        """
        windows = len(inputs)
        if self.options.compile and not self.options.data:
            # Another shape would be compiled anew: an epoch's last batch gets rows that are unused.
            inputs = F.pad(inputs, (0, 0, 0, self.part_size - windows))
        hidden = self.hidden(self.device.copy(inputs))[:windows].flatten(0, 1)  # (B * T, C)
        targets = targets.flatten()
        if self.options.data:  # of an example only completions are scored
            scored = scored_positions(targets)
            hidden = hidden[self.device.copy(scored)]
            targets = targets[scored]
        return self.model.loss(hidden, self.device.copy(targets))

    def gradients(self) -> list[Tensor]:
        """Return every gradient; zeros if this rank had no windows."""
        gradients = []
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        return gradients

    def measure(self) -> dict[str, Any]:
        """Return the metrics of the steps since the last call."""
        step = self.progress.step
        metrics = self.meter.measure()
        return {
            "step": step,
            "epoch": step / self.steps_per_epoch,
            "loss": metrics["loss"],
            "lr": self.optimizer.param_groups[0]["lr"],
            **metrics,
        }

    def stateful(self) -> dict[str, Any]:
        """Return what a checkpoint holds besides the parameters."""
        parts = {
            "optimizer": self.optimizer,
            "scaler": self.scaler,
            "progress": self.progress,
            "meter": self.meter,
        }
        if isinstance(self.options.lora, LoRAGAConfig):
            parts["start"] = GradientStart(self.model)
        return parts

    def evaluate(self) -> Scores:
        batches = self.data.validation.evaluation_batches()
        return evaluate(self.model, batches, self.data.tokenizer, self.device, self.ranks)


def train(trainer: Trainer, session: Session) -> None:
    """Take every step; validate, log and save when due."""
    options = trainer.options
    progress = trainer.progress
    meter = trainer.meter
    session.watch(trainer.parameters, **trainer.stateful())
    session.start_or_resume(trainer.total_steps)
    if progress.step == 0:  # else the checkpoint has the base's loss
        validate_start(trainer, session)
        meter.restart()

    session.handle_signals()
    for batch in session.steps(trainer.batches(progress.step)):
        trainer.step(batch)
        step = progress.step
        epoch_ends = step % trainer.steps_per_epoch == 0 or step == trainer.total_steps
        validates = epoch_ends or (options.eval_every and step % options.eval_every == 0)
        if validates or step % options.log_every == 0:
            metrics = trainer.measure()
            with meter.paused():
                if validates:
                    metrics |= validate(trainer, session)
                session.log(metrics)
        with meter.paused():
            session.save_or_stop(epoch_ends)
    session.finish(count_parameters(trainer.model) | progress.report() | meter.report())


def validate_start(trainer: Trainer, session: Session) -> None:
    """Score the validation part by the base and, if there is one, the initial adapter."""
    progress = trainer.progress
    with adapter_disabled(trainer.model):
        scores = trainer.evaluate()
    progress.base_val_loss = scores.loss
    progress.start_val_loss = scores.loss
    print(f"base: val {scores}", flush=True)
    if scores.loss > 1.01 * math.log(trainer.model.config.vocab_size):
        print(
            "warning: the base predicts this text worse than by guessing; is it plain text, "
            "in a language that the base has seen?"
        )
    if trainer.options.init_adapter:
        progress.start_val_loss = validate(trainer, session)["val_loss"]  # the best so far


def validate(trainer: Trainer, session: Session) -> dict[str, float]:
    """Score the validation part; save the model if it is the best so far."""
    progress = trainer.progress
    scores = trainer.evaluate()
    line = f"step {progress.step}/{trainer.total_steps}: val {scores}"
    if scores.loss < progress.best_val_loss:
        progress.best_val_loss = scores.loss
        progress.best_val_bits_per_byte = scores.bits_per_byte
        if trainer.ranks.first:
            with session.replacing_best_model():
                save_model(trainer, session.identity.base_weights_sha256)
        line += ", best so far"
    tqdm.write(line)
    return {
        "val_loss": scores.loss,
        "val_perplexity": scores.perplexity,
        "val_bits_per_byte": scores.bits_per_byte,
    }


def save_model(trainer: Trainer, base_sha256: str) -> None:
    """Write the adapter, or the whole model, with its tokenizer to `--out`."""
    options = trainer.options
    model = trainer.model
    tokenizer = trainer.data.tokenizer
    if options.lora:
        save_adapter(model, options.lora, options.out, options.base, base_sha256)
    else:
        save_gpt2(model, options.out, end_of_text=tokenizer.end_of_text)
    template = CHAT_TEMPLATE if options.data else None
    save_tokenizer(tokenizer, options.out, model.config.n_positions, template)


if __name__ == "__main__":
    run_command(main)
