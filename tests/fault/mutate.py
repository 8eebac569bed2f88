"""Seeded damage: each mutator takes a generator and a good file's bytes, and gives bad bytes."""

import json
from random import Random
from typing import Any

NUMBERS = (0, 1, -1, 2, 7, 255, 65535, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64,
           10**30, 10**400, -(2**63), 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"))
TEXTS = ("", "gpt2", "LORA", "c_attn", "wte", "../../etc/passwd", "/dev/zero", "a\nb", "\x1b[2J",
         "\0", "\ud800", "\u202e", "x" * 7_000, "$x_{", "{}", "%s", "é" * 40, "true", "9" * 5000)


def mutate_bytes(rng: Random, data: bytes) -> bytes:
    """One to four of: bits flipped, bytes set, cut, put in, doubled, moved; seldom only noise."""
    if rng.random() < 0.02:
        return rng.randbytes(rng.choice((0, 1, 8, 100, 5000)))
    for _ in range(rng.randint(1, 4)):
        data = rng.choice(BYTE_CHANGES)(rng, data)
    return data


def _flip(rng: Random, data: bytes) -> bytes:
    if not data:
        return data
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 8, 64))):
        changed[_place(rng, data) % len(data)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _set(rng: Random, data: bytes) -> bytes:
    start, length = _place(rng, data), rng.choice((1, 2, 4, 8, 64))
    fill = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80", rng.randbytes(1)))
    return data[:start] + fill * length + data[start + length :]


def _cut(rng: Random, data: bytes) -> bytes:
    start = _place(rng, data)
    return data[:start] if rng.random() < 0.5 else data[:start] + data[start + _span(rng) :]


def _insert(rng: Random, data: bytes) -> bytes:
    start = _place(rng, data)
    return data[:start] + rng.randbytes(_span(rng)) + data[start:]


def _double(rng: Random, data: bytes) -> bytes:
    start = _place(rng, data)
    return data[: start + _span(rng)] + data[start:]


def _swap(rng: Random, data: bytes) -> bytes:
    a, b, c = sorted(_place(rng, data) for _ in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


BYTE_CHANGES = (_flip, _flip, _set, _cut, _insert, _double, _swap)


def _place(rng: Random, data: bytes) -> int:
    """Headers and directories stand at a file's ends, and most of a file is numbers."""
    near = rng.randrange(min(len(data), 600) + 1)
    return rng.choice((near, len(data) - near, rng.randrange(len(data) + 1)))


def _span(rng: Random) -> int:
    return rng.choice((1, 2, 4, 16, 300, 5000))


# --- JSON --------------------------------------------------------------------------------------


def mutate_json(rng: Random, data: bytes) -> bytes:
    """A field changed, lost, added or said twice; or the bytes changed."""
    if rng.random() < 0.2:
        return mutate_bytes(rng, data)
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        key = rng.choice([*value, rng.choice(TEXTS)])
        if rng.random() < 0.2:
            value.pop(key, None)
        else:
            value[key] = hostile_value(rng)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.1:
        text = text[:-1] + f", {json.dumps(rng.choice(list(value) or ['x']))}: 1}}"
    if rng.random() < 0.05:
        text = rng.choice(("[]", "null", "3", '"x"', "", f"[{text}]", text + text, "[" * 9**5))
    return text.encode("utf-8", rng.choice(("replace", "surrogatepass")))


def hostile_value(rng: Random, depth: int = 3) -> Any:
    kind = rng.randrange(8 if depth else 6)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind < 5:
        return rng.choice(TEXTS)
    if kind == 5:
        return rng.choice((None, True, False, [], {}, _nested(rng.choice((10, 20, 400)))))
    items = [hostile_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return items * rng.choice((1, 1, 50)) if kind == 6 else {rng.choice(TEXTS): x for x in items}


def _nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


# --- books -------------------------------------------------------------------------------------


def mutate_text(rng: Random, data: bytes) -> bytes:
    """White space, controls, separators, other scripts and long runs put in; or bytes changed."""
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(data) + 1)
        piece = rng.choice((" ", "\n", "\r", "\t", "\0", "\ufeff", "\u3000", "<|endoftext|>", "汉",
                            "😀", "'ll", "é", "\x1c", "\x85", "\u2028", "a", "7", "!"))
        times = rng.choice((1, 2, 50, 70_000))
        data = data[:start] + (piece * times).encode() + data[start:]
    return mutate_bytes(rng, data) if rng.random() < 0.5 else data
