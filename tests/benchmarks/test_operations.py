"""The benchmark of single operations: it replaces one operation at a time and restores it."""

from benchmarks import operations, ours, speed
from common.files import read_json
from model.kernels.fast import FAST
from tests.runs import stdout_of, table


def test_each_operation_is_replaced_in_turn_and_all_are_put_back(base, monkeypatch, tmp_path):
    seen = []

    def step(trainer, batch):
        plain = {kind for kind in FAST if any(type(m) is kind for m in trainer.model.modules())}
        seen.append(plain)

    monkeypatch.setattr(ours, "step", step)
    monkeypatch.setattr(speed, "RESULTS", tmp_path)
    said = stdout_of(operations.main, "--base", base, "--precision", "fp32", "--rounds", 2)

    one_round = [set(), *({kind} for kind in operations.OPERATIONS.values()), set(FAST)]
    assert seen == 2 * [set(), *one_round, *one_round]  # two methods: a warm-up and two rounds
    [stored] = tmp_path.iterdir()
    results = read_json(stored)["results"]
    assert [*results] == ["LoRA, fp32", "full, fp32"]
    for name in (*operations.OPERATIONS, "all"):
        cells = [speed.spread(found[name]) for found in results.values()]
        assert [name, *cells] in table(said)
