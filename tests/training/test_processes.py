"""Real processes compute the same as one process, and continue after a process has died."""

import os
import re
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from shlex import split
from unittest import mock

import numpy as np
import pytest
import torch

import training.model
import training.saver
from benchmarks.ours import Steps
from common.device import Device
from common.processes import Processes
from tests import runs
from tests.fault.runs import differences, result
from tests.helpers import relative_difference
from tests.processes import fork, torchrun
from tests.runs import acting, arguments, finished, run, run_acting, trained, trainer
from train import main
from training.options import parse_options
from training.plan import make_plan

# 37 is odd, and an epoch's last batch is one window: process 1 gets no window.
SAME = split("--batch-size 37 --stride 11 --grad-accum 2 --max-steps 9 --eval-every 5 --lr 3e-3")
# Dropout is on.
DROPPING = split("--batch-size 8 --max-steps 8 --eval-every 5 --checkpoint-every 2 --lr 3e-3")
LOST = re.compile(r"error: process (\d) of 2: the connection to another process is lost.*")


@pytest.fixture
def alone(monkeypatch):
    """One of two processes. It gets the values that it sends."""
    for collective in ("broadcast", "barrier"):
        monkeypatch.setattr(Processes, collective, lambda self, *tensors: None)
    monkeypatch.setattr(Processes, "gather", lambda self, value: [value])
    monkeypatch.setattr(Processes, "from_main", lambda self, value: value)


def test_without_torchrun_a_clusters_variables_mean_nothing(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert Processes.from_environment() == Processes(0, 1)


def test_a_micro_batch_is_a_share_of_the_process(base, book, tmp_path, alone):
    options = parse_options("-", arguments("lora", base, book, tmp_path / "out", *SAME))
    of_two = make_plan(options, Device.pick("cpu"), Processes(0, 2))
    assert of_two.micro_batch_size == 10  # 19 of the 37 windows, in two micro-batches


def test_a_checkpoint_that_is_due_by_another_ranks_clock_is_saved(base, book, tmp_path):
    """Saving gathers from every process, so a process that does not save would block the others."""
    saved = []
    look = {2: lambda moment: saved.append(moment.run.saver.saved_step)}
    argv = arguments("lora", base, book, tmp_path, "--max-steps", 2)
    with mock.patch.object(Processes, "maximum", lambda self, *numbers: [1, *numbers[1:]]):
        assert run_acting(look, *argv).status == 0
    assert saved == [1]


def name_threads() -> None:
    threads = sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
    print(f"threads: {', '.join(threads)}", file=sys.stderr)


def errors(lines: list[str]) -> set[str]:
    """Return the error lines, without the processes that only report another process's end."""
    found = {line for line in lines if line.startswith("error: ")}
    lost = {line for line in found if LOST.fullmatch(line)}
    return found - lost - {"error: interrupted"}


def moved(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that a gradient moves: everything except the keys' bias.

    The keys' bias adds the same to all scores of a query. Its gradient is only rounding, and AdamW
    normalises it to whole steps.
    """
    if name.endswith("c_attn.bias"):
        return tensor.view(3, -1)[[0, 2]]
    return tensor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def whole(base, book, folder) -> list[str]:
    """Return the stderr of two undisturbed processes: their threads in step 2 and at the end. Their
    run is in `folder / "whole"`.
    """

    @contextmanager
    def naming_threads():
        with acting({2: lambda moment: name_threads()}):
            try:
                yield
            finally:
                name_threads()

    argv = arguments("lora", base, book, folder / "whole", *DROPPING)
    statuses, lines = fork(folder / "whole-said", argv, argv, during=naming_threads())
    assert statuses == [0, 0], lines
    return lines


@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_ranks_change_no_number_and_one_rank_writes_and_prints(base, book, tmp_path, method):
    made = trainer(method, base, book, tmp_path / "unused", *SAME)
    assert len(made.data.training) % made.options.batch_size == 1
    options = (*SAME, *runs.NO_DROPOUT[method])
    alone = trained(method, base, book, tmp_path / "alone", *options)
    argv = arguments(method, base, book, tmp_path / "processes", *options)

    def save_in_rank_0(*given, save=training.saver.save_model):
        assert os.environ["RANK"] == "0"
        save(*given)

    saving = mock.patch.object(training.saver, "save_model", save_in_rank_0)
    statuses, lines = fork(tmp_path / "said", argv, argv, during=saving)
    assert statuses == [0, 0] and "error" not in "".join(lines), lines
    ours = finished(tmp_path / "processes")
    assert len(ours.metrics) == 9 and len(ours.column("val_loss")) == 3
    for column in ("step", "epoch", "lr", "loss", "grad_norm", "val_loss", "val_bits_per_byte"):
        assert ours.column(column) == pytest.approx(alone.column(column), rel=1e-5), column
    weights = ours.weights
    others = alone.weights
    assert weights.keys() == others.keys()
    for key in weights:
        difference = relative_difference(moved(key, weights[key]), moved(key, others[key]))
        assert difference < 1e-4, key

    assert {p.name for p in ours.out.iterdir()} == {p.name for p in alone.out.iterdir()}
    assert ours.report["device"] == "2 x cpu"
    said = (tmp_path / "said" / "out").read_text()
    expected = [line.split()[:2] for line in alone.stdout.splitlines()]
    told = [line.split()[:2] for line in said.splitlines()]
    if torch.__version__ < "2.9":  # gloo prints there, bypassing Python's stdout
        told = [words for words in told if words in expected]
    assert told == expected


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc")
def test_the_connections_threads_end_with_it(whole):
    """A thread that is busy when Python ends would abort the process, and torchrun would report a
    complete run as failed.
    """
    named = [
        line.removeprefix("threads: ").split(", ") for line in whole if line.startswith("threads: ")
    ]
    *in_a_step, first, second = sorted(named, key=len)[::-1]
    # Two threads run collectives and one listens. torch 2.8 does not name them. Process 0 has one
    # more, for the rendezvous.
    assert [len(names) - len(first) for names in in_a_step] == [4, 3] and len(second) == len(first)
    assert not any("gloo" in name for name in (*first, *second))


def test_each_rank_draws_dropouts_of_its_own(whole, base, book, folder):
    """In the first step each process computes half of the batch, and process 1 has another seed."""
    made = trainer("lora", base, book, folder / "unused", *DROPPING)
    [(inputs, targets)] = next(made.batches()).micro_batches
    of_first = made.model.loss(inputs[:4], targets[:4]).item()
    torch.manual_seed(made.options.seed + 1)
    of_second = made.model.loss(inputs[4:], targets[4:]).item()
    mean = (of_first + of_second) / (8 * made.options.block_size)
    assert finished(folder / "whole").column("loss")[0] == pytest.approx(mean, rel=1e-5)


def test_a_gpu_draws_dropouts_with_the_seed_of_its_rank(base, book, tmp_path, alone):
    options = parse_options("-", arguments("lora", base, book, tmp_path))
    with mock.patch.object(torch.cuda, "manual_seed_all") as seeded:
        Steps(options, Processes(1, 2))
    assert seeded.call_args_list == [mock.call(options.seed), mock.call(options.seed + 1)]


def test_a_run_whose_rank_was_killed_and_that_was_stopped_ends_as_if_nothing_had_happened(
    whole, base, book, folder
):
    out = folder / "broken"
    argv = arguments("lora", base, book, out, *DROPPING)

    def kill_rank_1(moment):
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    statuses, lines = fork(folder / "killed", argv, argv, during=acting({4: kill_rank_1}))
    assert statuses == [1, -signal.SIGKILL] and not (out / "run.json").exists()
    (line,) = (line for line in lines if line.startswith("error: "))
    assert LOST.fullmatch(line)[1] == "0" and line.endswith("the last checkpoint is from step 2")
    as_killed = shutil.copytree(out, folder / "as-killed")

    def stop_each(moment):
        signal.raise_signal(signal.SIGTERM if os.environ["RANK"] == "1" else signal.SIGINT)

    again = [*argv, "--resume"]
    statuses, lines = fork(folder / "stopped", again, again, during=acting({6: stop_each}))
    assert statuses == [143, 143] and not errors(lines)
    assert "resuming after step 2 of 8" in (folder / "stopped" / "out").read_text()
    assert any(line.startswith("stopped after step 6; the same command") for line in lines)

    statuses, lines = fork(folder / "resumed", again, again)
    assert statuses == [0, 0] and "warning: the run" not in "".join(lines)
    assert "resuming after step 6 of 8" in (folder / "resumed" / "out").read_text()
    assert differences(out, result(folder / "whole")) == []

    ending = run(main, *arguments("lora", base, book, as_killed, *DROPPING), "--resume")
    assert ending.status == 0 and "resuming after step 2" in ending.stdout
    assert (
        "warning: the checkpoint was saved with processes 2, and the run resumes with 1"
        in ending.stderr
    )
    assert finished(as_killed).column("step") == list(range(1, 9))


def test_the_command_of_the_docs(base, book, tmp_path):
    """Without the `--`, torchrun takes --r for an abbreviation of a torchrun option."""
    argv = arguments("lora", base, book, tmp_path / "run", "--max-steps", 1, "--r", 4)
    options = split("--standalone --nproc-per-node 2 --")
    status, lines = torchrun(tmp_path / "said", *options, "train.py", *argv)
    assert status == 0, lines
    report = finished(tmp_path / "run").report
    assert (report["device"], report["options"]["r"]) == ("2 x cpu", 4)


def test_ranks_whose_examples_differ_in_length_compute_what_one_process_does(base, tmp_path):
    data = runs.questions(tmp_path / "x.jsonl")  # 18 to train on: one process has the last batch
    options = split("--batch-size 17 --block-size 64 --max-steps 3 --lr 3e-3")
    options += runs.NO_DROPOUT["lora"]
    argv = arguments("lora", base, data, tmp_path / "processes", *options)

    def draw_another_start(
        model, *args, add=training.model.add_adapter
    ):  # as another machine might
        add(model, *args)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * int(os.environ["RANK"])

    patch = mock.patch.object(training.model, "add_adapter", draw_another_start)
    statuses, lines = fork(tmp_path / "said", argv, argv, during=patch)
    assert statuses == [0, 0], lines
    ours = finished(tmp_path / "processes")
    alone = trained("lora", base, data, tmp_path / "alone", *options)
    assert len(ours.metrics) == 3
    for column in ("loss", "grad_norm", "val_loss", "val_bits_per_byte"):
        assert ours.column(column) == pytest.approx(alone.column(column), rel=1e-5), column


def test_a_mistake_is_one_line_and_no_process_has_to_be_killed(base, book, tmp_path):
    free = tmp_path / "free"
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "run.json").touch()
    argv = arguments("lora", base, book, free)
    for words, *commands in (
        ("--base 'gpt9': no such directory", *[[*argv, "--base", "gpt9"]] * 2),
        ("contains a run (run.json)", *[arguments("lora", base, book, taken)] * 2),
        (
            "process 1 and process 0 differ in options; start every process with the same options",
            argv,
            [*argv, "--seed", "7", "--lr", "0.1"],
        ),
    ):
        statuses, lines = fork(tmp_path / words[:4], *commands)
        (line,) = errors(lines)
        assert words in line and set(statuses) <= {1, 2} and "Traceback" not in "".join(lines)
    assert not free.exists()


@pytest.mark.device
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_process_without_windows_adds_zeros_and_never_calls_the_attention(
    base, book, tmp_path, monkeypatch, alone, precision
):
    """Flash attention raises on an empty batch in some versions (pytorch#133780)."""
    argv = arguments("lora", base, book, tmp_path, *split("--kernels plain --precision"), precision)
    made = Steps(parse_options("-", argv), Processes(number=1, count=2))
    sent = []
    for block in made.model.h:
        block.attn.attention = mock.Mock(side_effect=RuntimeError("empty"))
    monkeypatch.setattr(
        Processes, "all_reduce", lambda self, *tensors: sent.extend(t.clone() for t in tensors)
    )
    batch = made.plan.batch(np.array([3]), made.data.training)  # in process 0's share
    assert len(list(batch.micro_batches)) == 0 and batch.num_tokens == made.options.block_size
    assert made.step(batch) == 0
    assert [t.shape for t in sent] == [torch.Size(()), *(p.shape for p in made.parameters.values())]
    assert not any(t.any() for t in sent)


def test_if_a_gradient_overflows_on_one_rank_both_skip_the_step(base, book, tmp_path):
    """If only one rank skipped the step, the two models would differ from then on."""
    steps = iter(range(100))  # of each process

    def overflow(self, model, loss, reduce=Processes.all_reduce_gradients):
        if next(steps) == 3 and self.number == 1:
            trained = [p for p in model.parameters() if p.requires_grad]
            trained[0].grad.fill_(float("inf"))
        reduce(self, model, loss)

    argv = arguments(
        "lora", base, book, tmp_path / "run", *DROPPING, *split("--precision fp16 --kernels plain")
    )
    overflowing = mock.patch.object(Processes, "all_reduce_gradients", overflow)
    statuses, lines = fork(tmp_path / "said", argv, argv, during=overflowing)
    assert statuses == [0, 0], lines
    skipped = finished(tmp_path / "run").column("skipped_steps")
    assert skipped[2:4] == [skipped[0], skipped[0] + 1] and skipped[-1] == skipped[3]
