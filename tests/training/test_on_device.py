"""Compare a run's steps on the tests' device with plain kernels in fp32 on the CPU.

On a CPU, the run computes CUDA's loss. Gradients are compared as well as losses, because AdamW
hides a wrong scale of a gradient.
"""

from dataclasses import replace
from shlex import split

import pytest
import torch
from torch import Tensor

from benchmarks.ours import Steps
from tests.helpers import DEVICE
from tests.runs import NO_DROPOUT, cudas_loss, questions, trainer

pytestmark = pytest.mark.device

EXACT = "--device cpu --precision fp32 --kernels plain"
# 179 windows make micro-batches of 20, 20 and 20 and, in the third step, of 20, 20 and 19.
STEPS = "--batch-size 60 --max-steps 4 --lr 1e-3 --weight-decay 1 --clip 1e9"
COMMANDS = (
    "lora",
    "lora --clip 0.1",
    "lora --grad-accum 3 --gradient-checkpointing",
    "lora --target-modules c_attn.q c_attn.v",
    "lora --target-modules c_attn c_proj c_fc --use-rslora",
    "lora --use-dora",
    "lora --init-lora-weights pissa",
    "lora --quantise nf4",
    "lora --quantise int8",
    "lora --data --block-size 64",
    "full",
    "full --grad-accum 3",
)
# The largest relative difference of a loss and of a gradient's norm, and the largest 1 - cosine of
# two gradients. Rounding changes a gradient by about 2^-24 (fp32), 2^-11 (fp16) or 2^-8 (bf16),
# relative to its norm, and 1 - cosine is about the square of this share.
LIMITS = {
    "fp32": (1e-5, 1e-4, 1e-8),
    "fp16": (2e-3, 2e-2, 5e-3),
    "bf16": (4e-3, 5e-2, 1e-1),
}


@pytest.fixture
def make(base, book, tmp_path):
    """Return a function that makes a run's trainer from a command line."""

    def make(command: str, *more: object) -> Steps:
        method, *options = command.split()
        text = book
        if "--data" in options:
            options.remove("--data")
            text = questions(tmp_path / "questions.jsonl")
        return trainer(method, base, text, tmp_path, *split(STEPS), *options, *more)

    return make


def steps_of(made: Steps) -> tuple[list[float], list[dict[str, Tensor]]]:
    """Take every step. Return the losses in nats per token, with the score of the validation part
    as the last, and the gradients of each step before clipping.
    """
    gradients: list[dict[str, Tensor]] = []

    def record(*_: object) -> None:
        gradients.append({name: p.grad.double().cpu() for name, p in made.parameters.items()})

    made.trainer.optimizer.register_step_pre_hook(record)
    losses = [made.step(batch).item() / batch.num_tokens for batch in made.batches()]
    return [*losses, made.evaluate().loss], gradients


def norm(tensors: dict[str, Tensor]) -> float:
    return torch.stack([t.norm() for t in tensors.values()]).norm().item()


def angle(a: Tensor, b: Tensor) -> float:
    """Return 1 - cosine of the two tensors, or 0 for two tensors of zeros."""
    if not a.any() and not b.any():
        return 0.0
    return 1 - torch.cosine_similarity(a.flatten(), b.flatten(), dim=0, eps=1e-30).item()


@pytest.mark.parametrize("command", COMMANDS)
def test_steps_are_those_of_plain_kernels_on_the_cpu(make, command):
    no_dropout = NO_DROPOUT[command.split()[0]]
    losses, gradients = steps_of(make(command, *no_dropout, *split(EXACT)))
    if command.startswith("lora "):  # the options have an effect
        plain, _ = steps_of(make("lora", *no_dropout, *split(EXACT)))
        parts_only = "--grad-accum" in command
        assert (losses[-1] == pytest.approx(plain[-1], rel=1e-6)) == parts_only

    for precision, (of_loss, of_norm, of_angle) in LIMITS.items():
        if precision == "fp16" and DEVICE == "cpu":
            continue  # refused with the fast kernels
        with cudas_loss():
            mine, my_gradients = steps_of(make(command, *no_dropout, "--precision", precision))
        assert mine == pytest.approx(losses, rel=of_loss), precision
        angles = []
        for here, there in zip(my_gradients, gradients, strict=True):
            assert norm(here) == pytest.approx(norm(there), rel=of_norm), precision
            if "pissa" in command:  # a GPU may choose the other sign of a pair of singular vectors
                here, there = ({n: t.abs() for n, t in each.items()} for each in (here, there))
            angles += [angle(here[name], there[name]) for name in there]
        assert max(angles) < of_angle, precision
        assert (max(angles) < LIMITS["fp32"][-1]) == (precision == "fp32")


def test_every_micro_batch_draws_masks_of_its_own_and_a_validation_draws_none(make):
    dropout = split("--base-dropout 0.1 --lora-dropout 0.1 --grad-accum 3 --lr 1e-12")
    made = make("lora", *dropout)
    batch = next(made.batches())
    inputs, targets = batch.micro_batches[0]
    batch = replace(batch, micro_batches=[(inputs[:1], targets[:1])] * 3)
    losses = []
    real = made.trainer.loss
    made.trainer.loss = lambda *given: losses.append(real(*given)) or losses[-1]
    for _ in range(2):
        made.step(batch)
    assert len({round(loss.item(), 4) for loss in losses}) == 6
    assert made.evaluate() == made.evaluate()


@pytest.mark.skipif(DEVICE != "cuda", reason="only a GPU computes while the CPU goes on")
@pytest.mark.parametrize("options", ["--precision fp32", "--precision fp16 --grad-accum 3"])
def test_a_step_never_waits_for_the_gpu(make, options):
    made = make("lora", *split(options))
    first, second, *_ = made.batches()
    made.step(first)  # PyTorch initialises its libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        made.step(second)
    finally:
        torch.cuda.set_sync_debug_mode("default")
