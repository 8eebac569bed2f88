"""A run directory's disk, lock and links: errors are one line, and saved data is never lost."""

import resource
from shlex import split

import pytest

import train
from common.errors import RunError
from tests.fault.runs import differences, result
from tests.helpers import drawing
from tests.runs import WEIGHTS, arguments, contents, one_line, refused, run, run_acting, trained
from train import main
from training.checkpoint import CHECKPOINT, PREVIOUS
from training.directory import RunDirectory

OPTIONS = split("--max-steps 9 --log-every 2 --eval-every 8 --batch-size 4")
SHORT = ("--max-steps", 2)


@pytest.fixture
def argv(base, book, tmp_path) -> list[str]:
    return arguments("lora", base, book, tmp_path / "run", *OPTIONS)


@pytest.fixture(scope="module")
def whole(base, book, tmp_path_factory):
    """Return a run whose disk was never full."""
    return trained("lora", base, book, tmp_path_factory.mktemp("whole"), *OPTIONS)


@pytest.fixture
def size_limit():
    """Limit the size of files that this process writes, as a full disk would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    "size, file", [(12_000, CHECKPOINT), (250, "metrics.jsonl"), (3_000, "adapter_model")]
)
def test_a_full_disk_ends_the_run_in_one_line_and_after_that_it_goes_on(
    whole, tmp_path, argv, size_limit, size, file
):
    argv += ["--checkpoint-every", "3" if file == CHECKPOINT else "100"]
    line = one_line(run_acting({5: lambda moment: size_limit(size)}, *argv))
    assert f"{tmp_path / 'run' / file}" in line and "File too large" in line
    assert "checkpoint" in line.split(";")[-1]
    size_limit(resource.RLIM_INFINITY)
    assert not list((tmp_path / "run").glob(".*"))
    assert run(main, *argv, "--resume").status == 0
    assert differences(tmp_path / "run", result(whole.out)) == []


def test_a_line_of_which_the_disk_takes_only_a_part_is_an_error(tmp_path, size_limit):
    directory = RunDirectory(tmp_path / "run")
    with pytest.raises(RunError, match=r"cannot be written \(File too large\)"):
        size_limit(10)
        try:
            directory.append({"step": 1, "loss": 2.5})
        finally:
            size_limit(resource.RLIM_INFINITY)  # pytest must write its output
    directory.close()


@drawing()
def test_overwrite_replaces_everything_that_a_run_left_and_nothing_else(base, book, tmp_path):
    trained("lora", base, book, tmp_path, "--max-steps", 2)
    (tmp_path / "notes.txt").write_text("mine")
    done = trained("full", base, book, tmp_path, "--max-steps", 1, "--overwrite")
    model = "config.json generation_config.json model.safetensors"
    tokenizer = "tokenizer.json tokenizer_config.json"
    others = f"{tokenizer} notes.txt run.json metrics.jsonl loss.png {CHECKPOINT} {PREVIOUS}"
    assert set(contents(tmp_path)) == set(split(f"{model} {others}"))
    assert done.report["method"] == "full" and done.column("step") == [1]


def test_metrics_without_a_checkpoint_are_somebodys(argv, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("mine")
    assert "contains a run (metrics.jsonl)" in refused(tmp_path / "run", *argv)


def test_two_runs_do_not_share_a_directory(argv, tmp_path):
    held = RunDirectory(tmp_path / "run")
    for options in ((), ("--overwrite",), ("--resume",)):
        line = refused(tmp_path / "run", *argv, *options)
        assert f"--out {tmp_path / 'run'}: another run is using it" in line
    held.close()
    assert run(main, *argv, *SHORT).status == 0


def test_a_run_that_ended_while_another_started_up_is_not_replaced(argv, tmp_path, monkeypatch):
    """The second run looks before the first begins, and takes the lock after it ends."""
    load = train.load_model

    def slowly(*arguments):
        monkeypatch.undo()
        assert run(main, *argv, *SHORT).status == 0
        whole.update(contents(tmp_path / "run"))
        return load(*arguments)

    whole: dict = {}
    monkeypatch.setattr(train, "load_model", slowly)
    assert "contains a run (run.json)" in one_line(run(main, *argv), 2)
    assert contents(tmp_path / "run") == whole != {}


@drawing()
def test_links_in_the_directory_are_replaced_and_never_followed(argv, tmp_path):
    """The directory itself may be a link."""
    out = tmp_path / "run"
    outside = tmp_path / "outside"
    (tmp_path / "real").mkdir()
    out.symlink_to(tmp_path / "real")
    outside.write_text("mine")
    weights = ("adapter_config.json", "adapter_model.safetensors")
    names = (CHECKPOINT, PREVIOUS, *weights, "run.json", "loss.png")
    for name in names:
        (out / name).symlink_to(outside)
    assert run(main, *argv, *SHORT, "--overwrite").status == 0
    assert not any((out / name).is_symlink() for name in names)
    assert outside.read_text() == "mine"


@pytest.mark.parametrize("option, target", [("--overwrite", "outside"), ("--resume", "nowhere")])
def test_metrics_that_are_a_link_are_refused(argv, tmp_path, option, target):
    (tmp_path / "run").mkdir()
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "run" / "metrics.jsonl").symlink_to(tmp_path / target)
    assert "metrics.jsonl" in one_line(run(main, *argv, option), 2)
    assert len(list((tmp_path / "run").iterdir())) == 1
    assert (tmp_path / "outside").read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


def test_what_a_killed_process_left_half_written_is_removed(argv, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    stale = [out / f".{name}.x1.tmp" for name in (CHECKPOINT, WEIGHTS["lora"])]
    for path in (*stale, out / ".notes.tmp"):
        path.write_text("half")
    assert run(main, *argv, *SHORT).status == 0
    assert not any(path.exists() for path in stale) and (out / ".notes.tmp").exists()
