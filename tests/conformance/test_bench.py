"""The bench: every check fails on its toys and passes on this project."""

import pytest
import torch.nn.functional as F

from generators.results import PAGE, cells, write
from lora_conformance.__main__ import main
from lora_conformance.bench import report, run
from lora_conformance.checks import CHECKS
from results import bench_peft as peft
from results import bench_this_project as this_project
from tests.conformance import mistakes, shipped
from tests.conformance.toys import TOYS, Layer, Right

PEFT_LACKS = {
    "slices_of_a_fused_layer",
    "slices_of_unequal_widths",
    "slices_with_rslora",
    "slices_with_dora",
    "slices_with_dropout",
}
WE_LACK = {  # PEFT adds adapters. c_attn of GPT-2 has thirds
    "weighted_sum_with_a_negative_weight",
    "weighted_sum_of_other_layers",
    "weighted_sum_of_rslora",
    "weighted_sum_of_dora",
    "slices_of_unequal_widths",
}
WE_REFUSE = {
    "merging_into_bf16_rounds_once",
    "unmerging_from_bf16_restores_the_base",
    "state_dict_while_merged",
    "slices_with_dora",
    "merging_into_nf4_keeps_the_update",
    "every_target_matches",
    "tied_head",
    "tied_head_of_a_loaded_adapter",
}

MISTAKES = mistakes.MISTAKES | shipped.MISTAKES


def named(results, outcome):
    return {result.check.name for result in results if result.outcome == outcome}


@pytest.mark.parametrize("name", TOYS)
def test_a_toy_fails_its_check_and_no_other_check_except_those_that_it_names(name):
    toy = TOYS[name]
    results = run(toy.functions)
    assert named(results, "FAIL") == {toy.check, *toy.also}
    assert not named(results, "skip")


def test_every_check_has_a_toy_or_a_mistake():
    checks = {toy.check for toy in TOYS.values()} | {check for _, check in MISTAKES.values()}
    assert checks == CHECKS.keys()


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_fails_the_check_of_its_name(name):
    functions, check = MISTAKES[name]
    [result] = run(functions, [check])
    # In the names of our small model, there is one number.
    expected = "pass" if name == "peft #3318 TakesTheLastNumber" else "FAIL"
    assert (result.outcome, result.crashed) == (expected, False), result


def test_the_right_implementation_passes_every_check_or_refuses():
    results = run(Right())
    assert named(results, "pass") | named(results, "refused") == CHECKS.keys()


def test_this_project_passes_every_check_of_what_it_has():
    results = run(this_project)
    assert named(results, "FAIL") == set()
    assert named(results, "skip") == WE_LACK
    assert named(results, "refused") == WE_REFUSE
    assert write(PAGE.read_text(), "this project", cells(results)) == PAGE.read_text()


def test_peft_fails_only_what_the_page_explains():
    results = run(peft)
    assert write(PAGE.read_text(), "peft", cells(results)) == PAGE.read_text()
    assert named(results, "skip") == PEFT_LACKS


def test_a_crash_is_reported_as_a_crash(capsys):
    class Naive(Layer):
        def forward(self, x):
            return self.base(x) + F.linear(x, self.delta())

    functions = Right()
    functions.layer = Naive
    names = ("output_keeps_its_precision", "unmerging_from_bf16_restores_the_base")
    report(functions, names)
    printed = capsys.readouterr().out
    for name in names:
        assert f"FAIL     {name}: crash, RuntimeError: " in printed
        assert CHECKS[name].bug not in printed


def test_a_wrap_that_exits_is_a_crash(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def wrap(*_, **options):\n    raise SystemExit(0)")
    assert main([str(tmp_path / "mine.py"), "start_of_a"]) == 1
    assert "FAIL     start_of_a: crash, SystemExit: 0\n" in capsys.readouterr().out


def test_a_forgotten_alpha_fails_no_check_of_bf16():
    class Unscaled(Layer):
        def scaling(self):
            return 1.0

    functions = Right()
    functions.layer = Unscaled
    failed = named(run(functions), "FAIL")
    assert "update_is_alpha_over_r" in failed
    assert not {name for name in failed if "bf16" in name or "fp32" in name}


def test_a_check_of_what_an_implementation_lacks_is_skipped():
    """These checks also accept a refusal, but a missing function is not a refusal."""

    class Lacking(Right):
        load = None

        def merge(self, module):
            raise NotImplementedError

    names = ("file_of_another_model_is_noticed", "merging_into_bf16_rounds_once")
    assert {r.outcome for r in run(Lacking(), names)} == {"skip"}
