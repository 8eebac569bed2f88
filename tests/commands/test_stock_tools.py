"""Runs and merges can be uploaded: stock tools read their files, and no file names a path."""

import io
import json
import logging
import re
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, pipeline

import generate
from adapters import merge
from data.instructions import CHAT_TEMPLATE
from storage.hf_compat import save_tokenizer
from storage.hub import MINI
from tests import runs as commands
from tests.helpers import TINY, small_tokenizer
from tests.runs import arguments, die, run, run_acting, stdout_of
from train import main as train
from training.options import ROOT

QUESTION = "Who keeps the light?"
DEPRECATED = (DeprecationWarning, FutureWarning)  # from the libraries' code
CHAT = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> dict[str, Path]:
    """Train mini on conversations by each method, and merge the adapter. Return the directories."""
    folder = tmp_path_factory.mktemp("chat")
    data = folder / "data.jsonl"
    lines = (ROOT / "data" / "instructions.jsonl").read_text().splitlines()
    data.write_text("\n".join(lines[:10]))
    for method in ("lora", "full"):
        options = ("--base", "mini", "--data", data, "--max-steps", 1, "--device", "cpu")
        small = ("--lr", 1e-2, "--batch-size", 2, "--out", folder / method)
        ending = run(train, method, *options, *small)
        assert ending.status == 0, ending.stderr
    stdout_of(merge.main, "--adapter", folder / "lora", "--out", folder / "merged")
    return {name: folder / name for name in ("lora", "full", "merged")}


@pytest.fixture
def said(caplog, monkeypatch):
    """Collect the warnings of transformers and PEFT. Work in the project's directory."""
    monkeypatch.chdir(ROOT)
    transformers.logging.enable_propagation()
    with warnings.catch_warnings(record=True) as found, caplog.at_level(logging.WARNING):
        warnings.simplefilter("always")
        yield (
            lambda: (
                [str(w.message) for w in found if not issubclass(w.category, DEPRECATED)]
                + caplog.messages
            )
        )
    transformers.logging.disable_propagation()


@pytest.mark.parametrize("name", ["lora", "full", "merged"])
def test_stock_tools_load_it_and_answer_a_batch_and_messages(chat, name, said):
    directory = chat[name]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if name == "lora":
        model = AutoPeftModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    else:
        pipe = pipeline("text-generation", str(directory), dtype=torch.float32)
    how = {"max_new_tokens": 4, "do_sample": False}
    prompts = ["The captain", "You climb the stair and"]
    alone = [pipe(prompt, **how)[0]["generated_text"] for prompt in prompts]
    both = [texts[0]["generated_text"] for texts in pipe(prompts, batch_size=2, **how)]
    assert both == alone

    # The answer of generate.py to the same message, without the leading space:
    answer = pipe(CHAT, **how)[0]["generated_text"][-1]["content"]
    place = ["--adapter", directory] if name == "lora" else ["--base", directory]
    options = ("--chat", "--max-new-tokens", 4, "--temperature", 0, "--device", "cpu")
    assert answer.strip() and chatted(*place, *options) == answer.strip()
    assert said() == []


@pytest.mark.parametrize(
    "code",
    [
        code
        for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
        for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
        if "runs/" in code and "trl" not in code  # trl's ten steps can take minutes
    ],
)
def test_the_pages_code_runs_as_it_is_written(chat, code, tmp_path, monkeypatch):
    runs = dict.fromkeys(("lora", "chat", "a", "b"), chat["lora"]) | {"full": chat["full"]}
    for name in ("runs", "model"):
        (tmp_path / name).mkdir()
    for name, directory in runs.items():
        (tmp_path / "runs" / name).symlink_to(directory)
    (tmp_path / "model" / "mini").symlink_to(MINI)
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    try:
        exec(code.replace("/path/to/project", str(tmp_path)), {})
    except ModuleNotFoundError as error:
        if error.name != "tensorboard":
            raise
        pytest.skip("tensorboard is not among the tests' packages")


def chatted(*argv: object) -> str:
    """Return the answer of `generate.py --chat` to QUESTION."""
    with mock.patch.object(sys, "stdin", io.StringIO(QUESTION)):
        return stdout_of(generate.main, *argv).strip()


def test_a_text_longer_than_the_context_is_cut_instead_of_an_index_error(chat, runs):
    """The base's settings need no pad token and no context."""
    places = [(directory, 256, 8191) for directory in chat.values()]
    places += [(done.out, TINY["n_positions"], TINY["vocab_size"] - 1) for done in runs.values()]
    for directory, context, end in places:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        assert len(tokenizer("word " * 2000, truncation=True)["input_ids"]) == context
        assert tokenizer.pad_token_id == tokenizer.eos_token_id == end
    generation = transformers.GenerationConfig.from_pretrained(chat["merged"])
    assert generation.pad_token_id == generation.eos_token_id == 8191


def test_the_template_goes_with_what_was_trained_on_conversations_and_nothing_else(chat, runs):
    for directory in chat.values():
        assert (directory / "chat_template.jinja").read_text() == CHAT_TEMPLATE
        assert AutoTokenizer.from_pretrained(directory).chat_template == CHAT_TEMPLATE
    for done in runs.values():
        assert not (done.out / "chat_template.jinja").exists()
        assert AutoTokenizer.from_pretrained(done.out).chat_template is None


def test_our_template_replaces_the_bases(tmp_path):
    settings = json.dumps({"chat_template": "{{ 'old' }}", "model_max_length": 10**30}).encode()
    tokenizer = replace(small_tokenizer(331), files={"tokenizer_config.json": settings})
    save_tokenizer(tokenizer, tmp_path, 64, "{{ 'new' }}")
    stored = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert "chat_template" not in stored and stored["model_max_length"] == 64
    save_tokenizer(tokenizer, tmp_path, 64, "{{ 'newer' }}")  # an existing file may be the user's
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ 'new' }}"


def test_no_file_names_a_path(base, book, runs, chat, tmp_path):
    """The paths are of the run, the base, the book, the project and the home directory."""
    told = shutil.copytree(base, tmp_path / "base")
    settings = json.loads((told / "tokenizer_config.json").read_text())
    settings |= {"name_or_path": str(told), "special_tokens_map_file": str(told / "x")}
    (told / "tokenizer_config.json").write_text(json.dumps(settings))
    more = commands.trained("lora", told, book, tmp_path / "run", "--max-steps", 2)
    every = ("--checkpoint-every", 1, "--eval-every", 2)
    stopped = arguments("full", told, book, tmp_path / "stopped", *every)
    run_acting({3: die}, *stopped)

    paths = [base, book, tmp_path, ROOT, Path.home(), Path.cwd(), *chat.values()]
    needles = [str(path).encode() for path in paths]
    directories = [runs["lora"].out, runs["full"].out, more.out, tmp_path / "stopped"]
    seen = set()
    for directory in (*directories, *chat.values()):
        for path in directory.iterdir():
            seen.add(path.name)
            data = path.read_bytes()
            assert not [needle for needle in needles if needle in data], path
    assert {"adapter_config.json", "run.json", "checkpoint.safetensors"} < seen
    assert needles[2] in (told / "tokenizer_config.json").read_bytes()  # the search finds a path
