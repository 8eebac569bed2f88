"""The bench: every check fails on its toy and passes on this project."""

import pytest

from conformance.bench import run
from conformance.checks import CHECKS
from conformance.implementations import peft, this_project
from conformance.toys import TOYS, Right

PEFT_FAILS = {  # docs/conformance.md explains them
    "unmerging_from_bf16_restores_the_base",
    "state_dict_while_merged",
    "patterns_keep_their_order",
}


def outcomes(functions, names=()):
    return {result.check.name: result for result in run(functions, names)}


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_fails_on_its_toy(name):
    [result] = run(TOYS[name], [name])
    assert result.outcome == "FAIL"


def test_the_right_implementation_passes_every_check_and_this_project_lacks_one_function():
    assert {r.outcome for r in run(Right())} == {"pass"}
    found = outcomes(this_project)
    assert found.pop("weighted_sum_with_a_negative_weight").outcome == "skip"  # PEFT adds adapters
    assert {r.outcome for r in found.values()} == {"pass"}


def test_peft_fails_only_what_the_page_explains():
    found = outcomes(peft)
    assert {name for name, r in found.items() if r.outcome == "FAIL"} == PEFT_FAILS
    assert {name for name, r in found.items() if r.outcome == "skip"} == {"slices_of_a_fused_layer"}


def test_a_check_of_what_an_implementation_lacks_is_skipped():
    """These checks also accept a refusal, but a missing function is not a refusal."""

    class Lacking(Right):
        load = None

        def merge(self, module):
            raise NotImplementedError

    names = ("file_of_another_model_is_noticed", "merging_into_bf16_rounds_once")
    assert {r.outcome for r in run(Lacking(), names)} == {"skip"}
