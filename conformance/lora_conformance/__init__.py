"""A referee for implementations of LoRA: test vectors and a bench (README.md)."""

__version__ = "2026.12.3"
