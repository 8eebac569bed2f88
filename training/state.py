"""All that a training step depends on: gathered for a checkpoint, checked and put back."""

import math
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from errors import RunError, UserError
from training.checkpoint import read_checkpoint, settle, write_checkpoint
from training.identity import refuse_another
from training.randomness import check_random_state, random_state, set_random_state

if TYPE_CHECKING:
    from train import Trainer

LARGEST = 1 << 53


@dataclass
class Progress:
    """What a run knows of itself besides its tensors; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0  # trained on so far
    training_seconds: float = 0.0  # in training steps alone
    seconds: float = 0.0  # wall clock, validation and saving included
    base_val_loss: float = math.nan
    best_val_loss: float = math.inf
    best_val_bits_per_byte: float = math.inf
    metrics_bytes: int = 0  # length of metrics.jsonl


def bytes_needed(trainer: "Trainer") -> int:
    """Two checkpoints and the one being written, the best model twice, and small files."""
    trained = sum(p.nbytes for p in trainer.trainable.values())
    # A checkpoint holds each number and AdamW's two moments; 4 kB a tensor is zip and names.
    checkpoint = 3 * trained + 4096 * len(trainer.trainable) + 65536
    best = trained if trainer.lora_config else sum(p.nbytes for p in trainer.model.parameters())
    return 3 * checkpoint + 2 * best + (1 << 20)


def resume_training(trainer: "Trainer") -> None:
    """Take up the run where its checkpoint left it. Raises UserError if this is another run."""
    directory = trainer.directory
    found = read_checkpoint(directory.out) if directory else None
    state, path = trainer.ranks.from_first(found)
    refuse_another(state.get("run"), trainer.identity)
    restore_state(trainer, state)
    trainer.saved_step = trainer.progress.step
    print(f"resuming after step {trainer.progress.step} of {trainer.total_steps}")
    if not directory:
        return
    settle(directory.out, path)
    if not directory.cut(trainer.progress.metrics_bytes):
        print(f"warning: {directory.metrics}: lines from before the checkpoint are missing",
              file=sys.stderr)


def save_training(trainer: "Trainer") -> None:
    """Write a checkpoint. Raises RunError, and writes nothing, if a step since was faulty."""
    trainer.check()
    step = trainer.progress.step
    if not _all_finite(list(trainer.trainable.values())):
        raise RunError(f"step {step}: a weight is not a finite number any more")
    trainer.progress.seconds = time.perf_counter() - trainer.started
    state = gather_state(trainer)
    if trainer.directory:
        trainer.directory.sync()
        write_checkpoint(trainer.directory.out, state)
    trainer.interval.restart(*state["interval"]["sums"])  # saving is not training time
    trainer.saved_step, trainer.saved_at = step, time.perf_counter()


def gather_state(trainer: "Trainer") -> dict:
    """The run's state, without the frozen base; the random generators' is every rank's."""
    on_cuda = trainer.device.type == "cuda"
    cuda = trainer.ranks.gather(torch.cuda.get_rng_state(trainer.device)) if on_cuda else []
    return {
        "run": trainer.identity,
        "machine": {"torch": str(torch.__version__), "threads": torch.get_num_threads(),
                    "ranks": trainer.ranks.count, "gpus": len(cuda)},
        "progress": asdict(trainer.progress),
        "interval": trainer.interval.state(),
        "parameters": {name: p.detach() for name, p in trainer.trainable.items()},
        "optimizer": trainer.optimizer.state_dict()["state"],
        "scaler": trainer.scaler.state_dict(),
        "random": trainer.ranks.gather(random_state()),
        "cuda_random": cuda,
    }


def restore_state(trainer: "Trainer", state: dict) -> None:
    """Put a gathered state back. Raises UserError, and changes nothing, if it does not fit.

    What may differ without harm but not without a trace is said in a warning.
    """
    template = gather_state(trainer) | {"optimizer": _adamw_form(trainer), "run": {}}
    state = state | {"run": {}}  # compared before
    for name in ("random", "cuda_random"):  # of other ranks or GPUs: the warning says so
        if isinstance(state.get(name), list) and len(state[name]) != len(template[name]):
            state[name] = template[name]
    try:
        _check_form(template, state, "state")
        _check_values(trainer, state)
    except ValueError as error:
        raise UserError(f"--resume: the checkpoint does not fit this run: {error}") from error
    if trainer.ranks.first:
        _warn_of_another_machine(state["machine"], template["machine"])
    with torch.no_grad():
        for name, parameter in trainer.trainable.items():
            parameter.copy_(state["parameters"][name])
    groups = trainer.optimizer.state_dict()["param_groups"]
    trainer.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
    trainer.scaler.load_state_dict(state["scaler"])
    trainer.progress = Progress(**state["progress"])
    trainer.interval.load_state(state["interval"])
    set_random_state(state["random"][trainer.ranks.rank])
    if state["cuda_random"]:
        torch.cuda.set_rng_state(state["cuda_random"][trainer.ranks.rank], trainer.device)


def _adamw_form(trainer: "Trainer") -> dict:
    """The shapes of AdamW's state, which is empty before the first step."""
    def like(parameter: Tensor) -> Tensor:
        return torch.empty_like(parameter, device="meta")

    return {i: {"step": torch.empty((), device="meta"), "exp_avg": like(p), "exp_avg_sq": like(p)}
            for i, p in enumerate(trainer.trainable.values())}


def _check_form(template: object, value: object, where: str) -> None:
    """Raises ValueError unless `value` has the template's types, keys, lengths and shapes."""
    if isinstance(template, Tensor):
        plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
        if not plain or (value.dtype, value.shape) != (template.dtype, template.shape):
            raise ValueError(f"{where} is not {template.dtype} of {tuple(template.shape)}")
    elif type(value) is not type(template):
        raise ValueError(f"{where} is not of type {type(template).__name__}")
    elif isinstance(template, dict):
        if value.keys() != template.keys():
            raise ValueError(f"{where} has other fields")
        for key in template:
            _check_form(template[key], value[key], f"{where}.{key}")
    elif isinstance(template, list | tuple):
        if len(value) != len(template):
            raise ValueError(f"{where} has {len(value)} entries, not {len(template)}")
        for i, item in enumerate(template):
            _check_form(item, value[i], f"{where}[{i}]")


def _check_values(trainer: "Trainer", state: dict) -> None:
    """Raises ValueError for numbers that no run has; on what forms cannot tell."""
    progress, interval = state["progress"], state["interval"]
    counts = {**progress, **interval, "tokens trained": interval["sums"][1]}
    for name, value in counts.items():
        if isinstance(value, int) and not 0 <= value < LARGEST:
            raise ValueError(f"{name} is {value:.3e}")
    if not 1 <= progress["step"] <= trainer.total_steps:
        raise ValueError(f"step {progress['step']} is not one of {trainer.total_steps}")
    for name, seconds in (("training_seconds", progress["training_seconds"]),
                          ("seconds", progress["seconds"]), ("interval", interval["sums"][2])):
        if not 0 <= seconds < math.inf:
            raise ValueError(f"{name} is {seconds}")
    if not 0 < state["scaler"].get("scale", 1) < math.inf:
        raise ValueError(f"the loss scale is {state['scaler']['scale']}")
    tensors = [*state["parameters"].values(),
               *(t for moments in state["optimizer"].values() for t in moments.values())]
    if not _all_finite(tensors):
        raise ValueError("it holds numbers that are not finite")
    for random_numbers in state["random"]:
        check_random_state(random_numbers)


def _warn_of_another_machine(then: dict, now: dict) -> None:
    for name in then:
        if then[name] != now[name]:
            print(f"warning: the run was under {name} {then[name]!s:.40} and goes on under "
                  f"{now[name]}: its last bits may differ from those of a run that nobody stopped",
                  file=sys.stderr)


def _all_finite(tensors: list[Tensor]) -> bool:
    return bool(torch.stack([torch.isfinite(t).all() for t in tensors]).all().item())
