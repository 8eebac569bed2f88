"""Numbers that are not finite, and a lack of memory, end a run with one line."""

import errno
import math

import pytest
from safetensors.torch import load_file

from tests.fault.runs import differences, result
from tests.runs import arguments, die, finished, one_line, run_acting
from training.checkpoint import read_checkpoint

OPTIONS = ("--max-steps", 12, "--log-every", 5, "--checkpoint-every", 3, "--batch-size", 4)
FP16 = ("--precision", "fp16", "--kernels", "plain")


@pytest.fixture
def argv(base, book, tmp_path) -> list[str]:
    return arguments("lora", base, book, tmp_path / "run", *OPTIONS)


def poison(moment):
    """Set one weight of the base, used by every window, to NaN."""
    moment.model.ln_f.weight.data[0] = math.nan


def spoil_gradient(moment):
    parameter = next(iter(moment.parameters.values()))
    hook = parameter.register_hook(lambda gradient: hook.remove() or gradient * math.inf)


@pytest.mark.parametrize(
    "act, what",
    [(poison, "the loss is not a finite number"), (spoil_gradient, "the gradient is not finite")],
)
def test_a_number_that_is_not_finite_stops_the_run_with_its_step_named(argv, tmp_path, act, what):
    line = one_line(run_acting({8: act}, *argv))
    assert f"step 8: {what}; " in line
    assert "the last checkpoint is from step 6" in line and "--lr" in line
    assert read_checkpoint(tmp_path / "run")["progress"]["step"] == 6
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_weight_poisoned_after_its_last_use_is_not_saved(argv, tmp_path):
    def act(moment):
        moment.optimizer.register_step_post_hook(
            lambda *_: next(iter(moment.parameters.values())).data.fill_(math.nan)
        )

    line = one_line(run_acting({9: act}, *argv))
    assert "parameters.h/0/attn/c_attn/lora_A/weight contains numbers that are not finite" in line
    assert "the last checkpoint is from step 6" in line
    assert read_checkpoint(tmp_path / "run")["progress"]["step"] == 6


def test_a_faulty_step_that_ends_an_epoch_leaves_the_best_model_as_it_was(argv, tmp_path):
    line = one_line(run_acting({8: spoil_gradient}, *argv, "--eval-every", 4, "--log-every", 100))
    assert "step 8" in line
    adapter = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in adapter.values())
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    line = one_line(run_acting({2: spoil_gradient}, *argv, "--batch-size", 1000, "--overwrite"))
    assert "step 2: the gradient is not finite; " in line  # one step per epoch


def test_steps_that_fp16_skips_are_counted_and_survive_a_stop(base, book, tmp_path):
    options = (*FP16, "--max-steps", 6, "--checkpoint-every", 1)
    whole = arguments("lora", base, book, tmp_path / "whole", *options)
    parts = arguments("lora", base, book, tmp_path / "parts", *options)
    skip = {2: spoil_gradient, 5: spoil_gradient}
    assert run_acting(skip, *whole).status == 0
    done = finished(tmp_path / "whole")
    assert done.column("skipped_steps") == [0, 1, 1, 1, 2, 2] and done.report["skipped_steps"] == 2
    assert [i for i, norm in enumerate(done.column("grad_norm"), 1) if norm is None] == [2, 5]

    assert run_acting({**skip, 4: die}, *parts).status == 130
    assert run_acting(skip, *parts, "--resume").status == 0
    assert differences(tmp_path / "parts", result(done.out)) == []


def test_twenty_skipped_steps_in_a_row_are_a_fault(argv):
    """The failure comes even if the next step is good and no step between was logged.

    A good step starts a new count.
    """
    argv += [*FP16, "--max-steps", 44, "--log-every", 100, "--checkpoint-every", 100, "--overwrite"]
    argv += ["--batch-size", 1]
    line = one_line(run_acting(dict.fromkeys(range(3, 23), spoil_gradient), *argv))
    assert "step 22: the gradient overflowed in 20 steps in a row" in line
    assert "the last checkpoint is from step 0" in line
    twice_19 = [*range(3, 22), *range(23, 42)]
    assert run_acting(dict.fromkeys(twice_19, spoil_gradient), *argv).status == 0


def test_a_row_of_skipped_steps_goes_on_after_a_resume(argv):
    skip = dict.fromkeys(range(3, 23), spoil_gradient)
    argv += ["--max-steps", "30"]
    assert run_acting({**skip, 12: die}, *argv, *FP16).status == 130
    ending = run_acting(skip, *argv, *FP16, "--resume")
    assert "resuming after step 9" in ending.stdout
    assert "step 22: the gradient overflowed in 20 steps in a row" in one_line(ending)


def test_out_of_memory_says_what_helps_and_another_error_is_not_taken_for_it(argv):
    def fail(moment):
        raise error

    error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9.")
    assert one_line(run_acting({5: fail}, *argv)) == (
        "error: out of memory; try a smaller --batch-size, --block-size or --base, --precision "
        "bf16 or, in training, --grad-accum or --gradient-checkpointing; the last checkpoint is "
        "from step 3"
    )
    error = OSError(errno.ENOSPC, "No space left on device", "/disk")
    assert one_line(run_acting({5: fail}, *argv, "--overwrite")) == (
        "error: /disk: No space left on device; the last checkpoint is from step 3"
    )
    error = OSError(errno.EBADF, "a bug")
    with pytest.raises(OSError, match="a bug"):
        run_acting({5: fail}, *argv, "--overwrite")
