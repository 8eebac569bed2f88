"""Generation: the cache, sampling options, streams of whole characters, chats."""

import io
import sys
from argparse import Namespace
from dataclasses import replace
from shlex import split

import pytest
import torch

import generate as command
from data.tokenizer import END_OF_TEXT, load_tokenizer
from generate import stream
from lora.save import save_adapter
from model.gpt2 import GPT2, GPT2Config
from model.sampling import generate, next_token, probabilities
from storage.hf_compat import save_tokenizer
from storage.weights import load_gpt2, save_gpt2
from tests.helpers import TINY, small_tokenizer, token_ids
from tests.pairs import adapted
from tests.runs import Ending, one_line, run, stdout_of

CONTEXT = TINY["n_positions"]
VOCAB = TINY["vocab_size"]


@pytest.fixture(scope="module")
def model(base) -> GPT2:
    return load_gpt2(base)


def without_cache(model: GPT2, ids: torch.Tensor, new_tokens: int) -> list[int]:
    """Return greedy tokens, reading all tokens again for each. A full context drops half."""
    window = ids[-CONTEXT:]
    out = []
    for _ in range(new_tokens):
        if len(window) > CONTEXT:
            window = window[-(CONTEXT // 2) :]
        out.append(model(window[None])[0, -1].argmax().item())
        window = torch.cat((window, torch.tensor(out[-1:])))
    return out


@pytest.mark.parametrize("prompt_length", [1, CONTEXT + 30])
def test_the_cache_changes_no_token_even_past_the_context(model, prompt_length):
    ids = token_ids(VOCAB, prompt_length)
    with torch.inference_mode():
        expected = without_cache(model, ids, 2 * CONTEXT)
    assert list(generate(model, ids, 2 * CONTEXT, temperature=0)) == expected


LOGITS = torch.tensor([0.5, 0.4, 0.06, 0.04]).log()


@pytest.mark.parametrize(
    "choices, expected",
    [
        ([{}, {"top_k": 99}], [0.5, 0.4, 0.06, 0.04]),
        ([{"temperature": 0}, {"temperature": 1e-40}], [1, 0, 0, 0]),
        ([{"top_k": 1}, {"top_p": 1e-9}, {"top_p": 0.49}], [1, 0, 0, 0]),
        ([{"top_k": 2}, {"top_p": 0.51}], [5 / 9, 4 / 9, 0, 0]),
        ([{"top_p": 0.95}], [0.5 / 0.96, 0.4 / 0.96, 0.06 / 0.96, 0]),
        ([{"temperature": 0.5}], [p * p / 0.4152 for p in (0.5, 0.4, 0.06, 0.04)]),
    ],
)
def test_tokens_are_drawn_with_the_probabilities_that_the_options_leave(choices, expected):
    for choice in choices:
        options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | choice
        drawn = next_token(LOGITS, torch.Generator().manual_seed(0), **options)
        if options["temperature"] < 1e-6:
            assert drawn.tolist() == [0]
            continue
        p = probabilities(LOGITS, **options)
        assert p.tolist() == pytest.approx(expected, abs=1e-6), choice
        assert torch.equal(drawn, p.multinomial(1, generator=torch.Generator().manual_seed(0)))


class Scripted(torch.nn.Module):
    """Returns these tokens in turn for any input. Id 5 is always the second likeliest."""

    def __init__(self, config: GPT2Config, tokens: list[int]):
        super().__init__()
        self.wte = torch.nn.Embedding.from_pretrained(torch.eye(config.vocab_size))
        self.config = config
        self.tokens = iter(tokens)
        self.read: list[list[int]] = []  # the token ids of each call

    def hidden(self, idx, cache=None):
        self.read += idx.tolist()
        logits = torch.zeros(1, idx.size(1), self.config.vocab_size)
        logits[..., next(self.tokens)] = 99.0
        logits[..., 5] = 9.0
        return logits

    def logits(self, hidden):
        return hidden


def test_text_stops_at_end_of_text_and_streams_whole_characters(model):
    def pieces(tokens, tokenizer):
        args = Namespace(temperature=0, top_k=0, top_p=1.0, max_new_tokens=99)
        scripted = Scripted(model.config, tokens)
        prompt = tokenizer.encode("x")
        return list(stream(scripted, tokenizer, prompt, args, None))

    tokenizer = small_tokenizer(VOCAB)
    text = "naïve ☂ 🕯 end"
    after_the_end = tokenizer.encode("not this")
    tokens = [*tokenizer.encode(text), tokenizer.end_of_text, *after_the_end]
    found = pieces(tokens, tokenizer)
    assert "".join(found) == text
    assert len(found) > 3 and not any("\ufffd" in piece for piece in found)

    cut = [*tokenizer.encode("☂")[:1], tokenizer.end_of_text]
    assert "".join(pieces(cut, tokenizer)) == "\ufffd"  # the text ends inside a character

    padded = replace(small_tokenizer(VOCAB - 9), vocab_size=VOCAB)
    tokens = [VOCAB - 1, *padded.encode("a"), VOCAB - 9, padded.end_of_text]
    assert "".join(pieces(tokens, padded)) == "&a&"  # id 5 replaces an id without a token


def chat(base, monkeypatch, lines: bytes, *options: object) -> Ending:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    return run(command.main, "--chat", "--base", base, "--device", "cpu", *options)


@pytest.mark.parametrize("answer_tokens, starts", [(29, [0, 0, 0, 3]), (70, [0, 1, 1, 3])])
def test_a_chat_answers_every_line_after_what_was_said_before_it(
    monkeypatch, answer_tokens, starts
):
    """`starts` has, for each line, the number of the first line in its context.

    From the first line on, the contexts have 26, 51, 71 and 157 tokens. From the second line on,
    they have 20, 40 and 126. The context of 100 keeps room for an answer, at most half of it.
    """
    lines = ["Who lights it? ", "And then?", "When?", f"Does {30 * 'it '}"]
    tokenizer = small_tokenizer(VOCAB)
    script = []
    for answer in ("You.", "", "At dusk.", "No."):
        script += [*tokenizer.encode(f" \n{answer}"), tokenizer.end_of_text]
    model = Scripted(GPT2Config(VOCAB, n_positions=100), script)
    monkeypatch.setattr(command, "load_with_adapter", lambda *_: ("scripted", model, tokenizer))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
    options = split(f"--chat --device cpu --temperature 0 --max-new-tokens {answer_tokens}")
    ending = run(command.main, *options)
    assert (ending.status, ending.stdout) == (0, "You.\n\nAt dusk.\nNo.\n")

    said = [
        f"User: Who lights it?\nAssistant: You.{END_OF_TEXT}",
        f"User: And then?\nAssistant: {END_OF_TEXT}",
        f"User: When?\nAssistant: At dusk.{END_OF_TEXT}",
    ]
    asks = [f"User: {line.strip()}\nAssistant:" for line in lines]
    prompts = [ids for ids in model.read if len(ids) > 1]
    for turn, (ids, first) in enumerate(zip(prompts, starts, strict=True)):
        expected = "".join(said[first:turn]) + asks[turn]
        assert tokenizer.decode(ids) == expected

    endless = replace(tokenizer, eos_token=None)
    monkeypatch.setattr(command, "load_with_adapter", lambda *_: ("scripted", model, endless))
    assert "--chat" in one_line(run(command.main, "--chat", "--device", "cpu"), 2)


def test_a_chat_ends_with_its_input_and_needs_no_prompt(base, monkeypatch):
    options = ("--max-new-tokens", 20, "--seed", 3)
    said = chat(base, monkeypatch, b"Who lights it?\nAnd caf\xe9?\n", *options)
    assert (said.status, said.stderr) == (0, "") and said.stdout.count("\n") >= 2
    assert said.stdout == chat(base, monkeypatch, b"Who lights it?\nAnd caf\xe9?", *options).stdout
    assert chat(base, monkeypatch, b"").stdout == ""
    two = chat(base, monkeypatch, b"x", "--adapter", "x", "y")
    assert "--chat answers with one adapter" in one_line(two, 2)


def test_the_command_continues_each_prompt_as_if_alone(base):
    options = [*split("--max-new-tokens 5 --seed 3 --device cpu --base"), str(base), "--prompt"]
    prompts = ["You climb", "naïve☂"]
    alone = [run(command.main, *options, prompt) for prompt in prompts]
    assert [ending.status for ending in alone] == [0, 0]
    assert run(command.main, *options, prompts[0], "--seed", 4).stdout != alone[0].stdout
    expected = "".join(ending.stdout for ending in alone)
    assert run(command.main, *options, *prompts).stdout == expected
    refused = one_line(run(command.main, *options, "caf\udce9"), 2)
    assert refused.startswith("error: the tokenizer cannot read the text")


def test_sampling_options_reach_the_sampler(base):
    options = ("--base", base, *split("--max-new-tokens 20 --device cpu --prompt You"))
    greedy = stdout_of(command.main, *options, "--temperature", 0)
    for likeliest in ("--top-k 1", "--top-p 1e-9"):
        assert stdout_of(command.main, *options, *split(likeliest), "--temperature", 9) == greedy
    assert stdout_of(command.main, *options) != greedy


def test_several_adapters_write_one_after_the_other_with_the_same_seed(base, adapter, tmp_path):
    other = tmp_path / "other"
    save_adapter(adapted(base, ("c_fc",), r=2), other, "gpt2")
    options = ("--base", base, *split("--max-new-tokens 20 --device cpu --prompt You A"))
    expected = f"=== {base}\n\n{stdout_of(command.main, *options)}"
    for directory in (adapter, other):
        expected += f"=== {base} with {directory}\n\n"
        expected += stdout_of(command.main, *options, "--adapter", directory)
    both = (*options, "--with-base", "--adapter", adapter, other)
    assert stdout_of(command.main, *both) == expected


@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite_end_the_command_in_one_line(base, tmp_path, temperature):
    """The weights are finite, like the weights of a model trained at 100 times the right rate."""
    broken = load_gpt2(base)
    with torch.no_grad():
        broken.ln_f.weight.fill_(1e38)
    save_gpt2(broken, tmp_path)
    save_tokenizer(load_tokenizer(base, VOCAB), tmp_path, 64)
    options = ("--base", tmp_path, "--device", "cpu", "--temperature", temperature)
    ending = run(command.main, *options, "--prompt", "The keeper")
    assert "the model's logits are not finite numbers; try" in one_line(ending, 1)
