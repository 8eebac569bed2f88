"""The LoRA layer: a frozen linear layer plus a trained low-rank update.

This file needs PyTorch alone: copy it anywhere, and it adapts any `nn.Linear`.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LoRAConfig:
    """Hyper-parameters of LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    They are named as in PEFT's `adapter_config.json`. A variant adds its own field in a subclass.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.05
    target_modules: tuple[str, ...] | str = ("c_attn",)  # `find_targets` says what names match
    use_rslora: bool = False
    layers_to_transform: tuple[int, ...] | None = None  # only these blocks; None: all
    layers_pattern: tuple[str, ...] | None = None  # the blocks' list, such as "h"; None: any
    rank_pattern: dict[str, int] = field(default_factory=dict)  # regex -> r of matching layers
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # regex -> their lora_alpha

    @property
    def scaling(self) -> float:
        """Return the factor of B A x: alpha / r (paper, 4.1), or alpha / sqrt(r) for rsLoRA
        (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
        """
        if self.use_rslora:
            return self.lora_alpha / math.sqrt(self.r)
        return self.lora_alpha / self.r


class LoRALinear(nn.Module):
    """y = W x + b + scaling * B A dropout(x) (paper, equation 3); `inject` freezes W and b.

    Shapes: x (..., in), A = lora_A.weight (r, in), B = lora_B.weight (out, r), y (..., out).
    A starts as U(-1/sqrt(in), 1/sqrt(in)) and B as zero, so a new adapter changes nothing.
    Trained A and B are fp32 whatever the base's precision: their steps are small, and GradScaler
    refuses fp16 gradients. Raises ValueError for a rank outside 1 .. min(in, out).
    """

    def __init__(self, base_layer: nn.Linear, config: LoRAConfig):
        super().__init__()
        fan_in = base_layer.in_features
        fan_out = base_layer.out_features
        if not 1 <= config.r <= min(fan_in, fan_out):
            raise ValueError(f"rank {config.r} is outside 1 .. {min(fan_in, fan_out)}")

        self.base_layer = base_layer
        self.config = config
        self.scaling = config.scaling
        self.enabled = True
        self.merged = False
        self.lora_dropout = nn.Dropout(config.lora_dropout)
        # Drawn on the CPU in PEFT's order (A, B, A again), so a seed gives PEFT's A on any device.
        self.lora_A = nn.Linear(fan_in, config.r, bias=False, dtype=torch.float32)
        self.lora_B = nn.Linear(config.r, fan_out, bias=False, dtype=torch.float32)
        # With a = sqrt(5), Kaiming's bound sqrt(6 / (1 + a^2) / in) is 1 / sqrt(in).
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.register_state_dict_pre_hook(_refuse_merged)
        self.register_load_state_dict_pre_hook(_refuse_merged)
        self.to(base_layer.weight.device)
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """Return no row of W, (0, in): models such as T5 ask for its dtype or device.

        A model that computed with W past `forward` would leave the update out. With no row of it,
        shapes do not fit, and PyTorch raises an error.
        """
        return self.base_layer.weight[:0]

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)  # (..., out)
        if self.merged or not self.enabled:  # merged: W holds the update already
            return y
        update = self.update(self.in_adapter_precision(x), y)
        return (y + update).to(y.dtype)

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        """Return what the adapter adds to y = W x + b: scaling * B A dropout(x), (..., out)."""
        return self.lora_B(self.lora_A(self.lora_dropout(x))) * self.scaling

    def in_adapter_precision(self, x: Tensor) -> Tensor:
        """Return x in the precision of A and B; under autocast, x itself: each matmul casts it."""
        if torch.is_autocast_enabled(x.device.type):
            return x
        return x.to(self.lora_A.weight.dtype)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return scaling * B A, (out, in) in fp32: what merging adds to W."""
        return self.lora_B.weight.float() @ self.lora_A.weight.float() * self.scaling

    def merge(self) -> None:
        """Set W to W + scaling * B A. The layer then runs as fast as a plain linear layer.

        Does nothing if the layer is merged. Raises ValueError for a disabled adapter, and unless W
        is in fp32: a sum in bf16 rounds a small update away, and one in four bits most of it.
        """
        weight = self.base_layer.weight
        in_fp32 = isinstance(weight, nn.Parameter) and weight.dtype == torch.float32
        if not self.enabled or not in_fp32:
            raise ValueError("only an enabled adapter is merged, and into fp32 weights")
        if not self.merged:
            self.base_layer.weight.data += self.delta_weight()
            self.merged = True

    def unmerge(self) -> None:
        """Undo `merge`, up to rounding."""
        if self.merged:
            self.base_layer.weight.data -= self.delta_weight()
            self.merged = False

    def unwrapped(self) -> nn.Linear:
        """Return the linear layer inside, with what was merged into it."""
        return self.base_layer

    def saved_tensors(self) -> dict[str, Tensor]:
        """Return the layer's tensors in an adapter file, under PEFT's names."""
        return {"lora_A.weight": self.lora_A.weight, "lora_B.weight": self.lora_B.weight}

    def saved_config(self) -> LoRAConfig:
        """Return the config with which `saved_tensors` are to be read."""
        return self.config


def stacked(config: LoRAConfig, n: int) -> LoRAConfig:
    """Return the config of n adapters stacked into one of rank n * r, with the same scaling."""
    alpha_factor = math.sqrt(n) if config.use_rslora else n
    return LoRAConfig(
        r=n * config.r,
        lora_alpha=alpha_factor * config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.target_modules,
        use_rslora=config.use_rslora,
    )


def _refuse_merged(layer: LoRALinear, *_: object) -> None:
    if layer.merged:  # the update would be added twice, or subtracted from a W without it
        raise ValueError("the adapter is merged; unmerge it before taking or loading a state dict")
