"""Run the training loop safely: lock `--out`, save and resume, handle signals, log and report.

`train.py` owns the mathematics. With `watch` it names what a checkpoint must hold: any objects with
`state_dict()` and `load_state_dict()`, PyTorch's `Stateful` protocol.
"""

import math
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from tqdm import tqdm

from common.device import Device
from common.errors import RunError, UserError, describe_failure
from common.signals import end_at_once, on_signals, say
from training.checkpoint import has_checkpoint, read_checkpoint, write_checkpoint
from training.directory import RUN, RunDirectory, refuse_used_directory
from training.identity import refuse_another
from training.options import Options
from training.ranks import Ranks
from training.report import best_weights, read_run, write_report

# An epoch's end saves unless the last checkpoint is younger: on a GPU, saving can take longer than
# the epoch.
YOUNG_SECONDS = 10.0


class Session:
    """One run in `--out`. Inside the `with` it has the lock; only the first rank writes."""

    def __init__(self, options: Options, device: Device, ranks: Ranks, identity: dict):
        self.options, self.device, self.ranks, self.identity = options, device, ranks, identity
        self.directory: RunDirectory | None = None
        self.watched: dict[str, Any] = {}
        self.finished, self.running = False, False
        self.saved_step: int | None = None
        self.stop_signal: int | None = None
        self.seconds, self.peak_memory_mb = 0.0, 0.0
        self.total_steps, self.started, self.saved_at = 0, 0.0, 0.0  # `resume` and `steps` set them
        self.bar: tqdm | None = None

    def __enter__(self) -> "Session":
        """Take the lock. Raises UserError if another run is in `--out`, or at work there."""
        self.ranks.check_same(self.identity)
        if self.ranks.first:
            self.directory = RunDirectory(self.options.out)
            try:
                refuse_used_directory(
                    self.options
                )  # again: another run may have ended there meanwhile
                if self.options.resume and (self.options.out / RUN).exists():
                    refuse_another(read_run(self.options.out), self.identity)
                    print(f"{self.options.out}: this run is finished; nothing to resume")
                    self.finished = True
            except UserError:
                self.directory.close()
                raise
        self.finished = self.ranks.from_first(self.finished)
        return self

    def __exit__(self, kind, error: BaseException | None, traceback) -> None:
        """Release the lock; turn a known failure into a RunError that names the last checkpoint."""
        if self.directory:
            self.directory.close()
        if self.running and (failure := describe_failure(error)):
            saved = (
                "there is no checkpoint yet"
                if self.saved_step is None
                else f"the last checkpoint is from step {self.saved_step}"
            )
            raise RunError(f"{failure}; {saved}") from error

    def watch(self, **stateful: Any) -> None:
        """Name what a checkpoint holds besides the random generators' states. One of these must be
        `progress`, with its `step` and `best_val_loss`.
        """
        self.watched = stateful

    def resume(self, total_steps: int) -> None:
        """Empty `--out` and start or, with --resume, continue from the checkpoint."""
        out, resume = self.options.out, self.options.resume
        self.total_steps = total_steps
        if not self.directory:
            torch.manual_seed(self.options.seed + self.ranks.rank)  # dropouts of its own
        if self.ranks.from_first(resume and has_checkpoint(out)):
            self._restore(self.ranks.from_first(read_checkpoint(out) if self.directory else {}))
        else:
            if resume:
                print(f"{out}: the run has no checkpoint yet; starting from the beginning")
            if self.directory:
                self.directory.clear()
        self.started = time.perf_counter() - self.seconds
        self.running = True

    def steps(self, batches: Iterable) -> Iterator:
        """Yield the batches under a progress bar; from here on, a signal lets the step finish."""
        on_signals(self._on_signal)
        self.saved_at = time.perf_counter()
        with tqdm(
            total=self.total_steps,
            initial=self.watched["progress"].step,
            unit="step",
            disable=None if self.directory else True,
        ) as self.bar:
            for batch in batches:
                yield batch
                self.bar.update()

    def log(self, metrics: dict) -> None:
        """Add a line to metrics.jsonl."""
        self.bar.set_postfix_str(
            "loss {loss:.4f}, lr {lr:.2e}, {tokens_per_second:,.0f} tokens/s".format(**metrics)
        )
        if self.directory:
            self.directory.append(metrics)

    def after_step(self, epoch_ends: bool) -> float:
        """Save if a checkpoint is due; after a signal, save and stop. Return the seconds taken."""
        began = time.perf_counter()
        if self.ranks.max_over_ranks(self._checkpoint_is_due(epoch_ends)):
            self._save()
        if stop := self.ranks.max_over_ranks(
            self.stop_signal or 0
        ):  # it may have come during the save
            if self.saved_step != self.watched["progress"].step:
                self._save()
            on_signals(signal.SIG_IGN)  # a second one while Python ends would change the status
            if self.directory:
                print(
                    f"stopped after step {self.saved_step}; the same command with --resume "
                    "continues",
                    file=sys.stderr,
                )
            self.ranks.barrier()  # torchrun ends the others as soon as one has ended
            sys.exit(128 + stop)
        return time.perf_counter() - began

    def finish(self, report: dict) -> None:
        """Write `run.json`, whose presence says that the run is complete; draw `loss.png`."""
        if self.directory:
            self.directory.check()
            many = f"{self.ranks.count} x " if self.ranks.count > 1 else ""
            write_report(
                self.options,
                self.identity
                | report
                | self._count()
                | {
                    "device": many + self.device.name,
                    "precision": self.device.precision,
                    "torch": torch.__version__,
                },
            )

    def _count(self) -> dict:
        """Update and return time and peak memory, including those before a resume."""
        self.seconds = time.perf_counter() - self.started
        self.peak_memory_mb = max(self.peak_memory_mb, self.device.peak_memory_mb())
        return {"seconds": self.seconds, "peak_memory_mb": self.peak_memory_mb}

    def _checkpoint_is_due(self, epoch_ends: bool) -> bool:
        age = time.perf_counter() - self.saved_at
        step = self.watched["progress"].step
        if step == self.total_steps or (epoch_ends and age >= YOUNG_SECONDS):
            return True
        return self.options.checkpoint_every.is_due(step, age)

    def _on_signal(self, number: int, frame) -> None:
        """At the first signal, let the step end and save; at another, stop at once.

        Ignore repeated SIGTERM: `timeout` and `make` both forward it. Ignore repeated SIGHUP: a
        closed terminal and its shell both send it.
        """
        if number == self.stop_signal != signal.SIGINT:
            return
        if self.stop_signal:
            end_at_once(number, frame)
        self.stop_signal = number
        if self.directory:
            say("stopping once the step is done and saved; Ctrl-C stops at once")

    def _save(self) -> None:
        mine = bytes(self.device.random.get_rng_state().tolist()).hex()
        state = {
            "run": self.identity,
            "machine": self._machine(),
            "session": self._count(),
            "random": self.ranks.gather(mine),
            **{name: stateful.state_dict() for name, stateful in self.watched.items()},
        }
        if self.directory:
            self.directory.sync()
            write_checkpoint(self.options.out, state)
        self.saved_step, self.saved_at = self.watched["progress"].step, time.perf_counter()

    def _restore(self, state: dict) -> None:
        """Restore what `_save` saved. Raises UserError if the checkpoint is another run's."""
        try:
            refuse_another(state["run"], self.identity)
            for name, stateful in self.watched.items():
                stateful.load_state_dict(state[name])
            vars(self).update(state["session"])  # seconds, peak_memory_mb
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            if describe_failure(error):  # out of memory
                raise
            raise UserError(f"--resume: the checkpoint does not fit this run: {error}") from error
        best = best_weights(self.options.out, self.options.method)
        if (
            self.directory
            and self.watched["progress"].best_val_loss < math.inf
            and (not best.is_file())
        ):
            raise UserError(
                f"--resume: {best}: is missing, the best model so far; put it back, or "
                "start again with --overwrite"
            )
        then, now = state["machine"], self._machine()
        for name in now:
            if self.directory and then[name] != now[name]:
                print(
                    f"warning: the run began with {name} {then[name]} and resumes with "
                    f"{now[name]}: its last bits may differ from an uninterrupted run's",
                    file=sys.stderr,
                )
        if (then["ranks"], then["device"]) == (now["ranks"], now["device"]):
            mine = bytes.fromhex(state["random"][self.ranks.rank])
            self.device.random.set_rng_state(torch.tensor(list(mine), dtype=torch.uint8))
        self.saved_step = self.watched["progress"].step
        print(f"resuming after step {self.saved_step} of {self.total_steps}")
        if self.directory:
            self.directory.cut(self.saved_step)

    def _machine(self) -> dict:
        """Return what may change the last bits of a result."""
        return {
            "torch": str(torch.__version__),
            "threads": torch.get_num_threads(),
            "ranks": self.ranks.count,
            "device": self.device.torch_device.type,
        }
