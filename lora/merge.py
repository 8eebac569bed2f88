"""Write a base and its adapter as one model: `python -m lora.merge --adapter DIR --out DIR`."""

from pathlib import Path

from cli import Parser, add_model_options, load_model
from errors import UserError, run_command
from lora.inject import merge, unwrap
from model.checkpoint import save_gpt2


def main() -> None:
    parser = Parser(prog="lora.merge", description=__doc__.splitlines()[0])
    add_model_options(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR",
                        help="the new Hugging Face GPT-2 directory")
    args = parser.parse_args()
    if not args.adapter:
        raise UserError("--adapter is missing: there is nothing to merge")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UserError(f"--out {args.out}: exists already; name a new directory")
    name, model = load_model(args)
    merge(model)
    unwrap(model)
    save_gpt2(model, args.out)
    print(f"{name} + {args.adapter} -> {args.out}")


if __name__ == "__main__":
    run_command(main)
