"""Implementations of LoRA on the bench: glue that calls a package and contains no LoRA."""
