"""Implementations of LoRA on the bench. Each file is glue: it calls a package and contains no LoRA."""
