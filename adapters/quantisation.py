"""Choose how a base is quantised: as the user asks, or as it was when its adapter was trained."""

from collections.abc import Collection
from pathlib import Path

from common.cli import NONE
from common.errors import UserError
from common.files import brief
from lora.files import QUANTISED, adapter_path, read_header
from lora.quantised import LAYERS


def recorded_quantisation(adapter: Path) -> str | None:
    """Return how the base was quantised when the adapter was trained, by its file's header.

    Raises UserError for a kind that is not known here.
    """
    path = adapter_path(adapter)
    if not path.exists():  # `load_adapter` says what is missing
        return None
    kind = read_header(adapter).get(QUANTISED)
    if kind is not None and kind not in LAYERS:
        raise UserError(f"{path}: its base was quantised to {brief(kind)}, which is not known here")
    return kind


def choose_quantisation(asked: str | None, adapters: Collection[Path]) -> str | None:
    """Return the kind of `LAYERS` to which the base is quantised, or None.

    That is what was asked for, or else what the adapters record; this is then printed. Raises
    UserError if nothing was asked for and they record different things.
    """
    if asked == NONE:
        return None
    if asked is not None:
        return asked

    recorded = {recorded_quantisation(adapter) for adapter in adapters}
    if len(recorded) > 1:
        kinds = " and ".join(sorted(kind or NONE for kind in recorded))
        raise UserError(
            f"--quantise: these adapters were trained on bases quantised in different ways "
            f"({kinds}); choose one"
        )
    kind = recorded.pop() if recorded else None
    if kind:
        print(f"the base is quantised to {kind}, as in the adapter's training (--quantise)")
    return kind
