"""A referee for implementations of LoRA: test vectors and a bench (docs/conformance.md)."""
