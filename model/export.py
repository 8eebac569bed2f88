"""Write a base in another precision: `python -m model.export --base B --out DIR`."""

from pathlib import Path

from common.cli import Parser, add_base_option
from common.device import PRECISIONS
from common.errors import run_command
from common.files import refuse_existing
from model.hub import find_base
from model.tokenizer_files import load_tokenizer, save_tokenizer
from model.weights import WEIGHTS, load_gpt2, save_gpt2


def main() -> None:
    parser = Parser(prog="model.export", description=__doc__.splitlines()[0])
    add_base_option(parser)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp16")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR",
                        help="the new Hugging Face GPT-2 directory")
    args = parser.parse_args()
    refuse_existing(args.out)
    name, directory = find_base(args.base)
    model = load_gpt2(directory)
    tokenizer = load_tokenizer(directory, model.config.vocab_size)
    save_gpt2(model, args.out, PRECISIONS[args.precision], tokenizer.end_of_text)
    save_tokenizer(tokenizer, args.out)
    print(f"{name} in {args.precision} -> {args.out / WEIGHTS}")


if __name__ == "__main__":
    run_command(main)
