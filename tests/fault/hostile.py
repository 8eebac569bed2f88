"""Files that are meant to do harm: pickles that run code or ask for everything, JSON, headers."""

import io
import pickle
import zipfile
from pathlib import Path

HUGE = (1 << 31) - 1
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def pickled(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + len(encoded).to_bytes(4, "little") + encoded


def call(module: str, name: str, *arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def storage(numel: int = 1, key: str = "0", kind: str = "FloatStorage") -> bytes:
    return (b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu")
            + number(numel) + b"tQ")


def tensor(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, **of: object) -> bytes:
    shapes = [b"(" + b"".join(map(number, shape)) + b"t" for shape in (size, stride)]
    return call("torch._utils", "_rebuild_tensor_v2", storage(**of), number(offset), *shapes,
                b"\x89", b"ccollections\nOrderedDict\n)R")


def held(value: bytes) -> bytes:
    """A state dict that holds the value under a name."""
    return pickled(b"}" + text("wte.weight") + value + b"s")


class Touch:
    """Its unpickling makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def code(marker: Path) -> dict[str, bytes]:
    """Pickles that would make the file, in the ways in which a pickle can run code."""
    command = f"open({str(marker)!r}, 'w')"
    return {
        "reduce": pickle.dumps({"wte.weight": Touch(marker)}, 2),
        "protocol 4": pickle.dumps({"wte.weight": Touch(marker)}, 4),
        "eval": held(call("builtins", "eval", text(command))),
        "old name": held(call("__builtin__", "eval", text(command))),
        "system": held(call("os", "system", text(f"touch '{marker}'"))),
        "inst": held(b"(" + text(command) + b"ibuiltins\neval\n"),
        "obj": held(b"(cbuiltins\neval\n" + text(command) + b"o"),
        "through torch": held(call("torch.serialization", "os.system", text(f"touch '{marker}'"))),
        "build": held(b"ccollections\nOrderedDict\n)R}" + text("__reduce__")
                      + call("builtins", "eval", text(command)) + b"sb"),
    }


ROWS = tensor((1 << 40, 2), (0, 0))  # 2^40 rows of one number
BOMBS = {
    "bytearray": held(call("builtins", "bytearray", number(1 << 36))),
    "tensor": held(call("torch", "FloatTensor", number(1 << 34))),
    "long view": held(tensor((1 << 34,), (1,))),
    "view of one": held(tensor((1 << 20, 1 << 20), (0, 0))),
    "negative stride": held(tensor((2,), (-1,))),
    "offset": held(tensor((1,), (1,), offset=1 << 40)),
    "long storage": held(tensor((1 << 34,), (1,), numel=1 << 34)),
    "negative storage": held(tensor((0,), (1,), numel=-1)),
    "other storage": held(tensor((1,), (1,), key="../../../etc/passwd")),
    "endless arguments": held(REBUILD + ROWS + b"R"),
    "endless items": held(b"ccollections\nOrderedDict\n" + ROWS + b"\x85R"),
    "endless state": held(b"ccollections\nOrderedDict\n)R" + ROWS + b"b"),
    "set": held(call("builtins", "set", ROWS)),
    "many dimensions": held(tensor((255**200,) * 2000, (1,) * 2000)),
    "doubled key": pickled(b"})" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(99)) + b"Ns"),
    "doubled list": pickled(b"}" + text("wte.weight") + b"]q\0s" + b"".join(
        text(str(i)) + b"](h%ch%ceq%cs" % (i, i, i + 1) for i in range(99))),
    "nested key": pickled(b"})" + b"\x85" * 400_000 + b"Ns"),
    "nested list": held(b"]" * 200_000 + b"a" * 199_999),
    "nested dict": held((b"}" + text("a")) * 9999 + b"N" + b"s" * 9999),
    "memo": held(b"Nr" + HUGE.to_bytes(4, "little")),
    "long string": held(b"X" + HUGE.to_bytes(4, "little")),
    "long bytes": held(b"\x8e" + (1 << 40).to_bytes(8, "little")),
    "long number": held(b"\x8b" + HUGE.to_bytes(4, "little")),
    "digits": held(b"I" + b"9" * 400_000 + b"\n"),
    "marks": pickled(b"(" * 500_000),
    "pops": pickled(b"0" * 1_000),
    "long": held(b"](" + b"N" * (4 << 20) + b"e"),
    "other storage type": held(tensor((1,), (1,), kind="UntypedStorage")),
    "two sizes": pickled(b"(" + tensor((1,), (1,)) + tensor((2,), (1,), numel=2) + b"t"),
    "no dict": pickled(b"K\x01"),
    "number as a name": pickled(b"}K\x01" + tensor((1,), (1,)) + b"s"),
    "cycle": pickled(b"}q\x00" + text("wte.weight") + b"h\x00s"),
    "empty": b"",
}


def archive(data_pkl: bytes, compression: int = zipfile.ZIP_STORED,
            storages: dict[str, bytes] | None = None) -> bytes:
    """The pickle and its storages' bytes as torch.save's zip has them."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as out:
        out.writestr("archive/data.pkl", data_pkl)
        out.writestr("archive/byteorder", b"little")
        for key, content in (storages or {"0": bytes(4)}).items():
            out.writestr(f"archive/data/{key}", content)
        out.writestr("archive/version", b"3\n")
    return file.getvalue()


def legacy(data: bytes, keys: list[str] = ("0",), storages: bytes = b"\1" + bytes(11)) -> bytes:
    """The pickle and its storages as torch.save wrote them before 1.6."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
    data = data.replace(b"tQ", b"NtQ")  # a storage also said which view of another it is
    starts = (0x1950A86A20F9469CFC6C, 1001, system)
    return (b"".join(pickle.dumps(value, 2) for value in starts) + data
            + pickle.dumps(list(keys), 2) + storages)
