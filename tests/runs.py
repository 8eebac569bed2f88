"""Run the project's commands in this process, and compute the same with stock libraries."""

import contextlib
import io
import json
import math
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import split
from unittest import mock

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import evaluate
import train
from benchmarks.ours import Steps
from common.errors import run_command
from common.signals import HANDLED
from model.kernels import cuda_loss, fast
from tests.helpers import DEVICE, TINY, small_tokenizer
from training.options import parse_options

BLOCK = 16  # the runs' block size and stride
WORDS = ("the", "a", "lamp", "keeper", "sea", "stair", "gull", "light", "salt", "night", "turns")
WEIGHTS = {"lora": "adapter_model.safetensors", "full": "model.safetensors"}
NO_DROPOUT = {"lora": ("--base-dropout", 0, "--lora-dropout", 0), "full": ("--base-dropout", 0)}

Main = Callable[[Sequence[str] | None], int | None]  # the `main` of a command


class Clock:
    """A module's `time`: a slow clock, which a test advances. A busy machine changes nothing."""

    def __init__(self):
        self.later = 0.0

    def perf_counter(self) -> float:
        return time.perf_counter() / 1000 + self.later


@dataclass
class Ending:
    """The status and the output of a command."""

    status: int
    stdout: str
    stderr: str


@dataclass
class Run:
    """A finished training run: its directory, `run.json`, `metrics.jsonl` and base."""

    out: Path
    report: dict
    metrics: list[dict]
    stdout: str = ""
    base: Path | None = None

    def column(self, name: str) -> list[float]:
        """Return the metric's values, from the lines with this metric."""
        return [line[name] for line in self.metrics if name in line]

    @property
    def weights(self) -> dict[str, Tensor]:
        """Return the tensors of the adapter or the model."""
        return load_file(self.out / WEIGHTS[self.report["method"]])


def run(main: Main, *argv: object) -> Ending:
    """Run the command of this `main` with these arguments. Return its ending."""
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    out = io.StringIO()
    err = io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as ended,
        ):
            run_command(main, [str(argument) for argument in argv])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Ending(ended.value.code, out.getvalue(), err.getvalue())


def arguments(method: str, base: Path, book: Path, out: Path, *options: object) -> list[str]:
    """Return `train.py`'s arguments for a small run. `options` come last and win.

    A `book` of JSON lines is passed as `--data`.
    """
    if Path(book).suffix == ".jsonl":
        source = ["--data", book]
    else:
        source = ["--book", book, "--stride", BLOCK]
    small = split(f"--device {DEVICE} --precision fp32 --block-size {BLOCK} --log-every 1")
    words = [method, "--base", base, *source, "--out", out, *small, *options]
    return [str(word) for word in words]


def trained(method: str, base: Path, book: Path, out: Path, *options: object) -> Run:
    """Train with these `arguments`, which must succeed. Return the run."""
    ending = run(train.main, *arguments(method, base, book, out, *options))
    assert ending.status == 0, ending.stderr
    return finished(out, ending.stdout, base)


def finished(out: Path, stdout: str = "", base: Path | None = None) -> Run:
    """Return the run in this directory."""
    report = json.loads((out / "run.json").read_text())
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return Run(out, report, [json.loads(line) for line in lines], stdout, base)


def trainer(method: str, base: Path, book: Path, out: Path, *options: object) -> Steps:
    """Make the state of `train.main` before its first step."""
    return Steps(parse_options("-", arguments(method, base, book, out, *options)))


@dataclass
class Moment:
    """The state of `train.py` in a step, for an action in that step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    run: train.Run

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


@contextlib.contextmanager
def acting(actions: dict[int, Callable[[Moment], None]]) -> Iterator[None]:
    """Run actions at the start of some steps of `train.py`."""
    step = train.train_step
    loop = train.train
    runs = []

    def remember(plan, trainer, run):
        runs.append(run)
        loop(plan, trainer, run)

    def act(trainer, batch, lr):
        action = actions.get(runs[-1].step + 1)
        if action:
            action(Moment(trainer.model, trainer.optimizer, trainer.scaler, runs[-1]))
        return step(trainer, batch, lr)

    with (
        mock.patch.object(train, "train", remember),
        mock.patch.object(train, "train_step", act),
    ):
        yield


def run_acting(actions: dict[int, Callable[[Moment], None]], *argv: object) -> Ending:
    """Run `train.py` with actions at the start of some steps. Return its ending."""
    with acting(actions):
        return run(train.main, *argv)


def scores(path: Path, *argv: object) -> tuple[dict, str]:
    """Return the file and the output of `evaluate.py --json path`."""
    said = stdout_of(evaluate.main, *argv, "--device", "cpu", "--json", path)
    return json.loads(path.read_text()), said


def stdout_of(main: Main, *argv: object) -> str:
    """Return the command's output. It must succeed and write nothing to stderr."""
    ending = run(main, *argv)
    assert (ending.status, ending.stderr) == (0, "")
    return ending.stdout


def table(said: str) -> list[list[str]]:
    """Return the cells of a printed table, row by row. Its columns must line up."""
    lines = [line for line in said.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1

    rows = []
    for line in lines:
        _, *cells, _ = line.split("|")
        rows.append([cell.strip() for cell in cells])
    return rows


def one_line(ending: Ending, status: int = 1) -> str:
    """Return the single error line of a command that ended with this status."""
    lines = ending.stderr.splitlines()
    assert ending.status == status, ending
    assert len(lines) == 1 and lines[0].startswith("error: "), ending
    return lines[0]


def refused(out: Path, *argv: object) -> str:
    """Return the line of `train.py` that refuses these arguments. `out` must not change."""
    before = contents(out)
    line = one_line(run(train.main, *argv), 2)
    assert contents(out) == before
    return line


def kept_bytes(model: nn.Module, inputs: Tensor) -> int:
    """Count the bytes, except parameters, that `model.hidden` keeps for its backward pass."""
    storages = {}  # by address, so that a view counts once

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.hidden(inputs)
    for parameter in model.parameters():
        storages.pop(parameter.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in storages.values())


@contextlib.contextmanager
def cudas_loss() -> Iterator[None]:
    """Compute CUDA's loss also on a CPU, as on a card with memory for the logits of 20 tokens."""
    memory = 20 * cuda_loss.aligned(TINY["vocab_size"]) * 8 * cuda_loss.SHARE
    with (
        mock.patch.object(cuda_loss, "card_memory", lambda device: memory),
        mock.patch.object(fast, "loss", cuda_loss),
    ):
        yield


def die(moment: Moment) -> None:
    """End the process without saving: an action for `run_acting`."""
    raise KeyboardInterrupt


def contents(directory: Path) -> dict[str, bytes]:
    """Return the directory's files, by name."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def story(sentences: int = 120, seed: int = 0) -> str:
    """Return reproducible prose: a few thousand tokens of a small vocabulary."""
    rng = random.Random(seed)
    text = ""
    for _ in range(sentences):
        words = rng.choices(WORDS, k=rng.randint(4, 9))
        end = rng.choice((". ", "! ", ".\n"))
        text += " ".join(words).capitalize() + end
    return text


def questions(path: Path) -> Path:
    """Write 20 reproducible examples of many lengths as JSON lines. Return the path."""
    sentences = story(40, seed=3).replace("!", ".").split(".")[:40]
    lines = []
    for prompt, completion in zip(sentences[::2], sentences[1::2], strict=True):
        lines.append(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    path.write_text("".join(lines))
    return path


def token_parts(book: Path) -> tuple[Tensor, Tensor]:
    """Return the token ids (N,) of the book's training part and of its validation part."""
    tokenizer = small_tokenizer(TINY["vocab_size"])
    ids = torch.tensor(tokenizer.encode(book.read_text()).astype(int))
    cut = len(ids) - len(ids) // 10
    return ids[:cut], ids[cut:]


def windows(ids: Tensor, shift: int = 1) -> tuple[Tensor, Tensor]:
    """Return the inputs and targets (B, T) of all whole windows."""
    spans = ids.unfold(0, BLOCK + shift, BLOCK)
    return spans[:, :BLOCK], spans[:, shift:]


def stock_model(base: Path, adapter: Path | None = None) -> nn.Module:
    """Return transformers' model, with PEFT's adapter on it, in evaluation mode."""
    model = transformers.GPT2LMHeadModel.from_pretrained(base)
    if adapter:
        model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
    return model.eval()


def stock_linear_model(base: Path) -> nn.Module:
    """Return transformers' model with an `nn.Linear` in place of each Conv1D.

    This project adapts linear layers too, and PEFT's code for Conv1D has had bugs.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="sdpa")
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(*module.weight.shape)
            linear.weight = nn.Parameter(module.weight.detach().t().contiguous())
            linear.bias = module.bias
            model.set_submodule(name, linear)
    return model


def stock_result(run: Run) -> nn.Module:
    """Load a run's result into stock libraries."""
    if run.report["method"] == "full":
        return stock_model(run.out)
    assert run.base
    return stock_model(run.base, run.out)


def mean_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of a stock model over (B, T) targets, in nats."""
    return F.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def validation_loss(model: nn.Module, ids: Tensor, block: int = BLOCK) -> float:
    """Return a stock model's mean loss over every token but the first, window after window."""
    sums = []
    for start in range(0, len(ids) - 1, block):
        window = ids[None, start : start + block + 1]
        inputs = window[:, :-1]
        targets = window[:, 1:]
        sums.append(mean_loss(model, inputs, targets).item() * targets.numel())
    return math.fsum(sums) / (len(ids) - 1)
