"""The content of memory and its precision. Saving memory changes no result."""

import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from common.device import Device
from model.gpt2 import GPT2, GPT2Config
from storage.weights import WEIGHTS as MODEL_WEIGHTS
from storage.weights import save_gpt2
from tests.helpers import DEVICE
from tests.runs import WEIGHTS, arguments, kept_bytes, run_acting, trained, trainer
from training.model import load_base
from training.options import ROOT


@pytest.mark.device
@pytest.mark.parametrize("method", WEIGHTS)
def test_gradient_checkpointing_keeps_less_and_changes_no_bit(base, book, tmp_path, method):
    options = ("--max-steps", 3, "--lr", 1e-2)
    checkpointing = "--gradient-checkpointing"
    plain = trained(method, base, book, tmp_path / "plain", *options)
    checkpointed = trained(method, base, book, tmp_path / "other", *options, checkpointing)
    assert plain.column("loss") == checkpointed.column("loss")
    name = WEIGHTS[method]
    assert (plain.out / name).read_bytes() == (checkpointed.out / name).read_bytes()
    assert plain.column("val_loss")[-1] < plain.report["base_val_loss"]  # gradients arrived

    without = trainer(method, base, book, tmp_path)
    with_it = trainer(method, base, book, tmp_path, checkpointing)
    [(inputs, _)] = next(without.batches()).micro_batches
    inputs = inputs.to(DEVICE)
    assert 0 < kept_bytes(with_it.model, inputs) < kept_bytes(without.model, inputs) / 4


def test_a_step_leaves_no_graph_and_no_gradient(base, book, tmp_path):
    """The meter holds the losses of all steps until a line is due."""
    made = trainer("lora", base, book, tmp_path)
    assert not made.step(next(made.batches())).requires_grad
    assert all(p.grad is None for p in made.parameters.values())  # nor the gradients


@pytest.mark.device
@pytest.mark.parametrize("method, compute", [("lora", torch.bfloat16), ("full", torch.float32)])
def test_only_what_lora_freezes_is_held_in_the_compute_precision(
    base, book, tmp_path, method, compute
):
    argv = arguments(method, base, book, tmp_path, "--precision", "bf16", "--max-steps", 1)
    argv += ["--batch-size", "1", "--val-fraction", "0.02"]
    trainers = []
    assert run_acting({1: trainers.append}, *argv).status == 0
    (made,) = trainers
    norms = {f"{name}." for name, m in made.model.named_modules() if isinstance(m, nn.LayerNorm)}
    for name, parameter in made.model.named_parameters():
        small = ".lora_" in name or name.startswith(tuple(norms))
        assert parameter.dtype == (torch.float32 if small else compute), name

    # The weights are loaded in this precision, and not cast afterwards.
    loaded = load_base(made.run.plan.options, base, Device(torch.device(DEVICE), "bf16"))
    assert loaded.h[0].mlp.c_fc.weight.dtype == compute


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[int, ...]:
    """Return numbers of a fresh process. In bytes: the size of a base's file, and the peak memory
    of loading it. The page faults of tensors that are freed and made again, after `tune_process`
    for a GPU and then for the CPU.
    """
    directory = tmp_path_factory.mktemp("large")
    with torch.device("meta"):
        model = GPT2(GPT2Config(vocab_size=5_000, n_embd=512, n_layer=12, n_head=8))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.zero_()
    save_gpt2(model, directory, torch.float16)
    code = """if True:
        import resource, sys, torch
        from pathlib import Path
        from common.device import Device, tune_process
        from storage.hub import MINI
        from storage.weights import load_gpt2
        def resident(name):
            lines = open("/proc/self/status").read().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
        load_gpt2(MINI, torch.bfloat16)  # libraries that are read at their first use
        before = resident("VmRSS")
        model = load_gpt2(Path(sys.argv[1]), torch.bfloat16)
        print(resident("VmHWM") - before)
        for device in ("cuda", "cpu"):
            tune_process(Device(torch.device(device), "fp32"))
            torch.zeros(1 << 24)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(5):
                torch.zeros(1 << 24)
            print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    command = [sys.executable, "-c", code, directory]
    said = subprocess.run(command, cwd=ROOT, check=True, text=True, capture_output=True).stdout
    return (directory / MODEL_WEIGHTS).stat().st_size, *map(int, said.split())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_base_is_loaded_in_the_memory_of_its_weights_and_one_tensor(measured):
    stored, grown, *_ = measured
    assert 0.9 * stored < grown < 1.25 * stored  # 2 if the file's pages stay as well


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept_for_runs_on_the_cpu_only(measured):
    """Either all of a tensor's 4 KB pages fault, or no page does."""
    *_, given_back, kept = measured
    assert kept < 100 < given_back / 100
