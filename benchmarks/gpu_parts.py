"""The parts of `verify_gpu.py`: each takes the options and adds to a report, or says why not."""

import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
from torch import Tensor

from benchmarks import ours, parity, peft_loop
from benchmarks.parity_report import Report, machine, relative, versions
from benchmarks.speed import run_apart, sides
from benchmarks.speed_worker import Task
from common.device import PRECISIONS
from common.errors import RunError, UserError
from model import fast, plain
from model.hub import MINI, find_base
from model.sampling import generate
from model.weights import load_gpt2
from train import Trainer
from training.options import ROOT
from training.ranks import Ranks
from training.report import read_metrics

# Relative errors that may be: several times what rounding alone makes of such sums.
OPERATION = {"fp32": 5e-5, "bf16": 2e-2, "fp16": 4e-3}
# Rounding decides the sign of Adam's first steps where a gradient is near 0, in whatever precision.
LOSS = {"fp32": 1e-4, "TF32": 5e-2, "bf16": 5e-2, "fp16": 5e-2}
NEAR_TIE = 1e-3  # between the two likeliest logits: rounding may choose either
NO_DROPOUT = ("--base-dropout", "0", "--lora-dropout", "0")
LOW, COMPILE = ("--precision", "low"), ("--compile",)
SMALL_PART = ("--val-fraction", "0.02")  # to validate on: it takes most of a short run
CASES = {  # what changes a step's computation; each is compared with fp32 as it is
    "checkpointing": ("--gradient-checkpointing",),
    "3 parts": ("--grad-accum", "3"),
    "TF32": ("--allow-tf32",),
    "compiled": COMPILE,
    "low": LOW,
    "low, compiled": (*LOW, *COMPILE),
    "low, all": (*LOW, *COMPILE, "--gradient-checkpointing", "--grad-accum", "3"),
}


class Skip(Exception):
    """Say why a part cannot run here."""


def describe(opts: Namespace, report: Report) -> None:
    """Describe the machine, and which attention kernel each precision takes."""
    report.facts |= {"machine": machine(), **versions(), "native low precision": opts.low}
    if opts.device.is_cuda:
        card = torch.cuda.get_device_properties(0)
        driver = subprocess.getoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader")
        report.facts |= {
            "GPUs": torch.cuda.device_count(),
            "compute capability": f"{card.major}.{card.minor}",
            "memory MB": card.total_memory // 10**6,
            "driver": driver.partition("\n")[0],
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
            "torch's kernels": " ".join(torch.cuda.get_arch_list()),
        }
    for precision in ("fp32", opts.low):
        q, k, v = (
            torch.randn(
                2,
                4,
                128,
                64,
                device=opts.device.torch_device,
                requires_grad=True,
                dtype=PRECISIONS[precision],
            )
            for _ in range(3)
        )
        with torch.profiler.profile() as profile:
            fast.causal_attention(q, k, v, 0.1)
        kernels = [e.key for e in profile.key_averages() if "::_scaled_dot_product" in e.key]
        report.facts[f"attention kernel, {precision}"] = (kernels or ["our own"])[0]


def operations(opts: Namespace, report: Report) -> None:
    """Check values and gradients of model/fast.py against its plain twins in double."""
    torch.manual_seed(0)
    targets = torch.randint(1001, (77,), device=opts.device.torch_device)
    for precision, dtype in ((p, PRECISIONS[p]) for p in ("fp32", opts.low)):

        def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape).to(opts.device.torch_device, dtype).requires_grad_()

        for name, twins, inputs, more in (
            ("linear", "linear", (normal(2, 5, 64), normal(96, 64), normal(96)), ()),
            *(
                (
                    f"attention, {T} tokens",
                    "causal_attention",
                    [normal(2, 3, T, 64) for _ in range(3)],
                    (0.0,),
                )
                for T in (33, 300)
            ),
            (
                "loss, head frozen",
                "tied_cross_entropy",
                (normal(77, 64), normal(1001, 64).detach()),
                (targets,),
            ),
            (
                "loss, head trained",
                "tied_cross_entropy",
                (normal(77, 64), normal(1001, 64)),
                (targets,),
            ),
        ):
            error = error_of(getattr(fast, twins), getattr(plain, twins), inputs, more)
            report.check(f"{precision}: {name}", error, OPERATION[precision])
        hidden, weight = normal(77, 64), normal(1001, 64)
        (here, _), (there, _) = (twin.score(hidden, weight, targets) for twin in (fast, plain))
        report.check(f"{precision}: scores", (here / there - 1).abs().max().item(), 1e-4)


def error_of(fast_twin: Callable, plain_twin: Callable, inputs: tuple, more: tuple) -> float:
    """Return the largest relative error of the value and the gradients, as norms."""
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    y, wanted = fast_twin(*inputs, *more), plain_twin(*exact, *more)
    gradient = torch.randn_like(wanted)
    y.backward(gradient.to(y.dtype))
    wanted.backward(gradient)
    pairs = [(y, wanted), *((x.grad, e.grad) for x, e in zip(inputs, exact, strict=True))]
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs if a is not None)


def arguments(opts: Namespace, method: str, *more: object) -> list[str]:
    """Return `train.py`'s for a short run on mini; of an option given twice, the last wins."""
    return [
        opts.low if option == "low" else str(option)
        for option in (
            method,
            "--base",
            MINI,
            "--device",
            opts.device.torch_device.type,
            "--precision",
            "fp32",
            "--max-steps",
            opts.steps,
            "--batch-size",
            opts.batch,
            "--block-size",
            opts.block,
            *more,
        )
    ]


def trainer(opts: Namespace, method: str, *more: object) -> Trainer:
    torch.compiler.reset()
    return ours.make_trainer(ours.options(*arguments(opts, method, *more)))


def losses(opts: Namespace, method: str, *more: object) -> list[float]:
    """Return the loss of each step on one batch, on mini without dropout."""
    made = trainer(opts, method, *NO_DROPOUT[: 4 if method == "lora" else 2], *more)
    return [ours.step(made, batch) for batch in [next(made.batches(0))] * opts.steps]


def options(opts: Namespace, report: Report) -> None:
    """Train on mini under every option that changes the computation, beside fp32 as it is."""
    for method in ("lora", "full"):
        reference = losses(opts, method)
        report.check(f"{method}: the loss falls", reference[-1] - reference[0], 0)
        for name, more in CASES.items():
            if opts.dry_run and COMPILE[0] in more:
                report.facts["compiled"] = "left out of a dry run: minutes of compilation"
                continue
            allowed = LOSS.get(opts.low if "low" in more else name, LOSS["fp32"])
            report.check(
                f"{method}, {name.replace('low', opts.low)}: loss of every step",
                relative(losses(opts, method, *more), reference),
                allowed,
            )


def no_waiting(opts: Namespace, report: Report) -> None:
    """Check that a step never waits for the GPU: PyTorch raises where one would."""
    if not opts.device.is_cuda:
        raise Skip("on a CPU there is nothing to wait for")
    for precision, *more in (
        ("fp32",),
        (opts.low,),
        (opts.low, "--use-dora"),
        (opts.low, "--target-modules", "c_attn.q", "c_attn.v"),
        (opts.low, "--data", ROOT / "data" / "instructions.jsonl"),
    ):
        made = trainer(opts, "lora", "--precision", precision, *more)
        batches = made.batches(0)
        for mode in ("default", "default", "error"):  # the first steps make what later ones keep
            torch.cuda.set_sync_debug_mode(mode)
            made.step(next(batches))
        torch.cuda.set_sync_debug_mode("default")
        report.facts[" ".join(map(str, (precision, *more)))] = "a step does not wait"


def resume(opts: Namespace, report: Report) -> None:
    """Check that a run which died goes on to the same bytes, with deterministic kernels."""

    def dying(made: Trainer, batch, step: Callable = Trainer.step) -> None:
        if made.progress.step == 7:
            raise KeyboardInterrupt
        step(made, batch)

    torch.use_deterministic_algorithms(True)
    with TemporaryDirectory() as whole, TemporaryDirectory() as broken:
        argv = arguments(
            opts,
            "lora",
            *LOW,
            *SMALL_PART,
            "--max-steps",
            10,
            "--log-every",
            1,
            "--checkpoint-every",
            5,
            "--out",
        )
        ours.run([*argv, whole])
        with suppress(KeyboardInterrupt), mock.patch.object(Trainer, "step", dying):
            ours.run([*argv, broken])
        ours.run([*argv, broken, "--resume"])
        ends = [
            (
                Path(out, "adapter_model.safetensors").read_bytes(),
                [line["loss"] for line in read_metrics(Path(out))],
            )
            for out in (whole, broken)
        ]
    report.check("files or losses differ", ends[0] != ends[1], 0)


def empty_share(opts: Namespace, report: Report) -> None:
    """Check that a rank without windows adds zeros and does not fail."""
    for precision in ("fp32", opts.low):
        made, sent = trainer(opts, "lora", "--precision", precision), []
        made.ranks = Ranks(rank=1, count=2)
        with mock.patch.object(Ranks, "all_reduce", lambda _, ts, sent=sent: sent.extend(ts)):
            made.step(next(made.batches(0))[:1])  # which rank 0 has
        report.check(f"{precision}: what it adds", max(t.abs().max().item() for t in sent), 0)


def two_ranks(opts: Namespace, report: Report) -> None:
    """Check that two ranks train as one process does."""
    if opts.device.is_cuda and torch.cuda.device_count() < 2:
        raise Skip("one GPU")
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    argv = arguments(opts, "lora", *NO_DROPOUT, *SMALL_PART, "--log-every", 1, "--out")
    with TemporaryDirectory() as both, TemporaryDirectory() as alone:
        subprocess.run([sys.executable, "-m", *torchrun, *argv, both], cwd=ROOT, check=True)
        ours.run([*argv, alone])
        curves = [[line["loss"] for line in read_metrics(Path(out))] for out in (both, alone)]
    report.check("loss of every step", relative(*curves), LOSS["fp32"])


@torch.inference_mode()
def text(opts: Namespace, report: Report) -> None:
    """Check that greedy text on the device is the CPU's, in fp32, unless two tokens nearly tie."""
    ids = torch.arange(100, 116)
    cpu, model = load_gpt2(MINI), opts.device.place(load_gpt2(MINI))
    here, there = (
        list(generate(m, ids.to(m.wte.weight.device), 10 * opts.steps, temperature=0))
        for m in (model, cpu)
    )
    same = next((i for i, token in enumerate(there) if here[i] != token), len(there))
    report.facts["tokens alike"] = f"{same} of {len(there)}"
    if same < len(there):
        seen = torch.cat((ids, torch.tensor(there[:same], dtype=torch.int64)))
        first, second = cpu(seen[None])[0, -1].topk(2).values.tolist()
        report.check("logits' difference where they part", first - second, NEAR_TIE)


def peft_parity(opts: Namespace, report: Report) -> None:
    """Run benchmarks.parity on the device, in fp32 and in the native low precision."""
    small = ["--exact-only", "--steps", "2", "--block-size", "32"] if opts.dry_run else []
    chosen = parity.parse_args(
        ["--base", str(MINI), "--device", opts.device.torch_device.type, *small]
    )
    found = Report()  # of its own: parity's facts are not for this report
    parity.compare(chosen, found)
    report.checks += found.checks


def validation(opts: Namespace, report: Report) -> None:
    """Compare validation losses of adapters trained on gpt2, each with dropouts of its own."""
    try:
        base = MINI if opts.dry_run else find_base("gpt2")[1]
    except UserError as error:
        raise Skip(str(error)) from error
    args = ours.options(
        *arguments(  # all of the three epochs
            opts, "lora", "--base", base, *([] if opts.dry_run else ["--max-steps", 10**6])
        )
    )
    tokens, found = ours.data(args)[1].tokens[: 1000 if opts.dry_run else None], {}
    for precision in ("fp32", opts.low):
        device, args = (replace(x, precision=precision) for x in (opts.device, args))
        trainer = parity.train_here(args, draws=0)[1]
        found[f"ours, {precision}"] = ours.evaluate(
            trainer.model, tokens, base, device, args.block_size
        ).loss
    there = parity.train_there(args, trainer, draws=0).model
    with device.autocast():
        found["PEFT, autocast"] = peft_loop.evaluate(there, tokens, args.block_size)
    for name, loss in found.items():
        report.facts[name] = f"validation loss {loss:.4f}"
        report.check(f"{name}: from ours in fp32", abs(loss / found["ours, fp32"] - 1), 2e-2)


def speed(opts: Namespace, report: Report) -> None:
    """Time a LoRA step of GPT-2 124M, random weights, each contender in a process of its own."""
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)  # as users have it
    torch.cuda.empty_cache()
    with TemporaryDirectory() as folder:
        if not opts.dry_run:
            run_apart(Task("base", folder))
        task = Task(
            "train",
            str(MINI) if opts.dry_run else folder,
            opts.device.torch_device.type,
            precision=opts.low,
            batch_size=opts.batch,
            block_size=opts.block,
            warm_up=5,
            steps=opts.steps,
            profile=True,
            matmuls=not opts.dry_run,
        )
        tasks = sides(task) if opts.dry_run else [*sides(task), *sides(replace(task, compile=True))]
        for task in tasks:
            try:
                found = run_apart(task)
            except RunError as error:
                if task.side == "ours":
                    raise
                report.facts[f"{task.contender}, failed"] = str(error)
                continue
            report.facts[task.contender] = {
                "ms a step": round(1e3 * found["median"], 2),
                "tokens/s": round(opts.batch * opts.block / found["median"]),
                "GPU busy, ms": round(found["busy_ms"], 2),
                "launches": found["launches"],
                "peak MB": round(found["peak_mb"]),
                "reserved MB": round(found["reserved_mb"]),
                "matmuls' share": round(found["matmul_seconds"] / found["median"], 2)
                if "matmul_seconds" in found
                else "-",
            }


PARTS = {
    part.__name__.replace("_", "-"): part
    for part in (
        describe,
        operations,
        options,
        no_waiting,
        resume,
        empty_share,
        two_ranks,
        text,
        peft_parity,
        validation,
        speed,
    )
}
