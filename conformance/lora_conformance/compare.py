"""Compare results in safetensors files with the test vectors.

FOLDER contains a file for each case, such as lora.safetensors, with some of the case's results,
such as y and dA. Each file has the names and shapes of the file in conformance/vectors. Its
numbers are fp64, fp32, fp16 or bf16, and the tolerance depends on this precision.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_conformance import vectors
from lora_conformance.expected import judged, read_expected, summary
from lora_conformance.tensors import read


class Result(NamedTuple):
    name: str  # case/tensor
    outcome: str  # "pass", "FAIL" or "skip"
    reason: str = ""


def off_by(value: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    """Return the largest difference, in units of the largest expected magnitude."""
    return float(abs(value - expected).max() / (abs(expected).max() or 1))


def compared(
    dtype: str, value: NDArray[np.float64], expected: NDArray[np.float64], tolerance: float
) -> tuple[str, str]:
    """Return the outcome and the reason."""
    if value.shape != expected.shape:
        return "FAIL", f"the shape is {value.shape}, not {expected.shape}"
    error = off_by(value, expected)
    line = f"off by {error:.1e}; the tolerance of {dtype} is {tolerance:.0e}"
    return "pass" if error <= tolerance else "FAIL", line


def compare_case(folder: Path, case: str) -> Iterator[Result]:
    expected = vectors.results(case)
    path = folder / f"{case}.safetensors"
    try:
        found = read(path)
    except FileNotFoundError:
        found = {}
    except ValueError as error:
        yield Result(case, "FAIL", str(error))
        return
    for name in expected:
        if name in found:
            dtype, value = found[name]
            tolerance = vectors.tolerance(name, dtype)
            yield Result(f"{case}/{name}", *compared(dtype, value, expected[name], tolerance))
        else:
            yield Result(f"{case}/{name}", "skip", "there is no such result")
    for name in found.keys() - expected.keys():
        reason = f"the case has no result of this name, but {', '.join(expected)}"
        yield Result(f"{case}/{name}", "FAIL", reason)


def compare(folder: Path) -> list[Result]:
    """Compare every result of every case. Unknown files and tensors fail, because a wrong name
    would otherwise look like a missing result.
    """
    cases = vectors.cases()
    found = [result for case in cases for result in compare_case(folder, case)]
    for path in sorted(folder.glob("*.safetensors")):
        if path.stem not in cases:
            found.append(Result(path.stem, "FAIL", "there is no case of this name"))
    return found


def show(case: str, results: Sequence[tuple[str, Result]]) -> None:
    """Print a case's passes and missing results in one line each, and each other result."""
    if {outcome for outcome, _ in results} == {"skip"}:
        print(f"skip  {case}: no {case}.safetensors with results")
        return
    for kind, about in (("pass", ""), ("skip", "no ")):
        names = [r.name.partition("/")[2] for outcome, r in results if outcome == kind]
        if names:
            print(f"{kind}  {case}: {about}{', '.join(names)}")
    for outcome, result in results:
        if outcome not in ("pass", "skip"):
            print(f"{outcome}  {result.name}: {result.reason}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="lora_conformance compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    for option in ("--expected-failures", "--required"):
        names = "names of results such as dora/dA, or of cases, one per line"
        parser.add_argument(option, type=Path, metavar="FILE", help=names)
    args = parser.parse_args(argv)
    if not args.folder.is_dir():
        parser.error(f"{args.folder} is not a folder")
    known = {f"{case}/{name}" for case in vectors.cases() for name in vectors.results(case)}
    known |= vectors.cases().keys()
    try:
        expected = read_expected(args.expected_failures, known)
        required = read_expected(args.required, known)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    by_case: dict[str, list[Any]] = {}
    for result in compare(args.folder):
        case = result.name.partition("/")[0]
        listed = [bool({result.name, case} & names) for names in (expected, required)]
        by_case.setdefault(case, []).append((judged(result.outcome, *listed), result))
    for case, results in by_case.items():
        show(case, results)
    line, succeeded = summary(outcome for results in by_case.values() for outcome, _ in results)
    print(line)
    return 0 if succeeded else 1
