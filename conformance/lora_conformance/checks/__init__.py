"""The checks, by subject. Importing this package registers them."""

from importlib import import_module

from lora_conformance.bench import CHECKS

for subject in ("layer", "dora", "merging", "slices", "models", "files"):
    import_module(f"lora_conformance.checks.{subject}")

__all__ = ["CHECKS"]
