"""Check what the program asks of CUDA, without a GPU: each call to a GPU is replaced by a spy."""

from contextlib import ExitStack
from unittest import mock
from weakref import WeakSet

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import one_page
from common.device import Device
from common.errors import RunError, UserError
from common.processes import PATIENCE, Processes
from model.kernels import cuda_loss
from training.launch import launch
from training.options import parse_options

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "9", "WORLD_SIZE": "10", "LOCAL_RANK": "1"}


@pytest.fixture
def cuda(monkeypatch):
    """Two GPUs, and a group of ten processes, of which this one is the last. Yields its calls."""
    calls = mock.Mock()
    calls.bf16.return_value = True
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with ExitStack() as stack:
        for where, name, value in (
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "device_count", lambda: 2),
            (torch.cuda, "set_device", calls.set_device),
            (torch.cuda, "is_bf16_supported", calls.bf16),
            (torch, "ones", calls.ones),
            (dist, "init_process_group", calls.init),
            (dist, "is_initialized", lambda: True),
            (dist, "get_backend", lambda: "cpu:gloo,cuda:nccl"),
            (dist, "destroy_process_group", calls.destroy),
        ):
            stack.enter_context(mock.patch.object(where, name, value))
        dist.group.WORLD = calls.world
        yield calls
        dist.group.WORLD = None


def options(*more: str):
    return parse_options("-", ["lora", "--device", "cuda", *more])


def test_a_process_takes_its_gpu_before_anything_asks_one(cuda):
    with launch(options()) as (device, processes):
        assert (device.precision, processes) == ("bf16", Processes(9, 10))
    assert cuda.set_device.call_args_list == [mock.call(1)]
    names = [name for name, *_ in cuda.mock_calls]
    assert names.index("set_device") == 0 and {"ones", "bf16"} < set(names)
    assert cuda.ones.call_args.kwargs["device"] == "cuda"  # not a number: the current GPU
    assert cuda.init.call_args == mock.call("cpu:gloo,cuda:nccl", timeout=PATIENCE)


def test_a_run_on_a_gpu_computes_in_tf32_if_asked(cuda):
    try:
        with launch(options("--allow-tf32")):
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_more_processes_than_gpus_are_refused(cuda, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"^--nproc-per-node: this machine has 2 GPUs"):
        Device.pick("cuda")


def test_without_torchrun_the_current_gpu_stays(cuda, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    Device.pick("cuda")
    assert cuda.ones.called and not cuda.set_device.called


def test_a_gpu_whose_first_kernel_fails_is_named(cuda):
    cuda.ones.side_effect = RuntimeError("no kernel image is available")
    with pytest.raises(UserError, match=r"^--device cuda: the GPU's first kernel fails"):
        Device.pick("cuda")


def test_a_lost_connection_and_an_error_abort_nccl_which_would_wait(cuda):
    processes = Processes(9, 10)
    with (
        pytest.raises(RunError, match="process 9 of 10: the connection"),
        mock.patch.object(dist, "all_reduce", side_effect=RuntimeError("closed")),
    ):
        processes.all_reduce(torch.zeros(1))
    assert cuda.world.abort.call_count == 1
    with pytest.raises(ZeroDivisionError), processes.joined(torch.device("cuda")):
        1 / 0  # noqa: B018
    assert cuda.world.abort.call_count == 2


def test_the_numbers_that_processes_exchange_in_each_step_never_wait_for_a_gpu(cuda):
    with mock.patch.object(dist, "all_reduce") as reduced:
        assert Processes(9, 10).maximum(1, 15) == [1, 15]
    assert reduced.call_args.args[0].is_cpu


def test_the_size_of_a_chunk_depends_on_the_card_and_not_on_what_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 8000))
    card = mock.Mock(total_memory=8000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert cuda_loss.card_memory(torch.device("cuda")) == 8000


class Peak(TorchDispatchMode):
    """Record the largest number of bytes of living tensors of this shape."""

    def __init__(self, *shape: int):
        super().__init__()
        self.shape = shape
        self.living: WeakSet = WeakSet()
        self.bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape == self.shape:
            self.living.add(result.untyped_storage())
            self.bytes = max(self.bytes, sum(x.nbytes() for x in self.living))
        return result


@pytest.mark.parametrize("compute", [cuda_loss.tied_cross_entropy, cuda_loss.token_losses])
def test_a_chunk_of_logits_takes_no_more_memory_than_its_size_allows_for(monkeypatch, compute):
    monkeypatch.setattr(cuda_loss, "card_memory", lambda _: 20 * 128 * 8 * cuda_loss.SHARE)
    hidden = torch.randn(60, 16, dtype=torch.bfloat16)  # three chunks
    weight = torch.randn(101, 16, dtype=torch.bfloat16)
    with Peak(20, 128) as peak:
        compute(hidden, weight, torch.zeros(60, dtype=torch.int64))
    assert peak.bytes == 20 * 128 * 8


def test_the_one_page_switches_cudnns_attention_off(monkeypatch):
    torch.backends.cuda.enable_cudnn_sdp(True)
    monkeypatch.setattr(one_page, "load_gpt2", mock.Mock(side_effect=InterruptedError))
    with pytest.raises(InterruptedError):
        one_page.main()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
