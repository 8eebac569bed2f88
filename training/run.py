"""Do what a run needs around the training step: device, processes, the lock on `--out`,
checkpoints, signals, logs, the best model.

`train.py` contains the mathematics of a step. `Run.begin` receives from `train.py` the objects that
a checkpoint must save.
"""

import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.device import Device, tune_process
from common.errors import RunError, UserError, describe_failure
from common.signals import end_at_once, leave_closed_terminals, on_signals, say
from data.tokenizer import Tokenizer
from data.windows import Batch, Dataset
from model.gpt2 import GPT2
from model.kernels.fast import set_kernels
from storage import hub
from storage.weights import base_hashes
from training import recipe
from training.data import Data
from training.directory import RUN, RunDirectory, refuse_inputs_as_output, refuse_used_directory
from training.identity import RunIdentity, refuse_another, run_identity
from training.launch import compile_hidden, prepare_device
from training.meter import Meter, Progress
from training.model import save_model
from training.options import Options
from training.processes import Processes
from training.report import (
    best_weights,
    count_parameters,
    read_run,
    write_report,
)
from training.resume import Saver
from training.scores import Scores

# At the end of an epoch, save only if the last checkpoint is at least this many seconds old. On a
# GPU, saving can take longer than an epoch.
MIN_CHECKPOINT_AGE = 10.0


@contextmanager
def open_run(options: Options) -> Iterator["Run"]:
    """Join the other processes, and yield the run. If the run fails, the message names the last
    checkpoint.
    """
    tune_process()
    processes = Processes.from_environment()
    device = Device.pick(options.device, options.precision, train=True)
    with processes.joined(device.torch_device):
        if processes.is_main:
            refuse_used_directory(options)
        prepare_device(options, device)
        run = Run(options, device, processes)
        try:
            yield run
        except Exception as error:
            failure = describe_failure(error)
            if failure is None or run.saver is None:
                raise
            raise RunError(f"{failure}; {run.saver.describe()}") from error
        finally:
            if run.directory:
                run.directory.close()


class Run:
    """One run of `train.py` in `--out`. Only process 0 writes files and prints."""

    base: str  # the base's name
    base_directory: Path
    identity: RunIdentity
    tokenizer: Tokenizer

    def __init__(self, options: Options, device: Device, processes: Processes):
        self.options = options
        self.device = device
        self.processes = processes
        self.progress = Progress()
        self.meter = Meter(device.precision == "fp16")
        self.steps_per_epoch = 0
        self.total_steps = 0
        self.micro_batch_size = 0

        self.directory: RunDirectory | None = None  # only in process 0, once it has the lock
        self.finished = False  # whether --resume found the run complete
        self.saver: Saver | None = None  # set once the run has begun
        self.line: dict[str, Any] = {}  # for metrics.jsonl. Empty if no line is due
        self.stop_signal: int | None = None
        self.step_began = 0.0

    # Before the first step

    def find_base(self) -> Path:
        """Find the base. Raises UserError if the run would overwrite its inputs."""
        with self.processes.main_first():
            self.base, self.base_directory = hub.find_base(self.options.base)
        if self.processes.is_main:
            refuse_inputs_as_output(self.options, self.base_directory)
        return self.base_directory

    @cached_property
    def base_sha256(self) -> dict[str, str]:
        """Hash the base's config and weights only once, because weights can be large."""
        return base_hashes(self.base_directory)

    def resolve(self, data: Data) -> Options:
        """Fill in the options that the user left out, and count the steps. Return the options."""
        self.options = recipe.resolve(self.options, self.base, self.device, data.training)
        self.tokenizer = data.tokenizer
        windows = len(data.training)
        self.steps_per_epoch, self.total_steps = recipe.count_steps(self.options, windows)
        largest_batch = min(self.options.batch_size, windows)
        share = math.ceil(largest_batch / self.processes.count)
        self.micro_batch_size = math.ceil(share / self.options.grad_accum)
        return self.options

    def claim_out(self, data: Data) -> None:
        """Identify the run by options and inputs, and lock `--out`. Set `finished` if --resume
        finds a complete run.

        Raises UserError if `--out` contains another run, or if a process is still training there.
        """
        tokens = data.training.tokens, data.validation.tokens
        self.identity = run_identity(self.options, self.base_sha256, *tokens)
        self.processes.check_same(asdict(self.identity))
        if self.processes.is_main:
            self.directory = RunDirectory(self.options.out)
            # Check again, because another run may have used --out since the first check.
            refuse_used_directory(self.options)
            self.finished = self._is_finished()
        self.finished = self.processes.from_main(self.finished)

    def _is_finished(self) -> bool:
        """Return whether --resume finds a finished run. Raises UserError for another run."""
        out = self.options.out
        if not self.options.resume or not (out / RUN).exists():
            return False
        refuse_another(out / RUN, read_run(out), self.identity)
        print(f"{out}: this run is finished; nothing to resume")
        return True

    def set_up_model(self, model: GPT2) -> None:
        """Cast frozen weights to the run's precision, choose the kernels, and apply --compile."""
        model.train()
        self.device.cast_frozen(model)
        set_kernels(model, self.options.kernels)
        self.processes.broadcast(*(p for p in model.parameters() if p.requires_grad))
        if self.options.compile:
            compile_hidden(model, 0 if self.options.data else self.micro_batch_size)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Return a scaler of the loss for fp16. In other precisions the scaler does nothing."""
        device = self.device.torch_device
        scaler = torch.amp.GradScaler(device.type, enabled=self.device.precision == "fp16")
        # The first call of `scale` initialises the scaler. A process without windows would never
        # call `scale` during training, so call it here.
        scaler.scale(torch.zeros((), device=device))
        return scaler

    def begin(self, model: GPT2, **stateful: Any) -> None:
        """Resume from the checkpoint if --resume finds one. Otherwise clear `--out`.

        A checkpoint contains the trained parameters and the state of the `stateful` objects.
        """
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        # ParameterDict does not allow a dot in a name.
        named = {name.replace(".", "/"): parameter for name, parameter in trained.items()}
        stateful |= {
            "parameters": nn.ParameterDict(named),
            "progress": self.progress,
            "meter": self.meter,
        }
        options = self.options
        if not self.processes.is_main:
            torch.manual_seed(options.seed + self.processes.number)  # for different dropout masks
        saver = Saver(
            options.out, self.directory, self.identity, self.processes, self.device, stateful
        )
        if options.resume and saver.can_resume():
            saver.restore()
            self._check_best_model()
            print(f"resuming after step {self.step} of {self.total_steps}")
        elif self.directory:
            if options.resume:
                print(f"{options.out}: the run has no checkpoint yet; starting from the beginning")
            self.directory.clear()
        self.saver = saver

    def _check_best_model(self) -> None:
        """Raise UserError if the best model, which no checkpoint contains, is missing."""
        best = best_weights(self.options.out, self.options.method)
        if self.directory and math.isfinite(self.progress.best_val_loss) and not best.exists():
            raise UserError(f"--resume: {best} is missing; start again with --overwrite")

    def keep_base(self, model: GPT2, scores: Scores) -> None:
        """Print and keep the base's scores on the validation part."""
        self.progress.base_val_loss = scores.loss
        self.progress.start_val_loss = scores.loss
        print(f"base: val {scores}", flush=True)
        if scores.loss > 1.01 * math.log(model.config.vocab_size):
            print(
                "warning: the base predicts this text worse than by guessing; is this plain text "
                "in a language that the base has seen?"
            )

    # The steps

    @property
    def step(self) -> int:
        """Return the number of steps that are done."""
        return self.progress.step

    def steps(self, training: Dataset) -> Iterator[Batch]:
        """Yield the batch of each remaining step. After each step, do what is due: log, save or
        stop.

        After a signal, the step ends, a checkpoint is saved, and the process exits.
        """
        on_signals(self._on_signal)
        disable = None if self.directory else True  # None: show the bar on a terminal only
        bar = tqdm(total=self.total_steps, initial=self.step, unit="step", disable=disable)
        with bar:
            for batch in self.batches(training, self.step):
                self.step_began = time.perf_counter()
                yield batch
                self._end_step(bar)
        on_signals(end_at_once)  # nothing is left to save

    def batches(self, training: Dataset, first: int = 0) -> Iterator[Batch]:
        """Yield the batch of each step from step `first` on. Each epoch has a different order."""
        size = self.options.batch_size
        order = np.empty(0, dtype=np.int64)
        for step in range(first, self.total_steps):
            epoch, position = divmod(step, self.steps_per_epoch)
            if position == 0 or step == first:
                order = training.epoch_order(self.options.seed, epoch)
            yield self.batch(training, order[position * size : (position + 1) * size])

    def batch(self, training: Dataset, indices: np.ndarray) -> Batch:
        """Return this process's share of the windows with these indices (B,)."""
        mine = np.array_split(indices, self.processes.count)[self.processes.number]
        return Batch(training, mine, self.micro_batch_size, training.num_tokens(indices))

    def count_step(self, loss: Tensor, grad_norm: Tensor, num_tokens: int, lr: float) -> None:
        """Count a finished step. `loss` is the sum over `num_tokens` scored tokens."""
        self.progress.step += 1
        self.meter.count(self.step, loss, num_tokens, grad_norm)
        self.line = {}
        line_is_due = self.should_validate() or self.step % self.options.log_every == 0
        if line_is_due:
            self.meter.check()  # waits for the device
        # Neither validating nor saving counts as training time.
        self.meter.seconds += time.perf_counter() - self.step_began
        if line_is_due:
            metrics = self.meter.measure()
            self.line = {
                "step": self.step,
                "epoch": self.step / self.steps_per_epoch,
                "loss": metrics.pop("loss"),
                "lr": lr,
                **metrics,
            }

    def epoch_ends(self) -> bool:
        return self.step % self.steps_per_epoch == 0 or self.step == self.total_steps

    def should_validate(self) -> bool:
        """Return whether a validation is due, by --eval-every or because an epoch ends."""
        every = self.options.eval_every
        return self.epoch_ends() or bool(every and self.step % every == 0)

    def keep_best(self, model: GPT2, scores: Scores) -> None:
        """Print and log the validation scores. Save the model if it is the best so far."""
        line = f"step {self.step}/{self.total_steps}: val {scores}"
        progress = self.progress
        if self.step == 0:  # the score of an initial adapter
            progress.start_val_loss = scores.loss
        if scores.loss < progress.best_val_loss:
            progress.best_val_loss = scores.loss
            progress.best_val_bits_per_byte = scores.bits_per_byte
            if self.processes.is_main:
                weights_sha256 = self.identity.base_sha256.get("weights", "")
                save_model(model, self.tokenizer, self.options, weights_sha256)
            line += ", best so far"
        tqdm.write(line)
        self.line |= {
            "val_loss": scores.loss,
            "val_perplexity": scores.perplexity,
            "val_bits_per_byte": scores.bits_per_byte,
        }

    def _end_step(self, bar: tqdm) -> None:
        if self.line:
            text = "loss {loss:.4f}, lr {lr:.2e}, {tokens_per_second:,.0f} tokens/s"
            bar.set_postfix_str(text.format(**self.line))
            if self.directory:
                self.directory.append(self.line)
        self._save_or_stop()
        bar.update()

    def finish(self, model: GPT2) -> None:
        """Draw `loss.png`, and write `run.json`, which marks the run as complete."""
        if not self.directory:
            return
        assert self.saver
        device = self.device.name
        if self.processes.count > 1:
            device = f"{self.processes.count} x {device}"
        machine = {
            "device": device,
            "precision": self.device.precision,
            "torch": str(torch.__version__),
        }
        counts = count_parameters(model) | self.progress.report() | self.meter.report()
        write_report(self.options, asdict(self.identity) | counts | self.saver.cost() | machine)

    # Signals and checkpoints

    def _on_signal(self, number: int, frame: Any) -> None:
        """At the first signal, finish the step, save and stop. At a second signal, stop at once.

        Ignore a repeated SIGTERM, because `timeout` and `make` both forward it. Ignore a repeated
        SIGHUP, because a closed terminal and the shell both send it.
        """
        leave_closed_terminals()  # SIGHUP means that a terminal was closed
        repeated = number == self.stop_signal
        if repeated and number != signal.SIGINT:
            return
        if self.stop_signal:
            end_at_once(number, frame)
        self.stop_signal = number
        if self.directory:
            say("stopping once the step is done and saved; Ctrl-C stops at once")

    def _save_or_stop(self) -> None:
        """Save a checkpoint when due. If any process has received a signal, save and end.

        `stop_signal` is read once. A later signal takes effect at the next step.
        """
        assert self.saver
        due, number = self.processes.maximum(self._is_due(), self.stop_signal or 0)
        if due or number:
            self.saver.save(self.step)
        if number:
            self._stop(number)

    def _is_due(self) -> bool:
        assert self.saver
        age = self.saver.age()
        if self.step == self.total_steps or (self.epoch_ends() and age >= MIN_CHECKPOINT_AGE):
            return True
        return self.options.checkpoint_every.is_due(self.step, age)

    def _stop(self, number: int) -> None:
        """End the process with the exit status of the signal. The caller saves the run first."""
        # Another signal during Python's exit would change the exit status.
        on_signals(signal.SIG_IGN)
        if self.directory:
            print(
                f"stopped after step {self.step}; the same command with --resume continues",
                file=sys.stderr,
            )
        self.processes.barrier()  # when a process ends, torchrun kills the other processes
        sys.exit(128 + number)
