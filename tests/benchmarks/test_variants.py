"""The benchmark of the variants: what each keeps for the backward pass."""

from benchmarks import variants
from tests.runs import stdout_of


def test_each_variants_bytes_and_times_are_beside_plain_loras(base, monkeypatch):
    chosen = {
        name: ("--block-size", "32", *variants.VARIANTS[name])
        for name in ("plain", "DoRA", "LoRA-FA")
    }
    monkeypatch.setattr(variants, "VARIANTS", chosen)
    monkeypatch.setattr(variants, "MINI", base)
    monkeypatch.setattr(variants.torch, "set_num_threads", lambda count: None)
    lines = stdout_of(variants.main, "--rounds", 2).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[-3:]]
    assert [name for name, *_ in rows] == [*chosen] and rows[0][1] == "1.00"
    plain, dora, frozen = (float(mb) for *_, mb in rows)
    assert frozen < plain < dora
