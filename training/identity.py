"""Identify a run by its method, its options, and hashes of its inputs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import file_sha256
from data.tokens import text_files
from lora.peft_config import CONFIG
from lora.save import WEIGHTS
from storage.weights import base_hashes
from training.options import MAY_CHANGE, Options, flag


@dataclass(frozen=True)
class RunIdentity:
    """The facts that identify a run, as stored in `run.json` and in checkpoints."""

    method: str
    options: dict[str, Any]
    base_sha256: dict[str, str]  # of the base's config, weights and tokenizer, as far as present
    book_sha256: list[str]  # of each file of --book, or of --data and --val-data
    init_adapter_sha256: dict[str, str] | None  # of the adapter's two files


def run_identity(options: Options, base_directory: Path) -> RunIdentity:
    """Identify a run by the options, and by the files of the base, the text and the adapter."""
    texts = text_files(options.book)
    texts += [path for path in (options.data, options.val_data) if path]
    init_adapter_sha256 = None
    if options.init_adapter:
        init_adapter_sha256 = {
            "config": file_sha256(options.init_adapter / CONFIG),
            "weights": file_sha256(options.init_adapter / WEIGHTS),
        }
    return RunIdentity(
        method=options.method,
        options=options.as_json(),
        base_sha256=base_hashes(base_directory),
        book_sha256=[file_sha256(path) for path in texts],
        init_adapter_sha256=init_adapter_sha256,
    )


def refuse_another_run(path: Path, then: dict[str, Any], now: RunIdentity) -> None:
    """Raise UserError if `now` differs from `then`, the identity stored in `path`. The message
    names the first difference.
    """
    try:
        difference = _difference(then, now)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--resume: {path}: damaged, or written by another version ({error!r:.80}); "
            "start again with --overwrite"
        ) from error
    if difference:
        raise UserError(f"--resume: {path}: {difference}")


def _difference(then: dict[str, Any], now: RunIdentity) -> str | None:
    """Describe the first difference in the method, the options, or the content of the inputs."""
    if then["method"] != now.method:
        return f"the method was {then['method']!s:.80} and is now {now.method}"

    # Compare the recipe first, because the recipe sets other options.
    names = now.options.keys() - MAY_CHANGE
    for name in sorted(names, key=lambda name: (name != "recipe", name)):
        before = then["options"][name]
        asked = now.options[name]
        if before != asked:
            return (
                f"{flag(name)} was {before!s:.80} and is now {asked!s:.80}; "
                "repeat the run's options"
            )

    contents = {
        "--base": (then["base_sha256"], now.base_sha256),
        _text_options(now.options): (then["book_sha256"], now.book_sha256),
        "--init-adapter": (then["init_adapter_sha256"], now.init_adapter_sha256),
    }
    for option, (before, asked) in contents.items():
        if before != asked:
            return f"{option}: the content has changed since the run began"
    return None


def _text_options(options: dict[str, Any]) -> str:
    if options["val_data"]:
        return "--data or --val-data"
    return "--data" if options["data"] else "--book"
