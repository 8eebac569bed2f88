"""Check the answers to docs/exercises.md: `python -m lesson.exercises 3`; without a number, all."""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import nn

from common.cli import Parser, number
from common.errors import run_command
from lesson.exercises import answers as own_answers
from lesson.experiments.common import mean_loss, trainer
from lesson.experiments.sweep import finetune
from lora.inject import inject
from lora.layer import LoRAConfig, LoRALinear
from model.gpt2 import GPT2, GPT2Config


class Wrong(Exception):
    """Say what is wrong with an answer."""


def expect(condition: object, message: str) -> None:
    if not condition:
        raise Wrong(message)


def adapted(fan_in: int, fan_out: int, r: int = 4, dropout: float = 0.0) -> LoRALinear:
    """Make a layer whose B is not zero."""
    config = LoRAConfig(r=r, lora_alpha=12, lora_dropout=dropout)
    layer = LoRALinear(nn.Linear(fan_in, fan_out), config)
    nn.init.normal_(layer.lora_B.weight)
    return layer


def check_1(answers: ModuleType) -> None:
    layer = adapted(12, 400)
    answers.swap_the_zero(layer)
    a, b = layer.lora_A.weight, layer.lora_B.weight
    expect(not a.any(), "A is not zero")
    expect(b.any(), "B is zero as well: then neither of them ever moves")
    expect(
        -0.5 <= b.min() < -0.45 and 0.45 < b.max() <= 0.5,
        "B reads r numbers, so it is "
        "U(-1/sqrt(r), 1/sqrt(r)), from -0.5 to 0.5 for r = 4; yours is from "
        f"{b.min():.2f} to {b.max():.2f}",
    )
    layer(torch.randn(5, 12)).square().sum().backward()
    expect(a.grad.any() and not b.grad.any(), "A's first gradient must not be zero, and B's must")


@torch.no_grad()
def check_2(answers: ModuleType) -> None:
    layer, x = adapted(12, 20, r=1, dropout=0.5), torch.randn(400, 12)
    full = layer.base_layer(x) + 2 * layer.scaling * layer.lora_B(layer.lora_A(x))
    y = answers.dropout_after_a(layer, x)
    dropped = torch.isclose(y, layer.base_layer(x), atol=1e-5).all(-1)
    kept = torch.isclose(y, full, atol=1e-5).all(-1)
    expect(
        (dropped | kept).all(),
        "with r = 1 and p = 0.5 a token's update is either gone or "
        "doubled; some of yours are neither",
    )
    expect(120 < dropped.sum() < 280, f"{dropped.sum()} of 400 updates are dropped; half should be")
    y = answers.dropout_after_a(layer.eval(), x)
    expect(torch.allclose(y, layer(x), atol=1e-5), "in evaluation nothing may be dropped")


def check_3(answers: ModuleType) -> None:
    for norm, seen in ((0.5, 0.5), (8.0, 1.0)):
        w = nn.Parameter(torch.zeros(4))
        optimizer, scaler = torch.optim.SGD([w], lr=1.0), torch.amp.GradScaler("cpu")
        answers.clipped_step(scaler, optimizer, [w], (w * norm / 2).sum(), 1.0)
        expect(
            abs(w.norm() - seen) < 1e-3,
            f"a gradient of norm {norm}, clipped to 1, moved the "
            f"weights by {w.norm():.2g} at rate 1, and should by {seen}",
        )


@torch.no_grad()
def check_4(answers: ModuleType) -> None:
    for fan_in, fan_out in ((16, 16), (12, 20)):
        layer, x = adapted(fan_in, fan_out), torch.randn(5, fan_in)
        merged = answers.merge_into_file(
            layer.base_layer.weight.T.clone(),
            layer.lora_A.weight,
            layer.lora_B.weight,
            layer.scaling,
        )
        y = x @ merged + layer.base_layer.bias
        expect(
            torch.allclose(y, layer(x), atol=1e-5),
            f"({fan_in}, {fan_out}): the shapes fit, "
            "and the merged layer computes something else: W + scaling * B A is (out, in)",
        )


def check_5(answers: ModuleType) -> None:
    for n_layer, n_embd, r, targets in (
        (12, 768, 8, ("c_attn",)),
        (6, 256, 4, ("c_proj",)),
        (24, 1024, 16, ("c_attn", "c_proj", "c_fc")),
    ):
        with torch.device("meta"):  # shapes without numbers
            model = GPT2(GPT2Config(n_layer=n_layer, n_embd=n_embd, n_head=4))
            inject(model, LoRAConfig(r=r, target_modules=targets))
        right = sum(p.numel() for p in model.parameters() if p.requires_grad)
        yours = answers.count_lora(n_layer, n_embd, r, targets)
        expect(
            yours == right,
            f"{n_layer} layers of width {n_embd}, rank {r} on "
            f"{', '.join(targets)}: {right:,}, and not {yours:,}",
        )


def check_6(answers: ModuleType) -> None:
    r = answers.RANK
    expect(r, "not answered yet")
    expect(r in [2**i for i in range(9)], f"{r} is not a power of two from 1 to 256")
    (full,), (lora,), (half,) = (
        finetune("full", max_steps=8, lr=1.5e-4),
        *(
            finetune(
                "lora",
                max_steps=8,
                lr=3e-3,
                r=rank,
                lora_alpha=2 * rank,
                target_modules=("c_attn", "c_proj", "c_fc"),
            )
            for rank in (r, max(1, r // 2))
        ),
    )
    expect(lora <= full, f"full fine-tuning reaches {full:.1f}, and rank {r} only {lora:.1f}")
    expect(half > full or r == 1, f"rank {r // 2} meets it too, with {half:.1f}")


def check_7(answers: ModuleType) -> None:
    table, ids = nn.Embedding(30, 16), torch.randint(30, (5, 7))
    layer = answers.LoRAEmbedding(table, LoRAConfig(r=4, lora_alpha=12))
    expect(torch.equal(layer(ids), table(ids)), "a new adapter must change nothing")
    layer(ids).square().sum().backward()
    expect(table.weight.grad is None, "the table is not frozen")
    expect(
        any(p.grad is not None and p.grad.any() for p in layer.parameters()),
        "no gradient differs from zero: with A and B both zero nothing ever moves",
    )
    for p in (layer.lora_A, layer.lora_B):
        nn.init.normal_(p)
    merged = table.weight + 3 * (layer.lora_B @ layer.lora_A).T
    expect(
        torch.allclose(layer(ids), merged[ids], atol=1e-5),
        "it differs from a table to which scaling * (B A)^T was added",
    )


def check_8(answers: ModuleType) -> None:
    weight = torch.randn(64, 64).bfloat16()
    for size in (0.1, 0.01, 0.001):
        delta = size * torch.randn(64, 64)
        kept = (weight.double() + delta).bfloat16().double() - weight.double()
        right = ((kept - delta).norm() / delta.norm()).item()
        yours = answers.lost_in_bf16(weight, delta)
        expect(
            abs(yours - right) < 0.02 * right,
            f"an update of {size} of the weights' size loses {right:.1%}, and not {yours:.1%}",
        )


def check_9(answers: ModuleType) -> None:
    for fan_in, fan_out in ((12, 20), (16, 16)):
        layer = adapted(fan_in, fan_out).double()
        x, g = torch.randn(7, fan_in).double(), torch.randn(7, fan_out).double()
        layer(x).backward(g)
        a, b = layer.lora_A.weight, layer.lora_B.weight
        yours = answers.gradients(x, g, a.detach(), b.detach(), layer.scaling)
        for name, gradient, p in zip(("dA", "dB"), yours, (a, b), strict=True):
            expect(
                gradient.shape == p.shape,
                f"{name} is {tuple(gradient.shape)}, and should be {tuple(p.shape)}",
            )
            expect(
                torch.allclose(gradient, p.grad),
                f"{name} is not what autograd computes; the "
                f"norms are {gradient.norm():.4g} and {p.grad.norm():.4g}",
            )


@torch.no_grad()
def check_10(answers: ModuleType) -> None:
    made = trainer(batch_size=2, max_steps=1)
    batch = next(made.batches())
    inputs, targets = made.windows.batch(batch)  # (2, 128) each
    right, yours = mean_loss(made, batch), answers.next_token_loss(made.model(inputs), targets)
    expect(
        abs(yours - right) < 1e-3,
        f"mini's loss is {right:.3f} on these windows, and not "
        f"{yours:.3f}: which token is position t scored on?",
    )


def check_11(answers: ModuleType) -> None:
    w = nn.Parameter(torch.tensor(1.0))
    answers.accumulate([w * torch.tensor([1.0, 2.0, 3.0]), w * torch.tensor([10.0])])
    expect(
        w.grad is not None and abs(w.grad - 4) < 1e-5,
        f"four tokens have the gradients 1, 2, 3 and 10, and so the mean 4; yours is {w.grad}",
    )


def check_12(answers: ModuleType) -> None:
    for use_rslora in (False, True):
        for r in (1, 8, 64):
            alpha = answers.alpha_for(2.0, r, use_rslora)
            scaling = LoRAConfig(r=r, lora_alpha=alpha, use_rslora=use_rslora).scaling
            expect(
                abs(scaling - 2) < 1e-9,
                f"r {r}, use_rslora {use_rslora}: the scaling is {scaling:.4g}, and should be 2",
            )


CHECKS = {
    int(name[6:]): check for name, check in list(globals().items()) if name.startswith("check_")
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="lesson.exercises", description=__doc__)
    parser.add_argument("numbers", nargs="*", type=number(int, 1, len(CHECKS)), metavar="N")
    failed = 0
    for n in parser.parse_args(argv).numbers or CHECKS:
        torch.manual_seed(n)
        try:
            CHECKS[n](own_answers)
            print(f"{n}: passed")
        except (Wrong, NotImplementedError) as error:
            print(f"{n}: {str(error) or 'not answered yet'}")
            failed = 1
        except Exception as error:  # the reader's own code
            print(f"{n}: {type(error).__name__}: {error}")
            failed = 1
    return failed


if __name__ == "__main__":
    run_command(main)
