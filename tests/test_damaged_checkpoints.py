"""A checkpoint is believed only when it is whole and fits; a broken one costs steps, no run."""

import math
import shutil

import pytest
import torch

from tests.runs import Run, arguments, contents, die, finished, run, run_acting, trained
from train import main
from training.checkpoint import content_sha256, read_checkpoint

OPTIONS = ("--max-steps", 6, "--checkpoint-every", 2, "--lr", 1e-2)
FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def whole(base, book, tmp_path_factory) -> Run:
    return trained("lora", base, book, tmp_path_factory.mktemp("whole"), *OPTIONS)


@pytest.fixture(scope="module")
def killed(base, book, tmp_path_factory):
    """A run that died in step 6: its checkpoints are of steps 4 and 2."""
    out = tmp_path_factory.mktemp("killed")
    assert run_acting({6: die}, *arguments("lora", base, book, out, *OPTIONS)).status == 130
    return out


@pytest.fixture
def argv(killed, base, book, tmp_path) -> list[str]:
    """The arguments that go on with a copy of it in `tmp_path / "run"`."""
    shutil.copytree(killed, tmp_path / "run")
    return [*arguments("lora", base, book, tmp_path / "run", *OPTIONS), "--resume"]


def flip(data: bytes, place: float) -> bytes:
    i = int(place * len(data))
    return data[:i] + bytes([data[i] ^ 16]) + data[i + 1:]


DAMAGES = {
    "cut": lambda data: data[:1000], "empty": lambda data: b"", "other": lambda data: b"{}",
    "shorter": lambda data: data[:-1], "zeros": lambda data: bytes(len(data)),
    "flipped": lambda data: flip(data, 0.3), "flipped later": lambda data: flip(data, 0.6),
}


def test_the_two_last_checkpoints_are_kept(killed):
    for name, step in (("checkpoint.pt", 4), ("checkpoint.previous.pt", 2)):
        state = torch.load(killed / name, weights_only=True)
        assert state["progress"]["step"] == step


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(whole, argv, tmp_path, damage):
    newest = tmp_path / "run" / "checkpoint.pt"
    newest.write_bytes(DAMAGES[damage](newest.read_bytes()))
    ending = run(main, *argv)
    assert ending.status == 0 and "resuming after step 2 of 6" in ending.stdout
    assert ending.stderr.startswith(f"warning: {newest}: damaged")
    assert len(ending.stderr.splitlines()) == 1
    ours, theirs = (contents(out) for out in (tmp_path / "run", whole.out))
    assert all(ours[name] == theirs[name] for name in FILES)
    assert finished(tmp_path / "run").column("step") == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_that_is_not_there_yet_is_the_one_before(whole, argv, tmp_path):
    """As after a kill between the two renames."""
    (tmp_path / "run" / "checkpoint.pt").unlink()
    ending = run(main, *argv)
    assert (ending.status, ending.stderr) == (0, "") and "after step 2 of 6" in ending.stdout
    assert finished(tmp_path / "run").column("loss") == whole.column("loss")


def test_the_good_one_is_never_replaced_by_the_damaged_one(argv, tmp_path):
    """Killed again at the worst moment, before the next checkpoint: it still goes on."""
    newest, previous = (tmp_path / "run" / name for name in ("checkpoint.pt",
                                                             "checkpoint.previous.pt"))
    good = previous.read_bytes()
    newest.write_bytes(b"damaged")

    assert run_acting({3: die}, *argv).status == 130
    assert newest.read_bytes() == good and not previous.exists()


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("both", [True, False])
def test_where_no_checkpoint_is_whole_each_is_named(argv, tmp_path, damage, both):
    newest, previous = (tmp_path / "run" / name for name in ("checkpoint.pt",
                                                             "checkpoint.previous.pt"))
    newest.write_bytes(DAMAGES[damage](newest.read_bytes()))
    previous.write_bytes(b"") if both else previous.unlink()
    before = contents(tmp_path / "run")
    ending = run(main, *argv)
    assert ending.status == 2 and len(ending.stderr.splitlines()) == 1
    assert f"{newest}: damaged" in ending.stderr and "--overwrite" in ending.stderr
    assert (f"{previous}: damaged" in ending.stderr) == both
    assert contents(tmp_path / "run") == before




def put(state: dict, *path_and_value) -> None:
    *path, last, value = path_and_value
    for key in path:
        state = state[key]
    state[last] = value


NAME = "h.0.attn.c_attn.lora_A.weight"
FORGED = {
    "a parameter to broadcast": lambda s: put(s, "parameters", NAME, torch.zeros(1)),
    "a parameter of another shape": lambda s: put(s, "parameters", NAME, torch.zeros(9, 9)),
    "another dtype": lambda s: put(s, "parameters", NAME, s["parameters"][NAME].half()),
    "a number for a parameter": lambda s: put(s, "parameters", NAME, 1.0),
    "no parameter": lambda s: s["parameters"].pop(NAME),
    "one parameter more": lambda s: put(s, "parameters", "wte.weight", torch.zeros(2, 2)),
    "a weight that is NaN": lambda s: put(s, "parameters", NAME, s["parameters"][NAME] * math.nan),
    "no moments": lambda s: s["optimizer"].clear(),
    "no moment": lambda s: s["optimizer"][0].pop("exp_avg"),
    "a moment of another shape": lambda s: put(s, "optimizer", 0, "exp_avg", torch.zeros(1)),
    "a step that is no tensor": lambda s: put(s, "optimizer", 0, "step", 3),
    "parameter groups": lambda s: put(s, "optimizer", "param_groups", []),
    "a step after the last": lambda s: put(s, "progress", "step", 7),
    "a step before the first": lambda s: put(s, "progress", "step", -1),
    "a step that is no int": lambda s: put(s, "progress", "step", 4.0),
    "a huge number": lambda s: put(s, "progress", "metrics_bytes", 1 << 70),
    "endless time": lambda s: put(s, "progress", "seconds", math.inf),
    "a field more": lambda s: put(s, "progress", "more", 1),
    "a field less": lambda s: s["progress"].pop("tokens"),
    "a list of progress": lambda s: put(s, "progress", []),
    "short sums": lambda s: put(s, "interval", "sums", (1.0,)),
    "Python's state cut": lambda s: put(s, "random", 0, "python", s["random"][0]["python"][:-1]),
    "NumPy's state too large": lambda s: put(s, "random", 0, "numpy", [1 << 40] * 624),
    "NumPy beyond its state": lambda s: put(s, "random", 0, "numpy_position", 1 << 40),
    "torch's state of zeros": lambda s: put(s, "random", 0, "torch", torch.zeros(
        5056, dtype=torch.uint8)),
    "no generators": lambda s: s.pop("random"),
    "a GPU that is text": lambda s: put(s, "cuda_random", "0"),
    "nothing of the run": lambda s: s.pop("run"),
    "a run that is text": lambda s: put(s, "run", "lora"),
    "options that are a list": lambda s: put(s, "run", "options", []),
    "a tensor among the options": lambda s: put(s, "run", "options", "lr", torch.zeros(2)),
    "a base that is text": lambda s: put(s, "run", "base", "x"),
}


@pytest.mark.parametrize("forge", FORGED)
def test_a_forged_checkpoint_with_a_right_checksum_is_refused_before_anything_changes(
        argv, tmp_path, forge):
    out = tmp_path / "run"
    state, path = read_checkpoint(out)
    FORGED[forge](state)
    torch.save(state | {"sha256": content_sha256(state)}, path)
    before = contents(out)
    ending = run(main, *argv)
    assert ending.status == 2 and len(ending.stderr.splitlines()) == 1, ending
    assert ending.stderr.startswith("error: --resume: ") and len(ending.stderr) < 400
    assert contents(out) == before


class Runs:
    """Unpickled, it would leave a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_checkpoint_is_not_run(argv, tmp_path):
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        torch.save({"sha256": "", "run": Runs(tmp_path / "ran")}, tmp_path / "run" / name)
    ending = run(main, *argv)
    assert ending.status == 2 and "damaged" in ending.stderr
    assert not (tmp_path / "ran").exists()
