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


def choose_quantisation(asked: str | None, adapters: Collection[Path]) -> str | None:
    """Return how to quantise the base: a key of `LAYERS`, or None.

    `asked` is the value of --quantise, which wins. Without --quantise, use and print the
    quantisation that the adapter records. `adapters` contains one adapter, or none.
    """
    if asked == NONE:
        return None
    if asked is not None:
        return asked

    for adapter in adapters:
        kind = recorded_quantisation(adapter)
        if kind:
            print(f"the base is quantised to {kind}, as in the adapter's training (--quantise)")
            return kind
    return None
