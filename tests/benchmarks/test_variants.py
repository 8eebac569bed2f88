"""The benchmark of the variants: the bytes that each keeps for the backward pass."""

from benchmarks import variants
from tests.runs import stdout_of, table


def test_each_variants_bytes_and_times_are_beside_plain_loras(base, monkeypatch):
    chosen = {}
    for name in ("plain", "DoRA"):
        chosen[name] = (*variants.VARIANTS[name], "--block-size", "32")
    monkeypatch.setattr(variants, "VARIANTS", chosen)
    monkeypatch.setattr(variants, "MINI", base)
    monkeypatch.setattr(variants.torch, "set_num_threads", lambda count: None)

    _, _, *rows = table(stdout_of(variants.main, "--rounds", 2))
    assert [name for name, _, _ in rows] == list(chosen)
    plain, dora = [float(megabytes) for _, _, megabytes in rows]
    assert plain < dora
