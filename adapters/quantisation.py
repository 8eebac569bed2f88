"""Choose how to quantise a base: as the user asks, or as in the adapter's training."""

from collections.abc import Collection
from pathlib import Path

from common.cli import NONE
from common.errors import UserError, as_failure
from common.files import brief
from lora.load import read_header
from lora.quantised import LAYERS
from lora.save import QUANTISED, WEIGHTS


def recorded_quantisation(adapter: Path) -> str | None:
    """Return how the adapter's base was quantised, as the adapter's file records it, or None."""
    path = adapter / WEIGHTS
    if not path.exists():  # `load_adapter` reports the missing file
        return None
    with as_failure():
        kind = read_header(adapter).get(QUANTISED)
    if kind is not None and kind not in LAYERS:
        raise UserError(f"{path}: the base was quantised to {brief(kind)}, which is unknown")
    return kind


def common_quantisation(adapters: Collection[Path]) -> str | None:
    """Return the quantisation that all these adapters record: a key of `LAYERS`, or None."""
    kinds = {adapter: recorded_quantisation(adapter) for adapter in adapters}
    if not kinds:
        return None
    (first, expected), *others = kinds.items()
    for adapter, kind in others:
        if kind != expected:
            raise UserError(
                f"{first} ({expected or NONE}) and {adapter} ({kind or NONE}): were trained on "
                "bases quantised in different ways; first train one adapter on the base of the "
                "other: train.py lora --init-adapter A --quantise KIND"
            )
    return expected


def choose_quantisation(asked: str | None, adapters: Collection[Path]) -> str | None:
    """Return how to quantise the base: a key of `LAYERS`, or None.

    `asked` is the value of --quantise, which wins. Without --quantise, use and print the
    quantisation that the adapters record. Raises UserError if they record different quantisations.
    """
    if asked == NONE:
        return None
    if asked is not None:
        return asked

    kind = common_quantisation(adapters)
    if kind:
        print(f"the base is quantised to {kind}, as in the adapter's training (--quantise)")
    return kind
