"""The bench: the functions of an implementation, the definition of a check, and the runner.

An implementation is a Python file or module with some of these functions. A check that needs a
missing function, or a missing keyword of `wrap` or `inject`, is skipped. **kwargs counts as every
keyword.

wrap(linear, r, alpha, dropout) -> module   adapt one nn.Linear and freeze it. Optional keywords:
    use_rslora=True, use_dora=True
    fan_in_fan_out=True   `linear` is then a `models.InOutLinear`, whose weight is (in, out)
    slices=(0, 2)         adapt these thirds of the output: 0 is q, 1 is k, 2 is v
    widths=(16, 8, 8)     q, k and v have these widths, as with grouped queries
    nf4=True              store W in NF4. The W of `linear` has such values already
factors(layer) -> (A, B)                    the parameters, in any orientation. With slices: A
    (slices * r, in), slice by slice, and B (rows of all slices, r) or a sparse B (out, slices * r)
merge(module), unmerge(module)              all LoRA layers in a model, or a single layer
inject(model, targets, r, alpha) -> handle  adapt the named layers in place and freeze the rest. The
    handle, such as the model, goes to `merge` and `save`. Optional keywords:
    layers=[1]            adapt only these blocks
    ranks, alphas         dictionaries from a layer's name to a rank or an alpha
    use_rslora=True, use_dora=True
save(handle, path), load(model, path, **settings) -> handle
    `load` adapts a fresh base. `settings` are the arguments of `inject`, for files that lack them
combine(paths, weights, out)                save the weighted sum of saved adapters
lacks = {"check": "reason"}                 checks to skip, because the implementation has no such
    feature. To refuse a feature at runtime, raise ValueError or RuntimeError

A check is *mathematics* if every right implementation must pass it, *robustness* if it concerns
precision, states and files, and *interface* if projects may choose differently.
"""

import inspect
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lora_conformance.expected import LEVELS, judged, summary


class Missing(Exception):
    """The implementation lacks a function or a keyword. The check is skipped."""


class Refused(Exception):
    """The implementation raises an error in place of a result, which the check permits."""


class Failed(Exception):
    """The implementation fails a check. The message describes the difference."""


def expect(condition: object, message: str) -> None:
    """Raise Failed with the message unless the condition holds."""
    if not condition:
        raise Failed(message)


@contextmanager
def may_refuse() -> Iterator[None]:
    """Turn an error of the implementation into a refusal."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise Refused(str(error)) from error


@dataclass(frozen=True)
class Check:
    """A property, the bug that it catches, and threads where that bug was reported or fixed."""

    level: str
    name: str
    promise: str
    bug: str
    shipped: tuple[str, ...]
    run: Callable[["Implementation"], None]


CHECKS: dict[str, Check] = {}


def check(level: str, bug: str, *shipped: str) -> Callable[[Callable], Callable]:
    """Register a function as a check. The docstring of the function is the promise."""

    def register(run: Callable) -> Callable:
        CHECKS[run.__name__] = Check(level, run.__name__, run.__doc__ or "", bug, shipped, run)
        return run

    return register


mathematics, robustness, interface = (partial(check, level) for level in LEVELS)


class Implementation:
    """The functions of an implementation. Getting a missing function raises Missing."""

    def __init__(self, functions: Any):
        self.functions = functions

    def __getattr__(self, name: str) -> Callable:
        function = getattr(self.functions, name, None)
        if function is None:
            raise Missing(f"no function {name}")
        parameters = inspect.signature(function).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

        def call(*args: Any, **options: Any) -> Any:
            for option in options:
                if option not in parameters and not takes_any:
                    raise Missing(f"{name} has no {option}")
            try:
                return function(*args, **options)
            except NotImplementedError as error:
                raise Missing(str(error)) from error

        return call

    def has(self, name: str) -> bool:
        return getattr(self.functions, name, None) is not None


@dataclass(frozen=True)
class Result:
    check: Check
    outcome: str  # "pass", "FAIL", "refused" or "skip"
    reason: str = ""
    crashed: bool = False  # the reason is then an exception, and the check's bug may not be there


def run(functions: Any, names: Iterable[str] = ()) -> list[Result]:
    """Run the checks of these names, or all checks. Each check starts from the same seed."""
    lacks = getattr(functions, "lacks", {})
    results = []
    for one in (CHECKS[name] for name in names or CHECKS):
        torch.manual_seed(0)
        try:
            if one.name in lacks:
                raise Missing(lacks[one.name])
            one.run(Implementation(functions))
        except Missing as error:
            results.append(Result(one, "skip", str(error)))
        except Refused as error:
            results.append(Result(one, "refused", str(error)))
        except Failed as error:
            results.append(Result(one, "FAIL", str(error)))
        except (Exception, SystemExit) as error:  # from the code under test
            reason = f"crash, {type(error).__name__}: {error}"
            results.append(Result(one, "FAIL", reason, crashed=True))
        else:
            results.append(Result(one, "pass"))
    return results


def report(
    functions: Any,
    names: Iterable[str] = (),
    expected: Collection[str] = (),
    required: Collection[str] = (),
) -> bool:
    """Run the checks and print the results. Return whether the run succeeded."""
    start = time.perf_counter()
    outcomes: dict[str, list[str]] = {}
    for result in run(functions, names):
        one = result.check
        outcome = judged(result.outcome, one.name in expected, one.name in required)
        outcomes.setdefault(one.level, []).append(outcome)
        print(": ".join([f"{outcome:7}  {one.name}", *result.reason.splitlines()[:1]]))
        if outcome == result.outcome == "FAIL" and not result.crashed:
            shipped = f" ({', '.join(one.shipped)})" if one.shipped else ""
            print(f"         {one.bug}{shipped}")
    for level in LEVELS:
        if level in outcomes:
            print(f"{level}: {summary(outcomes[level])[0]}")
    counts, succeeded = summary(one for some in outcomes.values() for one in some)
    print(f"{time.perf_counter() - start:.1f} s: {counts}")
    return succeeded
