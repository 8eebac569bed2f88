"""Put an implementation of LoRA on the bench: `python -m conformance IMPLEMENTATION [CHECK ...]`.

IMPLEMENTATION is a Python file, or a name in conformance/implementations. `conformance/bench.py`
describes the functions of an implementation.
"""

import argparse
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from conformance.bench import report
from conformance.checks import CHECKS


def load_implementation(name: str) -> ModuleType:
    """Import a file, or a module of `conformance.implementations`."""
    if not name.endswith(".py"):
        return importlib.import_module(f"conformance.implementations.{name}")
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def describe() -> None:
    """Print each check with its promise, the bug that it catches, and where that bug shipped."""
    for one in CHECKS.values():
        print(f"{one.name}\n  {one.promise}\n  catches: {one.bug}")
        if one.shipped:
            print(f"  shipped: {', '.join(one.shipped)}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="conformance", description=__doc__)
    parser.add_argument("implementation", nargs="?", metavar="IMPLEMENTATION")
    parser.add_argument("checks", nargs="*", choices=[[], *CHECKS], metavar="CHECK")
    parser.add_argument("--list", action="store_true", help="describe the checks")
    args = parser.parse_args(argv)
    if args.list or not args.implementation:
        describe()
        return 0
    try:
        functions = load_implementation(args.implementation)
    except (ImportError, OSError) as error:
        parser.error(f"{args.implementation}: {error}")
    warnings.simplefilter("ignore")
    return 0 if report(functions, args.checks) else 1


if __name__ == "__main__":
    sys.exit(main())
