"""Generation: the cache changes nothing, sampling follows its options, text streams whole."""

import subprocess
import sys

import pytest
import torch

from generate import generate, sample, stream_text
from model.checkpoint import load_gpt2
from model.gpt2 import GPT2
from model.tokenizer import load_tokenizer
from tests.helpers import tiny_gpt2_directory, token_ids

CONTEXT = 64


@pytest.fixture(scope="module")
def directory_and_examiner(tmp_path_factory):
    return tiny_gpt2_directory(tmp_path_factory.mktemp("base"), n_positions=CONTEXT)


@pytest.fixture(scope="module")
def model(directory_and_examiner) -> GPT2:
    return load_gpt2(directory_and_examiner[0])


def without_cache(model: GPT2, ids: torch.Tensor, new_tokens: int) -> list[int]:
    """Greedy tokens, everything read again at each one; half is forgotten when it is full."""
    window, out = ids[-CONTEXT:], []
    for _ in range(new_tokens):
        if len(window) > CONTEXT:
            window = window[-(CONTEXT // 2) :]
        out.append(model(window[None])[0, -1].argmax().item())
        window = torch.cat((window, torch.tensor(out[-1:])))
    return out


@pytest.mark.parametrize("prompt_length", [1, 5, CONTEXT, CONTEXT + 30])
def test_the_cache_changes_no_token_even_past_the_context(model, prompt_length):
    ids = token_ids(model.config.vocab_size, prompt_length)
    with torch.inference_mode():
        expected = without_cache(model, ids, 2 * CONTEXT)
    assert list(generate(model, ids, 2 * CONTEXT, temperature=0)) == expected


def test_greedy_text_is_that_of_transformers(model, directory_and_examiner):
    ids = token_ids(model.config.vocab_size, 4)
    examiner = directory_and_examiner[1]
    expected = examiner.generate(ids[None], attention_mask=torch.ones(1, 4), do_sample=False,
                                 max_new_tokens=40, eos_token_id=None, pad_token_id=0)
    assert list(generate(model, ids, 40, temperature=0)) == expected[0, 4:].tolist()


def test_a_seed_fixes_the_text_and_another_changes_it(model):
    ids = token_ids(model.config.vocab_size, 4)

    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return list(generate(model, ids, 30, generator=generator))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


LOGITS = torch.tensor([0.5, 0.4, 0.06, 0.04]).log()


@pytest.mark.parametrize("options, expected", [
    ({}, [0.5, 0.4, 0.06, 0.04]),
    ({"temperature": 0}, [1, 0, 0, 0]),
    ({"temperature": 1e-40}, [1, 0, 0, 0]),
    ({"temperature": 0.5}, [0.25 / 0.4152, 0.16 / 0.4152, 0.0036 / 0.4152, 0.0016 / 0.4152]),
    ({"top_k": 1}, [1, 0, 0, 0]),
    ({"top_k": 2}, [5 / 9, 4 / 9, 0, 0]),
    ({"top_k": 99}, [0.5, 0.4, 0.06, 0.04]),
    ({"top_p": 1e-9}, [1, 0, 0, 0]),
    ({"top_p": 0.49}, [1, 0, 0, 0]),
    ({"top_p": 0.51}, [5 / 9, 4 / 9, 0, 0]),
    ({"top_p": 0.95}, [0.5 / 0.96, 0.4 / 0.96, 0.06 / 0.96, 0]),
])
def test_tokens_are_drawn_with_the_probabilities_that_the_options_leave(options, expected):
    generator = torch.Generator().manual_seed(0)
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "generator": generator} | options
    draws = 4000
    drawn = torch.cat([sample(LOGITS, **options) for _ in range(draws)])
    counted = torch.bincount(drawn, minlength=4) / draws
    expected = torch.tensor(expected, dtype=torch.float32)
    # Five standard deviations of a binomial share; what is excluded must never be drawn.
    allowed = 5 * (expected * (1 - expected) / draws).sqrt() + 1e-3 * (expected > 0)
    assert ((counted - expected).abs() <= allowed).all(), counted


class Scripted(torch.nn.Module):
    """A model that says these tokens one after another, whatever it reads."""

    def __init__(self, model: GPT2, tokens: list[int]):
        super().__init__()
        self.wte, self.config, self.tokens = model.wte, model.config, iter(tokens)

    def forward(self, idx, cache=None):
        logits = torch.zeros(1, idx.size(1), self.config.vocab_size)
        logits[..., next(self.tokens)] = 99.0
        return logits


def test_text_stops_at_end_of_text_and_streams_whole_characters(model):
    encoding = load_tokenizer(model.config.vocab_size)
    text = "naïve ☂ 🕯 end"
    tokens = [*encoding.encode_ordinary(text), encoding.eot_token, *encoding.encode("not this")]
    pieces = list(stream_text(Scripted(model, tokens), "x", 99, temperature=0, top_k=0, top_p=1.0))
    assert "".join(pieces) == text
    assert len(pieces) > 3 and not any("\ufffd" in piece for piece in pieces)


def test_the_command_continues_each_prompt_as_if_alone(directory_and_examiner):
    def run(*prompts: str) -> str:
        command = [sys.executable, "generate.py", "--base", str(directory_and_examiner[0]),
                   "--max-new-tokens", "5", "--seed", "3", "--device", "cpu", "--prompt", *prompts]
        return subprocess.run(command, capture_output=True, check=True).stdout.decode()

    assert run("You climb", "A gull") == run("You climb") + run("A gull")
