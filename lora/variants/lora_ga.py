"""LoRA-GA: start A and B so that the first step approximates a step of full fine-tuning."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora.layer import LoRAConfig
from lora.variants.offset import OffsetLinear

GAMMA = 16  # as in the paper and in PEFT. A larger value gives a smaller B0


@dataclass(frozen=True)
class LoRAGAConfig(LoRAConfig):
    """LoRA's hyper-parameters, and the field by which PEFT's config selects LoRA-GA
    (`init_lora_weights`)."""

    init_lora_weights: str = "lora_ga"


class LoRAGALinear(OffsetLinear):
    """An `OffsetLinear` that starts from singular vectors of dL/dW (Wang et al. 2024,
    https://arxiv.org/abs/2407.05000, 3.2 and 3.3).

    With G = dL/dW = U S V^T (out, in), the first step of gradient descent changes B A by
    -lr * scaling * (G A0^T A0 + B0 B0^T G). With A0 = V[:, :r]^T (r, in) and B0 = U[:, r:2r]
    (out, r), the sum in parentheses is the best approximation of G with rank 2 r.

    As in PEFT with the default `LoraGAConfig`, this B0 is multiplied by S[r:2r] out^(1/4) /
    sqrt(GAMMA). In contrast, the authors' code multiplies both A0 and B0 by out^(1/4) /
    sqrt(GAMMA).

    A new layer starts like plain LoRA. `start_at(*initial_factors(gradient))` then sets A0 and B0.
    """

    @torch.no_grad()
    def initial_factors(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return A0 (r, in) and B0 (out, r) for a gradient (out, in)."""
        r = self.config.r
        u, s, vt = torch.linalg.svd(gradient.float(), full_matrices=False)
        factor = len(gradient) ** 0.25 / GAMMA**0.5
        return vt[:r], u[:, r : 2 * r] * s[r : 2 * r] * factor


def lora_ga_layers(model: nn.Module) -> dict[str, LoRAGALinear]:
    """Return the model's LoRA-GA layers by module name, in module order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRAGALinear)}


@contextmanager
def weight_gradients(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that maps each layer's name to the sum (out, in) of dL/dW over all backward
    passes inside the `with`.

    The sum is in fp32 for any precision of W. The gradient of one pass is freed before the next.
    """
    sums: dict[str, Tensor] = {}
    hooks = []
    for name, layer in lora_ga_layers(model).items():
        weight = layer.base_layer.weight.requires_grad_()
        sums[name] = torch.zeros_like(weight, dtype=torch.float32, requires_grad=False)
        hooks.append(weight.register_post_accumulate_grad_hook(_adder(sums[name])))
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()
        for layer in lora_ga_layers(model).values():
            layer.base_layer.requires_grad_(False)


def _adder(total: Tensor) -> Callable[[Tensor], None]:
    """Return a hook that moves a weight's gradient into `total`."""

    def move(weight: Tensor) -> None:
        assert weight.grad is not None
        total.add_(weight.grad)
        weight.grad = None

    return move


class GradientStart:
    """The state of LoRA-GA in a checkpoint: each layer's A0 and B0.

    A resumed run cannot recompute A0 and B0 exactly. The gradient may differ in the last bits, and
    then singular vectors may change sign.
    """

    def __init__(self, model: nn.Module):
        self.layers = lora_ga_layers(model)

    def state_dict(self) -> dict[str, Any]:
        return {name: {"A": m.initial_A, "B": m.initial_B} for name, m in self.layers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, layer in self.layers.items():
            layer.subtract(state[name]["A"], state[name]["B"])
