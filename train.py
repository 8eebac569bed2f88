"""Fine-tune GPT-2 on a book or on conversations: `python train.py lora` or `full`.

LoRA and full fine-tuning share one loop, but train and save other parameters.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.errors import LossNotFinite, run_command
from data.windows import Batch, Dataset
from evaluation.scores import EVAL_BATCH, Scores, evaluate
from lora import RateSearch, adapter_disabled, find_rate
from training.directory import is_finished
from training.launch import launch
from training.model import load_model
from training.options import parse_options
from training.plan import Plan, make_plan
from training.report import describe_parameters
from training.run import Run, open_run
from training.search import short_run_data
from training.trainer import Trainer, trainer_for


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(__doc__, argv)
    with launch(options) as (device, processes):  # --precision: see common/device.py
        plan = make_plan(options, device, processes)
        if is_finished(plan):  # also refuses an --out that must not be written
            return
        model = load_model(plan)  # for LoRA, a frozen base with A and B
        print(describe_parameters(model))
        trainer = trainer_for(plan, model)  # with AdamW, device.grad_scaler()
        with open_run(plan, trainer) as run:  # resumes a run, or removes an older one
            train(plan, trainer, run)


def train(plan: Plan, trainer: Trainer, run: Run) -> None:
    """Take the steps that remain. Validate when due, and keep the best model."""
    if run.step == 0:  # also if the run was resumed before its first step
        begin(plan, trainer, run)
    run.start()  # from here on, a signal first saves the run
    for batch in plan.batches(run.step):
        lr = learning_rate(run.step, plan.total_steps, run.lr, plan.options.warmup_ratio)
        loss, grad_norm = train_step(trainer, batch, lr)
        run.count(loss, grad_norm, batch.num_tokens, lr)
        if plan.validation_is_due(run.step):
            run.keep_best(validate(plan, trainer, plan.data.validation))
        run.save_or_stop()
    run.finish()


def begin(plan: Plan, trainer: Trainer, run: Run) -> None:
    """Score the base, and --init-adapter, on the validation part. Find the rate if none is set."""
    run.save()  # a checkpoint before the first best model, so that --resume finds one
    with adapter_disabled(trainer.model):
        run.keep_base(validate(plan, trainer, plan.data.validation))
    if plan.options.init_adapter:
        run.keep_best(validate(plan, trainer, plan.data.validation))
    if plan.options.lr is None:
        run.keep_rate(search_rate(plan, trainer))


def train_step(trainer: Trainer, batch: Batch, lr: float) -> tuple[Tensor, Tensor]:
    """Take one optimizer step. Return the sum of the loss over the tokens of the batch, and the
    gradient norm before clipping.
    """
    device, scaler = trainer.device, trainer.scaler
    total_loss = torch.zeros((), device=device.torch_device)
    for inputs, targets in batch.micro_batches:
        with device.autocast():
            loss = trainer.loss(device.to_device(inputs), device.to_device(targets))
        # `loss` is a sum over tokens, and is divided by the number of tokens in the whole batch. So
        # the gradients of all micro-batches on all processes add up to the gradient of the mean
        # loss. In fp16, small gradients would underflow, so the scaler multiplies the loss.
        scaler.scale(loss / batch.num_tokens).backward()
        total_loss += loss.detach()
    trainer.processes.all_reduce_gradients(trainer.model, total_loss)  # also sums the loss

    scaler.unscale_(trainer.optimizer)  # divides by the scaler's factor: clip the true gradient
    clip = trainer.clip or math.inf  # 0: no clipping
    grad_norm = nn.utils.clip_grad_norm_(trainer.model.parameters(), clip)
    for group in trainer.optimizer.param_groups:
        group["lr"] = lr
    scaler.step(trainer.optimizer)
    scaler.update()
    trainer.optimizer.zero_grad()
    return total_loss, grad_norm


def learning_rate(step: int, total: int, peak: float, warmup_ratio: float) -> float:
    """Return the learning rate of a step. Steps count from 0. The rate rises linearly to `peak`
    over the first ceil(warmup_ratio * total) steps, and then falls along half a cosine towards 0
    (Loshchilov & Hutter 2016, https://arxiv.org/abs/1608.03983).
    """
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def search_rate(plan: Plan, trainer: Trainer) -> RateSearch:
    """Find the peak learning rate by short runs. They train on most of the training part, and its
    end scores them, so the choice of the rate does not see the validation part."""
    batches, held_out = short_run_data(plan)

    def short_run(rate: float) -> float:
        short = trainer_for(plan, trainer.model)  # with a new optimizer
        for step, batch in enumerate(batches):
            lr = learning_rate(step, len(batches), rate, plan.options.warmup_ratio)
            train_step(short, batch, lr)
        try:
            return validate(plan, short, held_out).loss
        except LossNotFinite:  # the short run diverged
            return math.inf

    return find_rate(trainer.model, short_run)


def validate(plan: Plan, trainer: Trainer, data: Dataset) -> Scores:
    """Score a part of the text. A batch is at most as large as a micro-batch of training."""
    size = min(EVAL_BATCH, plan.micro_batch_size)
    return evaluate(trainer.model, data, trainer.device, trainer.processes, size)


if __name__ == "__main__":
    run_command(main)
