"""The example on real weights, with a tiny random Llama: `python -m lesson.examples.any_model`."""

import json
import math
import re
import shutil

import peft
import pytest
import torch
import transformers

from common.errors import UserError
from data.instructions import CHAT_TEMPLATE
from data.tokenizer import END_OF_TEXT
from lesson.examples.any_model import main
from lesson.examples.chat import encode, read_conversations
from lora.peft_config import CONFIG
from tests.helpers import relative_difference, tiny_gpt2, write_small_tokenizer
from tests.models import named, small_llama
from tests.runs import one_line, questions, run, stdout_of


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A random Llama in transformers' format, with a tokenizer."""
    directory = tmp_path_factory.mktemp("llama")
    small_llama().save_pretrained(directory)
    write_small_tokenizer(directory, 317)
    return directory


def test_it_trains_as_peft_does_and_peft_loads_what_it_saves(llama, tmp_path):
    options = ("--model", llama, "--steps", 12, "--lr", 2e-2, "--precision", "fp32")
    ours = stdout_of(main, *options, "--out", tmp_path / "ours").splitlines()
    theirs = stdout_of(main, *options, "--out", tmp_path / "theirs", "--peft").splitlines()
    shared = len(theirs)  # before and during training
    assert ours[:shared] == theirs and sum(": loss " in line for line in theirs) == 12
    scores = [float(line.split()[-1]) for line in ours if line.startswith("validation perplexity")]
    assert len(scores) == 3 and scores[-1] < 0.95 * scores[0]

    samples = ours[1:4]
    in_peft, *after = ours[shared:]
    assert len(after) == 3 and after != samples
    assert float(in_peft.split()[-1]) == pytest.approx(min(scores), rel=1e-5)
    stored = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert (stored["task_type"], stored["fan_in_fan_out"]) == ("CAUSAL_LM", False)
    base = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    ids = torch.arange(64)[None]
    expected = base(input_ids=ids).logits
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    assert isinstance(loaded, peft.PeftModelForCausalLM)
    assert relative_difference(loaded(input_ids=ids).logits, expected) > 0.01


CHATML = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nHm.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKS = re.compile(r"{%-? *(?:end)?generation *-?%}")
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Who keeps the light?"},
    {"role": "assistant", "content": "You do."},
    {"role": "user", "content": "And the bell?"},
    {"role": "assistant", "content": "Nobody.\nIt keeps itself."},
]


@pytest.mark.parametrize("template", [CHATML, CHAT_TEMPLATE], ids=["ChatML", "ours"])
def test_masks_are_those_of_transformers(llama, template):
    """A template that marks answers, read by transformers, and the same template without marks."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>" if template == CHATML else END_OF_TEXT})
    tokenizer.chat_template = template
    expected = tokenizer.apply_chat_template(
        TALK, return_dict=True, return_assistant_tokens_mask=True
    )
    assert 0 < sum(expected["assistant_masks"]) < len(expected["input_ids"])
    for chat_template in (template, MARKS.sub("", template)):
        tokenizer.chat_template = chat_template
        ids, scored = encode(TALK, tokenizer)
        assert ids.tolist() == expected["input_ids"]
        assert scored.tolist() == [bool(x) for x in expected["assistant_masks"]]

    tokenizer.chat_template = (
        "{% for m in messages %}{{ messages | length }}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(UserError, match="rewrites earlier turns"):
        encode(TALK, tokenizer)


@pytest.fixture
def chatting(llama, tmp_path):
    """The Llama with a chat template, and a file of conversations."""
    directory = tmp_path / "chatting"
    shutil.copytree(llama, directory)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return directory, questions(tmp_path / "questions.jsonl")


def test_of_conversations_only_the_answers_count(chatting, tmp_path):
    base, file = chatting
    options = ("--model", base, "--data", file, "--steps", 6, "--precision", "fp32")
    ours = stdout_of(main, *options, "--out", tmp_path / "ours").splitlines()
    assert any(line.startswith("peak lr: ") for line in ours)  # the example searched it
    before = float(ours[0].split()[-1])
    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    losses, count = 0.0, 0
    for messages in read_conversations(file)[-2:]:  # the last tenth of 20
        rendered = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = torch.tensor([rendered["input_ids"]])
        answer = torch.tensor([rendered["assistant_masks"]]) == 1
        mean = model(input_ids=ids, labels=ids.masked_fill(~answer, -100)).loss.item()
        losses += mean * answer.sum().item()
        count += answer.sum().item()
    assert before == pytest.approx(math.exp(losses / count), rel=1e-5)
    assert f"{messages[0]['content']!r} " in "".join(ours[1:3])


def test_data_that_does_not_fit_is_refused_in_one_line(llama, tmp_path):
    enough = questions(tmp_path / "enough.jsonl")
    few = tmp_path / "few.jsonl"
    few.write_text("".join(enough.read_text().splitlines(keepends=True)[:9]))
    for file, reason in ((few, "ten conversations"), (enough, "no chat template")):
        arguments = ("--model", llama, "--data", file, "--out", tmp_path / "out")
        assert reason in one_line(run(main, *arguments), 2)


def test_a_model_that_does_not_fit_is_refused_in_one_line(tmp_path):
    for make, reason in (
        (tiny_gpt2, "a Conv1D; only linear layers"),
        (named("Roberta", vocab_size=317).make, "sees the tokens that it predicts"),
    ):
        make().save_pretrained(tmp_path / "model")
        write_small_tokenizer(tmp_path / "model", 317)
        arguments = ("--model", tmp_path / "model", "--out", tmp_path / "out")
        assert reason in one_line(run(main, *arguments), 2)
