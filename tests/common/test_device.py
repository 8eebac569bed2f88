"""Check the choice of a device, with a mock GPU."""

from unittest import mock

import pytest
import torch

import evaluate
import generate
import train
from benchmarks import speed_worker
from benchmarks.speed_worker import Task
from common import device
from common.device import Device
from common.errors import UserError
from tests.runs import arguments, one_line, run
from training.ranks import Ranks

TOO_OLD = "CUDA error: no kernel image is available for execution on the device"


@pytest.fixture
def gpu(monkeypatch):
    """A mock GPU that runs `torch.ones`."""
    ones = torch.ones
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    first_kernel = mock.Mock(side_effect=lambda *size, device=None: ones(*size))
    monkeypatch.setattr(torch, "ones", first_kernel)
    return first_kernel


def test_the_cpus_bf16_is_for_training(monkeypatch):
    monkeypatch.setattr(device, "_cpu_has_bf16", lambda: True)
    assert Device.pick("cpu").precision == "fp32"
    assert Device.pick("cpu", train=True).precision == "bf16"


def test_a_gpu_without_bf16_computes_in_fp16(gpu):
    assert Device.pick() == Device(torch.device("cuda"), "fp16")


def test_a_rank_for_which_there_is_no_gpu_is_refused(gpu, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with (
        pytest.raises(UserError, match="this machine has 2 GPUs; use one rank per GPU"),
        Ranks(2, 3).joined(torch.device("cuda")),
    ):
        pass


def test_a_gpu_that_runs_no_kernel_is_refused_in_one_line(gpu):
    gpu.side_effect = RuntimeError(f"{TOO_OLD}\nCompile with `TORCH_USE_CUDA_DSA`")
    for asked in ("auto", "cuda"):  # instead of hours on the CPU
        with pytest.raises(UserError, match=r"^--device cuda: .*no kernel image.*cu126[^\n]*$"):
            Device.pick(asked)
    assert Device.pick("cpu").torch_device.type == "cpu"


def test_what_fails_on_mps_is_refused_and_its_generator_is_saved(base, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    ending = run(train.main, "lora", "--base", base, "--out", tmp_path, "--gradient-checkpointing")
    assert ending.status == 2 and "error: --gradient-checkpointing: on MPS" in ending.stderr
    with (
        pytest.raises(UserError, match=r"^torchrun: .* --device cpu$"),
        Ranks(0, 2).joined(torch.device("mps")),
    ):
        pass
    with pytest.raises(UserError, match="--precision fp16: on MPS"):
        Device.pick("mps", "fp16", train=True)
    assert Device.pick("mps", "fp16").precision == "fp16"  # for evaluation
    assert Device.pick("mps", "bf16", train=True).rng is torch.mps


def test_our_commands_leave_cudnn_attention_and_no_other_side_does(base, monkeypatch):
    """All sides compute fp32 without TF32, even if the image enables TF32."""
    monkeypatch.setitem(speed_worker.CALLS, "train", lambda *_: lambda: None)
    for main, *argv in ((train.main, "lora"), (evaluate.main,), (generate.main, "--prompt", "x")):
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch.set_float32_matmul_precision("high")
        speed_worker.measure(Task("train", str(base), side="theirs"))
        assert torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.get_float32_matmul_precision() == "highest"
        torch.set_float32_matmul_precision("high")
        assert run(main, *argv, "--base", "nowhere", "--device", "cpu").status == 2
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.get_float32_matmul_precision() == "highest"


def test_compile_is_refused_on_a_cpu_before_anything_is_written(base, book, tmp_path):
    argv = arguments("lora", base, book, tmp_path / "run", "--compile", "--device", "cpu")
    line = one_line(run(train.main, *argv), 2)
    assert line.startswith("error: --compile: makes steps slower on a CPU")
    assert not (tmp_path / "run").exists()


def test_out_of_memory_while_the_model_is_moved_is_one_line(base, monkeypatch):
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ):
        monkeypatch.setattr(Device, "cast_frozen", mock.Mock(side_effect=error))
        ending = run(generate.main, "--prompt", "x", "--base", base, "--device", "cpu")
        assert one_line(ending).startswith("error: out of memory; try a smaller --batch")


def test_tf32_is_for_cuda_and_only_if_asked():
    try:
        torch.set_float32_matmul_precision("high")  # as some images do
        for device, allowed, expected in (
            ("cpu", False, "high"),
            ("cuda", False, "highest"),
            ("cpu", True, "highest"),
            ("cuda", True, "high"),
        ):
            Device(torch.device(device), "fp32").set_tf32(allowed)
            assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision("highest")
