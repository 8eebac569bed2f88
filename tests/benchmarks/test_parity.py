"""The parity check passes, and each fault that it must detect makes it fail."""

import json
import math

import pytest
import torch

import train
from benchmarks import parity
from benchmarks.parity_report import Report
from common.device import Device
from lora.config import LoRAConfig
from tests.helpers import DEVICE, tiny_gpt2_directory
from tests.runs import run

LOW = Device.pick().precision if DEVICE == "cuda" else "bf16"  # fp16 where bf16 is emulated


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny base with heads of 16: 1/sqrt(16) is exact however it is computed."""
    return tiny_gpt2_directory(tmp_path_factory.mktemp("base"), n_head=2)[0]


@pytest.fixture
def check(base, book, tmp_path):
    """Run the parity check with these options. Return its ending and its `parity.json`."""
    standard = ["--base", base, "--book", book, "--out", tmp_path]
    standard += ["--block-size", 16, "--device", "cpu"]

    def check(*options):
        ending = run(parity.main, *standard, *options)
        return ending, json.loads((tmp_path / "parity.json").read_text())

    return check


@pytest.mark.device
def test_every_section_holds_and_says_so_and_is_pefts_to_the_last_bit(check, base):
    ending, result = check("--steps", 30, "--batch-size", 4, "--device", DEVICE)
    assert ending.status == 0 and result["holds"], ending.stdout
    assert "parity holds" in ending.stdout and "FAILED" not in ending.stdout
    assert str(base.parent) not in json.dumps(result)
    assert result["device"] == Device.pick(DEVICE).name

    losses = result["curves"]["exact"]
    assert losses["here"] == losses["there"] and len(set(losses["here"])) == 30
    differences = {entry["name"]: entry["value"] for entry in result["checks"]}
    for what in (
        "adapter before the first step",
        "loss of every step",
        "adapter after the last step",
    ):
        assert differences[f"exact: {what}"] == 0.0
    assert result["curves"].keys() == {
        "exact",
        "resumed",
        "fp32, no dropout",
        "fp32, independent dropout",
        f"{LOW}, no dropout",
        f"{LOW}, independent dropout",
        "full",
    }
    losses = result["validation_losses"]
    assert losses["trained here"]["there"] < losses["base"]["there"] - 0.01  # it has trained


def scaled_by_one_percent_more(config, scaling=LoRAConfig.scaling.fget):
    return 1.01 * scaling(config)


def validation_that_draws(*given, validate=train.validate):
    torch.rand(1)  # advances the stream of the dropouts
    return validate(*given)


AFTER = "adapter after the last step"


@pytest.mark.parametrize(
    ("kind", "name", "wrong", "found"),
    [
        (LoRAConfig, "scaling", property(scaled_by_one_percent_more), AFTER),
        (train, "validate", validation_that_draws, "loss of every step"),
    ],
)
def test_a_fault_breaks_parity(check, monkeypatch, kind, name, wrong, found):
    monkeypatch.setattr(kind, name, wrong)
    ending, result = check("--exact-only", "--steps", 5)
    broken = [entry["name"] for entry in result["checks"] if not entry["ok"]]
    assert ending.status == 1 and not result["holds"]
    assert f"exact: {found}" in broken
    assert "parity is broken" in ending.stdout


def test_a_difference_that_is_not_a_number_breaks_parity():
    one = torch.ones(1)
    not_a_number = torch.tensor([math.nan])
    report = Report()
    report.check("loss", parity.relative([1.0, math.nan, 1.0], [1.0, 1.0, 1.0]), 1.0)
    report.check("names", parity.largest({"a": one}, {"b": one}), 1.0)
    report.check("parameters", parity.largest({"a": not_a_number}, {"a": one}), 1.0)
    assert report.broken() == ["loss", "names", "parameters"]


@pytest.mark.parametrize(
    "config",
    [
        {"n_embd": 768, "n_head": 12},  # the sizes of GPT-2 124M
        {"n_head": 2, "activation_function": "gelu"},
    ],
    ids=["the width of 124M", "the gelu of erf"],
)
def test_steps_of_other_models_are_pefts_to_the_last_bit(check, tmp_path, config):
    base, _ = tiny_gpt2_directory(tmp_path / "base", n_layer=1, **config)
    ending, result = check("--base", base, "--exact-only", "--steps", 3, "--batch-size", 1)
    assert ending.status == 0, ending.stdout
    losses = result["curves"]["exact"]
    assert losses["here"] == losses["there"] and len(set(losses["here"])) == 3
