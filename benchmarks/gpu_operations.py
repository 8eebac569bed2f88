"""Parts of `verify_gpu.py`: what the machine is, and whether its kernels compute what they should.

A part takes the options and adds to a report.
"""

import subprocess
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.parity_report import Report, machine, versions
from common.device import PRECISIONS
from model import fast
from model.gpt2 import GPT2
from model.sampling import generate
from model.weights import load_gpt2

# Relative errors that may be: several times what rounding alone makes of such sums.
OPERATION = {"fp32": 5e-5, "bf16": 2e-2, "fp16": 4e-3}
SCORES = 1e-4  # they are computed in fp32 in every precision
NEAR_TIE = 1e-3  # between the two likeliest logits: rounding may choose either


def plain_attention(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)


def plain_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum")


# What each function of model/fast.py computes, in PyTorch's own calls.
PLAIN: dict[str, Callable[..., Tensor]] = {
    "linear": F.linear,
    "causal_attention": plain_attention,
    "tied_cross_entropy": plain_cross_entropy,
}


def describe(opts: Namespace, report: Report) -> None:
    """Describe the machine, and which attention kernel each precision takes."""
    report.facts |= {"machine": machine(), **versions(), "native low precision": opts.low}
    if opts.device.is_cuda:
        report.facts |= describe_gpu()
    for precision in ("fp32", opts.low):
        kernel = attention_kernel(opts.device.torch_device, PRECISIONS[precision])
        report.facts[f"attention kernel, {precision}"] = kernel


def describe_gpu() -> dict[str, object]:
    card = torch.cuda.get_device_properties(0)
    driver = subprocess.getoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader")
    return {
        "GPUs": torch.cuda.device_count(),
        "compute capability": f"{card.major}.{card.minor}",
        "memory MB": card.total_memory // 10**6,
        "driver": driver.partition("\n")[0],
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "torch's kernels": " ".join(torch.cuda.get_arch_list()),
    }


def attention_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """Return the name of the kernel that a training step's attention takes."""
    shape = (2, 4, 128, 64)  # (B, nh, T, hs)
    q, k, v = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    with torch.profiler.profile() as profile:
        fast.causal_attention(q, k, v, 0.1)
    for event in profile.key_averages():
        if "::_scaled_dot_product" in event.key:
            return event.key
    return "our own"


@dataclass
class Case:
    """Inputs for one operation of model/fast.py, by its name."""

    name: str
    operation: str
    tensors: Sequence[Tensor]
    others: tuple[object, ...] = ()


def operations(opts: Namespace, report: Report) -> None:
    """Check values and gradients of model/fast.py against its plain twins in double."""
    device = opts.device.torch_device
    torch.manual_seed(0)
    targets = torch.randint(1001, (77,), device=device)
    for precision in ("fp32", opts.low):
        dtype = PRECISIONS[precision]
        for case in cases(device, dtype, targets):
            fast_twin = getattr(fast, case.operation)
            error = error_of(fast_twin, PLAIN[case.operation], case)
            report.check(f"{precision}: {case.name}", error, OPERATION[precision])

        hidden = normal(device, dtype, 77, 64)
        weight = normal(device, dtype, 1001, 64)
        here, _ = fast.score(hidden, weight, targets)
        there = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")
        report.check(f"{precision}: scores", (here / there - 1).abs().max().item(), SCORES)


def cases(device: torch.device, dtype: torch.dtype, targets: Tensor) -> list[Case]:
    def random(*shape: int) -> Tensor:
        return normal(device, dtype, *shape)

    found = [Case("linear", "linear", (random(2, 5, 64), random(96, 64), random(96)))]
    for length in (33, 300):
        qkv = [random(2, 3, length, 64) for _ in range(3)]
        found.append(Case(f"attention, {length} tokens", "causal_attention", qkv, (0.0,)))

    hidden, frozen = random(77, 64), random(1001, 64).detach()
    found.append(Case("loss, head frozen", "tied_cross_entropy", (hidden, frozen), (targets,)))
    hidden, trained = random(77, 64), random(1001, 64)
    found.append(Case("loss, head trained", "tied_cross_entropy", (hidden, trained), (targets,)))
    return found


def normal(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape).to(device, dtype).requires_grad_()


def error_of(
    fast_twin: Callable[..., Tensor], plain_twin: Callable[..., Tensor], case: Case
) -> float:
    """Return the largest relative error of the value and the gradients, as norms."""
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in case.tensors]
    y = fast_twin(*case.tensors, *case.others)
    wanted = plain_twin(*exact, *case.others)

    gradient = torch.randn_like(wanted)
    y.backward(gradient.to(y.dtype))
    wanted.backward(gradient)

    errors = [relative_error(y, wanted)]
    for x, e in zip(case.tensors, exact, strict=True):
        if x.grad is not None and e.grad is not None:
            errors.append(relative_error(x.grad, e.grad))
    return max(errors)


def relative_error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


@torch.inference_mode()
def text(opts: Namespace, report: Report) -> None:
    """Check that greedy text on the device is the CPU's, in fp32, unless two tokens nearly tie."""
    prompt = torch.arange(100, 116)
    cpu = load_gpt2(opts.base)
    model = load_gpt2(opts.base)
    opts.device.place(model)
    here = greedy(model, prompt, 10 * opts.steps)
    there = greedy(cpu, prompt, 10 * opts.steps)

    same = 0
    while same < len(there) and here[same] == there[same]:
        same += 1
    report.facts["tokens alike"] = f"{same} of {len(there)}"
    if same < len(there):
        seen = torch.cat((prompt, torch.tensor(there[:same], dtype=torch.int64)))
        first, second = cpu(seen[None])[0, -1].topk(2).values.tolist()
        report.check("logits' difference where they part", first - second, NEAR_TIE)


def greedy(model: GPT2, prompt: Tensor, count: int) -> list[int]:
    ids = prompt.to(model.wte.weight.device)
    return list(generate(model, ids, count, temperature=0))
