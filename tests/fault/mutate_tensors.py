"""Seeded damage to files of tensors: their headers, records, pickles, or the tensors themselves."""

import io
import json
import struct
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import safetensors.torch
import torch

from tests.fault import hostile
from tests.fault.mutate import NUMBERS, TEXTS, hostile_value, mutate_bytes

BIG = struct.Struct("<Q")

# --- tensors -----------------------------------------------------------------------------------


def mutate_state(rng: Random, state: dict) -> dict:
    """One or two values of a state dict replaced, renamed or lost, in a file that is whole."""
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice(list(state) or [""])
        value = state.pop(key, None)
        if isinstance(value, dict) and value:
            state[key] = mutate_state(rng, dict(value))
        elif rng.random() < 0.8:
            state[key] = _other(rng, value)
        elif rng.random() < 0.8:
            state[rng.choice((*TEXTS[:-1], f"_orig_mod.{key}", f"transformer.{key}"))] = value
    return state


def _other(rng: Random, value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or value.numel() > 1 << 20:
        return hostile_value(rng)
    changed = value.contiguous().clone()
    flat = changed.view(-1)  # shares its numbers with `changed`
    if flat.is_floating_point() and len(flat):
        flat[rng.randrange(len(flat))] = rng.choice((1e38, -1e-40, float("nan"), float("-inf")))
    return rng.choice((
        changed, changed, value.half(), value.bfloat16(), value.double(), value.int(), value > 0,
        value.t() if value.ndim == 2 else value[None], value.flatten(), flat[:1], flat[:0],
        torch.zeros(()).expand(value.shape), torch.zeros(()).expand(1 << 40), torch.zeros(()),
        value + 1, torch.zeros(()).expand(2), [value], {"a": value},
    ))


# --- safetensors -------------------------------------------------------------------------------


def mutate_safetensors(rng: Random, data: bytes) -> bytes:
    """The header's entries changed, swapped, doubled, lost; or the tensors, or the bytes."""
    chance = rng.random()
    if chance < 0.2:
        return mutate_bytes(rng, data)
    if chance < 0.6:
        # Sorted, because the reader returns them in another order each time.
        tensors = mutate_state(rng, dict(sorted(safetensors.torch.load(data).items())))
        return safetensors.torch.save({
            key.encode("utf-8", "replace").decode(): x.contiguous() for key, x in tensors.items()
            if isinstance(x, torch.Tensor) and x.numel() < 1 << 20})
    length = BIG.unpack_from(data)[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    for _ in range(rng.choice((1, 1, 2))):
        with suppress(KeyError, TypeError, IndexError):  # what an earlier change spoiled
            rng.choice(HEADER_CHANGES)(rng, header)
    text = json.dumps(header)
    if rng.random() < 0.1:  # a name twice, the second time for other bytes
        again = {rng.choice([*header, "x"]): rng.choice([*header.values(), {}])}
        text = text[:-1] + ", " + json.dumps(again)[1:]
    if rng.random() < 0.1:
        body = rng.choice((body[:-4], body + bytes(4), b"", _not_finite(rng, body)))
    encoded = text.encode()
    claimed = rng.choice(NUMBERS[:15]) if rng.random() < 0.1 else len(encoded)
    return BIG.pack(claimed % 2**64) + encoded + body


def _entry(rng: Random, header: dict) -> dict:
    return header[rng.choice([key for key in header if key != "__metadata__"] or ["none"])]


def _swap_entries(rng: Random, header: dict) -> None:
    a, b = rng.choice(list(header)), rng.choice(list(header))
    header[a], header[b] = header[b], header[a]


def _copy_offsets(rng: Random, header: dict) -> None:
    _entry(rng, header)["data_offsets"] = _entry(rng, header)["data_offsets"]


def _shift_offsets(rng: Random, header: dict) -> None:
    entry = _entry(rng, header)
    entry["data_offsets"] = [x + rng.choice((-8, -4, 1, 4, 2**40)) for x in entry["data_offsets"]]


def _change_shape(rng: Random, header: dict) -> None:
    entry = _entry(rng, header)
    entry["shape"] = rng.choice((entry["shape"][::-1], [], [-1], [*entry["shape"], 1], [2**62, 4],
                                 [0, 2**63], [2**32, 2**32], entry["shape"] * 99, [1.5], [True]))


def _change_type(rng: Random, header: dict) -> None:
    _entry(rng, header)["dtype"] = rng.choice(
        ("F16", "BF16", "F64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "F4", "X", "", None))


def _rename(rng: Random, header: dict) -> None:
    key = rng.choice(list(header))
    header[rng.choice((*TEXTS, key + "x", key.replace("0", "1"), "__metadata__"))] = header.pop(key)


def _lose(rng: Random, header: dict) -> None:
    del header[rng.choice(list(header))]


def _pollute(rng: Random, header: dict) -> None:
    place = rng.choice((header, _entry(rng, header)))
    place[rng.choice((*TEXTS, *place))] = hostile_value(rng)


def _not_finite(rng: Random, body: bytes) -> bytes:
    start = rng.randrange(len(body) // 4) * 4
    return body[:start] + struct.pack("<f", rng.choice(NUMBERS[-2:])) + body[start + 4 :]


HEADER_CHANGES = (_swap_entries, _copy_offsets, _shift_offsets, _change_shape, _change_type,
                  _rename, _lose, _pollute)


# --- torch.save --------------------------------------------------------------------------------


def mutate_torch(rng: Random, data: bytes, marker: Path) -> bytes:
    """A zip's record changed with its checksum right, a hostile pickle, or tensors or bytes."""
    chance = rng.random()
    if chance < 0.2:
        harmful = list({**hostile.BOMBS, **hostile.code(marker)}.values())
        wrap = rng.choice((hostile.archive, hostile.legacy, bytes))
        return wrap(rng.choice(harmful))
    if chance < 0.5:
        file = io.BytesIO()
        state = mutate_state(rng, torch.load(io.BytesIO(data), weights_only=True))
        torch.save(state, file, _use_new_zipfile_serialization=rng.random() < 0.7)
        return file.getvalue()
    if chance < 0.7 or not zipfile.is_zipfile(io.BytesIO(data)):
        return mutate_bytes(rng, data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    for _ in range(rng.choice((1, 1, 2))):
        rng.choice(RECORD_CHANGES)(rng, records)
    file = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", kind) as archive:
        warnings.simplefilter("ignore")  # a name twice
        for name, content in records:
            archive.writestr(name, content)
        archive.comment = rng.choice((b"", b"", b"", b"PK\5\6" + bytes(18)))
    return file.getvalue()


def _damage_pickle(rng: Random, records: list) -> None:
    for i, (name, content) in enumerate(records):
        if name.endswith("data.pkl"):
            records[i] = (name, mutate_bytes(rng, content))


def _damage_record(rng: Random, records: list) -> None:
    i = rng.randrange(len(records))
    records[i] = (records[i][0], mutate_bytes(rng, records[i][1]))


def _swap_contents(rng: Random, records: list) -> None:
    i, j = rng.randrange(len(records)), rng.randrange(len(records))
    (a, x), (b, y) = records[i], records[j]
    records[i], records[j] = (a, y), (b, x)


def _double_record(rng: Random, records: list) -> None:
    records.append((rng.choice(records)[0], rng.choice(records)[1]))


def _rename_record(rng: Random, records: list) -> None:
    i = rng.randrange(len(records))
    name = rng.choice((*TEXTS[:-1], records[i][0].upper(), "../" + records[i][0]))
    name = name.encode("utf-8", "replace").decode().replace("\0", "0")  # what zipfile can write
    records[i] = (name or "x", records[i][1])


def _lose_record(rng: Random, records: list) -> None:
    if len(records) > 1:
        del records[rng.randrange(len(records))]


RECORD_CHANGES = (_damage_pickle, _damage_pickle, _damage_pickle, _damage_record, _swap_contents,
                  _double_record, _rename_record, _lose_record)
