"""A batch with one adapter per row: each row equals a run of that adapter alone."""

import pytest
import torch

import generate as command
from adapters.load import load_model
from adapters.multi_lora import Adapters
from common.errors import UserError
from common.files import file_sha256
from lora.save import save_adapter
from model.sampling import generate, generate_rows
from storage.weights import load_gpt2
from tests.helpers import TINY, tiny_gpt2_directory, token_ids
from tests.pairs import adapted, randomize
from tests.runs import run, stdout_of

IDS = token_ids(TINY["vocab_size"], 4, 16)
CONTEXT = 24


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return a base whose context is short, so that few tokens fill it."""
    return tiny_gpt2_directory(tmp_path_factory.mktemp("base"), n_positions=CONTEXT)[0]


@pytest.fixture
def directories(base, tmp_path):
    """Three adapters with different ranks, scalings and layers."""
    for name, targets, r, alpha in (
        ("a", ("c_attn",), 1, 16),
        ("b", ("c_attn", "c_proj"), 5, 3),
        ("c", ("c_fc",), 8, 8),
    ):
        model = adapted(base, targets, r=r, lora_alpha=alpha)
        randomize(model, seed=r)
        sha256 = file_sha256(base / "model.safetensors")
        save_adapter(model, tmp_path / name, "gpt2", sha256)
    return {name: tmp_path / name for name in "abc"}


@pytest.fixture
def model(base):
    return load_gpt2(base)


@pytest.fixture
def several(base, model, directories) -> Adapters:
    """Load the three adapters on `model`."""
    return Adapters(model, file_sha256(base / "model.safetensors"), directories)


def alone(base, directories, name):
    return load_model(str(base), directories.get(name)).model


def test_each_rows_tokens_are_those_of_its_adapter_alone(base, model, directories, several):
    names = ["a", "b", None, "c"]
    length = CONTEXT + 6
    several.use(names)

    def generators(count):
        return [torch.Generator().manual_seed(7) for _ in range(count)]

    sampling = {"temperature": 1.0, "top_k": 20}
    prompt = IDS[0]
    steps = list(generate_rows(model, prompt.expand(4, -1), length, generators(4), **sampling))
    rows = torch.stack(steps, dim=1)
    for name, row in zip(names, rows, strict=True):
        single = alone(base, directories, name)
        expected = generate(single, prompt, length, generator=generators(1)[0], **sampling)
        assert row.tolist() == list(expected)


def test_the_command_writes_each_text_under_its_heading(base, directories):
    options = ["--base", base, "--max-new-tokens", 12, "--device", "cpu", "--prompt"]
    paths = [directories["a"], directories["b"]]
    ending = run(command.main, *options, "You", "A", "--with-base", "--adapter", *paths)
    assert (ending.status, ending.stderr) == (0, "")
    expected = ""
    for prompt in ("You", "A"):
        expected += f"=== {base}\n\n"
        expected += stdout_of(command.main, *options, prompt)
        for path in paths:
            expected += f"=== {base} with {path}\n\n"
            expected += stdout_of(command.main, *options, prompt, "--adapter", path)
    assert ending.stdout == expected


def test_an_adapter_of_another_base_and_a_dora_are_refused(base, directories, tmp_path):
    def load(model, **adapters):
        return Adapters(load_gpt2(model), file_sha256(model / "model.safetensors"), adapters)

    other, _ = tiny_gpt2_directory(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="was trained on another base"):
        load(other, a=directories["a"])

    save_adapter(adapted(base, ("c_attn",), use_dora=True), tmp_path / "dora", "gpt2")
    with pytest.raises(UserError, match="dora: is DoRA, whose change is not B A alone; merge"):
        load(base, dora=tmp_path / "dora")
