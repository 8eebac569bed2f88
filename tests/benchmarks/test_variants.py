"""The benchmark of the variants: the bytes that each keeps for the backward pass."""

from benchmarks import speed, variants
from common.files import read_json
from tests.runs import stdout_of, table


def test_each_variants_bytes_and_times_are_beside_plain_loras(base, monkeypatch, tmp_path):
    chosen = {}
    for name in ("plain", "DoRA"):
        chosen[name] = (*variants.VARIANTS[name], "--block-size", "32")
    monkeypatch.setattr(variants, "VARIANTS", chosen)
    monkeypatch.setattr(variants, "MINI", base)
    monkeypatch.setattr(speed, "RESULTS", tmp_path)
    monkeypatch.setattr(variants.torch, "set_num_threads", lambda count: None)

    _, _, *rows = table(stdout_of(variants.main, "--rounds", 2))
    assert [name for name, _, _ in rows] == list(chosen)
    plain, dora = [float(megabytes) for _, _, megabytes in rows]
    assert plain < dora

    [stored] = tmp_path.iterdir()
    results = read_json(stored)["results"]
    assert [f"{found['kept_mb']:.1f}" for found in results.values()] == [row[2] for row in rows]
    assert results["plain"]["ratios"] == [1, 1]
