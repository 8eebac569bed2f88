"""Fine-tune GPT-2 on a book or on conversations: `python train.py lora` or `full`.

LoRA and full fine-tuning share one loop, and differ only in the parameters to train and save.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.errors import run_command
from data.windows import Batch
from evaluate import EVAL_BATCH, evaluate
from lora import adapter_disabled
from lora.variants.plus import parameter_groups
from model.gpt2 import GPT2
from training.data import Data, load_data
from training.model import add_adapter, load_base
from training.optimizer import AdamW
from training.options import parse_options
from training.report import describe_parameters
from training.run import Run, open_run
from training.scores import Scores


def main(argv: Sequence[str] | None = None) -> None:
    with open_run(parse_options(__doc__, argv)) as run:
        base = run.find_base()
        data = load_data(run.options, base)
        options = run.resolve(data)  # sets options that the user left out, such as lr
        model = load_base(options, base, run.device)
        if options.method == "lora":
            add_adapter(model, options, run.base_sha256)  # freezes the base
        print(describe_parameters(model))
        run.claim_out(data)
        if not run.finished:
            train(model, data, run)


def train(model: GPT2, data: Data, run: Run) -> None:
    """Run the training steps that remain. Validate when due, and keep the best model."""
    options = run.options
    optimizer, scaler = set_up(model, run)
    run.begin(model, optimizer=optimizer, scaler=scaler)  # resumes a run, or empties --out
    if run.step == 0:
        validate_start(model, data, run)
    for batch in run.steps(data.training):
        lr = learning_rate(run.step, run.total_steps, options.lr, options.warmup_ratio)
        loss, grad_norm = train_step(model, optimizer, scaler, batch, lr, run)
        run.count_step(loss, grad_norm, batch.num_tokens, lr)
        if run.should_validate():
            run.keep_best(model, validate(model, data, run))
    run.finish(model)


def set_up(model: GPT2, run: Run) -> tuple[AdamW, torch.amp.GradScaler]:
    """Return the optimizer and the GradScaler, which scales the loss in fp16."""
    options = run.options
    run.set_up_model(model)  # casts frozen weights, applies --kernels and --compile
    # Each parameter group has an `lr_scale`, which multiplies lr. Only LoRA+ has two groups.
    groups = parameter_groups(model, options.loraplus_lr_ratio)
    optimizer = AdamW(groups, lr=options.lr, weight_decay=options.weight_decay, fused=True)
    scaler = run.grad_scaler()
    return optimizer, scaler


def train_step(
    model: GPT2,
    optimizer: AdamW,
    scaler: torch.amp.GradScaler,
    batch: Batch,
    lr: float,
    run: Run,
) -> tuple[Tensor, Tensor]:
    """Take one optimizer step. Return the sum of the loss over the tokens of the batch, and the
    gradient norm before clipping.
    """
    total_loss = torch.zeros((), device=run.device.torch_device)
    for inputs, targets in batch.micro_batches():
        with run.device.autocast():
            # By default (--kernels fast), `model.loss` is FastGPT2.loss in model/kernels/fast.py.
            loss = model.loss(run.device.to_device(inputs), run.device.to_device(targets))
        # `loss` is a sum over tokens, and is divided by the number of tokens in the whole batch. So
        # the gradients of all micro-batches on all processes add up to the gradient of the mean
        # loss. Small gradients would underflow in fp16. So the scaler multiplies the loss by a
        # factor, and `unscale_` divides the gradients by this factor.
        scaler.scale(loss / batch.num_tokens).backward()
        total_loss += loss.detach()
    run.processes.all_reduce_gradients(model, total_loss)  # also sums the loss

    scaler.unscale_(optimizer)  # clipping needs the norm of the unscaled gradient
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), run.options.clip or math.inf)
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


def validate_start(model: GPT2, data: Data, run: Run) -> None:
    """Score the base on the validation part, and the adapter of `--init-adapter` if given."""
    with adapter_disabled(model):
        run.keep_base(model, validate(model, data, run))
    if run.options.init_adapter:
        run.keep_best(model, validate(model, data, run))


def validate(model: GPT2, data: Data, run: Run) -> Scores:
    """Score the validation part. A batch is at most as large as a micro-batch of training."""
    size = min(EVAL_BATCH, run.micro_batch_size)
    return evaluate(model, data.validation, run.device, run.processes, size)


if __name__ == "__main__":
    run_command(main)
