"""LoRA for any PyTorch model, with files in PEFT's format. Needs only PyTorch and safetensors.

from lora import LoRAConfig, inject, save_adapter

inject(model, LoRAConfig(r=8, lora_alpha=16, target_modules="all-linear"))
...  # train the parameters that require gradients
save_adapter(model, "adapter")
"""

from lora.config import LoRAConfig
from lora.inject import adapter_disabled, inject, lora_layers, make_layer
from lora.layer import LoRALinear
from lora.load import load_adapter
from lora.merge import merge, unmerge, unwrap
from lora.quantised import dequantise, quantise
from lora.save import save_adapter

__all__ = [
    "LoRAConfig",
    "LoRALinear",
    "adapter_disabled",
    "dequantise",
    "inject",
    "load_adapter",
    "lora_layers",
    "make_layer",
    "merge",
    "quantise",
    "save_adapter",
    "unmerge",
    "unwrap",
]
