"""Check the choice of a device."""

from unittest import mock

import pytest
import torch

import evaluate
import generate
import train
from common import device
from common.device import Device, tune_process
from common.errors import UserError
from model.gpt2 import GPT2
from tests.runs import arguments, one_line, run
from training.launch import prepare_device
from training.options import parse_options


def test_the_cpus_bf16_is_for_training(monkeypatch):
    monkeypatch.setattr(device, "_cpu_has_bf16", lambda: True)
    assert Device.pick("cpu").precision == "fp32"
    assert Device.pick("cpu", train=True).precision == "bf16"


def test_a_gpu_draws_with_its_own_random_generator():
    """A checkpoint stores its state. With the CPU's state, a resumed run would draw other masks."""
    for name, module in (("cpu", torch), ("cuda", torch.cuda), ("mps", torch.mps)):
        assert Device(torch.device(name), "fp32").rng is module


def test_a_gpu_that_torch_cannot_use_is_named_in_one_line(monkeypatch, tmp_path, capsys):
    for module in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(module, "is_available", lambda: False)
    none = tmp_path / "none"
    for cuda, drivers, asked, warned in (
        ("13.0", (tmp_path, none), "auto", True),
        ("13.0", (none, tmp_path), "auto", True),  # WSL
        ("13.0", (tmp_path, none), "cpu", False),
        ("13.0", (none, none), "auto", False),
        (None, (tmp_path, none), "auto", False),
    ):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(device, "NVIDIA_DRIVER", drivers)
        assert Device.pick(asked).torch_device.type == "cpu"
        said = capsys.readouterr().err
        assert said.count("\n") == said.count("too old for CUDA 13.0") == warned


def test_a_gpu_that_emulates_bf16_computes_in_fp16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "_take_gpu", lambda: None)
    for native, precision in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, native=native: including_emulation or native,
        )
        assert Device.pick("auto").precision == precision


def test_a_gpus_peak_memory_is_the_largest_that_was_allocated(monkeypatch):
    for name in ("memory_allocated", "max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: len(name) * 1e6)
    peak = Device(torch.device("cuda"), "fp32").peak_memory_mb()
    assert peak == len("max_memory_allocated")


def test_a_command_computes_without_cudnns_attention_and_tf32():
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.set_float32_matmul_precision("high")  # as some images do
    for main, *argv in ((train.main, "lora"), (evaluate.main,), (generate.main, "--prompt", "x")):
        assert run(main, *argv, "--base", "nowhere", "--device", "cpu").status == 2
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.get_float32_matmul_precision() == "highest"
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch.set_float32_matmul_precision("high")
    tune_process(Device(torch.device("cuda"), "bf16"))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    torch.set_float32_matmul_precision("highest")


def test_compile_is_refused_on_a_cpu_before_anything_is_written(base, book, tmp_path):
    argv = arguments("lora", base, book, tmp_path / "run", "--compile", "--device", "cpu")
    line = one_line(run(train.main, *argv), 2)
    assert line.startswith("error: --compile: makes steps slower on a CPU")
    assert not (tmp_path / "run").exists()


def test_a_compiler_that_fails_is_named_before_the_run(monkeypatch):
    monkeypatch.setattr(torch, "compile", mock.Mock(side_effect=RuntimeError("no g++")))
    with pytest.raises(UserError, match=r"^--compile: needs a C\+\+ compiler.*\(no g\+\+\)$"):
        Device(torch.device("cuda"), "bf16").check_compiler()


def test_out_of_memory_while_the_model_is_moved_is_one_line(base, monkeypatch):
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ):
        monkeypatch.setattr(GPT2, "to", mock.Mock(side_effect=error))
        ending = run(generate.main, "--prompt", "x", "--base", base, "--device", "cpu")
        assert one_line(ending).startswith("error: out of memory; try a smaller --batch")


def test_tf32_is_for_cuda_and_only_if_asked():
    try:
        for device, allowed, expected in (
            ("cpu", False, "highest"),
            ("cuda", False, "highest"),
            ("cpu", True, "highest"),
            ("cuda", True, "high"),
        ):
            torch.set_float32_matmul_precision("high")  # as some images do
            Device(torch.device(device), "fp32").set_tf32(allowed)
            assert torch.get_float32_matmul_precision() == expected
        gpu = Device(torch.device("cuda"), "fp32")
        tune_process(gpu)
        assert torch.get_float32_matmul_precision() == "highest"
        prepare_device(parse_options("-", ["lora", "--allow-tf32"]), gpu)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
