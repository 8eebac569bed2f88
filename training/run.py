"""Do what a run needs around the training step: the lock on `--out`, checkpoints, signals, logs,
and the best model.

`train.py` contains the mathematics of a step, and calls `Run.end_step` after each step.
"""

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.errors import RunError, UserError, describe_failure
from common.signals import end_at_once, leave_closed_terminals, on_signals, say
from evaluation.scores import Scores
from lora import trained_parameters
from model.gpt2 import GPT2
from training.directory import RunDirectory, refuse_used_directory
from training.meter import Meter, Progress
from training.model import save_model
from training.optimizer import AdamW
from training.plan import Plan
from training.report import best_weights, parameter_counts, write_report
from training.resume import Saver

# At the end of an epoch, save only if the last checkpoint is at least this many seconds old. On a
# GPU, saving can take longer than an epoch.
MIN_CHECKPOINT_AGE = 10.0


class Run:
    """A run that can take its next step. Only process 0 writes files and prints.

    `directory` is None in other processes.
    """

    def __init__(
        self,
        plan: Plan,
        model: GPT2,
        optimizer: AdamW,
        scaler: torch.amp.GradScaler,
        directory: RunDirectory | None,
    ):
        self.plan = plan
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler
        self.directory = directory
        self.progress = Progress()
        self.meter = Meter(plan.device.precision == "fp16")
        self.saver = Saver(plan, directory, self._state())
        self.stop_signal: int | None = None
        self.step_began = time.perf_counter()
        disable = None if directory else True  # None: show the bar on a terminal only
        self.bar = tqdm(total=plan.total_steps, unit="step", disable=disable)

    def _state(self) -> dict[str, Any]:
        """Return the objects whose state a checkpoint contains."""
        # ParameterDict does not allow a dot in a name.
        named = {n.replace(".", "/"): p for n, p in trained_parameters(self.model).items()}
        return {
            "parameters": nn.ParameterDict(named),
            "optimizer": self.optimizer,
            "scaler": self.scaler,
            "progress": self.progress,
            "meter": self.meter,
        }

    def resume_or_clear(self) -> None:
        """Resume from the checkpoint if --resume finds one. Otherwise clear `--out`."""
        settings = self.plan.settings
        processes = self.plan.processes
        if not processes.is_main:
            torch.manual_seed(settings.seed + processes.number)  # for different dropout masks
        if settings.resume and self.saver.can_resume():
            self.saver.restore()
            best = best_weights(settings.out, settings.method)  # no checkpoint contains it
            if self.directory and math.isfinite(self.progress.best_val_loss) and not best.exists():
                raise UserError(f"--resume: {best} is missing; start again with --overwrite")
            print(f"resuming after step {self.step} of {self.plan.total_steps}")
            self.bar.initial = self.bar.n = self.step
        elif self.directory:
            if settings.resume:
                print(f"{settings.out}: the run has no checkpoint yet; starting from the beginning")
            self.directory.clear()

    @property
    def step(self) -> int:
        """Return the number of steps that the run has taken."""
        return self.progress.step

    def keep_base(self, scores: Scores) -> None:
        """Print and keep the base's scores on the validation part."""
        self.progress.base_val_loss = scores.loss
        self.progress.start_val_loss = scores.loss
        print(f"base: val {scores}", flush=True)
        if scores.loss > 1.01 * math.log(self.model.config.vocab_size):
            print(
                "warning: the base predicts this text worse than by guessing; is this plain text "
                "in a language that the base has seen?"
            )
        self.step_began = time.perf_counter()

    def keep_best(self, scores: Scores) -> dict[str, float]:
        """Print validation scores, and save the model if it is the best so far. Return the scores
        for `metrics.jsonl`.
        """
        line = f"step {self.step}/{self.plan.total_steps}: val {scores}"
        progress = self.progress
        if self.step == 0:  # the score of an initial adapter
            progress.start_val_loss = scores.loss
        if scores.loss < progress.best_val_loss:
            progress.best_val_loss = scores.loss
            progress.best_val_bits_per_byte = scores.bits_per_byte
            if self.directory:
                save_model(self.model, self.plan)
            line += ", best so far"
        tqdm.write(line)
        self.step_began = time.perf_counter()
        return {
            "val_loss": scores.loss,
            "val_perplexity": scores.perplexity,
            "val_bits_per_byte": scores.bits_per_byte,
        }

    def end_step(
        self,
        loss: Tensor,
        grad_norm: Tensor,
        num_tokens: int,
        lr: float,
        validate: Callable[[], Scores],
    ) -> None:
        """Count a step. Then do what is due: log, validate and keep the best model, save a
        checkpoint, and stop after a signal.

        `loss` is the sum over `num_tokens` scored tokens.
        """
        self.progress.step += 1
        self.meter.count(self.step, loss, num_tokens, grad_norm)
        validation_is_due = self.plan.validation_is_due(self.step)
        line_is_due = validation_is_due or self.step % self.plan.settings.log_every == 0
        if line_is_due:
            self.meter.check()  # waits for the device
        # Neither validating nor saving counts as training time.
        self.meter.seconds += time.perf_counter() - self.step_began
        if line_is_due:
            line = self._measure(lr)
            if validation_is_due:
                line |= self.keep_best(validate())
            self._log(line)
        self._save_or_stop()
        self.bar.update()
        self.step_began = time.perf_counter()

    def _measure(self, lr: float) -> dict[str, Any]:
        """Return the line for `metrics.jsonl`: loss, rate and speed since the last line."""
        metrics = self.meter.measure()
        return {
            "step": self.step,
            "epoch": self.step / self.plan.steps_per_epoch,
            "loss": metrics.pop("loss"),
            "lr": lr,
            **metrics,
        }

    def _log(self, line: dict[str, Any]) -> None:
        text = "loss {loss:.4f}, lr {lr:.2e}, {tokens_per_second:,.0f} tokens/s"
        self.bar.set_postfix_str(text.format(**line))
        if self.directory:
            self.directory.append(line)

    def finish(self) -> None:
        """Draw `loss.png`, and write `run.json`, which marks the run as complete."""
        on_signals(end_at_once)  # nothing is left to save
        if not self.directory:
            return
        device = self.plan.device.name
        if self.plan.processes.count > 1:
            device = f"{self.plan.processes.count} x {device}"
        machine = {
            "device": device,
            "precision": self.plan.device.precision,
            "torch": str(torch.__version__),
        }
        counts = parameter_counts(self.model) | self.progress.report() | self.meter.report()
        identity = asdict(self.plan.identity)
        write_report(self.plan.settings, identity | counts | self.saver.cost() | machine)

    # Signals and checkpoints

    def on_signal(self, number: int, frame: Any) -> None:
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
        processes = self.plan.processes
        due, number = processes.maximum(self._checkpoint_is_due(), self.stop_signal or 0)
        if due or number:
            self.saver.save(self.step)
        if number:
            self._stop(number)

    def _checkpoint_is_due(self) -> bool:
        age = self.saver.age()
        if self.step == self.plan.total_steps:
            return True
        if self.plan.epoch_ends(self.step) and age >= MIN_CHECKPOINT_AGE:
            return True
        return self.plan.settings.checkpoint_every.is_due(self.step, age)

    def _stop(self, number: int) -> None:
        """End the process with the exit status of the signal. The caller saves the run first."""
        # Another signal during Python's exit would change the exit status.
        on_signals(signal.SIG_IGN)
        if self.directory:
            print(
                f"stopped after step {self.step}; the same command with --resume continues",
                file=sys.stderr,
            )
        self.plan.processes.barrier()  # when a process ends, torchrun kills the others
        sys.exit(128 + number)


@contextmanager
def open_run(
    plan: Plan, model: GPT2, optimizer: AdamW, scaler: torch.amp.GradScaler
) -> Iterator[Run]:
    """Lock `--out`, and yield the run: resumed from a checkpoint, or new in an empty directory.

    If the run fails, the message names the last checkpoint. Raises UserError if another process is
    training in `--out`.
    """
    with lock_out(plan) as directory:
        if directory:
            refuse_used_directory(plan.settings)  # again: another run may have begun since the plan
        run = Run(plan, model, optimizer, scaler, directory)
        run.resume_or_clear()
        on_signals(run.on_signal)
        try:
            with run.bar:
                yield run
        except Exception as error:
            failure = describe_failure(error)
            if failure is None:
                raise
            raise RunError(f"{failure}; {run.saver.describe()}") from error


def lock_out(plan: Plan) -> AbstractContextManager[RunDirectory | None]:
    """Return the locked directory of the run, or None in other processes than process 0."""
    return RunDirectory(plan.settings.out) if plan.processes.is_main else nullcontext()
