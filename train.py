"""Fine-tune GPT-2 on a book or on conversations: `python train.py lora` or `full`.

LoRA and full fine-tuning share one loop, and differ only in the parameters to train and save.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from common.errors import run_command
from data.windows import Batch
from evaluation.scores import EVAL_BATCH, Scores, evaluate
from lora import adapter_disabled
from model.gpt2 import GPT2
from training.model import load_model
from training.optimizer import AdamW, grad_scaler, parameter_groups
from training.options import parse_options
from training.plan import Plan, launch, make_plan
from training.report import describe_parameters
from training.run import Run, open_run


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(__doc__, argv)
    with launch(options) as (device, processes):
        plan = make_plan(options, device, processes)
        if plan is None:  # --resume found a finished run
            return
        model = load_model(plan)  # for LoRA, the base is frozen and A and B are new
        print(describe_parameters(model))
        optimizer, scaler = make_optimizer(model, plan)
        with open_run(plan, model, optimizer, scaler) as run:  # resumes a run, or empties --out
            train(plan, run)


def make_optimizer(model: GPT2, plan: Plan) -> tuple[AdamW, torch.amp.GradScaler]:
    """Return the optimizer and the GradScaler, which scales the loss in fp16."""
    settings = plan.settings
    groups = parameter_groups(model, settings)  # each has an `lr_scale`, which multiplies lr
    optimizer = AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    return optimizer, grad_scaler(plan.device)


def train(plan: Plan, run: Run) -> None:
    """Run the training steps that remain. Validate when due, and keep the best model."""
    settings = plan.settings
    if run.step == 0:
        validate_start(plan, run)
    for batch in plan.batches(run.step):
        lr = learning_rate(run.step, plan.total_steps, settings.lr, settings.warmup_ratio)
        loss, grad_norm = train_step(run.model, run.optimizer, run.scaler, batch, lr, plan)
        # Log, validate and keep the best model, save a checkpoint: each when it is due.
        run.end_step(loss, grad_norm, batch.num_tokens, lr, partial(validate, run.model, plan))
    run.finish()


def train_step(
    model: GPT2,
    optimizer: AdamW,
    scaler: torch.amp.GradScaler,
    batch: Batch,
    lr: float,
    plan: Plan,
) -> tuple[Tensor, Tensor]:
    """Take one optimizer step. Return the sum of the loss over the tokens of the batch, and the
    gradient norm before clipping.
    """
    total_loss = torch.zeros((), device=plan.device.torch_device)
    for inputs, targets in batch.micro_batches():
        with plan.device.autocast():
            # By default (--kernels fast), `model.loss` is FastGPT2.loss in model/kernels/fast.py.
            loss = model.loss(plan.device.to_device(inputs), plan.device.to_device(targets))
        # `loss` is a sum over tokens, and is divided by the number of tokens in the whole batch. So
        # the gradients of all micro-batches on all processes add up to the gradient of the mean
        # loss. Small gradients would underflow in fp16. So the scaler multiplies the loss by a
        # factor, and `unscale_` divides the gradients by this factor.
        scaler.scale(loss / batch.num_tokens).backward()
        total_loss += loss.detach()
    plan.processes.all_reduce_gradients(model, total_loss)  # also sums the loss

    scaler.unscale_(optimizer)  # clipping needs the norm of the unscaled gradient
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), plan.settings.clip or math.inf)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
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


def validate_start(plan: Plan, run: Run) -> None:
    """Score the base on the validation part, and the adapter of `--init-adapter` if given."""
    with adapter_disabled(run.model):
        run.keep_base(validate(run.model, plan))
    if plan.settings.init_adapter:
        run.keep_best(validate(run.model, plan))


def validate(model: GPT2, plan: Plan) -> Scores:
    """Score the validation part. A batch is at most as large as a micro-batch of training."""
    size = min(EVAL_BATCH, plan.micro_batch_size)
    return evaluate(model, plan.data.validation, plan.device, plan.processes, size)


if __name__ == "__main__":
    run_command(main)
