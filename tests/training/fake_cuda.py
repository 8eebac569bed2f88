"""Train, score and generate on fake CUDA tensors, without a GPU: `main(base, book, data)`.

A fake tensor has a shape, a type and a device, but no data. PyTorch applies its real rules for
devices, types and autocast to it. Before torch is imported, the process must load the library that
fake_cuda.cpp makes, because a PyTorch without CUDA refuses the device.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora.dora
import one_page
import training.model
from benchmarks.ours import Steps, options
from common.device import PRECISIONS, Device
from common.errors import first_line
from model.kernels import cuda_loss
from model.sampling import generate

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
    "lora --precision fp16 --loraplus-lr-ratio 4",
    "lora --precision bf16 --target-modules c_attn.q c_attn.v",
    "lora --precision bf16 --quantise nf4 --gradient-checkpointing",
    "lora --precision fp16 --quantise int8",
    "lora --precision bf16 --lr 1e-3 --data",
    "full --precision fp32",
    "full --precision bf16 --grad-accum 2",
    "full --precision fp16 --kernels plain",
)
PRODUCTS = ("mm", "addmm")  # attention's products depend on the kernel that a GPU chooses
READS = ("_local_scalar_dense", "item", "is_nonzero")  # a number for Python
WAITS = (*READS, "nonzero", "masked_select", "equal", "_unique2")


class Watch(TorchDispatchMode):
    """Record which operations wait for the GPU, and the types of the factors of matrix products.
    Raise for an operation on tensors of two devices. A number read from a tensor is 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.factors: set[torch.dtype] = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operation.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_gpu = any(x.is_cuda for x in tensors)
        if on_gpu and any(x.is_cpu and x.ndim for x in tensors):
            raise RuntimeError(f"{name}: tensors on two devices")
        if name in PRODUCTS:
            self.factors |= {x.dtype for x in tensors}
        if on_gpu and name in WAITS:
            self.waits.append(name)
        if name in READS:
            return {torch.bool: True, torch.int64: 1}.get(tensors[0].dtype, 1.0)
        result = operation(*args, **kwargs)
        copies = name == "_to_copy" and result.is_cuda != tensors[0].is_cuda
        if copies and not kwargs.get("non_blocking"):
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


@contextmanager
def on_fake_cuda(precision: str) -> Iterator[None]:
    """Let the project compute on fake CUDA tensors. Weights are read as real tensors."""
    load = training.model.load_gpt2
    device = Device(torch.device("cuda"), precision)

    def load_real(*given):
        with unset_fake_temporarily():
            return load(*given)

    with ExitStack() as stack:
        for where, name, value in (
            (Device, "pick", lambda *_, **__: device),
            (training.model, "load_gpt2", load_real),
            (cuda_loss, "card_memory", lambda device: 40 * 320 * 8 * cuda_loss.SHARE),
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


def check(command: str, base: str, book: str, data: str) -> None:
    """Take a step, score the validation part and draw tokens. Raise for a fault."""
    method, _, precision, *more = command.split()
    source: list[object] = ["--book", book, "--block-size", 16]
    if "--data" in more:
        more.remove("--data")
        source = ["--data", data, "--block-size", 64]
    fp32, low = torch.float32, PRECISIONS[precision]
    source += ["--batch-size", 4, "--val-fraction", 0.05]
    made = Steps(options(method, *source, *more, base=base, precision=precision))
    model = made.model
    types: set[torch.dtype] = set()  # of the residual stream and of the weights of its LayerNorms
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda norm, x, y: types.update((x[0].dtype, y.dtype)))
            types.update(p.dtype for p in module.parameters())

    with Watch() as step:
        types |= {made.step(next(made.batches())).dtype}
    assert not step.waits, f"a step waits for the GPU: {step.waits}"
    allowed = {low, fp32} if "--use-dora" in more else {low}  # DoRA's norms are in fp32
    assert low in step.factors <= allowed, f"products of {step.factors}"
    with Watch() as scoring:
        made.evaluate()
    assert len(scoring.waits) == 2, f"scoring waits for the GPU: {scoring.waits}"  # for two sums
    with Watch() as drawing, made.device.autocast():
        ids = torch.zeros(63, dtype=torch.int64, device="cuda")
        barred = torch.zeros(model.config.vocab_size, dtype=torch.bool, device="cuda")
        sampling = {"top_k": 5, "top_p": 0.9, "suppress_tokens": barred}
        list(generate(model.eval(), ids, 3, **sampling))
    assert len(drawing.waits) == 6, f"drawing waits for the GPU: {drawing.waits}"  # twice a token

    state = made.trainer.optimizer.state
    for name, parameter in made.parameters.items():
        assert parameter.is_cuda, name
        types |= {parameter.dtype, *(x.dtype for x in state[parameter].values())}
    assert types == {fp32}, f"fp32 is needed, found {types}"


def check_the_page(base: str, precision: str) -> None:
    """Take the steps of the one page. Raise if one waits, or multiplies in another precision."""
    low = PRECISIONS[precision]
    settings = {"CUDA": True, "DEVICE": "cuda", "DTYPE": low, "BLOCK": 16, "EPOCHS": 1}
    settings |= {"evaluate": lambda *_: 1.0, "save_adapter": lambda _: None}  # they may wait
    with ExitStack() as stack:
        for name, value in settings.items():
            stack.enter_context(mock.patch.object(one_page, name, value))
        with unset_fake_temporarily():
            model = one_page.load_gpt2(Path(base))
        model.to("cuda")
        tokens = torch.zeros(1040, dtype=torch.int64, device="cuda")  # four steps
        watch = stack.enter_context(Watch())
        one_page.train(model, tokens, tokens)
    assert watch.waits == ["_to_copy"], f"not only the epoch's order waits: {watch.waits}"
    assert watch.factors == {low}, f"products of {watch.factors}"


def main(base: str, book: str, data: str) -> None:
    """Print a line for each command that fails."""
    warnings.simplefilter("ignore")  # fake tensors are not meant to be printed or copied
    for command in COMMANDS:
        try:
            with on_fake_cuda(command.split()[2]), redirect_stdout(StringIO()):
                check(command, base, book, data)
        except Exception as error:  # the next command may show more
            print(f"{command}: {type(error).__name__}: {first_line(error)}")
    for precision in ("bf16", "fp16"):
        try:
            with on_fake_cuda(precision), redirect_stdout(StringIO()):
                check_the_page(base, precision)
        except Exception as error:
            print(f"one_page.py, {precision}: {type(error).__name__}: {first_line(error)}")
