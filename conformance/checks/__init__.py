"""The checks, by subject. Importing this package registers them in `bench.CHECKS`."""

from conformance.checks import files, layer, merging, models

__all__ = ["files", "layer", "merging", "models"]
