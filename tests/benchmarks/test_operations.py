"""The benchmark of single operations: it replaces one at a time, and puts all back."""

from benchmarks import operations, ours
from model import fast
from tests.runs import stdout_of


def test_each_operation_is_replaced_in_turn_and_all_are_put_back(base, monkeypatch):
    before = {name: getattr(fast, name) for name in ours.OPERATIONS}
    seen = []

    def step(trainer, batch):
        seen.append({name for name in before if getattr(fast, name) is not before[name]})

    monkeypatch.setattr(ours, "step", step)
    said = stdout_of(operations.main, "--base", base, "--precision", "fp32", "--rounds", 2)

    one_round = [set(), *({name} for name in operations.TRAINED), before.keys()]
    assert seen == 2 * [set(), *one_round, *one_round]  # two methods: a warm-up and two rounds
    for name in ("none", *operations.TRAINED, "all of them"):
        assert said.count(f"| {name} ") == 2
    assert {name: getattr(fast, name) for name in before} == before
