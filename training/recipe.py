"""Fill in missing options: the precision, and LoRA options from an initial adapter."""

from dataclasses import replace
from typing import Any

from adapters.quantisation import choose_quantisation
from common.device import Device
from common.errors import as_failure
from lora.load import load_adapter_config
from storage.hf_compat import portable_name
from training.options import LORA_FIELDS, Options


def fill_in(options: Options, base: str, device: Device) -> Options:
    """Return the options with the values that come from the base, the device and
    `--init-adapter`."""
    filled: dict[str, Any] = {"base": portable_name(base), "precision": device.precision}
    adapters = []
    if options.init_adapter:
        adapters.append(options.init_adapter)
        with as_failure():
            stored = load_adapter_config(options.init_adapter)
        filled |= {name: getattr(stored, name) for name in LORA_FIELDS}
    if options.method == "lora":
        filled["quantise"] = choose_quantisation(options.quantise, adapters)
    return replace(options, **filled)
