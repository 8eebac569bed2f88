"""Compare training steps with AdamW on stock models."""

import math
from dataclasses import replace
from functools import partial
from shlex import split
from unittest import mock

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from benchmarks import ours
from benchmarks.ours import Steps
from tests import runs
from tests.helpers import DEVICE, FP32_CLOSE, tiny_gpt2_directory
from tests.pairs import randomize
from tests.runs import BLOCK, mean_loss, stock_model, token_parts, trained, windows
from train import learning_rate
from training.options import parse_options

WHOLE = ("--batch-size", 1000)  # every window in each step, so their order has no effect
NO_DROPOUT = runs.NO_DROPOUT["lora"]


def exact_loss(base, book, shift: int = 1) -> float:
    """Return the stock base's mean loss over the whole training part."""
    return mean_loss(stock_model(base), *windows(token_parts(book)[0], shift)).item()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Return a base whose positions are all used, and an adapter made by stock PEFT."""
    base, _ = tiny_gpt2_directory(tmp_path_factory.mktemp("short"), n_positions=BLOCK)
    adapter = tmp_path_factory.mktemp("adapter")
    fields = {"r": 4, "lora_alpha": 12, "target_modules": ["c_attn", "c_fc"]}
    config = peft.LoraConfig(**fields, fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = peft.get_peft_model(stock_model(base), config)
    randomize(model)
    model.save_pretrained(adapter)
    return base, adapter


def adamw_steps(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    rates: list[float],
    weight_decay: float,
    clip: float,
) -> tuple[list[float], list[float], list[Tensor]]:
    """Train `model` with PyTorch's AdamW.

    Return the losses, the gradient norms, and for each weight whether its gradients were all well
    above rounding.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=weight_decay, foreach=False)
    losses = []
    norms = []
    clear = [torch.ones_like(p, dtype=torch.bool) for p in parameters]
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = mean_loss(model, *batch)
        loss.backward()
        for sure, parameter in zip(clear, parameters, strict=True):
            sure &= parameter.grad.abs() > 1e-6
        losses.append(loss.item())
        norms.append(nn.utils.clip_grad_norm_(parameters, clip or math.inf).item())
        optimizer.step()
    return losses, norms, clear


def cosine_rates(total: int, warmup: int, peak: float) -> list[float]:
    """Return transformers' schedule, without the initial 0 of its warm-up."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, total)
    rates = []
    for _ in range(total + 1):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    return rates[1 : warmup + 1] + rates[warmup:total]


@pytest.mark.device
@pytest.mark.parametrize("method, clip", [("lora", 0), ("full", 0.05)])
def test_steps_are_those_of_adamw_on_stock_models(start, book, tmp_path, method, clip):
    base, adapter = start
    options = []
    if method == "lora":
        options = ["--init-adapter", adapter]
    model = stock_model(base, *options[1:])
    hand = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in hand]
    peak = 1e-3
    rates = cosine_rates(4, 2, peak)
    batch = windows(token_parts(book)[0])
    losses, norms, clear = adamw_steps(model, batch, rates, weight_decay=0.5, clip=clip)

    options += split(f"--epochs 4 --lr {peak} --warmup-ratio 0.3 --weight-decay 0.5 --clip {clip}")
    run = trained(method, base, book, tmp_path, *WHOLE, "--base-dropout", 0, *options)
    assert run.column("lr") == pytest.approx(rates)
    assert run.column("loss") == pytest.approx(losses, rel=FP32_CLOSE)
    assert run.column("grad_norm") == pytest.approx(norms, rel=1e-4)  # before clipping
    assert not clip or min(norms) > 2 * clip
    assert run.column("val_loss")[-1] == run.report["best_val_loss"]  # the weights after step 4:
    after = [p for p in runs.stock_result(run).parameters() if p.requires_grad]
    for mine, theirs, old, sure in zip(after, hand, before, clear, strict=True):
        assert sure.float().mean() > 0.6
        assert (mine - theirs)[sure].abs().max() < 1e-3 * peak
        assert not torch.equal(mine, old)


def test_the_rate_is_that_of_transformers_but_for_its_first_step_at_zero():
    for total, ratio in ((1, 0), (1, 0.99), (3, 0.5), (30, 0), (30, 0.06)):
        warmup = math.ceil(ratio * total)
        rates = [learning_rate(step, total, 0.5, ratio) for step in range(total)]
        assert rates == pytest.approx(cosine_rates(total, warmup, 0.5))
        assert max(rates) == 0.5 and min(rates) > 0
        assert total - warmup < 10 or rates[-1] < 0.02 * 0.5


@pytest.mark.device
def test_parts_of_a_batch_change_nothing(base, book, tmp_path):
    def run_in(parts: int) -> runs.Run:
        options = split(f"--batch-size 7 --max-steps 2 --lr 1e-3 --grad-accum {parts}")
        return trained("lora", base, book, tmp_path / str(parts), *options, *NO_DROPOUT)

    whole = run_in(1)
    for run in (run_in(3), run_in(99)):
        assert run.column("loss") == pytest.approx(whole.column("loss"), rel=FP32_CLOSE)
        assert run.column("grad_norm") == pytest.approx(whole.column("grad_norm"), rel=1e-4)
        torch.testing.assert_close(run.weights, whole.weights, rtol=0, atol=10 * FP32_CLOSE)


def test_the_logged_loss_is_the_mean_over_tokens_though_the_last_batch_is_smaller(
    base, book, tmp_path
):
    options = split("--batch-size 89 --epochs 1 --log-every 99 --lr 1e-12")
    run = trained("lora", base, book, tmp_path, *options, *NO_DROPOUT)
    assert len(windows(token_parts(book)[0])[0]) % 89 == 1 and run.report["steps"] == 3
    assert run.column("loss") == pytest.approx([exact_loss(base, book)], rel=1e-6)


def compiled_trainer(base, book, tmp_path, *options) -> Steps:
    """Return a trainer with --compile, which the command refuses on a CPU because it is slow."""
    argv = runs.arguments("lora", base, book, tmp_path, *options)
    made = replace(parse_options("-", argv), compile=True)
    with mock.patch.object(ours, "prepare_device"):
        return Steps(made)


@pytest.mark.device
@pytest.mark.skipif(DEVICE == "cpu", reason="--compile is refused on a CPU")
def test_compiled_training_is_the_same(base, book, tmp_path):
    options = ("--max-steps", 2, *NO_DROPOUT)
    plain = runs.trainer("lora", base, book, tmp_path, *options)
    compiled = compiled_trainer(base, book, tmp_path, *options)
    assert_same_steps(plain, compiled)


def test_compiled_training_makes_one_graph_though_batches_differ(base, book, tmp_path, monkeypatch):
    """Epochs have batches of 89, 89 and 1. Padding rows in the last batch have no effect. An
    evaluation is not compiled.
    """
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count, fullgraph=True))
    options = split("--batch-size 89 --grad-accum 3 --epochs 1 --lr 1e-3 --use-dora")
    options += ["--gradient-checkpointing", *NO_DROPOUT]
    plain = runs.trainer("lora", base, book, tmp_path, *options)
    compiled = compiled_trainer(base, book, tmp_path, *options)
    assert_same_steps(plain, compiled)
    compiled.evaluate()
    assert len(graphs) == 1


def assert_same_steps(plain: Steps, compiled: Steps) -> None:
    """Take every step of both. Compare the losses and the weights."""
    for batch in plain.batches():
        losses = [each.step(batch).item() for each in (plain, compiled)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, parameter in plain.parameters.items():
        torch.testing.assert_close(compiled.parameters[name], parameter, rtol=0, atol=1e-5)
