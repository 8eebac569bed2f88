"""The matrix products of one training step, and how fast this machine multiplies such shapes.

Their time is the hardware's limit: a step cannot be shorter than its products, however little
else it does. Attention's products are counted whole, the masked half included.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from model import ops
from model.gpt2 import GPT2Config

ENOUGH_SECONDS = 0.2  # of one product; at least three times, however long it takes
CUDA_CALLS = 20  # launched before the clock is read, or the launch is all that is seen


@dataclass(frozen=True)
class Product:
    """`batch` results (m, n), each a sum over k.

    `form` says how the operands lie in memory: "NT" (m, k) (n, k)^T, as a linear layer's output
    x W^T; "NN" (m, k) (k, n), as its input's gradient g W; "TN" (k, m)^T (k, n), as its weight's
    gradient g^T x.
    """

    name: str
    form: str
    m: int
    k: int
    n: int
    batch: int = 1

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.k * self.n

    def operands(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Both factors and the place of the result, each (batch, ., .) or without the batch."""
        lead = (self.batch,) if self.batch > 1 else ()
        m, k, n = self.m, self.k, self.n
        shapes = {"NT": ((m, k), (n, k)), "NN": ((m, k), (k, n)), "TN": ((k, m), (k, n))}
        a, b = (torch.randn(*lead, *shape, device=device).to(dtype) for shape in shapes[self.form])
        a = a.mT if self.form == "TN" else a
        b = b.mT if self.form == "NT" else b
        return a, b, torch.empty(*lead, m, n, dtype=dtype, device=device)


def products(config: GPT2Config, method: str, batch_size: int, block_size: int,
             r: int) -> Counter[Product]:
    """What a step multiplies, and how often; LoRA is on c_attn.

    A frozen weight needs no gradient; and nothing before the first adapter is trained, so the
    first block's c_attn needs none for its input.
    """
    found, full = Counter(), method == "full"
    tokens, width = batch_size * block_size, config.n_embd
    inner = config.n_inner or 4 * width
    for layer in range(config.n_layer):
        passes_on = full or layer > 0
        found.update(linear("c_attn", tokens, width, 3 * width, passes_on, full))
        if not full:
            found.update(linear("lora_A", tokens, width, r, passes_on, True))
            found.update(linear("lora_B", tokens, r, 3 * width, True, True))
        found.update(attention(batch_size * config.n_head, block_size, width // config.n_head))
        found.update(linear("attn.c_proj", tokens, width, width, True, full))
        found.update(linear("c_fc", tokens, width, inner, True, full))
        found.update(linear("mlp.c_proj", tokens, inner, width, True, full))
    found.update(linear("head", tokens, width, config.vocab_size, True, full))
    return found


def linear(name: str, tokens: int, fan_in: int, fan_out: int, input_gradient: bool,
           weight_gradient: bool) -> Iterator[Product]:
    """A linear layer's output (tokens, fan_out), and the gradients that are needed."""
    yield Product(name, "NT", tokens, fan_in, fan_out)
    if input_gradient:
        yield Product(f"{name}, gradient of its input", "NN", tokens, fan_out, fan_in)
    if weight_gradient:
        yield Product(f"{name}, gradient of its weight", "TN", fan_out, tokens, fan_in)


def attention(heads: int, T: int, D: int) -> Iterator[Product]:
    """S = q k^T and y = P v of each head, and the gradients of P, v, q and k."""
    yield Product("attention q k^T", "NT", T, D, T, heads)
    yield Product("attention P v", "NN", T, T, D, heads)
    yield Product("attention, gradient of P", "NT", T, D, T, heads)
    yield Product("attention, gradient of v", "TN", T, T, D, heads)
    yield Product("attention, gradient of q", "NN", T, T, D, heads)
    yield Product("attention, gradient of k", "TN", T, T, D, heads)


def measure_products(config: GPT2Config, batch_size: int, block_size: int, r: int,
                     dtype: torch.dtype, device: torch.device) -> dict[str, dict]:
    """For LoRA and for full: the seconds and operations of a step's products, and each product."""
    cache: dict[tuple, float] = {}
    limits = {}
    for method in ("lora", "full"):
        lines = []
        for product, count in products(config, method, batch_size, block_size, r).items():
            shape = tuple(asdict(product).values())[1:]
            if shape not in cache:
                cache[shape] = measure_product(product, dtype, device)
            lines.append({**asdict(product), "count": count, "seconds": cache[shape]})
        limits[method] = {"seconds": sum(line["seconds"] * line["count"] for line in lines),
                          "flops": sum(p.flops * count for p, count in products(
                              config, method, batch_size, block_size, r).items()),
                          "products": lines}
    return limits


def measure_product(product: Product, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of one such product, by the faster of `matmul` and model/ops.py's `linear`."""
    a, b, out = product.operands(dtype, device)
    seconds = median_seconds(lambda: torch.matmul(a, b, out=out), device)
    if product.batch == 1:
        seconds = min(seconds, median_seconds(lambda: ops.linear(a, b.mT), device))
    return seconds


@torch.no_grad()
def median_seconds(call: Callable[[], object], device: torch.device) -> float:
    calls = CUDA_CALLS if device.type == "cuda" else 1
    seconds: list[float] = []

    def repeat() -> None:
        for _ in range(calls):
            call()

    repeat()
    while len(seconds) < 3 or sum(seconds) < ENOUGH_SECONDS:
        seconds += timed(repeat, 1, device)
    return statistics.median(seconds) / calls


def timed(call: Callable[[], object], times: int, device: torch.device) -> list[float]:
    """Seconds of each call, from an idle device until it is idle again."""
    seconds = []
    for _ in range(times):
        wait(device)
        began = time.perf_counter()
        call()
        wait(device)
        seconds.append(time.perf_counter() - began)
    return seconds


def wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
