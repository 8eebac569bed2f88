"""A run counts its steps, and saves: the best model, a line of metrics, a checkpoint, a report.

`train.py` contains the training step, and decides in plain sight when to call the methods here.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.errors import RunError, describe_failure
from common.signals import end_at_once, on_signals
from evaluation.scores import Scores
from lora import RateSearch, trained_parameters
from training.meter import Meter
from training.plan import Plan
from training.report import parameter_counts, write_report
from training.saver import Saver
from training.search import SHORT_STEPS
from training.stop import Stop
from training.trainer import Trainer

# At the end of an epoch, save only if the last checkpoint is at least this many seconds old. On a
# GPU, saving can take longer than an epoch.
MIN_CHECKPOINT_AGE = 10.0


class Run:
    """A run that can take its next step. Only process 0 writes files and prints."""

    STATE = (
        "step",
        "lr",
        "search",
        "base_val_loss",
        "start_val_loss",
        "best_val_loss",
        "best_val_bits_per_byte",
    )

    def __init__(self, plan: Plan, trainer: Trainer):
        self.plan = plan
        self.trainer = trainer
        self.step = 0  # the number of steps that the run has taken
        self.lr = plan.options.lr or math.nan  # the peak rate. NaN until `keep_rate`
        self.search: list[list[float]] | None = None  # the rates and losses of `keep_rate`
        self.base_val_loss = math.nan
        self.start_val_loss = math.nan  # with the adapter of --init-adapter, if given
        self.best_val_loss = math.inf
        self.best_val_bits_per_byte = math.inf
        self.meter = Meter(plan.device.precision == "fp16")
        self.line: dict[str, Any] | None = None  # of metrics.jsonl, if one is due in this step
        self.saver = Saver(plan, self._stateful())
        self.stop = Stop(plan.processes.is_main)
        disable = None if plan.processes.is_main else True  # None: show the bar on a terminal only
        self.bar = tqdm(total=plan.total_steps, unit="step", disable=disable)

    def _stateful(self) -> dict[str, Any]:
        """Return the objects whose state a checkpoint contains."""
        # These are the model's own tensors, so restoring them changes the model. ParameterDict does
        # not allow a dot in a name.
        trained = trained_parameters(self.trainer.model)
        named = {name.replace(".", "/"): p for name, p in trained.items()}
        return {
            "parameters": nn.ParameterDict(named),
            "optimizer": self.trainer.optimizer,
            "scaler": self.trainer.scaler,
            "progress": self,
            "meter": self.meter,  # sums since the last line, skipped steps
        }

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.STATE:
            setattr(self, name, state[name])

    # Counting

    def keep_base(self, scores: Scores) -> None:
        """Print and keep the base's scores on the validation part. Full fine-tuning starts from the
        base, and a new adapter changes nothing, so the start is the first best model.
        """
        self.base_val_loss = scores.loss
        self.start_val_loss = scores.loss
        print(f"base: val {scores}", flush=True)
        if not self.plan.options.init_adapter:
            self._save_best(scores)
        if scores.loss > 1.01 * math.log(self.trainer.model.config.vocab_size):
            print(
                "warning: the base predicts this text worse than by guessing; is this plain text "
                "in a language that the base has seen?",
                file=sys.stderr,
            )

    def _save_best(self, scores: Scores) -> None:
        self.best_val_loss = scores.loss
        self.best_val_bits_per_byte = scores.bits_per_byte
        self.saver.save_best(self.trainer.model)

    def keep_rate(self, search: RateSearch) -> None:
        """Print and keep the peak rate that a search has found."""
        self.lr = search.rate
        self.search = [list(pair) for pair in search.tried.items()]
        losses = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in search.tried.items())
        print(
            f"lr {search.rate:g}, found in {search.seconds:.0f} s by {len(search.tried)} runs of "
            f"{SHORT_STEPS} steps (loss on a part of the training text, by rate: {losses})",
            flush=True,
        )

    def start(self) -> None:
        """Start the clock. After a signal, finish the step, save and stop. Before this call, a
        signal ends the process at once, because a resumed run repeats what comes before step 1.
        """
        on_signals(self.stop.on_signal)
        self.meter.start()

    def count(self, loss: Tensor, grad_norm: Tensor, num_tokens: int, lr: float) -> None:
        """Count a step. If a line of metrics is due, check the losses, and prepare the line.

        `loss` is the sum over `num_tokens` scored tokens.
        """
        self.step += 1
        self.meter.count(self.step, loss, num_tokens, grad_norm)
        self.line = None
        every = self.plan.options.log_every
        if self.step % every == 0 or self.plan.validation_is_due(self.step):
            self.line = {
                "step": self.step,
                "epoch": self.step / self.plan.steps_per_epoch,
                "lr": lr,
                **self.meter.measure(),  # waits for the device
            }
        self.meter.pause()  # neither validating nor saving counts as training time

    def keep_best(self, scores: Scores) -> None:
        """Print validation scores, and save the model if it is the best so far."""
        message = f"step {self.step}/{self.plan.total_steps}: val {scores}"
        if self.step == 0:  # the score of an initial adapter
            self.start_val_loss = scores.loss
        if scores.loss < self.best_val_loss:
            self._save_best(scores)
            message += ", best so far"
        tqdm.write(message)
        if self.line:
            self.line |= {
                "val_loss": scores.loss,
                "val_perplexity": scores.perplexity,
                "val_bits_per_byte": scores.bits_per_byte,
            }

    # Saving

    def save(self) -> None:
        """Save a checkpoint."""
        self.saver.save(self.step)

    def save_or_stop(self) -> None:
        """End a step: write the line of metrics, and save a checkpoint when due. If any process has
        received a signal, save and end.
        """
        if self.line:
            text = "loss {loss:.4f}, lr {lr:.2e}, {tokens_per_second:,.0f} tokens/s"
            self.bar.set_postfix_str(text.format(**self.line))
            self.saver.append(self.line)
        due, number = self.plan.processes.maximum(self._checkpoint_is_due(), self.stop.number)
        if due or number:
            self.save()
        if number:
            self.stop.end(number, f"stopped after step {self.step}", self.plan.processes)
        self.bar.update()
        self.meter.start()

    def _checkpoint_is_due(self) -> bool:
        age = self.saver.age()
        if self.step == self.plan.total_steps:
            return True
        if self.plan.epoch_ends(self.step) and age >= MIN_CHECKPOINT_AGE:
            return True
        return self.plan.options.checkpoint_every.is_due(self.step, age)

    def resume_or_clear(self) -> None:
        """Resume from the checkpoint if --resume finds one. Otherwise clear `--out`."""
        options = self.plan.options
        if options.resume and self.saver.can_resume():
            self.saver.restore()  # also sets self.step: see `_stateful`
            if math.isfinite(self.best_val_loss):
                self.saver.require_best()
            print(f"resuming after step {self.step} of {self.plan.total_steps}")
            self.bar.initial = self.bar.n = self.step
        else:
            if options.resume:
                print(f"{options.out}: the run has no checkpoint yet; starting from the beginning")
            self.saver.clear()

    def finish(self) -> None:
        """Draw `loss.png`, and write `run.json`, which marks the run as complete."""
        on_signals(end_at_once)  # nothing is left to save
        if not self.plan.processes.is_main:
            return
        device = self.plan.device.name
        if self.plan.processes.count > 1:
            device = f"{self.plan.processes.count} x {device}"
        machine = {
            "device": device,
            "precision": self.plan.device.precision,
            "torch": str(torch.__version__),
        }
        counted = {name: value for name, value in self.state_dict().items() if value is not None}
        counted["steps"] = counted.pop("step")
        report = asdict(self.plan.identity) | parameter_counts(self.trainer.model) | counted
        write_report(self.plan.options, report | self.meter.report() | self.saver.cost() | machine)


@contextmanager
def open_run(plan: Plan, trainer: Trainer) -> Iterator[Run]:
    """Lock `--out`, and yield the run: resumed, or new, without the files of an older run.

    If the run fails, the message names the last checkpoint. Raises UserError if another process is
    training in `--out`.
    """
    run = Run(plan, trainer)
    with run.saver.locked():
        run.resume_or_clear()
        try:
            with run.bar:
                yield run
        except Exception as error:
            failure = describe_failure(error)
            if failure is None:
                raise
            raise RunError(f"{failure}; {run.saver.describe()}") from error
