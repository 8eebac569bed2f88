"""Hostile files: refused in one line that names them, quickly, and with nothing asked for."""

import io
import json
import os
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from data.tokens import load_tokens
from errors import UserError
from files import read_json
from tests.fault import hostile
from tests.helpers import assert_refused, tiny_gpt2_directory
from untrusted import check_safetensors_header, read_torch

PICKLE = "pytorch_model.bin"
WRAPS = [hostile.archive, hostile.legacy]
ONE = hostile.held(hostile.tensor((1,), (1,)))


def write(directory: Path, content: bytes) -> Path:
    path = directory / PICKLE
    path.write_bytes(content)
    return path


def refusal(path: Path) -> str:
    """Why the file is not read: one printable line after its name, said within two seconds."""
    began = time.process_time()
    with pytest.raises(UserError) as refused:
        read_torch(path)
    assert time.process_time() - began < 2
    name, _, reason = str(refused.value).partition(": ")
    assert name == str(path) and reason.isprintable() and len(reason) < 300
    return reason


# --- what torch.save writes is read ------------------------------------------------------------

STATE = {
    "parameters": {"a": torch.arange(6.0).view(2, 3).t(), "empty": torch.empty(0, 5)},
    "dtypes": [torch.ones(3, dtype=dtype) for dtype in (
        torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)],
    "parameter": torch.nn.Parameter(torch.tensor(2.5)),
    "rng": torch.get_rng_state(),
    "numbers": (3, tuple(range(625)), None, -2**40, 1e-300, True, (0.9, 0.999), (), [], {}),
    7: "é\n\ud800",
}


@pytest.mark.parametrize("zipped", [True, False])
def test_plain_data_and_tensors_are_read_as_torch_reads_them(tmp_path, zipped):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    shared = torch.ones(4)
    state = {**STATE, "module": module.state_dict(), "optimizer": optimizer.state_dict(),
             "shared": [shared, shared, shared[1:]]}
    torch.save(state, tmp_path / PICKLE, _use_new_zipfile_serialization=zipped)
    expected = torch.load(tmp_path / PICKLE, weights_only=True)
    read = read_torch(tmp_path / PICKLE)
    assert read.pop(7) == expected.pop(7) == STATE[7]  # assert_close knows no text
    torch.testing.assert_close(read, expected, rtol=0, atol=0)


# --- pickles -----------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("bomb", hostile.BOMBS)
def test_a_pickle_that_asks_for_everything_is_refused(tmp_path, bomb, wrap):
    directory, _ = tiny_gpt2_directory(tmp_path)
    (directory / "model.safetensors").unlink()
    write(directory, wrap(hostile.BOMBS[bomb]))
    began = time.process_time()
    assert assert_refused(directory, PICKLE).isprintable()
    assert time.process_time() - began < 2


@pytest.mark.parametrize("wrap", [*WRAPS, bytes])
@pytest.mark.parametrize("way", hostile.code(Path()))
def test_a_pickle_that_runs_code_is_refused_and_does_not_run_it(tmp_path, way, wrap):
    marker = tmp_path / "marker"
    reason = refusal(write(tmp_path, wrap(hostile.code(marker)[way])))
    assert not marker.exists()
    assert "can run code" in reason


def test_memory_is_not_asked_for(tmp_path):
    """In a process of its own, whose peak is known: all bombs together take less than 200 MB."""
    for name, bomb in hostile.BOMBS.items():
        (tmp_path / name).write_bytes(hostile.archive(bomb))
    script = f"""
import resource
from pathlib import Path
from errors import UserError
from untrusted import check_safetensors_header, read_torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in Path({str(tmp_path)!r}).iterdir():
    try:
        read_torch(path)
    except UserError:
        pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    output = subprocess.run([sys.executable, "-c", script], text=True, check=True,
                            stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent).stdout
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(output) * unit < 200e6


# --- archives ----------------------------------------------------------------------------------


def test_the_archive_of_the_tests_is_read_when_it_is_not_damaged(tmp_path):
    for wrap in WRAPS:
        assert read_torch(write(tmp_path, wrap(ONE)))["wte.weight"].tolist() == [0.0]


def with_record(name: str, count: int = 1) -> bytes:
    content = io.BytesIO(hostile.archive(ONE))
    with zipfile.ZipFile(content, "a") as archive:
        for i in range(count):
            archive.writestr(name.format(i), ONE)
    return content.getvalue()


def oversized() -> bytes:
    """Its directory says that the storage is 4 GB long, as the pickle does."""
    pickle = hostile.held(hostile.tensor((1,), (1,), numel=1 << 30))
    sizes, huge = (struct.pack("<LL", size, size) for size in (4, 0xFFFF0000))
    return hostile.archive(pickle).replace(sizes, huge)


ARCHIVES = {
    "compressed": (hostile.archive(ONE, zipfile.ZIP_DEFLATED), "a compressed record"),
    "zip bomb": (hostile.archive(bytes(1 << 28), zipfile.ZIP_DEFLATED), "a compressed record"),
    "no pickle": (hostile.archive(ONE).replace(b"data.pkl", b"atad.pkl"), "archive/data.pkl"),
    "bytes before": (hostile.archive(ONE)[:64] + hostile.archive(ONE), "before the first"),
    "bytes after": (hostile.archive(ONE) + b"x", "no zip directory at its end"),
    "a record twice": (with_record("archive/DATA.pkl"), "a record twice"),
    "a long directory": (with_record("archive/" + "x" * 9999 + "{}", 150), "or a long one"),
    "oversized": (oversized(), "records that overlap"),
    "short storage": (hostile.archive(ONE, storages={"0": bytes(3)}), "not of 4 bytes"),
    "long storage": (hostile.archive(ONE, storages={"0": bytes(5)}), "not of 4 bytes"),
    "missing storage": (hostile.archive(ONE, storages={"1": bytes(4)}), "not of 4 bytes"),
    "TorchScript": (with_record("archive/constants.pkl"), "TorchScript"),
    "unlisted storage": (hostile.legacy(ONE, [], b""), "storages that are not listed"),
    "storage listed twice": (hostile.legacy(ONE, ["0", "0"]), "storages that are not listed"),
    "storage cut": (hostile.legacy(ONE, storages=b"\1" + bytes(10)), "of another size"),
    "bytes after storage": (hostile.legacy(ONE, storages=b"\1" + bytes(12)), "of another size"),
    "of another length": (hostile.legacy(ONE, storages=b"\2" + bytes(11)), "wrong byte size"),
    "a zip's first bytes": (b"PK\3\4", "no zip directory at its end"),
    "nothing": (b"", "exhausted before seeing STOP"),
}


@pytest.mark.parametrize("archive", ARCHIVES)
def test_an_archive_that_is_not_torchs_is_refused(tmp_path, archive):
    content, reason = ARCHIVES[archive]
    assert reason in refusal(write(tmp_path, content))


# --- what is no file ---------------------------------------------------------------------------


@pytest.mark.parametrize("read", [
    read_torch, read_json, check_safetensors_header, lambda path: load_tokens(path, 300),
], ids=["torch", "json", "safetensors", "book"])
@pytest.mark.parametrize("kind", ["directory", "device"])
def test_what_is_no_regular_file_is_not_opened(tmp_path, read, kind):
    """A pipe would wait and a device may never end."""
    path = tmp_path / "name"
    path.mkdir() if kind == "directory" else path.symlink_to(os.devnull)
    with pytest.raises(UserError, match=r"^.*name: cannot be read \(not a regular file\)$"):
        read(path)


# --- JSON --------------------------------------------------------------------------------------

JSON = {
    "twice": ('{"r": 8, "r": 8}', "a name twice"),
    "twice inside": ('{"x": [{"r": 8, "r": 4}]}', "a name twice"),
    "NaN": ('{"r": NaN}', "not finite"),
    "infinity": ('{"r": [-Infinity]}', "not finite"),
    "too large": ('{"r": 1e999}', "not finite"),
    "65 bits": (f'{{"r": {2**63}}}', "more than 64 bits"),
    "many digits": ('{"r": ' + "9" * 9999 + "}", "not valid JSON"),
    "nested": ('{"x": ' + "[1," * 16 + "1" + "]" * 16 + "}", "nested deeper than 16"),
    "nested beyond reading": ('{"x": ' * 99_999, "not valid JSON"),
    "many": ("[" * 500_000, "not valid JSON"),
}


@pytest.mark.parametrize("content", JSON)
def test_json_that_readers_may_take_for_different_things_is_refused(tmp_path, content):
    text, reason = JSON[content]
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        read_json(path)
    message = str(refused.value)
    assert message.startswith(f"{path}: ") and reason in message
    assert message.isprintable() and len(message) < 500


def test_json_at_the_limits_is_read(tmp_path):
    value = {"x": [[1, -(2**63) + 1, 1e300, None, True]], "deep": 0, "\ud800\n": "é"}
    for _ in range(15):
        value["deep"] = [value["deep"]]
    (tmp_path / "x.json").write_text(json.dumps(value))
    assert read_json(tmp_path / "x.json") == value
