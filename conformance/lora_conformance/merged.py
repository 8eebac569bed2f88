"""Find out whether a merged model contains the update of an adapter.

BASE and MERGED are folders of safetensors in transformers' layout, and ADAPTER is a folder in
PEFT's format. For each adapted parameter, the command compares MERGED with W + s B A, rounded to
the precision of MERGED, and prints |merged - (W + s B A)| / |s B A| and a verdict. The exit status
is 0 if all updates survived, 1 if not, and 2 if the folders cannot be compared.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.linalg import norm

from lora_conformance.tensors import UNIT, Array, Stored, rounded
from lora_conformance.updates import HEAD, Mistake, Model, Update, join, updates

KEPT = ("survived", "rounded", "unchanged", "no update")
# Buffers that old files store, and new ones do not.
BUFFERS = re.compile(r".*(\.attn\.(masked_)?bias|\.rotary_emb\.inv_freq)")


class Verdict(NamedTuple):
    difference: float  # relative to the update's norm
    word: str
    detail: str = ""


def judge(update: Update, found: Array, dtype: str) -> Verdict:
    """Return the verdict on one parameter.

    Rounding erases numbers of the update that are smaller than a step of W. So the factor of the
    update decides, compared with the factor of a merge that rounds once. The factor is a mean over
    all numbers of a matrix, so errors of rounding cancel in it.
    """
    base = update.weight
    once = update.merge(base)
    change = once - base
    size = float(norm(change))
    if all(np.array_equal(rounded(a, "BF16"), a) for a in (base, found)):
        dtype = "BF16"  # The file may store a merge in bf16 as fp16 or fp32.
    if size == 0:
        return judge_without_update(update, found, rounded(once, dtype))
    # The sum is rounded to this type, and s B A often to bf16. Such errors are independent. A DoRA
    # merge with each step in bf16 reaches 1.3 units, and rounding W to int8 costs 1.5 to 2 units.
    noise = 1.4 * float(np.hypot(UNIT[dtype] * norm(once), UNIT["BF16"] * size))

    def is_found(merged: Array) -> bool:
        return is_right(found, rounded(merged, dtype), change, noise)

    difference = float(norm(found - once)) / size
    kept = factor(found - base, change)
    if is_found(once):
        return Verdict(difference, *survival(kept))
    if is_found(update.merge(once)):
        return Verdict(difference, "applied twice, or scaled by 2")
    if abs(kept) < 0.1 and float(norm(found - base)) <= noise:
        return Verdict(difference, "lost")
    scale = kept
    for _ in range(3):  # rounding can shrink a factor
        own = factor(rounded(base + scale * change, dtype) - base, change)
        scale *= kept / own if own else 1
    if is_found(base + scale * change):
        return Verdict(difference, f"scaled by {scale:.3g}")
    return Verdict(difference, "changed")


def judge_without_update(update: Update, found: Array, wanted: Array) -> Verdict:
    """Return the verdict on a parameter that must not change: B is 0, or only a tied weight has an
    update.
    """
    if not np.array_equal(found, wanted):
        return Verdict(float("inf"), "changed", "without an update")
    return Verdict(0.0, "unchanged" if update.merge is np.copy else "no update")


def survival(kept: float) -> tuple[str, str]:
    """Return the word and the detail for a right merge, of whose update rounding kept a share."""
    if kept > 0.995:
        return "survived", ""
    if kept < 0.5:
        return "lost", f"rounding keeps {kept:.0%}"
    return "rounded", f"keeps {kept:.0%}"


def factor(found: Array, change: Array) -> float:
    return float(np.vdot(change, found) / np.vdot(change, change))


def is_right(found: Array, wanted: Array, change: Array, noise: float) -> bool:
    """Return whether merges differ by rounding only: in their norm, and in each expert's factor."""
    if not norm(found - wanted) <= noise:
        return False
    parts = (found, wanted, change)
    for one, right, own in zip(*parts, strict=True) if found.ndim == 3 else [parts]:
        spread = norm(one - right) / (norm(own) * own.size**0.5 or 1)  # of a mean of random errors
        if norm(own) and abs(factor(one - right, own)) > 0.01 + 6 * spread:
            return False
    return True


def read(model: Model, update: Update) -> tuple[Array, str]:
    """Return a parameter of the merged model, and its type."""
    found = model.find(update.name)
    if not found:
        raise Mistake(f"{model.folder}: has no {update.name}")
    values = join(found)
    if values.shape != update.weight.shape:
        shapes = f"{values.shape}, not {update.weight.shape}"
        raise Mistake(f"{model.folder}: {update.name} has shape {shapes}")
    return values, found[0][0].dtype


def others(base: Model, merged: Model) -> Iterator[str]:
    """Yield a line for each tensor without an update that differs from the base, or is missing."""
    for name, stored in base.tensors.items():
        if stored in base.taken or BUFFERS.fullmatch(name) or (name == HEAD and merged.tied):
            continue
        longer = [[one] for key, one in merged.tensors.items() if key.endswith(f".{name}")]
        found = merged.stored(name) or longer
        if not found:
            yield f"missing  {name}"
        elif not same(stored, found[0][0]):
            yield f"differs  {name}"
        merged.taken |= {one for matrix in found for one in matrix}
    for name in (k for k, one in merged.tensors.items() if one not in merged.taken):
        if name == HEAD and base.tied:
            embedding = (merged if merged.tied else base).find(HEAD)[0][0]
            if not same(embedding, merged.tensors[HEAD]):
                yield f"differs  {HEAD}"
        elif not BUFFERS.fullmatch(name):
            yield f"new      {name}"


def same(stored: Stored, found: Stored) -> bool:
    if stored.shape != found.shape:
        return False
    if stored.dtype == found.dtype:
        return stored.raw() == found.raw()
    return np.array_equal(rounded(stored.values(), found.dtype), found.values())


def compare(base: Model, adapter: Path, merged: Model, and_others: bool = False) -> bool:
    """Print a line for each parameter, and the verdicts. Return whether all updates survived."""
    verdicts: Counter[str] = Counter()
    for update in updates(base, adapter):
        difference, word, detail = judge(update, *read(merged, update))
        verdicts[word] += 1
        about = f"{word}, {detail}" if detail else word
        print(f"{difference:8.4f}  {about:22}  {update.name}")
    if not verdicts.keys() - {"no update", "unchanged"}:
        raise Mistake(f"{adapter}: s B A is zero everywhere, so a merge changes nothing")
    for word, number in verdicts.items():
        print(f"{word}: {number} of {verdicts.total()} parameters")
    wrong = list(others(base, merged)) if and_others else []
    print(*wrong, sep="\n", end="\n" if wrong else "")
    if and_others:
        print(f"other parameters: {len(wrong) or 'none'} changed")
    return verdicts.keys() <= set(KEPT) and not wrong


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="lora_conformance merged",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name in ("base", "adapter", "merged"):
        parser.add_argument(name, type=Path, metavar=name.upper())
    parser.add_argument(
        "--others-unchanged", action="store_true", help="also compare the weights without an update"
    )
    args = parser.parse_args(argv)
    try:
        for folder in (args.base, args.adapter, args.merged):
            if not folder.is_dir():
                raise Mistake(f"{folder} is not a folder")
        models = Model(args.base), args.adapter, Model(args.merged)
        return 0 if compare(*models, args.others_unchanged) else 1
    except ValueError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename}: cannot be read ({error.strerror})"
    print(f"lora_conformance merged: {message}", file=sys.stderr)
    return 2
