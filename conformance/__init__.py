"""A referee for implementations of LoRA: test vectors, and a bench of checks (docs/conformance.md)."""
