"""Part of `verify_gpu.py`: check that a device computes the numbers that a CPU computes in fp32.

On the CPU, the steps of `train.py --kernels plain` must equal the steps of PEFT's loop. On the
device, every command line in `commands` must give the same steps as on the CPU. The checks compare
losses, weights and scores. They also compare gradients, because AdamW hides a wrong scale of a
gradient. Every step has a new batch, because a single batch hides a mistake in the choice of
batches.
"""

import gc
import json
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train
from benchmarks import ours, peft_loop
from benchmarks.parity_report import Report, snapshot
from data.json_lines import read_lines
from data.tokenizer import END_OF_TEXT, FAST, GPT2_FILES
from data.windows import Windows
from model.gpt2 import GPT2
from storage.weights import save_gpt2
from training import report
from training.directory import METRICS
from training.options import BOOK, Options, parse_options

Findings = dict[str, tuple[float, float]]  # name of the difference -> the difference and its limit

STEPS = 4
EXAMPLES = 48  # conversations
NO_DROPOUT = {"lora": "--base-dropout 0 --lora-dropout 0", "full": "--base-dropout 0"}
DROPOUT = {"lora": "--base-dropout 0.1 --lora-dropout 0.1", "full": "--base-dropout 0.1"}
ON_THE_CPU = "--device cpu --precision fp32 --kernels plain"
GRAPH = "--cuda-graph"
CHECKPOINTING = "--gradient-checkpointing"
SVD = "--init-lora-weights"  # with this option, A and B start from singular vectors
DIRECTION = "a gradient's direction differs, 1 - cosine"
CONVERSATIONS = "conversations.jsonl"
# Options that must not change the numbers. "low" becomes the low precision of the device. The three
# micro-batches of --grad-accum 3 differ in size.
WAYS = (
    "--precision fp32",
    f"--precision fp32 {CHECKPOINTING}",
    "--precision fp32 --grad-accum 3",
    "--precision fp32 --cuda-graph",
    "--precision fp32 --compile",
    "--precision fp32 --allow-tf32",
    "--precision low",
    "--precision low --grad-accum 3 --cuda-graph",
    "--precision low --compile --gradient-checkpointing --grad-accum 3",
)
# The commands that PEFT and transformers can also run.
BESIDE_PEFT = (
    "lora",
    "full",
    "lora --clip 0.1",
    "lora --target-modules c_attn c_proj c_fc --use-rslora",
    "lora --use-dora",
    "lora --init-lora-weights pissa",
)
VARIANTS = (
    "lora --clip 0.1",
    "lora --target-modules c_attn.q c_attn.v",
    "lora --target-modules c_attn c_proj c_fc --use-rslora",
    "lora --use-dora",
    "lora --init-lora-weights pissa",
    "lora --init-lora-weights lora_ga",
    "lora --loraplus-lr-ratio 4",
    "lora --freeze-a",
    "lora --riemannian",
    "lora --quantise nf4",
    "lora --quantise int8",
)
WAYS_OF_VARIANTS = ("--precision fp32", "--precision low --cuda-graph")


class Limits(NamedTuple):
    """The largest allowed differences: relative for loss and norm, 1 - cosine for directions."""

    loss: float
    norm: float
    direction: float


# Rounding changes a gradient by about 2^-24 (fp32) to 2^-8 (bf16), relative to its norm. Then
# 1 - cosine is about the square of this share.
LIMITS = {
    "fp32": Limits(1e-5, 1e-3, 1e-8),  # fp16, with the mantissa of TF32, gives 2e-6
    "tf32": Limits(2e-3, 2e-2, 5e-3),
    "fp16": Limits(2e-3, 2e-2, 5e-3),
    "bf16": Limits(4e-3, 5e-2, 1e-1),
}


@dataclass
class Steps:
    """The results of a run's first steps."""

    losses: list[float]  # one per step, nats per token
    gradients: list[dict[str, Tensor]]  # one per step, by the parameter's name
    moved: dict[str, Tensor]  # the change of the trained weights over all steps
    score: float  # nats per token on the validation part, after the last step
    waits: int = 0  # how often the last step waited for the GPU
    captured: bool = False  # whether there is a CUDA graph
    misplaced: int = 0  # number of matrices in the wrong precision


def checks(opts: Namespace, into: Report) -> None:
    """Run every check. An exception fails only the check that raised it."""
    for name, check in all_checks(opts).items():
        with into.trying(name):
            for what, (figure, limit) in check().items():
                into.check(f"{name}: {what}", figure, limit)


def all_checks(opts: Namespace) -> dict[str, Callable[[], Findings]]:
    """Return every check that this device can make, by name."""
    found: dict[str, Callable[[], Findings]] = {}
    for command in BESIDE_PEFT:
        found[f"{command}, beside PEFT"] = partial(beside_peft, opts, command)
    for command in commands(opts):
        found[command] = partial(beside_the_cpu, opts, command)
    found["dropout"] = partial(dropout, opts)
    found["evaluation"] = partial(evaluation, opts)
    found["--resume"] = partial(resume, opts)
    if opts.dry_run or torch.cuda.device_count() > 1:
        found["two ranks"] = partial(two_ranks, opts)
    return found


def commands(opts: Namespace) -> list[str]:
    """Return the command lines to check on this device."""
    found = [f"{method} {way}" for method in NO_DROPOUT for way in WAYS]
    found += [f"{variant} {way}" for variant in VARIANTS for way in WAYS_OF_VARIANTS]
    found += [f"lora --data {CONVERSATIONS} --precision {p}" for p in ("fp32", "low")]
    found.append("lora --clip 0.1 --precision fp16")  # clipping needs unscaled gradients
    lacking = []
    if not opts.device.is_cuda:
        lacking = ["--compile", "--allow-tf32"]
        found = [c.replace(f" {GRAPH}", "") for c in found]
    if opts.device.torch_device.type == "mps":
        lacking += [CHECKPOINTING, "fp16"]
    found = [c for c in found if not any(option in c for option in lacking)]
    if opts.low == "fp16":  # LoRA-GA refuses fp16
        found = [c for c in found if "lora_ga --precision low" not in c]
    low = f"--precision {opts.low}"
    return list(dict.fromkeys(c.replace("--precision low", low) for c in found))


def make_inputs(opts: Namespace, folder: Path) -> None:
    """Write a base of random weights with an odd vocabulary size, the start of the book, and short
    conversations.
    """
    opts.folder = folder
    opts.base = folder / "base"
    opts.book = folder / "book.txt"
    opts.known = {}  # the CPU's steps, by command line

    torch.manual_seed(0)
    model = GPT2(opts.config)
    with torch.no_grad():
        for parameter in model.parameters():  # new biases are 0, and new logits are nearly equal
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    save_gpt2(model, opts.base)
    write_tokenizer(opts.base, opts.config.vocab_size)
    text = BOOK.read_text(encoding="utf-8")[: 32 * opts.batch * opts.block]
    opts.book.write_text(text, encoding="utf-8")
    words = text.split()
    with (folder / CONVERSATIONS).open("w", encoding="utf-8") as file:
        for i in range(EXAMPLES):
            example = {"prompt": words[2 * i], "completion": words[2 * i + 1]}
            file.write(json.dumps(example) + "\n")


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """Write GPT-2's tokenizer, cut to the first tokens and the end-of-text token."""
    stored = json.loads((GPT2_FILES / FAST).read_text(encoding="utf-8"))
    model = stored["model"]
    end = vocab_size - 1
    first = {word: i for word, i in model["vocab"].items() if i < end}
    model["vocab"] = first | {END_OF_TEXT: end}
    model["merges"] = model["merges"][: end - 256]  # the first 256 tokens are bytes
    stored["added_tokens"][0]["id"] = end
    (directory / FAST).write_text(json.dumps(stored), encoding="utf-8")


def arguments(opts: Namespace, command: str) -> list[str]:
    """Return the arguments of `train.py` for a short run of this command."""
    method, *more = command.replace(CONVERSATIONS, f"{opts.folder / CONVERSATIONS}").split()
    source: list[object] = [] if "--data" in more else ["--book", opts.book]
    return ours.command_line(
        method,
        *source,
        *NO_DROPOUT[method].split(),
        *more,
        base=opts.base,
        device=opts.device.torch_device.type,
        max_steps=STEPS,
        batch_size=opts.batch,
        block_size=opts.block,
        lr=2e-3,
        weight_decay=1,  # large enough to show within a few steps
        warmup_ratio=0.4,  # two steps
        clip=1e9,  # no clipping
        log_every=1,
    )


def options(opts: Namespace, command: str) -> Options:
    return parse_options("-", arguments(opts, command))


@contextmanager
def recorded_gradients(parameters: dict[str, nn.Parameter]) -> Iterator[list[dict[str, Tensor]]]:
    """Yield a list that collects the gradients of each optimizer step inside the `with`."""
    seen: list[dict[str, Tensor]] = []

    def record(*_: object) -> None:
        seen.append({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None})

    hook = register_optimizer_step_pre_hook(record)
    try:
        yield seen
    finally:
        hook.remove()


def take_steps(opts: Namespace, command: str) -> Steps:
    """Take the first steps of `train.py COMMAND`."""
    torch.compiler.reset()
    gc.collect()  # frees the last model, which refers to itself if compiled or captured
    trainer = ours.Trainer(options(opts, command))
    parameters = trainer.parameters
    before = snapshot(dict(parameters))
    losses = []
    with recorded_gradients(parameters) as gradients:
        for batch in trainer.batches():
            with counted_waits(opts) as waits:
                loss = trainer.step(batch)
            losses.append(loss.item() / batch.num_tokens)
    return Steps(
        losses,
        [snapshot(each) for each in gradients],
        {name: tensor - before[name] for name, tensor in snapshot(dict(parameters)).items()},
        trainer.evaluate().loss,
        len(waits),
        getattr(trainer.model.loss, "graphed", None) is not None,
        misplaced_matrices(trainer),
    )


def misplaced_matrices(trainer: ours.Trainer) -> int:
    """Count the trained matrices that are not in fp32, and the frozen matrices that are not in the
    run's precision.
    """
    low = trainer.device.dtype
    matrices = [p for p in trainer.model.parameters() if p.ndim > 1]
    return sum(p.dtype != (torch.float32 if p.requires_grad else low) for p in matrices)


def steps_on_the_cpu(opts: Namespace, command: str) -> Steps:
    """Take the steps on the CPU, in fp32 with plain kernels, unless they are known already."""
    if command not in opts.known:
        opts.known[command] = take_steps(opts, f"{command} {ON_THE_CPU}")
    return opts.known[command]


def steps_of_peft(opts: Namespace, command: str) -> Steps:
    """Take the same steps with PEFT's loop, on the CPU in fp32."""
    args = options(opts, f"{command} {ON_THE_CPU}")
    training, validation = ours.data(args)
    model = peft_loop.build(args)
    parameters = {our_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    before = snapshot(dict(parameters))
    step = peft_loop.make_step(model, args, "fp32")
    order = training.epoch_order(args.seed, 0)
    losses = []
    with recorded_gradients(parameters) as gradients:
        for i in range(STEPS):
            starts = order[i * args.batch_size : (i + 1) * args.batch_size] * args.stride
            cpu = torch.device("cpu")
            batch = peft_loop.windows(training.tokens, starts, args.block_size, cpu)
            losses.append(step(*batch, peft_loop.learning_rate(i, STEPS, args)))
    moved = {name: tensor - before[name] for name, tensor in snapshot(dict(parameters)).items()}
    return Steps(
        losses,
        [transposed(each) for each in gradients],
        transposed(moved),
        peft_loop.evaluate(model, validation.tokens, args.block_size),
    )


def our_name(name: str) -> str:
    """Turn a parameter's name in PEFT or transformers into its name in this project."""
    name = name.replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector")
    for theirs in ("base_model.model.", "transformer.", ".default"):
        name = name.replace(theirs, "")
    return name


def transposed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Transpose the weights that transformers stores as (in, out)."""
    conv1d = ("c_attn.weight", "c_fc.weight", "c_proj.weight")
    return {name: t.t() if name.endswith(conv1d) else t for name, t in tensors.items()}


def beside_peft(opts: Namespace, command: str) -> Findings:
    """Compare the CPU's steps with PEFT's steps, without dropout and with equal dropout masks."""
    here = steps_on_the_cpu(opts, command)
    found = compare(command, here, steps_of_peft(opts, command), LIMITS["fp32"])
    if SVD not in command:  # PEFT first draws a random A, so the masks would differ
        dropping = f"{command} {DROPOUT[command.split()[0]]}"
        here, there = take_steps(opts, f"{dropping} {ON_THE_CPU}"), steps_of_peft(opts, dropping)
        found["with dropout, a loss differs, relative"] = (
            relative([*here.losses, here.score], [*there.losses, there.score]),
            LIMITS["fp32"].loss,
        )
    return found


def beside_the_cpu(opts: Namespace, command: str) -> Findings:
    """Compare the steps of the device with the steps of the CPU in fp32."""
    what, _, way = command.partition(" --precision ")
    there = steps_on_the_cpu(opts, what)
    here = take_steps(opts, command)
    limits = LIMITS["tf32" if "--allow-tf32" in way else way.split()[0]]
    found = compare(what, here, there, limits)
    found["the last step waits for the GPU, times"] = here.waits, 0
    found["matrices in the wrong precision"] = here.misplaced, 0
    if not way.startswith("fp32"):
        exact = found[DIRECTION][0] < LIMITS["fp32"].direction
        found["the low precision is not used"] = exact, 0
    if GRAPH in way:
        found["graphs that could not be captured"] = not here.captured, 0
    if what in VARIANTS:
        plain = steps_on_the_cpu(opts, "lora").losses
        rounded = 1e-2 if "--quantise" in what else limits.loss
        start = relative(here.losses[:1], plain[:1])
        found["the first loss differs from the base's, relative"] = start, rounded
        found["the last loss is plain LoRA's"] = there.losses[-1] == plain[-1], 0
    return found


def compare(command: str, here: Steps, there: Steps, limits: Limits) -> Findings:
    """Return the largest differences between two runs' steps."""
    norms, directions = [], []
    for mine, theirs in zip(here.gradients, there.gradients, strict=True):
        norms.append(relative([norm(mine)], [norm(theirs)]))
        if SVD in command:  # the sign of a singular vector is arbitrary
            mine, theirs = absolute(mine), absolute(theirs)
        directions.append(angle(mine, theirs))
    return {
        "a loss differs, relative": (relative(here.losses, there.losses), limits.loss),
        "a gradient's norm differs, relative": (largest(norms), limits.norm),
        DIRECTION: (largest(directions), limits.direction),
        "the weights move another distance, relative": (
            relative([norm(here.moved)], [norm(there.moved)]),
            limits.norm,
        ),
        "the validation loss differs, relative": (
            relative([here.score], [there.score]),
            limits.loss,
        ),
    }


def norm(tensors: dict[str, Tensor]) -> Tensor:
    return torch.stack([t.norm() for t in tensors.values()]).norm()


def angle(here: dict[str, Tensor], there: dict[str, Tensor]) -> float:
    """Return the largest 1 - cosine of two tensors with one name. Skip pairs of zeros."""
    found = []
    for name, tensor in there.items():
        a, b = here[name].double().flatten(), tensor.double().flatten()
        if a.any() or b.any():
            found.append(1 - torch.cosine_similarity(a, b, dim=0, eps=1e-30))
    return largest(found)


def largest(values: list[Any]) -> float:
    """Return the largest value, or NaN if a value is NaN."""
    return torch.tensor([float(value) for value in values]).max().item()


def relative(here: list[Any], there: list[Any]) -> float:
    """Return the largest difference, relative to `there`."""
    a, b = (torch.tensor([float(x) for x in values]) for values in (here, there))
    return ((a - b).abs() / b.abs()).max().item()


def absolute(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.abs() for name, tensor in tensors.items()}


def dropout(opts: Namespace) -> Findings:
    """Check that every micro-batch draws new masks. Check that a CUDA graph and checkpointed blocks
    use the same masks as an eager run.
    """
    command = f"lora --precision fp32 {DROPOUT['lora']}"
    still = ours.Trainer(options(opts, f"{command} --lr 1e-12 --grad-accum 2"))
    batch = next(still.batches())
    batch = replace(batch, indices=batch.indices[:1].repeat(opts.batch))  # the same window
    real = still.model.loss
    losses = []

    def recording(*given: Tensor) -> Tensor:
        loss = real(*given)
        losses.append(loss.item())
        return loss

    with mock.patch.object(still.model, "loss", recording):
        for _ in range(STEPS):
            still.step(batch)
    scores = [still.evaluate().loss for _ in range(2)]
    closest = torch.pdist(torch.tensor(losses, dtype=torch.float64)[:, None]).min() / losses[0]
    found = {
        "two micro-batches draw the same masks": (float(closest < 1e-6), 0),
        "the scores of an evaluation differ from the next, relative": (
            relative(scores[:1], scores[1:]),
            LIMITS["fp32"].loss,
        ),
    }
    eager = take_steps(opts, command).losses
    ways = {"cuda": [GRAPH, CHECKPOINTING], "cpu": [CHECKPOINTING], "mps": []}
    for way in ways[opts.device.torch_device.type]:
        here = take_steps(opts, f"{command} {way}").losses
        found[f"a loss differs with {way}, relative"] = relative(here, eager), LIMITS["fp32"].loss
    return found


def evaluation(opts: Namespace) -> Findings:
    few, many = (waits_in_evaluation(opts, batches) for batches in (2, 4))
    return {"waits for two batches more": (many - few, 0)}


def waits_in_evaluation(opts: Namespace, count: int) -> int:
    """Return how often scoring `count` batches waits for the GPU. Only the sums may wait."""
    trainer = ours.Trainer(options(opts, f"lora --precision {opts.low}"))
    validation = trainer.data.validation
    assert isinstance(validation, Windows) and validation.byte_counts is not None
    end = 2 * count * opts.block + 1
    counts = validation.byte_counts[:end]
    text = Windows(validation.tokens[:end], opts.block, opts.block, byte_counts=counts)
    with counted_waits(opts) as waits:
        ours.score(trainer.model, text, trainer.run.device, batch_size=2)
    return len(waits)


@contextmanager
def counted_waits(opts: Namespace) -> Iterator[list[str]]:
    """Yield a list that receives a line whenever the CPU waits for the GPU."""
    found: list[str] = []
    if not opts.device.is_cuda:
        yield found
        return
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [line for line in map(str, (w.message for w in seen)) if "synchroniz" in line]


def numbers(steps: Steps) -> list[Any]:
    """Return the numbers that `logged` returns, for steps outside the training loop."""
    pairs = zip(steps.losses, map(norm, steps.gradients), strict=True)
    return [*(number for pair in pairs for number in pair), steps.score]


def logged(out: Path) -> list[float]:
    """Return the losses and gradient norms of a run, and the last validation loss."""
    lines = read_lines(out / METRICS, lambda line: line)
    return [line[key] for line in lines for key in ("loss", "grad_norm")] + [lines[-1]["val_loss"]]


class Stopped(Exception):
    """Raised inside a step to end a run."""


def resume(opts: Namespace) -> Findings:
    """Check that the training loop takes the same steps as the other checks. Check that a run that
    was stopped in the third step resumes with the same numbers.
    """
    whole, parted = opts.folder / "whole", opts.folder / "parted"
    command = f"lora --precision fp32 {DROPOUT['lora']}"
    argv = arguments(opts, f"{command} --checkpoint-every 2")
    real = train.train_step
    taken = iter(range(STEPS))

    def stopping(*everything: Any) -> Any:
        if next(taken) == 2:
            raise Stopped
        return real(*everything)

    with mock.patch.object(report, "can_draw", lambda: False):
        ours.run([*argv, f"--out={whole}"])
        with mock.patch.object(train, "train_step", stopping), suppress(Stopped):
            ours.run([*argv, f"--out={parted}"])
        ours.run([*argv, f"--out={parted}", "--resume"])
    alone = numbers(take_steps(opts, command))
    return {
        "a loss or a gradient's norm of the loop differs": (relative(logged(whole), alone), 1e-4),
        "a loss or a gradient's norm differs from an unbroken run's": (
            relative(logged(parted), logged(whole)),
            1e-4,
        ),
    }


def two_ranks(opts: Namespace) -> Findings:
    """Check that two ranks with unequal shares of a batch compute the same as one process."""
    command = f"lora --precision fp32 --batch-size {opts.batch - 1}"
    out = opts.folder / "ranks"
    launch = LaunchConfig(
        run_id="verify-gpu",
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="spawn" if opts.device.is_cuda else "fork",  # a forked rank has torch loaded
    )
    with mock.patch.object(report, "can_draw", lambda: False):
        elastic_launch(launch, train.main)([*arguments(opts, command), f"--out={out}"])
    difference = relative(logged(out), numbers(take_steps(opts, command)))
    return {"a loss or a gradient's norm differs from one process's": (difference, 1e-4)}
