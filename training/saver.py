"""Save the best model and checkpoints of a run, and resume the run bit for bit."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from common.errors import RunError, UserError, as_failure, describe_failure
from data.instructions import CHAT_TEMPLATE
from lora import save_adapter
from lora.save import WEIGHTS as ADAPTER_WEIGHTS
from model.gpt2 import GPT2
from storage.hf_compat import save_tokenizer, stock_name
from storage.hub import split_revision
from storage.weights import WEIGHTS as MODEL_WEIGHTS
from storage.weights import save_gpt2
from training.checkpoint import CHECKPOINT, has_checkpoint, read_checkpoint, write_checkpoint
from training.directory import RunDirectory
from training.identity import refuse_another_run
from training.plan import Plan


class Saver:
    """Write the files of a run in `--out`, and restore the run from its last checkpoint.

    A checkpoint contains the state of the `stateful` objects, which have `state_dict()` and
    `load_state_dict()`: the trained parameters, AdamW, the scaler, the run's counts, its peak rate
    and its meter. It also contains the identity of the run, the random generators of all
    processes, the time, the peak memory, properties of the machine, and the length of
    metrics.jsonl, so that later lines are cut. The order of the windows follows from the seed and
    the step, not from a generator. Frozen weights are loaded again.

    Only process 0 reads and writes files. In other processes, `directory` is None.
    """

    def __init__(self, plan: Plan, stateful: Mapping[str, Any]):
        self.plan = plan
        self.out = plan.options.out
        self.processes = plan.processes
        self.device = plan.device
        self.directory: RunDirectory | None = None
        self.stateful = stateful
        self.saved_step: int | None = None  # of the last checkpoint
        self.began_at = time.perf_counter()
        self.saved_at = self.began_at
        self.peak_memory_mb = 0.0

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock `--out` inside the `with` block. Raises UserError if another run has the lock."""
        if not self.processes.is_main:
            yield
            return
        with RunDirectory(self.out) as self.directory:
            yield

    def clear(self) -> None:
        """Remove the files of an earlier run."""
        if self.directory:
            self.directory.clear(self.plan.options)

    def append(self, metrics: dict[str, Any]) -> None:
        """Add a line to `metrics.jsonl`."""
        if self.directory:
            self.directory.append(metrics)

    def can_resume(self) -> bool:
        """Return, in every process, whether there is a checkpoint."""
        return self.processes.from_main(self.directory is not None and has_checkpoint(self.out))

    def age(self) -> float:
        """Return the seconds since the last checkpoint, or since the run began."""
        return time.perf_counter() - self.saved_at

    def describe(self) -> str:
        if self.saved_step is None:
            return "there is no checkpoint yet"
        return f"the last checkpoint is from step {self.saved_step}"

    def save_best(self, model: GPT2) -> None:
        """Write the adapter or the whole model, and the tokenizer's files, to `--out`."""
        if self.directory:
            save_model(model, self.plan)

    def require_best(self) -> None:
        """Raise UserError if the best model is missing. A checkpoint does not contain it."""
        names = {"lora": ADAPTER_WEIGHTS, "full": MODEL_WEIGHTS}
        best = self.out / names[self.plan.options.method]
        if self.directory and not best.exists():
            raise UserError(f"--resume: {best} is missing; start again with --overwrite")

    def cost(self) -> dict[str, float]:
        """Return the run's time and peak memory so far, including the time before a resume."""
        self.peak_memory_mb = max(self.peak_memory_mb, self.device.peak_memory_mb())
        seconds = time.perf_counter() - self.began_at
        return {"seconds": seconds, "peak_memory_mb": self.peak_memory_mb}

    def save(self, step: int) -> None:
        # The generator of torch on this device. Restoring it undoes the seeding in `load_model`.
        generator_state = bytes(self.device.rng.get_rng_state().tolist()).hex()
        state: dict[str, Any] = {
            "run": asdict(self.plan.identity),
            "machine": self._machine(),
            "cost": self.cost(),
            "random": self.processes.gather(generator_state),
        }
        for name, stateful in self.stateful.items():
            state[name] = stateful.state_dict()
        if self.directory:
            state["metrics_bytes"] = self.directory.sync()
            write_checkpoint(self.out, state)
        self.saved_step = step
        self.saved_at = time.perf_counter()

    def restore(self) -> None:
        """Restore the last readable checkpoint. Raises UserError if another run wrote it."""
        state = self.processes.from_main(read_checkpoint(self.out) if self.directory else {})
        try:
            refuse_another_run(self.out / CHECKPOINT, state["run"], self.plan.identity)
            for name, stateful in self.stateful.items():
                stateful.load_state_dict(state[name])
            self.began_at -= state["cost"]["seconds"]
            self.peak_memory_mb = state["cost"]["peak_memory_mb"]
            self.saved_step = state["progress"]["step"]
            metrics_bytes = state["metrics_bytes"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            if describe_failure(error):  # out of memory
                raise
            raise UserError(f"--resume: the checkpoint does not fit this run: {error}") from error
        self._restore_random(state["machine"], state["random"])
        if self.directory:
            self.directory.cut(metrics_bytes)

    def _restore_random(self, then: dict[str, Any], states: list[str]) -> None:
        """Restore this process's random generator, unless the number of processes or the type of
        device has changed. Warn about each property of the machine that has changed since the
        checkpoint.
        """
        now = self._machine()
        changed = [name for name in now if then[name] != now[name]]
        draws_anew = "processes" in changed or "device" in changed
        what = "the dropout masks and the last bits" if draws_anew else "the last bits"
        for name in changed if self.directory else ():
            print(
                f"warning: the checkpoint was saved with {name} {then[name]}, and the run resumes "
                f"with {now[name]}: the result may differ in {what} from an uninterrupted run",
                file=sys.stderr,
            )
        if not draws_anew:
            mine = bytes.fromhex(states[self.processes.number])
            self.device.rng.set_rng_state(torch.tensor(list(mine), dtype=torch.uint8))

    def _machine(self) -> dict[str, Any]:
        """Return the properties of the machine that may change the last bits of a result."""
        return {
            "torch": str(torch.__version__),
            "threads": torch.get_num_threads(),
            "processes": self.processes.count,
            "device": self.device.torch_device.type,
            "processor": self.device.name,
        }


def save_model(model: GPT2, plan: Plan) -> None:
    """Write the adapter or the whole model, and the tokenizer's files, to `--out`."""
    options = plan.options
    tokenizer = plan.data.tokenizer
    if options.method == "lora":
        name, revision = split_revision(stock_name(options.base))
        weights_sha256 = plan.identity.base_sha256["weights"]
        with as_failure(RunError):
            save_adapter(model, options.out, name, weights_sha256, revision)
    else:
        save_gpt2(model, options.out, end_of_text=tokenizer.end_of_text)
    template = CHAT_TEMPLATE if options.data else None
    save_tokenizer(tokenizer, options.out, model.config.n_positions, template)
