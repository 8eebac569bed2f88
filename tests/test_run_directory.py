"""The disk, the lock and the links of a run directory: one line, and nothing saved is lost."""

import os
import re
import resource
import shutil

import pytest

import train
from tests.runs import arguments, contents, die, finished, one_line, run, run_acting, trained
from train import main
from training.directory import RunDirectory

OPTIONS = ("--max-steps", 30, "--log-every", 5, "--checkpoint-every", 3, "--batch-size", 4)


@pytest.fixture
def argv(base, book, tmp_path) -> list[str]:
    return arguments("lora", base, book, tmp_path / "run", *OPTIONS)


@pytest.fixture
def size_limit():
    """Sets the largest file that this process may write, as a full disk would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size, step, file", [
    (12_000, 7, "checkpoint.pt"), (250, 7, "metrics.jsonl"), (3_000, 20, "adapter_model")])
def test_a_full_disk_ends_the_run_in_one_line_and_after_that_it_goes_on(
        base, book, tmp_path, argv, size_limit, size, step, file):
    whole = trained("lora", base, book, tmp_path / "whole", *OPTIONS, "--eval-every", 20)
    every = ("--eval-every", "20", "--checkpoint-every", 3 if "checkpoint" in file else 100)
    ending = run_acting({step: lambda trainer: size_limit(size)}, *argv, *every)
    line = one_line(ending)
    assert f"{tmp_path / 'run' / file}" in line and "File too large" in line
    assert "checkpoint" in line.split(";")[-1]
    size_limit(resource.RLIM_INFINITY)
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
    assert run(main, *argv, *every, "--resume").status == 0
    ours, theirs = contents(tmp_path / "run"), contents(whole.out)
    assert ours["adapter_model.safetensors"] == theirs["adapter_model.safetensors"]
    assert finished(tmp_path / "run").column("loss") == whole.column("loss")


@pytest.mark.parametrize("take_away", [
    shutil.rmtree, lambda out: out.rename(out.with_name("away"))])
def test_a_directory_that_vanishes_ends_the_run_and_is_not_made_again(argv, tmp_path, take_away):
    out = tmp_path / "run"
    line = one_line(run_acting({7: lambda trainer: take_away(out)}, *argv))
    assert f"{out / 'metrics.jsonl'}: has vanished" in line and "step 6" in line
    assert not out.exists()


@pytest.fixture
def free_space(monkeypatch):
    """Sets how much the system says is free."""
    return lambda size: monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, size))


def megabytes(pattern: str, line: str) -> float:
    return 1e6 * float(re.search(pattern, line)[1].replace(",", ""))


def test_too_little_space_is_said_before_the_first_step(argv, tmp_path, free_space):
    free_space(1_000_000)
    line = one_line(run(main, *argv), 2)
    assert "1.0 MB are free" in line and 1e6 < megabytes(r"needs ([\d.]+) MB", line) < 2e6
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method, weights", [("lora", "adapter_model.safetensors"),
                                             ("full", "model.safetensors")])
def test_the_space_that_is_asked_for_holds_what_a_run_leaves(
        base, book, tmp_path, free_space, method, weights):
    done = trained(method, base, book, tmp_path / "run", *OPTIONS)
    sizes = {name: len(data) for name, data in contents(done.out).items()}
    most = 3 * sizes["checkpoint.pt"] + 2 * sizes[weights]
    free_space(0)
    line = one_line(run(main, *arguments(method, base, book, tmp_path / "new")), 2)
    assert most < megabytes(r"needs ([\d,.]+) MB", line) < 1.3 * most + 1_500_000


def test_a_run_that_is_gone_on_with_needs_only_what_it_has_not_yet_written(
        argv, tmp_path, free_space):
    assert run_acting({9: die}, *argv).status == 130
    free_space(0)
    line = one_line(run(main, *argv, "--resume"), 2)
    lacking = megabytes(r"needs ([\d.]+) MB", line) - megabytes(r"([\d.]+) MB are free", line)
    held = sum(map(len, contents(tmp_path / "run").values()))
    assert held > 50_000
    free_space(lacking + 100_000)  # the message rounds
    assert run(main, *argv, "--resume").status == 0


def test_two_runs_do_not_share_a_directory(argv, tmp_path):
    with RunDirectory(tmp_path / "run"):
        before = contents(tmp_path / "run")
        for options in ((), ("--overwrite",), ("--resume",)):
            line = one_line(run(main, *argv, *options), 2)
            assert f"--out {tmp_path / 'run'}: another run is at work there" in line
        assert contents(tmp_path / "run") == before
    assert run(main, *argv).status == 0


def test_a_run_that_ended_while_another_started_up_is_not_replaced(argv, base, book, tmp_path):
    """The second looked before the first had begun, and comes to the lock after its end."""
    load, others = train.load_data, []

    def slowly(*arguments):
        if not others:
            others.append(None)
            assert run(main, *argv).status == 0
            others.append(contents(tmp_path / "run"))
        return load(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_data", slowly)
        line = one_line(run(main, *argv), 2)
    assert "holds a run (run.json)" in line and contents(tmp_path / "run") == others[1]


def test_links_in_the_directory_are_replaced_and_never_followed(argv, tmp_path):
    out, outside = tmp_path / "run", tmp_path / "outside"
    out.mkdir()
    outside.write_text("mine")
    names = ("checkpoint.pt", "checkpoint.previous.pt", "adapter_config.json", "run.json",
             "adapter_model.safetensors", "loss.png")
    for name in names:
        (out / name).symlink_to(outside)
    assert run(main, *argv, "--overwrite").status == 0
    assert not any((out / name).is_symlink() for name in names)

    def link(trainer):
        for name in names:
            (out / name).unlink(missing_ok=True)
            (out / name).symlink_to(outside)

    assert run_acting({2: link}, *argv, "--overwrite").status == 0
    assert not any((out / name).is_symlink() for name in names if "previous" not in name)
    assert outside.read_text() == "mine"


@pytest.mark.parametrize("options", [(), ("--overwrite",), ("--resume",)])
@pytest.mark.parametrize("content", ["mine", ""])
def test_metrics_that_are_a_link_are_refused(argv, tmp_path, options, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "outside").write_text(content)
    (tmp_path / "run" / "metrics.jsonl").symlink_to(tmp_path / "outside")
    line = one_line(run(main, *argv, *options), 2)
    assert "metrics.jsonl" in line and (tmp_path / "outside").read_text() == content


@pytest.mark.parametrize("make", [
    lambda path: path.symlink_to(path.with_name("nowhere")), os.mkfifo, os.mkdir])
@pytest.mark.parametrize("options", [(), ("--overwrite",), ("--resume",)])
def test_metrics_that_are_no_file_are_refused(argv, tmp_path, make, options):
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / "metrics.jsonl")
    assert "metrics.jsonl" in one_line(run(main, *argv, *options), 2)
    assert len(list((tmp_path / "run").iterdir())) == 1


def test_the_directory_itself_may_be_a_link(argv, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "real")
    assert run(main, *argv).status == 0 and (tmp_path / "real" / "run.json").exists()


def test_what_a_killed_process_left_half_written_is_removed(argv, tmp_path):
    stale = tmp_path / "run" / ".checkpoint.pt.x1.tmp"
    stale.mkdir(parents=True)
    (stale / "checkpoint.pt").write_bytes(b"half")
    (tmp_path / "run" / ".notes.tmp").write_text("mine")
    assert run(main, *argv).status == 0
    assert not stale.exists() and (tmp_path / "run" / ".notes.tmp").exists()
    assert os.listdir(tmp_path / "run").count("checkpoint.pt") == 1
