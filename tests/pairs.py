"""Make adapters of this project and of PEFT that look trained, and take training steps."""

from copy import deepcopy
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.config import LoRAConfig
from lora.dora import DoRALinear
from lora.inject import inject
from lora.layer import LoRALinear
from lora.pissa import PiSSALinear
from model.gpt2 import GPT2
from storage.weights import load_gpt2
from tests.helpers import TINY, token_ids

IDS = token_ids(TINY["vocab_size"], 2, 16)
ALL_FOUR = ("c_attn", "c_proj", "c_fc")  # two layers are named c_proj
KINDS = {
    "lora": (LoRALinear, {}),
    "dora": (DoRALinear, {"use_dora": True}),
    "pissa": (PiSSALinear, {"init_lora_weights": "pissa"}),
}


def randomize(model: nn.Module, seed: int = 2) -> None:
    """Draw every A and B of either side from N(0, 0.2), so that B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2, generator=generator)


def adapted(base: Path, targets: tuple[str, ...] = ALL_FOUR, **config: object) -> GPT2:
    """Load `base` and add a random adapter."""
    model = load_gpt2(base)
    inject(model, LoRAConfig(target_modules=targets, **config))
    randomize(model)
    return model


def pair(
    kind: str, shape: tuple[int, int], dtype: torch.dtype = torch.float32, **config: object
) -> tuple[LoRALinear, nn.Module, nn.Linear]:
    """Return one linear layer with our adapter, with PEFT's adapter, and without an adapter."""
    torch.manual_seed(0)
    made, fields = KINDS[kind]
    linear = nn.Linear(*shape, dtype=dtype)
    config = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0} | config | fields
    ours = made(deepcopy(linear), LoRAConfig(**config))
    ours.base_layer.requires_grad_(False)
    peft_config = peft.LoraConfig(target_modules=["0"], **config)
    peft_model = peft.get_peft_model(nn.Sequential(deepcopy(linear)), peft_config)
    theirs = peft_model.base_model.model[0]
    return ours, theirs, linear


def our_name(theirs: str) -> str:
    return theirs.replace(".default", "").replace("vector.weight", "vector")


def parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters of our adapter or PEFT's adapter, by our names."""
    return {our_name(n): p for n, p in module.named_parameters() if "lora_" in n}


@torch.no_grad()
def perturb_alike(ours: nn.Module, theirs: nn.Module) -> None:
    """Move every parameter from its start, equally on both sides."""
    for name, parameter in parameters(ours).items():
        parameter += 0.1 * torch.randn_like(parameter)
        parameters(theirs)[name].copy_(parameter)


def output_and_gradients(layer: nn.Module, x: Tensor, autocast: bool = False) -> dict[str, Tensor]:
    """Return a layer's output in training, with seeded dropout, and the gradients of its square."""
    x = x.clone().requires_grad_()
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer.train()(x)
    y.float().square().sum().backward()
    found = {"y": y, "x": x.grad}
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            found[our_name(name)] = parameter.grad
    return found


def losses_of_steps(model: nn.Module, ids: Tensor, steps: int) -> list[float]:
    """Take AdamW steps on A and B. A step's number seeds its dropouts."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        output = model(ids[:, :-1])
        logits = getattr(output, "logits", output)  # transformers' models return an object
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses
