"""Write an adapter or a whole model for llama.cpp: `python -m adapters.gguf DIR --out FILE`."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from adapters.load import load_with_adapter, recorded_quantisation
from adapters.merge import chat_template, load_merged
from common.cli import BASE_OPTION, NONE, QUANTISE_OPTION, Parser
from common.device import PRECISIONS
from common.errors import UserError, run_command
from common.files import atomic_path
from lora import lora_layers
from storage.gguf_files import refuse_erf_gelu, save_adapter_gguf, save_gguf
from storage.hub import find_adapter


def export_adapter(base: str, adapter: Path, out: Path, dtype: torch.dtype) -> str:
    """Write only the adapter, with all layers padded to the largest rank. Return a description."""
    adapter = find_adapter(str(adapter))
    loaded = load_with_adapter(base, adapter, quantise=NONE)
    refuse_erf_gelu(loaded.model.config, loaded.base)
    if any(layer.config.use_dora for layer in lora_layers(loaded.model).values()):
        raise UserError(f"{adapter}: is DoRA, whose change is not B A alone; merge it instead")
    with atomic_path(out) as temporary:
        save_adapter_gguf(loaded.model, temporary, out.stem, dtype)

    kind = recorded_quantisation(adapter)
    if kind:
        print(
            f"note: the adapter was trained on a base in {kind}; write this base with --base B "
            f"--quantise {kind}"
        )
    return f"{adapter}, an adapter of {loaded.base},"


def export_model(
    base: str, adapter: Path | None, out: Path, dtype: torch.dtype, quantise: str | None
) -> str:
    """Write the base, with the adapter (if any) merged into it. Return a description."""
    loaded = load_merged(base, adapter, dtype, quantise)
    refuse_erf_gelu(loaded.model.config, loaded.base)
    template = chat_template(adapter)
    with atomic_path(out) as temporary:
        save_gguf(loaded.model, loaded.tokenizer, temporary, out.stem, dtype, template)
    return f"{loaded.base} + {adapter}" if adapter else loaded.base


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="adapters.gguf", description=__doc__)
    parser.add_argument(
        "adapter",
        type=Path,
        nargs="?",
        metavar="ADAPTER",
        help="an adapter in PEFT's format, or OWNER/NAME on the hub. Without ADAPTER, the base is "
        "written",
    )
    parser.add_argument("--base", **BASE_OPTION)
    parser.add_argument("--quantise", "--quantize", **QUANTISE_OPTION)
    parser.add_argument(
        "--merge",
        action="store_true",
        help="write the base with ADAPTER merged into it, as one model",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="precision of the matrices. For fewer than 16 bits, use llama-quantize of llama.cpp",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="such as lora.gguf")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.merge and not args.adapter:
        raise UserError("--merge: needs an ADAPTER")
    if args.quantise and args.adapter and not args.merge:
        raise UserError("--quantise: an adapter alone has no base; add --merge, or omit ADAPTER")
    if os.path.lexists(args.out):
        raise UserError(f"--out {args.out}: exists already; name a new file")

    dtype = PRECISIONS[args.precision]
    if args.adapter and not args.merge:
        written = export_adapter(args.base, args.adapter, args.out, dtype)
    else:
        written = export_model(args.base, args.adapter, args.out, dtype, args.quantise)
    print(f"{written} -> {args.out}")


if __name__ == "__main__":
    run_command(main)
