"""The benchmark of single operations: it replaces one at a time, and puts all back."""

from benchmarks import operations
from model import fast
from tests.runs import stdout_of


def test_each_operation_is_replaced_in_turn_and_all_are_put_back(base, monkeypatch):
    seen, before = [], {name: getattr(fast, name) for name in operations.OPERATIONS}
    monkeypatch.setattr(
        operations.ours,
        "step",
        lambda trainer, batch: seen.append(
            {name for name in before if getattr(fast, name) is not before[name]}
        ),
    )
    monkeypatch.setattr(operations, "timeit", lambda call, number: call() or 1.0 + bool(seen[-1]))
    said = stdout_of(operations.main, "--base", base, "--precision", "fp32", "--rounds", 2)
    one_round = [set(), *({name} for name in operations.TRAINED), before.keys()]
    assert seen == 2 * [set(), *one_round, *one_round]  # two methods: a warm-up and two rounds
    assert said.count("2.00") == 2 * (len(operations.TRAINED) + 1)
    assert all(getattr(fast, name) is operation for name, operation in before.items())
