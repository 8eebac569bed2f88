"""Join a directory of texts into one book: `python -m data.corpus DIR --out FILE`."""

from pathlib import Path

from common.cli import Parser
from common.errors import UserError, run_command
from common.files import atomic_path
from model.tokenizer import END_OF_TEXT


def main() -> None:
    parser = Parser(prog="data.corpus", description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, metavar="DIR", help="holds NAME.txt files, UTF-8")
    parser.add_argument("--leave-out", nargs="*", default=[], metavar="NAME",
                        help="texts to hold back, for evaluation")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    texts = {path.stem: path for path in args.directory.glob("*.txt")
             if path.resolve() != args.out.resolve()}  # of a run before
    if unknown := sorted(set(args.leave_out) - texts.keys()):
        raise UserError(f"--leave-out {unknown[0]}: {args.directory} holds no {unknown[0]}.txt")
    kept = [texts[name] for name in sorted(texts) if name not in args.leave_out]
    if not kept:
        raise UserError(f"{args.directory}: holds no .txt files to join")
    with atomic_path(args.out) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for i, path in enumerate(kept):
            file.write((END_OF_TEXT if i else "") + read_text(path).strip() + "\n")
    print(f"{len(kept)} texts, {args.out.stat().st_size:,} bytes -> {args.out}")


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from error


if __name__ == "__main__":
    run_command(main)
