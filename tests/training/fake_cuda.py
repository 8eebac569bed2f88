"""Train, score and generate on fake CUDA tensors, without a GPU: `main(base, adapter, book, data)`.

A fake tensor has a shape, a type and a device, but no data. PyTorch applies its real rules for
devices, types and autocast to it. Before torch is imported, the process must load the library that
fake_cuda.cpp makes, because a PyTorch without CUDA refuses the device. The process trains as the
first of two, in a fake group of processes, which returns each tensor as it is.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout, suppress
from copy import copy
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import evaluate
import generate
import lora.dora
import lora.load
import lora.pissa
import lora.tensors
import one_page
import training.model
from benchmarks.ours import Steps, options
from common.device import PRECISIONS, Device
from common.errors import first_line
from common.processes import Processes
from evaluation.scores import forgetting
from lora import find_rate, merge, unmerge
from lora.tensors import tensor_bytes
from model import sampling
from model.kernels import cuda_loss
from training.checkpoint import _take_tensors
from training.run import Run

COMMANDS = (
    "lora --precision fp32",
    "lora --precision bf16 --grad-accum 2 --gradient-checkpointing",
    "lora --precision fp16",
    "lora --precision bf16 --kernels plain",
    "lora --precision fp16 --kernels plain --gradient-checkpointing",
    "lora --precision bf16 --use-rslora --target-modules c_attn c_proj c_fc",
    "lora --precision fp16 --use-dora",
    "lora --precision bf16 --use-dora --kernels plain --lora-dropout 0",
    "lora --precision bf16 --init-lora-weights pissa",
    "lora --precision bf16 --target-modules c_attn.q c_attn.v",
    "lora --precision bf16 --quantise nf4 --gradient-checkpointing",
    "lora --precision fp16 --quantise int8",
    "lora --precision bf16 --lr 1e-3 --data",
    "lora --precision bf16 --init-adapter",
    "lora --precision fp32 --use-dora",
    "full --precision fp32",
    "full --precision bf16 --grad-accum 2",
    "full --precision fp16 --kernels plain",
)
PRODUCTS = ("mm", "addmm", "linear", "matmul")  # not of attention, whose kernel a GPU chooses
READS = ("_local_scalar_dense", "item", "is_nonzero", "equal")  # a number for Python
WAITS = (*READS, "nonzero", "masked_select", "_unique2")
LOGITS = 320  # columns of cuda_loss.py's logits: the small vocabulary, rounded up


class Watch(TorchDispatchMode):
    """Record which operations wait for the GPU, and the types of floats, of the factors of matrix
    products, and of the loss's logits. Raise for an operation on tensors of two devices. A number
    read from a tensor is 1, and no number is 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.factors: set[torch.dtype] = set()
        self.floats: set[torch.dtype] = set()
        self.logits: set[torch.dtype] = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operation.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_gpu = any(x.is_cuda for x in tensors)
        if on_gpu and name != "copy_" and any(x.is_cpu and x.ndim for x in tensors):
            raise RuntimeError(f"{name}: tensors on two devices")
        if name in PRODUCTS:
            self.factors |= {x.dtype for x in tensors}
        if on_gpu and name in WAITS:
            self.waits.append(name)
        if name in READS:
            return {torch.bool: True, torch.int64: 1}.get(tensors[0].dtype, 1.0)
        if name == "nonzero":
            return torch.arange(tensors[0].numel(), device=tensors[0].device)[:, None]
        result = operation(*args, **kwargs)
        results = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.floats |= {x.dtype for x in results if x.is_cuda and x.is_floating_point()}
        if name in PRODUCTS and result.size(-1) == LOGITS:
            self.logits.add(result.dtype)
        copies = name in ("_to_copy", "copy_") and result.is_cuda != tensors[-1].is_cuda
        if copies and result.is_cpu and kwargs.get("non_blocking"):
            raise RuntimeError("the CPU does not wait for its copy")
        if copies and (result.is_cpu or not kwargs.get("non_blocking")):
            self.waits.append(name)
        return result


def replace_tensors(module: nn.Module, change: Callable, recurse: bool = True) -> nn.Module:
    """Do the work of `Module._apply`, which changes tensors in place and cannot make them fake."""
    for child in module.children():
        child._apply(change)
    for name, parameter in module.named_parameters(recurse=False):
        changed = nn.Parameter(change(parameter.detach()), requires_grad=parameter.requires_grad)
        setattr(module, name, changed)
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, change(buffer))
    return module


def copy_layer(layer: nn.Module) -> nn.Module:
    """Do the work of `deepcopy`, which would copy memory that a fake tensor lacks, and crash."""
    copied = copy(layer)
    copied._parameters = {}
    for name, parameter in layer.named_parameters():
        setattr(copied, name, nn.Parameter(parameter.detach().clone()))
    return copied


def real(load: Callable) -> Callable:
    """Return a function that reads a model's files into tensors with data."""

    def load_real(*given):
        with unset_fake_temporarily():
            return load(*given)

    return load_real


@contextmanager
def open_real(path: Path, framework: str) -> Iterator[SimpleNamespace]:
    """Open an adapter's file as safetensors' `safe_open` does, for tensors with data."""
    with safe_open(path, framework) as file:
        yield SimpleNamespace(keys=file.keys, get_tensor=real(file.get_tensor))


class FakeGenerator:
    """A generator of the GPU. Fake tensors are drawn without one."""

    def __init__(self, device: str | torch.device = "cpu"):
        assert torch.device(device).type == "cuda", "a GPU cannot draw with the CPU's generator"

    def manual_seed(self, seed: int) -> None:
        pass


@contextmanager
def on_fake_cuda(precision: str) -> Iterator[None]:
    """Let the project compute on fake CUDA tensors. Weights are read as real tensors."""
    device = Device(torch.device("cuda"), precision)
    with ExitStack() as stack:
        for where, name, value in (
            (Device, "pick", lambda *_, **__: device),
            (training.model, "load_gpt2", real(training.model.load_gpt2)),
            (evaluate, "load_with_adapter", real(evaluate.load_with_adapter)),
            (generate, "load_with_adapter", real(generate.load_with_adapter)),
            (Processes, "gather", lambda processes, value: [value]),
            (lora.load, "safe_open", open_real),
            (lora.pissa, "deepcopy", copy_layer),
            (torch, "Generator", FakeGenerator),
            (torch.cuda, "get_device_capability", lambda device: (8, 0)),  # asked by a broadcast
            (Tensor, "as_subclass", lambda tensor, kind: tensor),  # fakes have a class already
            (cuda_loss, "card_memory", lambda device: 40 * LOGITS * 8 * cuda_loss.SHARE),
            (lora.dora, "_check_norms", lambda norms: None),  # reads numbers, before the steps
            (nn.Module, "_apply", replace_tensors),
            (Tensor, "pin_memory", lambda tensor: tensor),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda: True),
        ):
            stack.enter_context(mock.patch.object(where, name, value))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # other kernels would ask the driver
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def check(command: str, base: str, adapter: str, book: str, data: str) -> None:
    """Take a step, score the validation part, draw tokens and merge. Raise for a fault."""
    method, _, precision, *more = command.split()
    if "--init-adapter" in more:
        more.append(adapter)
    source: list[object] = ["--book", book, "--block-size", 16]
    if "--data" in more:
        more.remove("--data")
        source = ["--data", data, "--block-size", 64]
    fp32, low = torch.float32, PRECISIONS[precision]
    source += ["--batch-size", 4, "--val-fraction", 0.05]
    with Watch():
        chosen = options(method, *source, *more, base=base, precision=precision)
        made = Steps(chosen, Processes(0, 2))
    model = made.model
    types: set[torch.dtype] = set()  # of the residual stream and of the weights of its LayerNorms
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda norm, x, y: types.update((x[0].dtype, y.dtype)))
            types.update(p.dtype for p in module.parameters())

    with Watch() as step:
        batch = next(made.batches())
        loss = made.step(batch)
        types |= {loss.dtype}
        Run(made.plan, made.trainer).count(loss, loss, batch.num_tokens, 1e-3)
        made.step(replace(batch, micro_batches=[]))  # as a process without windows
        made.plan.processes.maximum(1, 15)  # as after each step
    assert not step.waits, f"a step waits for the GPU: {step.waits}"
    assert made.trainer.scaler.is_enabled() == (precision == "fp16")
    expected = {low, fp32} if "--use-dora" in more else {low}  # DoRA's norms are in fp32
    with Watch() as scoring:
        made.evaluate()
        if method == "lora":
            forgetting(model.eval(), made.data.validation, made.device)
    assert torch.float64 in scoring.floats, "scores are not summed in fp64"
    sums = 2 if method == "full" else 4
    assert len(scoring.waits) == sums, f"scoring waits for the GPU: {scoring.waits}"
    with Watch() as drawing, made.device.autocast():
        ids = torch.zeros(63, dtype=torch.int64, device="cuda")
        barred = torch.zeros(model.config.vocab_size, dtype=torch.bool, device="cuda")
        settings = {"top_k": 5, "top_p": 0.9, "suppress_tokens": barred}
        list(sampling.generate(model.eval(), ids, 3, **settings))
    assert len(drawing.waits) == 6, f"drawing waits for the GPU: {drawing.waits}"  # two numbers
    for watch in (step, scoring, drawing):
        assert watch.factors == expected, f"products of {watch.factors}"
        assert watch.floats <= {low, fp32, torch.float64}, f"floats of {watch.floats}"
        assert watch.logits <= {fp32}, "the loss's logits are rounded"

    state = made.trainer.optimizer.state
    for name, parameter in made.parameters.items():
        assert parameter.is_cuda, name
        types |= {parameter.dtype, *(x.dtype for x in state[parameter].values())}
    assert types == {fp32}, f"fp32 is needed, found {types}"
    check_between_steps(made, ids)
    if method == "lora" and precision == "fp32":
        check_merge(model)


def check_between_steps(made: Steps, ids: Tensor) -> None:
    """Embed in evaluation, store the tensors of a checkpoint and of a file, and search the rate."""
    with Watch() as watch, made.device.autocast(), torch.no_grad():
        made.model.embed(ids, ids)
    assert made.device.dtype in watch.floats, "scoring does not round the embeddings"
    stored: dict[str, Tensor] = {}
    _take_tensors(made.trainer.optimizer.state_dict(), "", stored)
    assert stored and all(x.is_cpu for x in stored.values()), "a checkpoint is on the GPU"
    with (
        mock.patch.object(lora.tensors, "is_finite", return_value=False) as asked,
        suppress(ValueError),  # not finite
        Watch(),
    ):
        tensor_bytes("A", next(iter(made.parameters.values())), torch.float32)
    assert asked.call_args.args[0].is_cpu, "a file is written from the GPU's memory"
    with mock.patch.object(torch.random, "fork_rng", return_value=nullcontext()) as fork:
        find_rate(made.model, lambda rate: rate)
    assert fork.call_args == mock.call([ids.device]), "the search keeps the GPU's draws"


def check_merge(model: nn.Module) -> None:
    """Merge and unmerge inside autocast, which must not round the update."""
    with Watch() as watch, torch.autocast("cuda", torch.bfloat16):
        merge(model)
        model.to("cpu")
        unmerge(model)
    assert watch.factors == {torch.float32}, f"merging multiplies {watch.factors}"


def check_commands(precision: str, base: str, adapter: str, book: str) -> None:
    """Run `evaluate.py --forgotten` and `generate.py --with-base`. Load a base alone."""
    model = ["--base", base, "--adapter", adapter]
    with Watch() as watch:
        evaluate.main([*model, "--text", book, "--block-size", "16", "--forgotten"])
        generate.main([*model, "--prompt", "a lamp", "--max-new-tokens", "2", "--with-base"])
        generate.main([*model, "--prompt", "a lamp", "--max-new-tokens", "2", "--quantise", "nf4"])
    low = PRECISIONS[precision]
    assert watch.factors == {low}, f"products of {watch.factors}"
    assert watch.floats <= {low, torch.float32, torch.float64}, f"floats of {watch.floats}"
    with mock.patch.object(generate, "write_texts") as written:
        generate.main(["--base", base, "--prompt", "a lamp"])
    held = written.call_args.args[0].wte.weight.dtype
    assert held == low, f"a base alone is held in {held}"


def check_the_page(precision: str, base: str, adapter: str, book: str) -> None:
    """Run the one page. Raise if a step waits, or if a part multiplies in another precision."""
    low = PRECISIONS[precision]
    settings = {"CUDA": True, "DEVICE": "cuda", "DTYPE": low, "BLOCK": 16, "BATCH": 64}
    settings |= {"BASE": base, "BOOK": Path(book), "OUT": Path(adapter), "R": 4, "EPOCHS": 1}
    settings["save_adapter"] = lambda _: None  # reads numbers
    steps = Watch()
    reports = Watch()

    def train(*given, train=one_page.train):
        with mock.patch.object(one_page, "evaluate", lambda *_: 1.0), steps:
            train(*given)

    def report(*given, report=one_page.report):
        with reports:
            report(*given)

    settings |= {"train": train, "report": report}
    settings |= {name: real(getattr(one_page, name)) for name in ("load_gpt2", "load_file")}
    with mock.patch.multiple(one_page, **settings):
        one_page.main()
    assert steps.waits == ["_to_copy"], f"not only the epoch's order waits: {steps.waits}"
    assert steps.factors == {low}, f"products of {steps.factors}"
    assert low in reports.factors, "the page scores in fp32"  # it draws in fp32


def main(base: str, adapter: str, book: str, data: str) -> None:
    """Print a line for each command that fails."""
    warnings.simplefilter("ignore")  # fake tensors are not meant to be printed or copied
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    inputs = (base, adapter, book)
    checks = {command: (check, command, *inputs, data) for command in COMMANDS}
    for precision in ("bf16", "fp16"):
        checks[f"commands --precision {precision}"] = (check_commands, precision, *inputs)
        checks[f"one_page.py --precision {precision}"] = (check_the_page, precision, *inputs)
    for name, (call, *arguments) in checks.items():
        try:
            with on_fake_cuda(name.split()[2]), redirect_stdout(StringIO()):
                call(*arguments)
        except Exception as error:  # the next check may show more
            print(f"{name}: {type(error).__name__}: {first_line(error)}")
