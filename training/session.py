"""Run the training loop safely: lock `--out`, save and resume, handle signals, log and report.

`train.py` owns the mathematics. With `watch` it names what a checkpoint must hold: any objects with
`state_dict()` and `load_state_dict()`, PyTorch's `Stateful` protocol.
"""

import math
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from common.device import Device
from common.errors import RunError, UserError, describe_failure
from common.files import read_json, write_json
from common.signals import end_at_once, on_signals, say
from training.checkpoint import CHECKPOINT, has_checkpoint, read_checkpoint, write_checkpoint
from training.directory import (
    IDENTITY,
    MODEL_FILES,
    RUN,
    RunDirectory,
    model_hashes,
    refuse_used_directory,
)
from training.identity import RunIdentity, refuse_another
from training.options import Options
from training.ranks import Ranks
from training.report import read_run, write_report

T = TypeVar("T")
# Save at an epoch's end if the last checkpoint is this old or older: on a GPU, saving can take
# longer than the epoch.
YOUNG_SECONDS = 10.0


class Session:
    """One run in `--out`. Inside the `with` it has the lock; only the first rank writes."""

    def __init__(self, options: Options, device: Device, ranks: Ranks, identity: RunIdentity):
        self.options = options
        self.device = device
        self.ranks = ranks
        self.identity = identity
        self.directory: RunDirectory | None = None  # None in all ranks but the first
        self.finished = False
        self.stateful: dict[str, Any] = {}
        self.bar: tqdm | None = None
        # Of the whole run, what came before a resume included:
        self.total_steps = 0
        self.seconds = 0.0
        self.peak_memory_mb = 0.0
        # Of this process:
        self.running = False
        self.stop_signal: int | None = None
        self.started_at = 0.0
        self.saved_at = 0.0
        self.saved_step: int | None = None

    def __enter__(self) -> "Session":
        """Take the lock. Raises UserError if another run is in `--out`, or at work there."""
        self.ranks.check_same(asdict(self.identity))
        if self.ranks.first:
            self.directory = RunDirectory(self.options.out)
            try:
                refuse_used_directory(self.options)  # another run may have ended there meanwhile
                self.finished = self._is_finished()
            except UserError:
                self.directory.close()
                raise
        self.finished = self.ranks.from_first(self.finished)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Release the lock; turn a known failure into a RunError that names the last checkpoint."""
        if self.directory:
            self.directory.close()
        failure = describe_failure(error)
        if self.running and failure:
            if self.saved_step is None:
                saved = "there is no checkpoint yet"
            else:
                saved = f"the last checkpoint is from step {self.saved_step}"
            raise RunError(f"{failure}; {saved}") from error

    def _is_finished(self) -> bool:
        """Return whether the run to resume is finished. Raises UserError if it is another run."""
        out = self.options.out
        if not self.options.resume or not (out / RUN).exists():
            return False
        refuse_another(out / RUN, read_run(out), self.identity)
        print(f"{out}: this run is finished; nothing to resume")
        return True

    def watch(self, parameters: Mapping[str, nn.Parameter], **stateful: Any) -> None:
        """Name what a checkpoint holds besides the random generators' states. One of these must be
        `progress`, with its `step` and `best_val_loss`.
        """
        # torch allows no dot in these names
        named = {name.replace(".", "/"): parameter for name, parameter in parameters.items()}
        self.stateful = {"parameters": nn.ParameterDict(named), **stateful}

    @property
    def step(self) -> int:
        return self.stateful["progress"].step

    def start_or_resume(self, total_steps: int) -> None:
        """With --resume, continue from the checkpoint if there is one; else empty `--out`."""
        out = self.options.out
        resume = self.options.resume
        self.total_steps = total_steps
        if not self.ranks.first:
            torch.manual_seed(self.options.seed + self.ranks.rank)  # other dropout masks

        if self.ranks.from_first(resume and has_checkpoint(out)):
            state = read_checkpoint(out) if self.ranks.first else {}
            self._restore(self.ranks.from_first(state))
        else:
            if resume:
                print(f"{out}: the run has no checkpoint yet; starting from the beginning")
            if self.directory:
                self._start_anew()
        self.started_at = time.perf_counter() - self.seconds
        self.running = True

    def _start_anew(self) -> None:
        """Empty `--out`. Raises UserError if --resume finds another run's best model there."""
        assert self.directory
        if self.options.resume and any((self.options.out / name).exists() for name in MODEL_FILES):
            refuse_another(self.identity_path, read_json(self.identity_path), self.identity)
        self.directory.clear()

    @property
    def identity_path(self) -> Path:
        return self.options.out / IDENTITY

    @contextmanager
    def replacing_best_model(self) -> Iterator[None]:
        """Say in `--out` whose the best model is and, once it is saved, the sha256 of its files.

        Until a checkpoint and `run.json` do, this names the run, so that no other deletes its
        model. In between, the files may be the old model's or the new one's.
        """
        identity = asdict(self.identity)
        write_json(self.identity_path, identity | {"model_sha256": None})
        yield
        write_json(self.identity_path, identity | {"model_sha256": model_hashes(self.options.out)})

    def handle_signals(self) -> None:
        """From now on, let a signal end the run once the step is done and saved."""
        on_signals(self._on_signal)

    def steps(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches under a progress bar."""
        self.saved_at = time.perf_counter()
        hidden = None if self.directory else True  # None hides the bar if stderr is no terminal
        with tqdm(
            total=self.total_steps, initial=self.step, unit="step", disable=hidden
        ) as self.bar:
            for batch in batches:
                yield batch
                self.bar.update()

    def log(self, metrics: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        line = "loss {loss:.4f}, lr {lr:.2e}, {tokens_per_second:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.set_postfix_str(line.format(**metrics))
        if self.directory:
            self.directory.append(metrics)

    def save_or_stop(self, epoch_ends: bool) -> None:
        """Save a checkpoint if `--checkpoint-every` asks for one, or at an epoch's end; if a signal
        has come, to any rank, save and end the process.
        """
        due = self._is_due(epoch_ends)
        due_anywhere, number = self.ranks.max_over_ranks(due, self.stop_signal or 0)
        if due_anywhere or number:
            self._save()
        if self.ranks.count == 1:  # a signal may have come while it saved
            number = self.stop_signal or 0
        if number:
            self._stop(number)

    def _stop(self, number: int) -> None:
        """End the process as the signal asks; all is saved."""
        on_signals(signal.SIG_IGN)  # a second one while Python ends would change the status
        if self.directory:
            print(
                f"stopped after step {self.saved_step}; the same command with --resume continues",
                file=sys.stderr,
            )
        self.ranks.barrier()  # torchrun ends the others as soon as one has ended
        sys.exit(128 + number)

    def finish(self, report: dict[str, Any]) -> None:
        """Write `run.json`, whose presence says that the run is complete; draw `loss.png`."""
        if not self.directory:
            return
        self.directory.check()
        device = self.device.name
        if self.ranks.count > 1:
            device = f"{self.ranks.count} x {device}"
        machine = {
            "device": device,
            "precision": self.device.precision,
            "torch": torch.__version__,
        }
        write_report(self.options, asdict(self.identity) | report | self._count() | machine)
        self.identity_path.unlink(missing_ok=True)

    def _count(self) -> dict[str, float]:
        """Update and return time and peak memory, including those before a resume."""
        self.seconds = time.perf_counter() - self.started_at
        self.peak_memory_mb = max(self.peak_memory_mb, self.device.peak_memory_mb())
        return {"seconds": self.seconds, "peak_memory_mb": self.peak_memory_mb}

    def _is_due(self, epoch_ends: bool) -> bool:
        """Return whether a checkpoint is due."""
        age = time.perf_counter() - self.saved_at
        if self.step == self.total_steps or (epoch_ends and age >= YOUNG_SECONDS):
            return True
        return self.options.checkpoint_every.is_due(self.step, age)

    def _on_signal(self, number: int, frame: Any) -> None:
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
        generator_state = bytes(self.device.random.get_rng_state().tolist()).hex()
        state = {
            "run": asdict(self.identity),
            "machine": self._machine(),
            "session": self._count(),
            "random": self.ranks.gather(generator_state),
        }
        for name, stateful in self.stateful.items():
            state[name] = stateful.state_dict()
        if self.directory:
            state["metrics"] = self.directory.sync()
            write_checkpoint(self.options.out, state)
        self.saved_step = self.step
        self.saved_at = time.perf_counter()

    def _restore(self, state: dict[str, Any]) -> None:
        """Restore what `_save` saved. Raises UserError if the checkpoint is another run's."""
        try:
            refuse_another(self.options.out / CHECKPOINT, state["run"], self.identity)
            for name, stateful in self.stateful.items():
                stateful.load_state_dict(state[name])
            self.seconds = state["session"]["seconds"]
            self.peak_memory_mb = state["session"]["peak_memory_mb"]
            metrics = state["metrics"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            if describe_failure(error):  # out of memory
                raise
            raise UserError(f"--resume: the checkpoint does not fit this run: {error}") from error
        self._restore_random(state["machine"], state["random"])
        self.saved_step = self.step
        print(f"resuming after step {self.saved_step} of {self.total_steps}")
        if self.directory:
            self._check_best_model()
            self.directory.cut(metrics)

    def _check_best_model(self) -> None:
        """Raise UserError unless the best model, which no checkpoint holds, is as it was saved."""
        if self.stateful["progress"].best_val_loss == math.inf:  # there is none yet
            return
        record = read_json(self.identity_path)
        refuse_another(self.identity_path, record, self.identity)
        if "model_sha256" not in record:
            raise UserError(f"{self.identity_path}: damaged; start again with --overwrite")

        saved = record["model_sha256"]
        found = model_hashes(self.options.out)
        if saved is None or saved == found:  # None: it was being replaced; these steps come again
            return
        wrong = sorted(name for name in MODEL_FILES if saved.get(name) != found.get(name))
        raise UserError(
            f"--resume: {self.options.out / wrong[0]}: is not the best model's that "
            f"{self.identity_path} records; put it back, or start again with --overwrite"
        )

    def _restore_random(self, then: dict[str, Any], states: list[str]) -> None:
        """Restore this rank's random generator, unless the number of ranks or the device differs;
        warn of what may change the last bits of the result.
        """
        now = self._machine()
        for name, value in now.items():
            if self.directory and then[name] != value:
                print(
                    f"warning: the run began with {name} {then[name]} and resumes with {value}: "
                    "its last bits may differ from an uninterrupted run's",
                    file=sys.stderr,
                )
        if (then["ranks"], then["device"]) == (now["ranks"], now["device"]):
            mine = bytes.fromhex(states[self.ranks.rank])
            self.device.random.set_rng_state(torch.tensor(list(mine), dtype=torch.uint8))

    def _machine(self) -> dict[str, Any]:
        """Return what may change the last bits of a result."""
        return {
            "torch": str(torch.__version__),
            "threads": torch.get_num_threads(),
            "ranks": self.ranks.count,
            "device": self.device.torch_device.type,
        }
