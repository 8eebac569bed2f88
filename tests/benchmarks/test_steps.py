"""The benchmark of steps: it replaces one operation at a time, and counts what a variant keeps."""

from benchmarks import steps
from model import fast
from tests.runs import run


def test_each_operation_is_replaced_in_turn_and_all_are_put_back(base, monkeypatch):
    seen, before = [], {name: getattr(fast, name) for name in steps.OPERATIONS}
    monkeypatch.setattr(steps, "seconds", lambda trainer, batch: seen.append(
        {name for name in before if getattr(fast, name) is not before[name]}) or 2.0)
    ending = run(steps.main, "operations", "--base", base, "--precision", "fp32", "--rounds", 2)
    assert (ending.status, ending.stderr) == (0, "")
    one_round = [set(), *({name} for name in steps.TRAINED), before.keys()]
    assert seen == 4 * one_round  # two methods, two rounds
    assert ending.stdout.count("1.00") == 2 * (len(steps.TRAINED) + 1)
    assert all(getattr(fast, name) is operation for name, operation in before.items())


def test_each_variants_bytes_and_times_are_beside_plain_loras(base, monkeypatch):
    chosen = {name: ("--block-size", "32", *steps.VARIANTS[name])
              for name in ("plain", "DoRA", "LoRA-FA")}
    monkeypatch.setattr(steps, "VARIANTS", chosen)
    monkeypatch.setattr(steps, "MINI", base)
    monkeypatch.setattr(steps.torch, "set_num_threads", lambda count: None)
    ending = run(steps.main, "variants", "--rounds", 2)
    assert (ending.status, ending.stderr) == (0, "")
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in ending.stdout.splitlines()[-3:]]
    assert [name for name, *_ in rows] == [*chosen] and rows[0][1] == "1.00"
    plain, dora, frozen = (float(mb) for *_, mb in rows)
    assert frozen < plain < dora
