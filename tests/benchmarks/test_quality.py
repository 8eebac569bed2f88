"""Time to quality: the curve, the steps of both sides, and the seconds to a target."""

import pytest

from benchmarks import quality
from common.files import read_json, write_json
from training.options import ROOT

BASE = 54.7  # mini's perplexity on the book's validation part


def test_the_plain_loop_needs_the_same_steps():
    words = ["--run", "LoRA, best", "--max-steps", "2", "--seeds", "2"]
    opts = quality.parse_args([*words, "--only", "curves"])
    (_, first), (steps, last) = quality.curve(opts)
    assert steps == 2
    assert last < first < BASE

    here, there = quality.make_trainer(opts), quality.make_trainer(opts)
    step = quality.stock_step(there)
    for ours, theirs in zip(here.batches(), there.batches(), strict=True):
        loss = here.step(ours).item() / ours.num_tokens
        # The sides draw different dropouts.
        assert step(theirs) == pytest.approx(loss, rel=0.01)
    assert loss < 5


def test_the_table_multiplies_steps_by_seconds(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    curves = {run: {"1": [[10, 42.0], [20, 36.0]]} for run in quality.RUNS}
    curves["LoRA, best"] = {"1": [[10, 41.0], [20, 34.0]], "2": [[10, 45.0], [20, 30.0]]}
    times = {run: {"here": [0.1, 0.2], "there": [0.3, 0.4]} for run in quality.COLOURS}
    path = tmp_path / f"quality-{quality.machine_name('cpu')}.json"
    write_json(path, {"curves": curves, "seconds": times})

    quality.main(["--only", "--out", str(tmp_path)])
    rows = {line.split(" |")[0]: line for line in capsys.readouterr().out.splitlines()}
    # 10 or 20 steps of 0.1 or 0.2 s
    assert "2.0 (1.0..4.0)" in rows["| LoRA, best".ljust(len("| LoRA, reference, lr 1e-3"))]
    assert path.with_suffix(".png").exists()


def test_the_page_has_the_table_of_the_stored_figures():
    page = (ROOT / "docs" / "speed.md").read_text()
    [path] = (ROOT / "benchmarks" / "results").glob("quality-*.json")
    _, rows = quality.table(read_json(path))
    for row in rows:
        assert f"| {' | '.join(row)} |\n" in page
