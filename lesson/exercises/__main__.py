"""Check the answers to docs/exercises.md: `python -m lesson.exercises 3`, or all without 3."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from common.cli import Parser, number
from common.errors import run_command
from lesson.exercises import answers as own_answers
from lesson.experiments.common import gradient, mean_loss, trainer
from lesson.experiments.sweep import SIZE, train
from lora import LoRAConfig, LoRALinear, count_parameters, inject
from lora.quantised import nearest, nf4_levels, scaled_blocks
from model.gpt2 import GPT2, GPT2Config


class Wrong(Exception):
    """An answer is wrong. The message describes the mistake."""


def expect(condition: object, message: str) -> None:
    """Raise Wrong with the message unless the condition holds."""
    if not condition:
        raise Wrong(message)


def close(x: Tensor, y: Tensor) -> bool:
    """Return whether two fp32 results differ at most by rounding."""
    return torch.allclose(x, y, atol=1e-5)


def adapted(fan_in: int, fan_out: int, r: int = 4, dropout: float = 0.0) -> LoRALinear:
    """Make a layer whose B is not 0."""
    config = LoRAConfig(r=r, lora_alpha=12, lora_dropout=dropout)
    layer = LoRALinear(nn.Linear(fan_in, fan_out), config)
    nn.init.normal_(layer.lora_B.weight)
    return layer


def check_1(answers: ModuleType) -> None:
    for n_layer, n_embd, r, targets in (
        (12, 768, 8, ("c_attn",)),
        (6, 256, 4, ("c_proj",)),
        (24, 1024, 16, ("c_attn", "c_proj", "c_fc")),
    ):
        with torch.device("meta"):  # shapes without numbers
            model = GPT2(GPT2Config(n_layer=n_layer, n_embd=n_embd, n_head=4))
            inject(model, LoRAConfig(r=r, target_modules=targets))
        right, _ = count_parameters(model)
        yours = answers.count_lora(n_layer, n_embd, r, targets)
        expect(
            yours == right,
            f"{n_layer} layers of width {n_embd}, rank {r} on {', '.join(targets)}: {right:,}, "
            f"not {yours:,}",
        )


def check_2(answers: ModuleType) -> None:
    layer = adapted(12, 400)
    answers.swap_the_zero(layer)
    a = layer.lora_A.weight
    b = layer.lora_B.weight
    expect(not a.any(), "A is not zero")
    expect(b.any(), "B is also zero, so A and B never move")

    fills_the_range = -0.5 <= b.min() < -0.45 and 0.45 < b.max() <= 0.5
    expect(
        fills_the_range,
        "B reads r numbers, so it is U(-1/sqrt(r), 1/sqrt(r)), from -0.5 to 0.5 for r = 4; "
        f"yours is from {b.min():.2f} to {b.max():.2f}",
    )

    layer(torch.randn(5, 12)).square().sum().backward()
    only_a_moves = gradient(a).any() and not gradient(b).any()
    expect(only_a_moves, "the first gradient of A must not be zero, but of B it must be zero")


def check_3(answers: ModuleType) -> None:
    for use_rslora in (False, True):
        for r in (1, 8, 64):
            alpha = answers.alpha_for(2.0, r, use_rslora)
            scaling = LoRAConfig(r=r, lora_alpha=alpha, use_rslora=use_rslora).scaling
            expect(
                abs(scaling - 2) < 1e-9,
                f"r {r}, use_rslora {use_rslora}: the scaling is {scaling:.4g}, not 2",
            )


@torch.no_grad()
def check_4(answers: ModuleType) -> None:
    for fan_in, fan_out in ((16, 16), (12, 20)):
        layer = adapted(fan_in, fan_out)
        x = torch.randn(5, fan_in)
        stored = layer.base_layer.weight.T.clone()  # (in, out), as in GPT-2's file
        merged = answers.merge_into_file(
            stored, layer.lora_A.weight, layer.lora_B.weight, layer.scaling
        )
        y = x @ merged + layer.base_layer.bias
        expect(
            close(y, layer(x)),
            f"({fan_in}, {fan_out}): the shapes fit, but the merged layer has another output: "
            "W + scaling * B A is (out, in)",
        )


def check_5(answers: ModuleType) -> None:
    table = nn.Embedding(30, 16)
    ids = torch.randint(30, (5, 7))
    layer = answers.LoRAEmbedding(table, LoRAConfig(r=4, lora_alpha=12))
    expect(torch.equal(layer(ids), table(ids)), "a new adapter must change nothing")

    layer(ids).square().sum().backward()
    expect(table.weight.grad is None, "the table is not frozen")
    gradients = [p.grad for p in layer.parameters() if p.grad is not None]
    expect(
        any(found.any() for found in gradients),
        "every gradient is zero: if A and B are both zero, nothing ever moves",
    )

    for p in (layer.lora_A, layer.lora_B):
        nn.init.normal_(p)
    merged = table.weight + 3 * (layer.lora_B @ layer.lora_A).T
    expect(
        close(layer(ids), merged[ids]),
        "the output differs from a table with scaling * (B A)^T added",
    )


def check_6(answers: ModuleType) -> None:
    for fan_in, fan_out in ((12, 20), (16, 16)):
        layer = adapted(fan_in, fan_out).double()
        x = torch.randn(7, fan_in).double()
        g = torch.randn(7, fan_out).double()
        layer(x).backward(g)
        a = layer.lora_A.weight
        b = layer.lora_B.weight
        da, db = answers.gradients(x, g, a.detach(), b.detach(), layer.scaling)
        for name, yours, right in (("dA", da, gradient(a)), ("dB", db, gradient(b))):
            expect(
                yours.shape == right.shape,
                f"{name} has shape {tuple(yours.shape)}, not {tuple(right.shape)}",
            )
            expect(
                torch.allclose(yours, right),
                f"{name} differs from autograd's gradient; the norms are {yours.norm():.4g} and "
                f"{right.norm():.4g}",
            )


@torch.no_grad()
def check_7(answers: ModuleType) -> None:
    layer = adapted(12, 20, r=1, dropout=0.5)
    x = torch.randn(400, 12)
    without = layer.base_layer(x)
    doubled = without + 2 * layer.scaling * layer.lora_B(layer.lora_A(x))

    y = answers.dropout_after_a(layer, x)
    dropped = torch.isclose(y, without, atol=1e-5).all(-1)
    kept = torch.isclose(y, doubled, atol=1e-5).all(-1)
    expect(
        (dropped | kept).all(),
        "with r = 1 and p = 0.5, a token's update is either zero or doubled; some of your updates "
        "are neither",
    )
    expect(120 < dropped.sum() < 280, f"{dropped.sum()} of 400 updates are dropped, not half")

    layer.eval()
    y = answers.dropout_after_a(layer, x)
    expect(close(y, layer(x)), "evaluation must not drop anything")


def check_8(answers: ModuleType) -> None:
    weight = torch.randn(64, 64).bfloat16()
    for size in (0.1, 0.01, 0.001):
        delta = size * torch.randn(64, 64)
        kept = (weight.double() + delta).bfloat16().double() - weight.double()
        right = ((kept - delta).norm() / delta.norm()).item()
        yours = answers.lost_in_bf16(weight, delta)
        expect(
            abs(yours - right) < 0.02 * right,
            f"an update of {size} times the weights' size loses {right:.1%}, not {yours:.1%}",
        )


def check_9(answers: ModuleType) -> None:
    w = nn.Parameter(torch.tensor(1.0))
    answers.accumulate([w * torch.tensor([1.0, 2.0, 3.0]), w * torch.tensor([10.0])])
    expect(
        w.grad is not None and abs(w.grad - 4) < 1e-5,
        f"four tokens have the gradients 1, 2, 3 and 10, with mean 4; your gradient is {w.grad}",
    )


def check_10(answers: ModuleType) -> None:
    for norm, clipped in ((0.5, 0.5), (8.0, 1.0)):
        w = nn.Parameter(torch.zeros(4))
        optimizer = torch.optim.SGD([w], lr=1.0)
        scaler = torch.amp.GradScaler("cpu")
        loss = (w * norm / 2).sum()  # each of the four gradients is norm / 2
        answers.clipped_step(scaler, optimizer, [w], loss, 1.0)
        expect(
            abs(w.norm() - clipped) < 1e-3,
            f"a gradient of norm {norm}, clipped to 1, moved the weights by {w.norm():.2g} at "
            f"rate 1, not by {clipped}",
        )


@torch.no_grad()
def check_11(answers: ModuleType) -> None:
    made = trainer(batch_size=2, max_steps=1)
    batch = next(made.batches())
    [(inputs, targets)] = batch.micro_batches  # (2, 128) each
    right = mean_loss(made, batch)
    yours = answers.next_token_loss(made.model(inputs), targets)
    expect(
        abs(yours - right) < 1e-3,
        f"mini's loss is {right:.3f} on these windows, not {yours:.3f}: on which token is "
        "position t scored?",
    )


def check_12(answers: ModuleType) -> None:
    r = answers.RANK
    expect(r, "not answered yet")
    expect(r in [2**i for i in range(9)], f"{r} is not a power of two from 1 to 256")

    full = perplexity_of("full", lr=1.5e-4)
    lora = lora_perplexity(r)
    expect(lora <= full, f"full fine-tuning reaches {full:.1f}, but rank {r} only {lora:.1f}")
    if r > 1:
        half = lora_perplexity(r // 2)
        expect(half > full, f"rank {r // 2} also reaches full fine-tuning, with {half:.1f}")


def lora_perplexity(r: int) -> float:
    """Return the perplexity of exercise 12's LoRA at this rank."""
    targets = ("c_attn", "c_proj", "c_fc")
    return perplexity_of("lora", lr=3e-3, r=r, lora_alpha=2 * r, target_modules=targets)


def perplexity_of(method: str, **options: Any) -> float:
    """Return the validation perplexity after 8 steps on 4 windows of 128 tokens, in fp32."""
    made = trainer(method, **(SIZE | {"max_steps": 8} | options))
    train(made)
    return made.evaluate().perplexity


def check_13(answers: ModuleType) -> None:
    weight = torch.randn(32, 128)
    outlier = weight.clone()
    outlier[3, 5] = -13
    nf4 = nf4_levels()
    even = torch.linspace(-1, 1, 15)
    for case, original, levels, block in (
        ("NF4, blocks of 64, an outlier", outlier, nf4, 64),
        ("NF4, blocks of 64", weight, nf4, 64),
        ("even levels, blocks of 16, an outlier", outlier, even, 16),
        ("NF4, one scale, an outlier", outlier, nf4, None),
    ):
        right = quantised(original, levels, block)
        yours = answers.quantise_by_absmax(original, levels, block)
        expect(
            yours.shape == right.shape,
            f"the result has shape {tuple(yours.shape)}, not {tuple(right.shape)}",
        )
        expect(
            relative_error(yours, right) < 0.01,  # a weight between two levels may round either way
            f"{case}: the error is {relative_error(right, original):.1%} of the norm, but yours is "
            f"{relative_error(yours, original):.1%}: divide each block, row after row, by the "
            "largest |w| of the block, and take the nearest level",
        )


def quantised(weight: Tensor, levels: Tensor, block: int | None) -> Tensor:
    """Return exercise 13's weight, computed with the functions of `lora.quantised`."""
    x, absmax = scaled_blocks(weight, block or weight.numel())
    codes = nearest(x, levels).int()
    return (levels[codes] * absmax[:, None]).view_as(weight)


def relative_error(x: Tensor, original: Tensor) -> float:
    """Return the norm of the difference, relative to the norm of the original."""
    return ((x - original).norm() / original.norm()).item()


def check_14(answers: ModuleType) -> None:
    for double, block, right in (
        (False, 64, 4.5),
        (False, 256, 4.125),
        (True, 64, 4.126953125),
        (True, 16, 4.5078125),
    ):
        yours = answers.bits_per_weight(block, double)
        expect(
            abs(yours - right) < 1e-9,
            f"blocks of {block}, double {double}: {right:.6g} bits a weight, not {yours:.6g}: "
            "count the code, the block's scale and, if double, the scale of 256 scales",
        )
    for bits, double, right in ((4.25, False, 128), (4.25, True, 64), (4.127, True, 64)):
        yours = answers.smallest_block(bits, double)
        expect(
            yours == right,
            f"at most {bits} bits, double {double}: blocks of {right}, not {yours}, which cost "
            f"{answers.bits_per_weight(yours, double):.6g}",
        )


CHECKS = {
    1: check_1,
    2: check_2,
    3: check_3,
    4: check_4,
    5: check_5,
    6: check_6,
    7: check_7,
    8: check_8,
    9: check_9,
    10: check_10,
    11: check_11,
    12: check_12,
    13: check_13,
    14: check_14,
}


def complaint(n: int) -> str | None:
    """Check one answer. Return the mistake, or None."""
    torch.manual_seed(n)
    try:
        CHECKS[n](own_answers)
    except (Wrong, NotImplementedError) as error:
        return str(error) or "not answered yet"
    except Exception as error:  # the reader's code may raise anything
        return f"{type(error).__name__}: {error}"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="lesson.exercises", description=__doc__)
    parser.add_argument("numbers", nargs="*", type=number(int, 1, len(CHECKS)), metavar="N")
    numbers = parser.parse_args(argv).numbers or CHECKS
    status = 0
    for n in numbers:
        wrong = complaint(n)
        print(f"{n}: {wrong or 'passed'}")
        if wrong:
            status = 1
    return status


if __name__ == "__main__":
    run_command(main)
