"""`compare`: the examples pass, mistakes are found, and only a run with a pass ends with 0."""

import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from lora_conformance import vectors
from lora_conformance.__main__ import main
from lora_conformance.vectors import HERE

EXAMPLES = HERE.parent / "examples"
README = (HERE.parent / "README.md").read_text()
NODE = shutil.which("node")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "results").mkdir()
    return tmp_path / "results"


def compare(*args):
    return main(["compare", *map(str, args)])


def write(folder, case, dtype=torch.float64, **changes):
    """Write the right results of a case, with changes."""
    found = {k: torch.from_numpy(v) for k, v in vectors.results(case).items()} | changes
    tensors = {k: v.to(dtype).contiguous() for k, v in found.items() if v is not None}
    save_file(tensors, folder / f"{case}.safetensors")


@pytest.mark.parametrize(
    ("program", "file", "right"),
    [
        (sys.executable, "numpy_layer.py", "else alpha / r\n"),
        pytest.param(
            NODE,
            "layer.mjs",
            ": alpha / r;\n",
            marks=pytest.mark.skipif(NODE is None, reason="node is not installed"),
        ),
    ],
)
def test_an_example_passes_and_without_alpha_it_fails(tmp_path, capsys, program, file, right):
    (tmp_path / "vectors").symlink_to(HERE)
    (tmp_path / "examples").mkdir()
    source = (EXAMPLES / file).read_text()
    assert source.count(right) == 1
    for text, status in ((source, 0), (source.replace(right, right.replace("alpha / r", "1")), 1)):
        copy = tmp_path / "examples" / file
        copy.write_text(text)
        subprocess.run([program, copy, tmp_path / "results"], check=True)
        assert compare(tmp_path / "results") == status
        printed = capsys.readouterr().out
        assert ("FAIL  lora/y: off by 1.8e-01; " in printed) == bool(status)
        assert (printed.splitlines()[-1] in README) == (not status)


@pytest.mark.skipif(NODE is None, reason="node is not installed")
def test_the_javascript_loads_and_saves_any_shape(tmp_path, capsys):
    (tmp_path / "vectors").symlink_to(HERE)
    (tmp_path / "examples").mkdir()
    text = (EXAMPLES / "layer.mjs").read_text()
    start = "function layer(settings, t) {"
    results = "return { A_steps: t.A_steps, losses: Float64Array.from(t.losses), y: t.y };"
    copy = tmp_path / "examples" / "layer.mjs"
    copy.write_text(text.replace(start, start + results))
    subprocess.run([NODE, copy, tmp_path / "results"], check=True)
    assert compare(tmp_path / "results") == 0
    assert "\npass  dropout: A_steps, losses, y\n" in capsys.readouterr().out


def test_every_result_of_every_case_can_pass(folder, capsys):
    for case in vectors.cases():
        write(folder, case)
    assert compare(folder) == 0
    count = sum(len(vectors.results(case)) for case in vectors.cases())
    assert f"{count} passed, 0 failed, 0 skipped\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("F64", torch.float64), ("F32", torch.float32), ("F16", torch.half), ("BF16", torch.bfloat16)],
)
def test_the_tolerance_is_that_of_the_type(folder, capsys, name, dtype):
    y = torch.from_numpy(vectors.tensors("lora")["y"])
    tolerance = vectors.tolerance("y", name)
    for factor, status in ((0.4, 0), (3, 1)):
        write(folder, "lora", dtype, y=y + factor * tolerance * y.abs().max())
        compare(folder)
        assert ("FAIL  lora/y: off by" in capsys.readouterr().out) == bool(status)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"y": torch.full((7, 5), float("nan"))}, "FAIL  lora/y: off by nan"),
        ({"y": torch.zeros(5, 7)}, "FAIL  lora/y: the shape is (5, 7), not (7, 5)"),
        ({"Y": torch.zeros(1)}, "FAIL  lora/Y: the case has no result of this name, but A_steps, "),
        ({"x": torch.zeros(1)}, "FAIL  lora/x: the case has no result of this name"),
    ],
)
def test_a_wrong_result_fails(folder, capsys, changes, line):
    write(folder, "lora", **changes)
    assert compare(folder) == 1
    assert f"\n{line}" in capsys.readouterr().out


def test_a_missing_result_is_named_and_an_empty_folder_fails(folder, capsys):
    assert compare(folder) == 1
    assert capsys.readouterr().out.endswith("skipped: nothing passed, so the run fails\n")
    write(folder, "lora", dA=None, losses=None)
    assert compare(folder) == 0
    printed = capsys.readouterr().out
    assert "\nskip  lora: no dA, losses\n" in printed
    assert "\nskip  dora: no dora.safetensors with results\n" in printed


@pytest.mark.parametrize("content", [b"", b"{}", 8 * b"\xff", b"\x02" + 7 * b"\0" + b"[]"])
def test_wrong_files_fail(folder, capsys, content):
    write(folder, "lora")
    (folder / "dora.safetensors").write_bytes(content)
    (folder / "Lora.safetensors").write_bytes(b"")
    assert compare(folder) == 1
    printed = capsys.readouterr().out
    assert f"\nFAIL  dora: {folder / 'dora.safetensors'} is not a safetensors file" in printed
    assert "\nFAIL  Lora: there is no case of this name\n" in printed


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("[5,null]", "(y has the shape [5, None])"),
        ("[5,7]", "(y has 40 bytes, not the shape (5, 7))"),
    ],
)
def test_a_shape_that_does_not_fit_is_named(folder, capsys, shape, message):
    header = f'{{"y":{{"dtype":"F64","shape":{shape},"data_offsets":[0,40]}}}}'.encode()
    (folder / "lora.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + bytes(40)
    )
    assert compare(folder) == 1
    assert message in capsys.readouterr().out


def test_expected_failures(folder, tmp_path, capsys):
    write(folder, "lora", y=torch.zeros(7, 5))
    listed = tmp_path / "expected.txt"
    listed.write_text("# ours\n\nlora/y  # since 1.2\n")
    assert compare(folder, "--expected-failures", listed) == 0
    printed = capsys.readouterr().out
    assert "\nxfail  lora/y: off by" in f"\n{printed}"
    assert ", 1 failed as expected\n" in printed
    write(folder, "lora")
    assert compare(folder, "--expected-failures", listed) == 1
    assert "XPASS  lora/y" in capsys.readouterr().out
    write(folder, "lora", y=None)
    assert compare(folder, "--expected-failures", listed) == 0
    assert "\nXSKIP  lora/y: there is no such result\n" in capsys.readouterr().out


def test_a_required_result_that_is_missing_fails(folder, tmp_path, capsys):
    write(folder, "lora")
    listed = tmp_path / "required.txt"
    for text, status in (("lora", 0), ("lora/y", 0), ("lora\ndora  # a whole case", 1)):
        listed.write_text(text)
        assert compare(folder, "--required", listed) == status
    assert "\nFAIL  dora/y: there is no such result\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere"], "nowhere is not a folder"),
        ([".", "--expected-failures", "nowhere"], "No such file or directory: 'nowhere'"),
        ([".", "--expected-failures", "wrong.txt"], "wrong.txt, line 2: there is no 'lora/z'"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(tmp_path, monkeypatch, capsys, arguments, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.txt").write_text("lora/y\nlora/z\n")
    with pytest.raises(SystemExit, match="2"):
        compare(*arguments)
    assert line in capsys.readouterr().err.splitlines()[-1]
