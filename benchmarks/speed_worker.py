"""One measurement of `speed.py`, in a process of its own: a task as JSON in, its figures out.

The examiners are imported only where they are measured: their memory is not ours.
"""

import copy
import json
import statistics
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.speed_products import measure_products, timed
from cli import BOOK, parse_train_args
from data.tokens import load_tokens
from data.windows import Windows, split
from errors import RunError, run_command
from evaluate import evaluate
from generate import generate
from hardware import (
    PRECISIONS,
    autocast,
    cast_frozen,
    keep_freed_memory,
    peak_memory_mb,
    pick_device,
)
from lora.adapter import load_adapter, save_adapter
from model.checkpoint import load_config, load_gpt2, save_gpt2
from model.gpt2 import GPT2, GPT2Config
from train import Trainer, build_model
from training.parallel import ALONE, Ranks

PROMPT_TOKENS, NEW_TOKENS, WARM_UP_TOKENS = 16, 256, 8
Call = Callable[[], object]  # what is timed; its value shows that both sides computed the same


@dataclass(frozen=True)
class Task:
    """`kind`: base, products, or a key of CALLS. `weights` "low": an examiner's frozen weights
    are in the compute precision, in place of fp32 under autocast.
    """

    kind: str
    base: str
    device: str = "cpu"
    side: str = "ours"  # or theirs
    method: str = "lora"  # or full
    precision: str = "fp32"
    weights: str = "fp32"  # or low
    compile: bool = False
    batch_size: int = 16
    block_size: int = 128
    r: int = 8
    warm_up: int = 1
    steps: int = 3

    @property
    def name(self) -> str:
        """Such as "PEFT, LoRA, bf16 autocast"."""
        adapts = self.kind in ("save", "load") or (self.kind, self.method) == ("train", "lora")
        who = "this project" if self.side == "ours" else "PEFT" if adapts else "transformers"
        what = {"lora": "LoRA", "full": "full"}[self.method] if self.kind == "train" else self.kind
        how = self.precision
        if self.side == "theirs" and how != "fp32":
            how += " weights" if self.weights == "low" else " autocast"
        return ", ".join((who, what, how, *["compiled"] * self.compile))

    def args(self) -> Namespace:
        """`train.py`'s options, its defaults included."""
        rank = ["--r", self.r] if self.method == "lora" else []
        args = parse_train_args("-", list(map(str, [
            self.method, "--base", self.base, "--device", self.device, "--precision",
            self.precision, "--batch-size", self.batch_size, "--block-size", self.block_size,
            "--max-steps", self.warm_up + self.steps, *rank,
            *["--compile"] * self.compile])))
        args.base = Path(self.base)
        return args

    def parts(self) -> tuple[Windows, np.ndarray]:
        """The book's training windows and its validation part."""
        args = self.args()
        tokens = load_tokens(BOOK, load_config(args.base).vocab_size)
        training, validation = split(tokens, args.val_fraction)
        return Windows(training, self.block_size, args.stride), validation

    def evaluated(self) -> np.ndarray:
        """The tokens of one batch of consecutive windows, and the last one's last target."""
        return self.parts()[0].tokens[: self.batch_size * self.block_size + 1]

    def prompt(self, device: torch.device) -> tuple[Tensor, int]:
        """Token ids (T,), and how many more the base sees, at most NEW_TOKENS."""
        ids = torch.from_numpy(self.evaluated()[:PROMPT_TOKENS].astype(np.int64)).to(device)
        return ids, min(NEW_TOKENS, load_config(Path(self.base)).n_positions - len(ids))


def main() -> None:
    warnings.simplefilter("ignore")  # the libraries', about each other
    task = Task(**json.loads(sys.argv[1]))
    try:
        print(json.dumps(measure(task)))
    except torch.OutOfMemoryError as error:
        raise RunError("out of memory") from error
    except RuntimeError as error:  # on the CPU the allocator raises no class of its own
        raise RunError(str(error).splitlines()[0]) from error


def measure(task: Task) -> dict:
    """The figures of this task."""
    device = pick_device(task.device)
    if task.side == "ours" and task.kind in ("train", "products", "evaluate", "generate"):
        keep_freed_memory()  # as train.py, evaluate.py and generate.py do
    torch.manual_seed(0)
    if task.kind == "base":
        return make_base(Path(task.base))
    if task.kind == "products":
        return {"limits": measure_products(
            load_config(Path(task.base)), task.batch_size, task.block_size, task.r,
            PRECISIONS[task.precision], device)}
    with TemporaryDirectory() as folder:
        call = CALLS[task.kind][task.side](task, device, Path(folder))
        timed(call, task.warm_up, device)
        seconds = timed(call, task.steps, device)
    return {"seconds": seconds, "median": statistics.median(seconds),
            "peak_mb": peak_memory_mb(device), "tokens": tokens_of(task)}


def tokens_of(task: Task) -> int:
    """How many a call computes."""
    if task.kind == "generate":
        return task.prompt(torch.device("cpu"))[1]
    return task.batch_size * task.block_size


def make_base(directory: Path) -> dict:
    """A GPT-2 124M of random weights: speed does not depend on their values."""
    model = GPT2(GPT2Config())
    model.init_weights(torch.Generator().manual_seed(0))
    save_gpt2(model, directory)
    return {}


def build_theirs(task: Task, device: torch.device) -> nn.Module:
    """transformers' model by its defaults, dropouts included; for LoRA with PEFT's adapter."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(task.base).float()  # mini's file is in fp16
    if task.weights == "low":
        model.to(PRECISIONS[task.precision])
    if task.kind in ("train", "save") and task.method == "lora":
        from benchmarks.peft_loop import add_lora

        model = add_lora(model, task.args())
    model.to(device)
    return torch.compile(model) if task.compile else model


def their_precision(task: Task, device: torch.device):
    return nullcontext() if task.weights == "low" else autocast(device, task.precision)


def their_loss(task: Task, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The mean over tokens. As fast as their own loss from `labels`, and as soon rid of logits."""
    with their_precision(task, inputs.device):
        logits = model(input_ids=inputs).logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def make_trainer(task: Task, device: torch.device, ranks: Ranks = ALONE) -> Trainer:
    """As `train.py` has it at its first step."""
    args = task.args()
    model, config = build_model(args, args.base)
    trainer = Trainer(args, model.to(device), config, *task.parts(), ranks)
    model.train()
    return trainer


def train_ours(task: Task, device: torch.device, folder: Path) -> Call:
    trainer = make_trainer(task, device)
    batches = trainer.batches(0)

    def step() -> float:
        trainer.interval.restart()
        trainer.step(next(batches))
        loss, tokens, _ = trainer.interval.sums()
        return loss / tokens

    return step


def train_theirs(task: Task, device: torch.device, folder: Path) -> Call:
    """The loop that their users write; its learning rate stays as it is."""
    args, (windows, _) = task.args(), task.parts()
    order = windows.epoch_order(args.seed, 0)
    batches = iter(np.split(order, range(task.batch_size, len(order), task.batch_size)))
    model = build_theirs(task, device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=task.precision == "fp16")

    def step() -> float:
        inputs, targets = (x.to(device) for x in windows.batch(next(batches)))
        loss = their_loss(task, model, inputs, targets)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(trained, args.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.item()

    return step


def load_ours(task: Task, device: torch.device) -> GPT2:
    """As `evaluate.py` and `generate.py` have it."""
    model = load_gpt2(Path(task.base)).requires_grad_(False).to(device)
    cast_frozen(model, task.precision)
    return model


def evaluate_ours(task: Task, device: torch.device, folder: Path) -> Call:
    model, tokens = load_ours(task, device), task.evaluated()
    return lambda: evaluate(model, tokens, block_size=task.block_size, batch_size=task.batch_size,
                            precision=task.precision).loss


def evaluate_theirs(task: Task, device: torch.device, folder: Path) -> Call:
    model = build_theirs(task, device).eval()
    tokens = torch.from_numpy(task.evaluated().astype(np.int64)).to(device)
    inputs, targets = tokens[:-1].view(task.batch_size, -1), tokens[1:]

    @torch.no_grad()
    def score() -> float:
        return their_loss(task, model, inputs, targets).item()

    return score


def generate_ours(task: Task, device: torch.device, folder: Path) -> Call:
    model, (ids, new) = load_ours(task, device), task.prompt(device)

    def write(tokens: int = new) -> list[int]:
        with autocast(device, task.precision):
            return list(generate(model, ids, tokens, temperature=0))

    write(WARM_UP_TOKENS)
    return write


def generate_theirs(task: Task, device: torch.device, folder: Path) -> Call:
    model, (ids, new) = build_theirs(task, device).eval(), task.prompt(device)
    model.generation_config.eos_token_id = None  # no end, and no processor that forbids it
    settings = {"attention_mask": torch.ones_like(ids)[None], "do_sample": False,
                "pad_token_id": model.config.vocab_size - 1}

    def write(tokens: int = new) -> list[int]:
        with their_precision(task, device):
            text = model.generate(ids[None], max_new_tokens=tokens, **settings)[0]
        return text[len(ids) :].tolist()

    write(WARM_UP_TOKENS)
    return write


def save_ours(task: Task, device: torch.device, folder: Path) -> Call:
    model, config = build_model(task.args(), Path(task.base))
    return lambda: save_adapter(model, config, folder, task.base)


def save_theirs(task: Task, device: torch.device, folder: Path) -> Call:
    model = build_theirs(task, device)
    return lambda: model.save_pretrained(folder)


def load_adapter_ours(task: Task, device: torch.device, folder: Path) -> Call:
    save_ours(task, device, folder)()
    bases = copies(load_gpt2(Path(task.base)), task)
    return lambda: load_adapter(bases.pop(), folder).r


def load_adapter_theirs(task: Task, device: torch.device, folder: Path) -> Call:
    from peft import PeftModel

    save_ours(task, device, folder)()
    bases = copies(build_theirs(task, device), task)
    return lambda: PeftModel.from_pretrained(bases.pop(), folder).peft_config["default"].r


def copies(base: nn.Module, task: Task) -> list[nn.Module]:
    """A base for every load."""
    return [copy.deepcopy(base) for _ in range(task.warm_up + task.steps)]


CALLS = {"train": {"ours": train_ours, "theirs": train_theirs},
         "evaluate": {"ours": evaluate_ours, "theirs": evaluate_theirs},
         "generate": {"ours": generate_ours, "theirs": generate_theirs},
         "save": {"ours": save_ours, "theirs": save_theirs},
         "load": {"ours": load_adapter_ours, "theirs": load_adapter_theirs}}

if __name__ == "__main__":
    run_command(main)
