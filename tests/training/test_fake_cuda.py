"""Run fake_cuda.py in a process that takes its library for CUDA."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora.save import save_adapter
from tests.helpers import tiny_gpt2_directory
from tests.pairs import adapted
from tests.runs import questions
from training.options import ROOT

START = """if True:
    import ctypes, sys
    library, *inputs = sys.argv[1:]
    hooks = ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    from tests.training.fake_cuda import main
    hooks.set_guard()
    main(*inputs)"""


def can_fake_matmuls() -> bool:
    """Return whether this PyTorch knows the type of a product with `out_dtype`, without a GPU."""
    x = torch.empty(2, 2, dtype=torch.bfloat16, device="meta")
    try:
        return torch.mm(x, x, out_dtype=torch.float32).dtype == torch.float32
    except TypeError:  # torch 2.8 and 2.9
        return False


@pytest.mark.skipif(not can_fake_matmuls(), reason="this PyTorch's fake mm has no out_dtype")
@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler to make CUDA's double")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes the steps of the other tests")
def test_the_program_on_fake_cuda_tensors_waits_nowhere_and_has_the_right_types(book, tmp_path):
    source = Path(__file__).with_name("fake_cuda.cpp")
    library = tmp_path / "fake_cuda.so"
    torch_folder = Path(torch.__file__).parent
    options = ["-shared", "-fPIC", "-std=c++20", "-w", f"-I{torch_folder / 'include'}"]
    libraries = [f"-L{torch_folder / 'lib'}", f"-Wl,-rpath,{torch_folder / 'lib'}"]
    libraries += ["-ltorch_cpu", "-lc10"]
    subprocess.run(["c++", *options, source, "-o", library, *libraries], check=True)

    base, _ = tiny_gpt2_directory(tmp_path / "base", n_layer=1)
    save_adapter(adapted(base, ("c_attn",), r=4), tmp_path / "adapter", "gpt2")
    data = questions(tmp_path / "questions.jsonl")
    command = [sys.executable, "-c", START, library, base, tmp_path / "adapter", book, data]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr
