"""One adapter a row of a batch: each row is what it is alone."""

import pytest
import torch

import generate as command
from adapters.files import save_adapter
from adapters.load import load_model
from adapters.several import Adapters
from common.errors import UserError
from common.files import file_sha256
from model.sampling import generate, generate_rows
from model.weights import load_gpt2
from tests.helpers import TINY, relative_difference, tiny_gpt2_directory, token_ids
from tests.pairs import adapted, randomize
from tests.runs import run

IDS = token_ids(TINY["vocab_size"], 4, 16)


@pytest.fixture
def directories(base, tmp_path):
    """Three adapters, of other ranks, scalings and layers."""
    for name, targets, r, alpha in (
        ("a", ("c_attn",), 1, 16),
        ("b", ("c_attn", "c_proj"), 5, 3),
        ("c", ("c_fc",), 8, 8),
    ):
        model, config = adapted(base, targets, r=r, lora_alpha=alpha)
        randomize(model, seed=r)
        save_adapter(
            model, config, tmp_path / name, "gpt2", file_sha256(base / "model.safetensors")
        )
    return {name: tmp_path / name for name in "abc"}


@pytest.fixture
def several(base, directories) -> Adapters:
    adapters = Adapters(load_gpt2(base), file_sha256(base / "model.safetensors"))
    for name, directory in directories.items():
        adapters.add(name, directory)
    return adapters


def alone(base, directories, name):
    return load_model(str(base), directories.get(name)).model


@torch.no_grad()
def test_each_rows_logits_are_those_of_its_adapter_alone(base, directories, several):
    for names in (["a", "b", None, "c"], ["c", "c", "a", "a"], [None] * 4):
        several.use(names)
        for row, name, ids in zip(several.model(IDS), names, IDS, strict=True):
            assert relative_difference(row, alone(base, directories, name)(ids[None])[0]) < 1e-5
            unlike = relative_difference(row, load_gpt2(base)(ids[None])[0])
            assert (unlike > 0.01) == (name is not None)


def test_each_rows_tokens_are_those_of_its_adapter_alone(base, directories, several):
    names, length = ["a", "b", None, "c"], TINY["n_positions"] + 20  # past the context
    several.use(names)

    def generators(count):
        return [torch.Generator().manual_seed(7) for _ in range(count)]

    sampling = {"temperature": 1.0, "top_k": 20}
    prompts = [IDS[0], IDS[0, :3], IDS[0], token_ids(TINY["vocab_size"], length)]
    steps = torch.stack(
        [*generate_rows(several.model, prompts, length, generators(4), **sampling)], 1
    )
    for name, prompt, row in zip(names, prompts, steps, strict=True):
        assert row[row >= 0][:length].tolist() == [
            *generate(
                alone(base, directories, name),
                prompt,
                length,
                generator=generators(1)[0],
                **sampling,
            )
        ]
    assert [(row < 0).sum().item() for row in steps] == [13, 0, 13, TINY["n_positions"] - 3]


def test_the_command_writes_each_text_under_its_heading(base, directories):
    options = ["--base", base, "--max-new-tokens", 12, "--device", "cpu", "--prompt"]
    paths = [*directories.values()][:2]
    ending = run(command.main, *options, "You", "A", "--with-base", "--adapter", *paths)
    assert (ending.status, ending.stderr) == (0, "")
    expected = ""
    for prompt in ("You", "A"):
        for path in (None, *paths):
            single = run(command.main, *options, prompt, *(("--adapter", path) if path else ()))
            expected += f"=== {base}{f' with {path}' if path else ''}\n\n{single.stdout}"
    assert ending.stdout == expected


def test_an_adapter_of_another_base_and_a_dora_are_refused(base, directories, tmp_path):
    other, _ = tiny_gpt2_directory(tmp_path / "other", seed=1)
    adapters = Adapters(load_gpt2(other), file_sha256(other / "model.safetensors"))
    with pytest.raises(UserError, match="was trained on another base"):
        adapters.add("a", directories["a"])
    save_adapter(*adapted(base, ("c_attn",), use_dora=True), tmp_path / "dora", "gpt2")
    with pytest.raises(UserError, match="dora: is DoRA, whose change is not B A alone; merge"):
        adapters.add("dora", tmp_path / "dora")
