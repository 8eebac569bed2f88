"""Find adapters that a model does not use as LoRA assumes, by calling the model."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from lora.guards import inner_model, readable_weights, without_autocast
from lora.inject import lora_layers
from lora.layer import LoRALinear


def probe(model: nn.Module, *inputs: Any, **named_inputs: Any) -> dict[str, str]:
    """Call the model, and return the adapters that do not work: a dict from each layer's name to
    the reason. If all adapters work, the dict is empty.

    Each B is small and random during the calls. First, B must receive a gradient from a randomly
    weighted sum of the outputs. It does not if the model reads W and does not call the layer. Then
    W becomes W + scaling * B A, and B becomes 0, which must not change the outputs. It does if
    another module shares W. The result is for these inputs only, because an expert that no token
    reaches has no gradient. Of a quantised layer, only the gradient is tried.

    The calls are in evaluation mode and without autocast. Parameters, gradients, random states and
    modes stay as they are. Raises ValueError for a model without an adapter, or with a merged one.
    """
    model = inner_model(model)
    layers = lora_layers(model)
    if not layers or any(layer.merged for layer in layers.values()):
        raise ValueError("the model has no adapter, or a merged one; probe it before `merge`")
    draws = torch.Generator().manual_seed(0)
    start: dict[str, Tensor] = {}  # every B by its name in the model
    merged: dict[str, dict[str, Tensor]] = {}  # what merging a layer changes
    for name, layer in layers.items():
        [(key, b)] = layer.lora_B.named_parameters()
        random = (0.05 * torch.randn(b.shape, generator=draws)).to(b).requires_grad_()
        start[f"{name}.lora_B.{key}"] = random
        merged[name] = {f"{name}.{own}": x for own, x in _merged(layer, key, random).items()}

    def outputs(names: list[str]) -> Tensor:
        """Return all outputs in one row, with these layers merged."""
        tensors = start.copy()
        for name in names:
            tensors |= merged[name]
        with torch.random.fork_rng(), readable_weights(), without_autocast(random):
            result = functional_call(model, tensors, inputs, named_inputs)
        floats = [x for x in tree_leaves(result) if torch.is_tensor(x) and x.is_floating_point()]
        return torch.cat([x.flatten().float() for x in floats])

    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.enable_grad():
            y = outputs([])
            total = y @ torch.randn(y.shape, generator=draws).to(y)
            total = total + sum(0 * b.sum() for b in start.values())  # a missing gradient is 0
            gradients = torch.autograd.grad(total, list(start.values()))
        used = [name for name, g in zip(layers, gradients, strict=True) if g.any()]
        found = {name: "B has no gradient with these inputs" for name in layers if name not in used}

        # In fp32, rounding changes the outputs by about 1e-7, and a weight that is used twice by
        # 1e-2 or more.
        types = {x.dtype for tensors in merged.values() for x in tensors.values()}
        tolerance = max([1e-3, *(16 * torch.finfo(dtype).eps for dtype in types)])

        @torch.no_grad()
        def changes(names: list[str]) -> bool:
            return not (outputs(names) - y).norm() <= tolerance * y.norm()  # also if y is NaN

        if changes(used):
            for name in filter(lambda name: changes([name]), used):
                found[name] = "merging changes the output with these inputs"
        return found
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def _merged(layer: LoRALinear, key: str, b: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a merged layer by name: W + scaling * B A, and 0 in the place of B."""
    update = functional_call(layer.lora_B, {key: b}, layer.lora_A.weight.T).T * layer.scaling
    stored = layer.state_dict()
    # PiSSA evaluates with `original`, which is W. A quantised layer does not store W.
    weights = [own for own in ("base_layer.weight", "original") if own in stored]
    tensors = {own: stored[own] + update.to(stored[own]) for own in weights}
    return tensors | {f"lora_B.{key}": torch.zeros_like(b)} if tensors else {}
