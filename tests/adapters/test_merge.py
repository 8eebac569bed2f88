"""Check the state of a merged model, unmerging, and `python -m adapters.merge`."""

import multiprocessing
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from adapters import merge as merge_module
from adapters.merge import main
from common.errors import run_command
from lora.inject import adapter_disabled, lora_layers
from lora.load import load_adapter
from lora.merge import merge, unmerge
from lora.save import save_adapter
from storage.weights import load_gpt2
from tests.helpers import relative_difference
from tests.pairs import IDS, adapted
from tests.runs import run, stdout_of


def base_weights(model):
    return {name: m.base_layer.weight.clone() for name, m in lora_layers(model).items()}


def test_the_state_of_a_merged_model_is_refused_and_unmerging_rounds_as_two_sums_do(base):
    model = adapted(base, lora_alpha=5)
    original = base_weights(model)
    state = model.state_dict()
    merge(model)
    merged = base_weights(model)
    with pytest.raises(ValueError, match="unmerge it before"):
        model.state_dict()
    with pytest.raises(ValueError, match="unmerge it before"):
        model.load_state_dict(state)
    unmerge(model)
    model.state_dict()
    for name, weight in base_weights(model).items():
        assert (merged[name] - original[name]).abs().max() > 0.1
        rounding = 2**-24 * (merged[name].abs() + original[name].abs())
        assert ((weight - original[name]).abs() <= rounding).all()


def test_only_an_enabled_adapter_is_merged_and_into_fp32(base):
    model = adapted(base)
    original = base_weights(model)
    with pytest.raises(ValueError, match="the adapter is disabled"), adapter_disabled(model):
        merge(model)
    assert all(torch.equal(w, original[name]) for name, w in base_weights(model).items())
    with pytest.raises(ValueError, match=r"in torch.bfloat16.* convert the model to fp32"):
        merge(model.bfloat16())


def test_the_command_writes_one_model(base, adapter, tmp_path):
    out = tmp_path / "merged"
    model = load_gpt2(base)
    load_adapter(model, adapter)
    said = stdout_of(main, "--base", base, "--adapter", adapter, "--out", out)
    assert said == f"{base} + {adapter} -> {out}\n"
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert files.keys() == {path.name for path in base.iterdir()}
    assert files["tokenizer.json"] == (base / "tokenizer.json").read_bytes()
    assert relative_difference(load_gpt2(out)(IDS), model(IDS)) < 1e-5
    assert {x.dtype for x in load_file(out / "model.safetensors").values()} == {torch.float32}


def test_a_lower_precision_is_written_and_what_it_costs_printed(base, tmp_path):
    adapter = tmp_path / "adapter"
    out = tmp_path / "merged"
    before = {name: x.bfloat16().float() for name, x in load_gpt2(base).state_dict().items()}
    model = adapted(base, ("c_attn",), r=4, lora_alpha=0.1)
    save_adapter(model, adapter, "gpt2")
    deltas = {name: layer.delta_weight() for name, layer in lora_layers(model).items()}
    model_options = ("--base", base, "--adapter", adapter)
    said = stdout_of(main, *model_options, "--out", out, "--precision", "bf16")
    assert {x.dtype for x in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    after = load_gpt2(out).state_dict()
    lost = []
    for name, delta in deltas.items():
        kept = after[f"{name}.weight"].float() - before[f"{name}.weight"]
        lost.append(kept - delta)
    share = torch.cat(lost).norm() / torch.cat(list(deltas.values())).norm()
    assert 0.01 < share < 0.5 and f"changes the update by {share:.1%} of its norm" in said


def test_a_merge_that_is_stopped_leaves_no_part_and_can_be_repeated(
    base, adapter, tmp_path, monkeypatch
):
    """The signal arrives when the model is complete and the tokenizer is missing."""
    out = tmp_path / "merged[1]"
    argv = ["--base", str(base), "--adapter", str(adapter), "--out", str(out)]
    command = multiprocessing.get_context("fork").Process(target=run_command, args=(main, argv))
    with monkeypatch.context() as patch:
        patch.setattr(
            merge_module, "save_tokenizer", lambda *_: os.kill(os.getpid(), signal.SIGTERM)
        )
        command.start()
        command.join()
    assert command.exitcode == 128 + signal.SIGTERM
    assert not out.exists() and not list(tmp_path.glob(".merged*"))

    out.mkdir()  # --out may be an empty directory
    assert run(main, *argv).status == 0
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(out))
