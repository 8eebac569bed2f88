"""Test an implementation of LoRA, results in files, or a merged model.

python -m lora_conformance IMPLEMENTATION [CHECK ...]   put PyTorch modules on the bench
python -m lora_conformance compare FOLDER               compare results with the test vectors
python -m lora_conformance merged BASE ADAPTER MERGED   find out whether a merge kept the update

IMPLEMENTATION is a Python file. `lora_conformance/bench.py` describes its functions.
"""

import argparse
import importlib
import importlib.util
import os
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from lora_conformance.expected import LEVELS, read_expected

COMMANDS = ("compare", "merged")


def load_implementation(name: str) -> ModuleType:
    """Import a file, with its folder on the path."""
    if not name.endswith(".py"):
        raise FileNotFoundError(f"no such file; did you mean {name}.py?")
    sys.path.insert(0, str(Path(name).resolve().parent))
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def described(error: BaseException) -> str:
    """Return an error of importing a file in one line, with the place."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, (ImportError, OSError, SyntaxError)):  # they name the place
        return line
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{line} ({Path(frame.filename).name}, line {frame.lineno})"


def describe(checks: Mapping[str, Any]) -> None:
    """Print each check with its promise, the bug that it catches, and where that bug shipped."""
    for one in checks.values():
        print(f"{one.name} ({one.level})\n  {one.promise}\n  catches: {one.bug}")
        if one.shipped:
            print(f"  shipped: {', '.join(one.shipped)}")


def bench(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="lora_conformance", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("implementation", nargs="?", metavar="IMPLEMENTATION")
    parser.add_argument("checks", nargs="*", metavar="CHECK")
    parser.add_argument("--list", action="store_true", help="describe the checks")
    parser.add_argument("--level", choices=LEVELS, help="run only the checks of this level")
    for option in ("--expected-failures", "--required"):
        parser.add_argument(option, type=Path, metavar="FILE", help="names of checks, one per line")
    args = parser.parse_args(argv)
    try:
        from lora_conformance.bench import report
        from lora_conformance.checks import CHECKS
    except ModuleNotFoundError as error:
        parser.error(f"the bench needs PyTorch: {error}")
    if args.list or not args.implementation:
        describe(CHECKS)
        return 0
    for name in args.checks:
        if name not in CHECKS:
            parser.error(f"there is no check {name!r} (--list describes all checks)")
    try:
        expected = read_expected(args.expected_failures, CHECKS)
        required = read_expected(args.required, CHECKS)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    names = [*args.checks] or [*CHECKS]
    names = [name for name in names if args.level in (None, CHECKS[name].level)]
    if not names:
        parser.error(f"no check has the level {args.level}")
    warnings.simplefilter("ignore")
    try:
        functions = load_implementation(args.implementation)
    except (Exception, SystemExit) as error:  # from the file under test
        parser.error(f"{args.implementation}: {described(error)}")
    return 0 if report(functions, names, expected, required) else 1


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return importlib.import_module(f"lora_conformance.{argv[0]}").main(argv[1:])
    return bench(argv)


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # as of `--list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
