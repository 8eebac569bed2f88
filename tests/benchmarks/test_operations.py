"""The benchmark of single operations: it replaces one operation at a time and restores it."""

from benchmarks import operations, ours
from model.kernels.fast import FAST
from tests.runs import stdout_of


def test_each_operation_is_replaced_in_turn_and_all_are_put_back(base, monkeypatch):
    seen = []

    def step(trainer, batch):
        plain = {kind for kind in FAST if any(type(m) is kind for m in trainer.model.modules())}
        seen.append(plain)

    monkeypatch.setattr(ours, "step", step)
    said = stdout_of(operations.main, "--base", base, "--precision", "fp32", "--rounds", 2)

    one_round = [set(), *({kind} for kind in operations.OPERATIONS.values()), set(FAST)]
    assert seen == 2 * [set(), *one_round, *one_round]  # two methods: a warm-up and two rounds
    for name in ("none", *operations.OPERATIONS, "all of them"):
        assert said.count(f"| {name} ") == 2
