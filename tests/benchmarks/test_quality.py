"""Time to quality: both sides learn the same, and only the arms' options differ."""

import math

import pytest

from benchmarks import quality
from benchmarks.quality import ARMS, seconds_to
from common.files import write_json

BASE = 54.7  # mini's perplexity on the book's validation part


def test_both_sides_learn_the_same_from_the_same_options():
    ours, theirs = (quality.train(f"LoRA, best recipe, {side}", 2, 2) for side in ("here", "PEFT"))
    (_, _, first), (steps, seconds, last) = ours
    assert steps == 2
    assert seconds > 0
    assert last < first < BASE
    # The two sides draw different dropouts.
    assert [perplexity for *_, perplexity in theirs] == pytest.approx([first, last], rel=0.005)


def test_the_first_validation_at_the_target_counts():
    curve = [(10, 1.0, 50.0), (20, 2.0, 41.0), (30, 3.0, 36.0)]
    assert seconds_to(curve, 41) == 2.0
    assert math.isinf(seconds_to(curve, 35))


def test_draw_reads_the_saved_curves(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    curve = [[10, 1.0, 42.0], [20, 2.0, 34.0]]
    path = tmp_path / f"quality-{quality.machine_name('cpu')}.json"
    write_json(path, {"runs": {arm: [curve, curve] for arm in ARMS}})
    quality.main(["--draw", "--out", str(tmp_path)])
    assert "LoRA, best recipe, PEFT" in capsys.readouterr().out
    assert path.with_suffix(".png").exists()
