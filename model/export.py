"""Rewrite a model in another precision: `python -m model.export --base B --out DIR`."""

from pathlib import Path

from cli import Parser, add_base_options
from errors import UserError, run_command
from hardware import PRECISIONS
from model.checkpoint import WEIGHTS, load_gpt2, save_gpt2
from model.hub import find_base


def main() -> None:
    parser = Parser(prog="model.export", description=__doc__.splitlines()[0])
    add_base_options(parser)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp16")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    name, directory = find_base(args.base)
    if args.out.resolve() == directory.resolve():
        raise UserError(f"--out {args.out}: is the base itself; name another directory")
    save_gpt2(load_gpt2(directory), args.out, PRECISIONS[args.precision])
    print(f"{name} in {args.precision} -> {args.out / WEIGHTS}")


if __name__ == "__main__":
    run_command(main)
