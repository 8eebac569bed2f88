"""Files from strangers: what is checked before memory is asked for.

`torch.load(weights_only=True)` runs no code, but believes what a pickle says: a few bytes make it
reserve all memory, unpack a view of 10^12 numbers over one, or hash nested tuples for ever. So
the pickle is first followed here, step by step, with nothing built. Only the small language is
known that torch.save writes for numbers, texts, lists, dicts and dense tensors.
"""

import math
import os
import re
import reprlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from pickletools import genops
from stat import S_ISREG
from zipfile import ZIP_STORED, ZipFile

import torch

from errors import UserError

MAX_HEADER = 1 << 19  # bytes of names and shapes: twice GPT-2 XL's with AdamW's state
MAX_DEPTH = 16
ZIP_START, ZIP_END = b"PK\3\4", b"PK\5\6"
END_BYTES = 22  # the end record of a zip without a comment
ITEM_BYTES = {
    "torch BoolStorage": 1, "torch ByteStorage": 1, "torch CharStorage": 1,
    "torch ShortStorage": 2, "torch IntStorage": 4, "torch LongStorage": 8,
    "torch HalfStorage": 2, "torch BFloat16Storage": 2, "torch FloatStorage": 4,
    "torch DoubleStorage": 8,
}
ORDERED_DICT = "collections OrderedDict"
TENSOR, PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
GLOBALS = {ORDERED_DICT, TENSOR, PARAMETER, *ITEM_BYTES}


def read_torch(path: Path, mapped: bool = False) -> object:
    """What torch.save wrote: plain data and dense tensors on the CPU.

    `mapped`: a zip's tensors lie in the file until they are used, and must be used at once.

    Raises UserError, before memory is asked for, for anything else, and for any size that the
    file does not hold.
    """
    path = Path(path)
    with refusing(path):
        check_regular(path)
        with open(path, "rb") as file:
            zipped = file.read(len(ZIP_START)) == ZIP_START
        (_check_archive if zipped else _check_legacy)(path)
        return torch.load(path, map_location="cpu", weights_only=True,
                          mmap=mapped and zipped)


def brief(value: object) -> str:
    """A value from a file, for a message: one printable line of bounded length."""
    return reprlib.repr(value)[:120]


def check_regular(path: Path) -> int:
    """The file's size. Raises UserError for a directory, a pipe or a device: it may never end."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{path}: cannot be read "
                        f"({getattr(error, 'strerror', error)})") from error
    if not S_ISREG(status.st_mode):
        raise UserError(f"{path}: cannot be read (not a regular file)")
    return status.st_size


def check_safetensors_header(path: Path) -> None:
    """Raises UserError for a header longer than any GPT-2's: its reader would hold all of it."""
    check_regular(path)
    with refusing(path), open(path, "rb") as file:
        if (length := int.from_bytes(file.read(8), "little")) > MAX_HEADER:
            raise UserError(f"{path}: damaged, or not a safetensors file "
                            f"(a header of {length:,} bytes)")


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turn all that the readers raise on a damaged or hostile file into one UserError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnpicklingError as error:  # torch's own text advises to load it all the same
        asked = f" (it asks for {error})" if isinstance(error, _NotPlain) else ""
        raise UserError(f"{path}: not a file of plain tensors{asked}; not read, "
                        "since such a pickle can run code") from error
    except Exception as error:  # torch.load raises whatever its unpickler meets
        first_sentence = re.split(r"\.\s|\n", str(error))[0]
        reason = ascii(first_sentence)[1:-1][:120] or type(error).__name__
        raise UserError(f"{path}: damaged, or not a file of tensors ({reason})") from error


class _NotPlain(UnpicklingError):
    """What a pickle asks for that is not of the known language."""


def _check_archive(path: Path) -> None:
    """torch.save's zip: records as they are, none twice, each storage as long as is said."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - END_BYTES))
        end = file.read(END_BYTES)
    if end[:4] != ZIP_END or int.from_bytes(end[12:16], "little") > MAX_HEADER:
        raise ValueError("no zip directory at its end, or a long one")
    with ZipFile(path) as archive:
        records = archive.infolist()
        if any(r.compress_type != ZIP_STORED or r.compress_size != r.file_size for r in records):
            raise ValueError("a compressed record")
        if len({r.filename.lower() for r in records}) < len(records) or records[0].header_offset:
            raise ValueError("a record twice, or bytes before the first")
        sizes = {r.filename: r.file_size for r in records}
        if sum(sizes.values()) > path.stat().st_size:
            raise ValueError("records that overlap")
        folder = records[0].filename.partition("/")[0]
        if sizes[f"{folder}/data.pkl"] > MAX_HEADER:
            raise ValueError("a long data.pkl")
        pickle = _Pickle(BytesIO(archive.read(f"{folder}/data.pkl")))
    for key, size in pickle.storages.items():
        if sizes.get(f"{folder}/data/{key}") != size:
            raise ValueError(f"storage {brief(key)} is not of {size:,} bytes")


def _check_legacy(path: Path) -> None:
    """What torch.save wrote before 1.6: five pickles, then each storage's length and bytes."""
    with open(path, "rb") as file:
        start = BytesIO(file.read(MAX_HEADER))
    _magic, _version, _system, value, keys = (_Pickle(start) for _ in range(5))
    listed = keys.result.items if isinstance(keys.result, _Box) else []
    if sorted(map(str, listed)) != sorted(value.storages):
        raise ValueError("storages that are not listed")
    if start.tell() + sum(8 + size for size in value.storages.values()) != path.stat().st_size:
        raise ValueError("storages of another size than the file")


@dataclass
class _Box:
    """A list, tuple or dict in the pickle; a dict's items are key, value, key, value."""

    kind: str
    items: list = field(default_factory=list)
    depth: int = 1

    def add(self, items: list) -> None:
        self.items += items
        self.depth = max([self.depth, *(x.depth + 1 for x in items if isinstance(x, _Box))])
        if self.depth > MAX_DEPTH:
            raise ValueError(f"data nested deeper than {MAX_DEPTH}")


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Storage:
    numel: int


class _Tensor:
    pass


class _Pickle:
    """Follows one pickle; `storages` are the bytes that each key's storage needs.

    Raises _NotPlain for all that torch.save does not write for plain data, ValueError or
    IndexError for a damaged pickle.
    """

    def __init__(self, file: BytesIO):
        self.stack: list = []
        self.marks: list[int] = []
        self.memo: dict = {}
        self.storages: dict[str, int] = {}
        for opcode, argument, _ in genops(file):
            self.step(opcode.name, argument)
        self.result = self.stack.pop()

    def step(self, name: str, argument: object) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "STOP":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append(None)
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "GLOBAL":
                if argument not in GLOBALS:
                    raise _NotPlain(ascii(argument)[:120])
                stack.append(_Global(argument))
            case "MARK":
                self.marks.append(len(stack))
            case "EMPTY_LIST" | "EMPTY_TUPLE" | "EMPTY_DICT":
                stack.append(_Box(name.removeprefix("EMPTY_")))
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = self.pop(int(name[5:]) if name[5:] else None)
                stack.append(_Box("TUPLE"))
                stack[-1].add(items)
            case "APPEND" | "APPENDS":
                items = self.pop(1 if name == "APPEND" else None)
                self.top("LIST").add(items)
            case "SETITEM" | "SETITEMS":
                self.set_items(self.pop(2 if name == "SETITEM" else None))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                self.share(self.memo[argument])
            case "BINPERSID":
                stack.append(self.storage(*self.arguments()))
            case "REDUCE":
                arguments = self.arguments()
                stack.append(self.call(stack.pop(), arguments))
            case "BUILD":  # a state dict's _metadata
                if stack.pop().kind != "DICT":
                    raise ValueError("a state that is no dict")
                self.top("DICT")
            case _:
                raise _NotPlain(f"opcode {name}")

    def pop(self, count: int | None) -> list:
        """The last `count` values, or those after the last mark, off the stack."""
        start = self.marks.pop() if count is None else len(self.stack) - count
        if start < (self.marks[-1] if self.marks else 0):
            raise ValueError("values that are not there")
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def top(self, kind: str) -> _Box:
        box = self.stack[-1]
        if not isinstance(box, _Box) or box.kind != kind:
            raise ValueError(f"no {kind.lower()} where one is needed")
        return box

    def set_items(self, items: list) -> None:
        if len(items) % 2 or not all(isinstance(key, str | int) for key in items[::2]):
            raise ValueError("a dict's key that is neither text nor whole number")
        self.top("DICT").add(items)

    def share(self, value: object) -> None:
        """Only what holds nothing else is used twice: shared boxes nest without end."""
        if isinstance(value, _Box):
            raise ValueError(f"a {value.kind.lower()} used twice")
        self.stack.append(value)

    def arguments(self) -> list:
        box = self.top("TUPLE")
        self.stack.pop()
        return box.items

    def storage(self, kind: str, item: _Global, key: str, device: str, numel: int,
                view: None = None) -> _Storage:
        size = ITEM_BYTES[item.name] * numel
        if (kind != "storage" or not isinstance(key, str) or not isinstance(device, str)
                or view is not None or size < 0 or self.storages.setdefault(key, size) != size):
            raise ValueError("a storage that is none")
        return _Storage(numel)

    def call(self, function: _Global, arguments: list) -> object:
        if function.name == ORDERED_DICT and not arguments:
            return _Box("DICT")
        if function.name == TENSOR and len(arguments) == 6:
            _check_view(*arguments[:4])
            return _Tensor()
        if function.name == PARAMETER and isinstance(arguments[0], _Tensor):
            return _Tensor()
        raise ValueError(f"a call of {function.name}")


def _check_view(storage: _Storage, offset: int, size: _Box, stride: _Box) -> None:
    """All of a tensor's numbers lie in its storage, each of them stored."""
    sizes, strides = size.items, stride.items
    if len(sizes) > MAX_DEPTH or min([offset, *sizes, *strides]) < 0:
        raise ValueError("a tensor that is none")
    count = math.prod(sizes)
    last = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    if count and max(count, last + 1) > storage.numel:
        raise ValueError("a view larger than its storage")
