"""Seeded damage: each mutator gets a generator and a good file's bytes, and returns bad bytes."""

import json
import math
import struct
from contextlib import suppress
from random import Random
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

FINITE = (0, 1, -1, 2, 7, 255, 65535, 0.5, -0.0, 1e-320, 1e308)
LARGE = (2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, -(2**63))
NOT_FINITE = (math.nan, math.inf)
NUMBERS = (*FINITE, *LARGE, *NOT_FINITE)
NAMES = ("", "gpt2", "LORA", "c_attn", "wte", "true", "../../etc/passwd", "/dev/zero")
CHARACTERS = ("a\nb", "\x1b[2J", "\0", "\ud800", "\u202e", "$x_{", "{}", "%s")
TEXTS = (*NAMES, *CHARACTERS, "é" * 40, "x" * 7_000, "9" * 5000)
PIECES = (*" \n\r\t\0\ufeff\u3000汉😀é\x1c\x85\u2028a7!", "<|endoftext|>", "'ll")
DTYPES = ("F16", "BF16", "F64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "F4", "X", "", None)


def mutate_bytes(rng: Random, data: bytes) -> bytes:
    """Flip, set, cut, insert, double or move bytes, one to four times. Rarely return noise."""
    if rng.random() < 0.02:
        return rng.randbytes(rng.choice((0, 1, 8, 100, 5000)))
    for _ in range(rng.randint(1, 4)):
        a, b, c = sorted(_place(rng, data) for _ in range(3))
        span = rng.choice((1, 2, 4, 16, 300, 5000))
        fill = bytes([rng.choice((0, 255, 127, 128, 65))]) * rng.choice((1, 2, 4, 8, 64))
        flipped = bytearray(data)
        if data:
            for _ in range(rng.choice((1, 1, 1, 8, 64))):
                flipped[_place(rng, data) % len(data)] ^= 1 << rng.randrange(8)
        changes = (
            bytes(flipped),
            bytes(flipped),
            data[:b],
            data[:a] + fill + data[a + len(fill) :],
            data[:b] + data[b + span :],
            data[:b] + rng.randbytes(span) + data[b:],
            data[: b + span] + data[b:],
            data[:a] + data[b:c] + data[a:b] + data[c:],
        )
        data = rng.choice(changes)
    return data


def _place(rng: Random, data: bytes) -> int:
    """Prefer a file's ends, where the headers are. Most of a file is numbers."""
    near = rng.randrange(min(len(data), 600) + 1)
    return rng.choice((near, len(data) - near, rng.randrange(len(data) + 1)))


def _nested(rng: Random, fields: dict) -> dict:
    """Return this object or, with equal chance, an object inside it."""
    children = []
    for value in fields.values():
        children += value if isinstance(value, list) else [value]
    inner = [child for child in children if isinstance(child, dict)]
    if inner and rng.random() < 0.5:
        return _nested(rng, rng.choice(inner))
    return fields


def mutate_json(rng: Random, data: bytes) -> bytes:
    """Change, drop, add or repeat a field, or change the bytes."""
    if rng.random() < 0.2:
        return mutate_bytes(rng, data)
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        fields = _nested(rng, value)
        key = rng.choice([*fields, rng.choice(TEXTS)])
        if rng.random() < 0.2:
            fields.pop(key, None)
        else:
            fields[key] = _hostile(rng)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.1:
        text = text[:-1] + f", {json.dumps(rng.choice(list(value) or ['x']))}: 1}}"
    if rng.random() < 0.05:
        text = rng.choice(("[]", "null", "3", '"x"', "", f"[{text}]", text + text, "[" * 9**5))
    return text.encode("utf-8", rng.choice(("replace", "surrogatepass")))


def _hostile(rng: Random, depth: int = 3) -> Any:
    kinds = 8 if depth else 6
    kind = rng.randrange(kinds)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind < 5:
        return rng.choice(TEXTS)
    if kind == 5:
        return rng.choice((None, True, False, [], {}, json.loads("[" * 400 + "]" * 400)))
    items = [_hostile(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 6:
        return items * rng.choice((1, 1, 50))
    return {rng.choice(TEXTS): item for item in items}


def mutate_text(rng: Random, data: bytes) -> bytes:
    """Insert white space, controls, separators, other scripts or long runs, or change bytes."""
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(data) + 1)
        piece = rng.choice(PIECES)
        times = rng.choice((1, 2, 50, 70_000))
        data = data[:start] + (piece * times).encode() + data[start:]
    if rng.random() < 0.5:
        return mutate_bytes(rng, data)
    return data


def mutate_safetensors(rng: Random, data: bytes) -> bytes:
    """Change the bytes, the tensors of a whole file, or the header's entries."""
    chance = rng.random()
    if chance < 0.2:
        return mutate_bytes(rng, data)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    if chance < 0.6:
        # Sorted, because the reader's order varies.
        tensors = dict(sorted(safetensors.torch.load(data).items()))
        return safetensors.torch.save(_change_tensors(rng, tensors), header["__metadata__"])
    for _ in range(rng.choice((1, 1, 2))):
        with suppress(KeyError, TypeError, AttributeError):  # after an earlier change
            _change_header(rng, header)
    text = json.dumps(header)
    if rng.random() < 0.1:  # a duplicate name, with other bytes
        again = {rng.choice([*header, "x"]): rng.choice([*header.values(), {}])}
        text = text[:-1] + ", " + json.dumps(again)[1:]
    if rng.random() < 0.1:
        start = rng.randrange(len(body) // 4) * 4
        infinite = body[:start] + struct.pack("<f", rng.choice(NOT_FINITE)) + body[start + 4 :]
        body = rng.choice((body[:-4], body + bytes(4), b"", infinite))
    claimed = rng.choice(LARGE) if rng.random() < 0.1 else len(text)  # json.dumps: ASCII
    return struct.pack("<Q", claimed % 2**64) + text.encode() + body


def _change_tensors(rng: Random, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace, rename or drop one or two tensors."""
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice(list(tensors))
        value = tensors.pop(key)
        flat = value.flatten().clone()
        if len(flat) and value.is_floating_point():  # the first change may have changed the type
            flat[rng.randrange(len(flat))] = rng.choice((1e38, -1e-40, float("nan"), float("-inf")))
        changed = flat.view(value.shape)
        if rng.random() < 0.8:
            casts = (value.half(), value.bfloat16(), value.double(), value.int(), value > 0)
            shapes = (value.t() if value.ndim == 2 else value[None], flat, flat[:1], flat[:0])
            others = (torch.zeros(value.shape), torch.zeros(()), torch.zeros(2), value + 1)
            choices = (changed, changed, *casts, *shapes, *others)
            tensors[key] = rng.choice(choices).contiguous()
        elif rng.random() < 0.8:
            name = rng.choice((*NAMES, *CHARACTERS, f"_orig_mod.{key}", f"transformer.{key}"))
            tensors[name.encode("utf-8", "replace").decode()] = value
    return tensors


def _change_header(rng: Random, header: dict) -> None:
    key = rng.choice(list(header))
    other = rng.choice(list(header))
    entry = header[key]
    shape = entry.get("shape", [])
    match rng.randrange(8):
        case 0:
            header[key] = header[other]
            header[other] = entry
        case 1:
            entry["data_offsets"] = header[other]["data_offsets"]
        case 2:
            shift = rng.choice((-8, -4, 1, 4, 2**40))
            entry["data_offsets"] = [x + shift * rng.randrange(2) for x in entry["data_offsets"]]
        case 3:
            shapes = ([], [-1], [2**62, 4], [0, 2**63], [2**32, 2**32], [1.5], [True])
            entry["shape"] = rng.choice((*shapes, shape[::-1], [*shape, 1], shape * 99))
        case 4:
            entry["dtype"] = rng.choice(DTYPES)
        case 5:
            name = rng.choice((*TEXTS, key + "x", key.replace("0", "1"), "__metadata__"))
            header[name] = header.pop(key)
        case 6:
            del header[key]
        case 7:
            place = rng.choice((header, entry))
            place[rng.choice((*TEXTS, *place))] = _hostile(rng)
