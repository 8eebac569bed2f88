"""LoRA for linear layers in PyTorch, with files in PEFT's format. Needs only torch and safetensors.

    from lora import LoRAConfig, inject, save_adapter, trained_parameters

    model = inject(model, LoRAConfig(r=8, lora_alpha=16))
    optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=1e-3)
    ...  # train
    save_adapter(model, "adapter")

A model has one adapter. `unwrap` removes the adapter, and then `inject` or `load_adapter` can add
another one.

With several processes, seed every process alike, and call `inject` before the model is wrapped in
DistributedDataParallel or sharded by FSDP (`fully_shard`). `save_adapter` takes the model of DDP as
it is, in one process. Under FSDP, first call `unshard` on each FSDPModule, in every process.

`adapter_disabled` switches the layers of the model, so it also affects other threads that use the
model at that time.
"""

from lora.config import LoRAConfig
from lora.inject import adapter_disabled, inject, lora_layers, make_layer
from lora.layer import LoRALinear
from lora.load import load_adapter
from lora.merge import merge, unmerge, unwrap
from lora.parameters import count_parameters, trained_parameters
from lora.probe import probe
from lora.quantised import dequantise, quantise
from lora.rate import RateSearch, adamw_run, find_rate
from lora.save import adapter_state_dict, save_adapter

__version__ = "1.0.0"
__all__ = [
    "LoRAConfig",
    "LoRALinear",
    "RateSearch",
    "adamw_run",
    "adapter_disabled",
    "adapter_state_dict",
    "count_parameters",
    "dequantise",
    "find_rate",
    "inject",
    "load_adapter",
    "lora_layers",
    "make_layer",
    "merge",
    "probe",
    "quantise",
    "save_adapter",
    "trained_parameters",
    "unmerge",
    "unwrap",
]
