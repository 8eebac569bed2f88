"""DPO with the adapter switched off as the reference: `python -m lesson.examples.dpo`."""

import json
import re

import peft
import pytest
import torch
import transformers

from common.device import Device
from lesson.examples import dpo
from lesson.examples.dpo import Pair, log_probability, train
from lora import LoRAConfig, inject
from tests.helpers import write_small_tokenizer
from tests.runs import stdout_of
from tests.trl_losses import LORA, LOSSES, LR, PAIRS, pairs, start, tiny_llama

CPU = Device(torch.device("cpu"), "fp32")
LINE = re.compile(
    r"step \d+: loss (\S+), margin (\S+), accuracy (\S+), log p / q chosen (\S+), rejected (\S+)"
)
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def printed(capsys, monkeypatch):
    """Train on TRL's pairs at TRL's constant rate. Return the numbers of each step's line."""
    monkeypatch.setattr(dpo, "learning_rate", lambda step, total, peak, warmup_ratio: peak)
    model = tiny_llama()
    inject(model, LoRAConfig(**LORA))
    start(model).eval()
    made = [Pair(*pair.values()) for pair in pairs()]
    train(model, [made[i : i + PAIRS] for i in range(0, len(made), PAIRS)], LR, CPU)
    return [[float(x) for x in found] for found in LINE.findall(capsys.readouterr().out)]


def test_twelve_steps_equal_trls(capsys, monkeypatch):
    lines = printed(capsys, monkeypatch)
    expected = json.loads(LOSSES.read_text())
    assert len(lines) == len(expected) == 12
    for (loss, margin, accuracy, *_), step in zip(lines, expected, strict=True):
        assert loss == pytest.approx(step["loss"], abs=1e-5)
        assert margin == pytest.approx(step["rewards/margins"], abs=1e-4)
        assert accuracy == pytest.approx(step["rewards/accuracies"], abs=0.01)
    assert lines[0][0] == pytest.approx(0.6931472, abs=1e-7)  # log 2: the policy is the reference
    assert min(loss for loss, *_ in lines) < 0.6


@torch.no_grad()
def test_only_the_answers_tokens_are_scored():
    """Compare with the means that TRL reports."""
    made = [Pair(*pair.values()) for pair in pairs()[:PAIRS]]
    for kind in ("chosen", "rejected"):
        answers = [getattr(pair, kind) for pair in made]
        ours = log_probability(tiny_llama().eval(), [pair.prompt for pair in made], answers, CPU)
        expected = json.loads(LOSSES.read_text())[0][f"logps/{kind}"]
        assert ours.mean().item() == pytest.approx(expected, abs=1e-4)


@pytest.fixture
def model(tmp_path):
    """A tiny Llama and a tokenizer with a chat template, as files."""
    directory = tmp_path / "llama"
    llama = tiny_llama()
    llama.lm_head.weight.data[316] *= 3  # makes some answers end
    llama.save_pretrained(directory)
    write_small_tokenizer(directory, 317)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def test_the_command_learns_short_answers_and_peft_loads_its_adapter(model, tmp_path, monkeypatch):
    monkeypatch.setattr(dpo, "TESTED", 8)
    monkeypatch.setattr(dpo, "TRAINED", 16)
    monkeypatch.setattr(dpo, "LONGEST", 24)
    options = ("--precision", "fp32", "--steps", 6, "--lr", 5e-3, "--out", tmp_path / "out")
    said = stdout_of(dpo.main, "--model", model, *options)
    before, after = re.findall(
        r"mean length (\S+) tokens, (\d+)% end by themselves, KL to the base (\S+)", said
    )
    assert float(before[2]) == 0 and float(after[2]) > 0
    assert float(after[0]) < float(before[0]) and int(after[1]) > int(before[1])
    steps = LINE.findall(said)
    assert float(steps[0][0]) == pytest.approx(0.6931472, abs=1e-6)
    assert float(steps[-1][0]) < 0.4

    base = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    ids = torch.arange(64)[None]
    expected = base(input_ids=ids).logits
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    assert not torch.allclose(loaded(input_ids=ids).logits, expected, atol=0.01)
