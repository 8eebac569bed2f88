"""Numbers that are none, and a lack of memory: one line, and nothing of it is saved."""

import math
import re

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import BLOCK, arguments, die, finished, one_line, run, run_acting, trained, trainer
from train import main
from training.checkpoint import read_checkpoint
from training.faults import memory_advice

OPTIONS = ("--max-steps", 30, "--log-every", 5, "--checkpoint-every", 3, "--batch-size", 4)


@pytest.fixture
def argv(base, book, tmp_path) -> list[str]:
    return arguments("lora", base, book, tmp_path / "run", *OPTIONS)


def poison(trainer):
    """One weight of the base that every window meets."""
    with torch.no_grad():
        trainer.model.ln_f.weight[0] = math.nan


def spoil_gradient(trainer):
    parameter = next(iter(trainer.trainable.values()))
    hook = parameter.register_hook(lambda gradient: hook.remove() or gradient * math.inf)


@pytest.mark.parametrize("act, what", [(poison, "the loss is not a finite number"),
                                       (spoil_gradient, "the gradient is not finite")])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_number_that_is_none_stops_the_run_with_its_step_and_batch_named(
        argv, tmp_path, act, what, precision):
    seen = []

    def act_and_look(trainer):
        seen.extend(next(trainer.batches(7)) * BLOCK)
        act(trainer)

    line = one_line(run_acting({8: act_and_look}, *argv, "--precision", precision))
    assert f"step 8: {what} (epoch 1, windows at tokens " in line
    assert re.search(r"tokens ([\d, ]+) of the book", line)[1] == ", ".join(
        str(start) for start in sorted(seen))
    assert "the last checkpoint is of step 6" in line and "--lr" in line
    state, path = read_checkpoint(tmp_path / "run")
    assert state["progress"]["step"] == 6 and path.name == "checkpoint.pt"
    assert all(p.isfinite().all() for p in state["parameters"].values())
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_weight_poisoned_after_its_last_use_is_not_saved(argv, tmp_path):
    def act(trainer):
        step = trainer.optimizer.step

        def poisoning(*arguments, **options):
            step(*arguments, **options)
            with torch.no_grad():
                next(iter(trainer.trainable.values()))[0, 0] = math.nan
        trainer.optimizer.step = poisoning

    line = one_line(run_acting({9: act}, *argv))
    assert "step 9: a weight is not a finite number" in line and "step 6" in line
    assert read_checkpoint(tmp_path / "run")[0]["progress"]["step"] == 6


def test_a_faulty_step_that_ends_an_epoch_leaves_the_best_model_as_it_was(argv, tmp_path):
    line = one_line(run_acting({8: spoil_gradient}, *argv, "--eval-every", 4, "--log-every", 100))
    assert "step 8" in line
    adapter = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in adapter.values())
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_rate_far_too_large_is_a_fault(base, book, tmp_path):
    ending = run(main, *arguments("full", base, book, tmp_path, "--lr", 10, "--precision", "fp16"))
    assert re.search(r"step \d+: the loss is not a finite number", one_line(ending))
    assert not (tmp_path / "run.json").exists()


def test_steps_that_fp16_skips_are_counted_and_survive_a_stop(base, book, tmp_path):
    whole, parts = (arguments("lora", base, book, tmp_path / name, "--precision", "fp16",
                              "--max-steps", 6, "--checkpoint-every", 1)
                    for name in ("whole", "parts"))
    skip = {2: spoil_gradient, 5: spoil_gradient}
    assert run_acting(skip, *whole).status == 0
    done = finished(tmp_path / "whole")
    assert done.column("skipped_steps") == [0, 1, 1, 1, 2, 2] and done.report["skipped_steps"] == 2
    assert [line["grad_norm"] is None for line in done.metrics] == [
        False, True, False, False, True, False]

    assert run_acting({**skip, 4: die}, *parts).status == 130
    assert run_acting(skip, *parts, "--resume").status == 0
    again = finished(tmp_path / "parts")
    for name in ("loss", "skipped_steps", "val_loss"):
        assert again.column(name) == done.column(name)


def test_only_fp16_speaks_of_skipped_steps(base, book, tmp_path):
    done = trained("lora", base, book, tmp_path, "--max-steps", 1)
    assert "skipped_steps" not in done.report and "skipped_steps" not in done.metrics[0]


@pytest.mark.parametrize("skips, status", [(19, 0), (20, 1)])
def test_twenty_skipped_steps_in_a_row_are_a_fault(argv, tmp_path, skips, status):
    """Even if the next is good, and nobody looked in between."""
    quiet = ("--precision", "fp16", "--log-every", 100, "--checkpoint-every", 100)
    ending = run_acting(dict.fromkeys(range(3, 3 + skips), spoil_gradient), *argv, *quiet)
    assert ending.status == status, ending
    if status:
        assert "step 22: the gradient overflowed in 20 steps in a row" in one_line(ending)
        assert "there is no checkpoint yet" in ending.stderr


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
], ids=["CUDA", "Python", "CPU"])
def test_out_of_memory_says_what_helps(argv, error):
    def fail(trainer):
        raise error

    line = one_line(run_acting({5: fail}, *argv))
    for word in ("out of memory", "--grad-accum 2", "--precision bf16",
                 f"--block-size {BLOCK // 2}", "the last checkpoint is of step 3"):
        assert word in line
    spent = ("--grad-accum", 4, "--precision", "bf16")
    line = one_line(run_acting({5: fail}, *argv, *spent, "--overwrite"))
    assert "--grad-accum" not in line and "--precision" not in line


def test_on_cuda_it_says_what_parts_would_save(base, book, tmp_path, monkeypatch):
    """Half of what is held beyond weights, gradients and moments, which parts do not touch."""
    made = trainer("full", base, book, tmp_path, "--batch-size", 8, "--grad-accum", 3)
    fixed = 4 * 4 * sum(p.numel() for p in made.model.parameters())
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: fixed + 90_000_000)
    advice = memory_advice(made.args, made.model, torch.device("cuda"))
    assert advice.startswith("try --grad-accum 6 (the same result, about 45 MB less), --")


def test_another_error_is_not_taken_for_a_lack_of_memory(argv):
    def fail(trainer):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_acting({5: fail}, *argv)
