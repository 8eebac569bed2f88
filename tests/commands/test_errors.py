"""A mistake gives one line with the option or file, has status 2, and writes nothing."""

import argparse
import errno
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

import evaluate
import generate
import train
from adapters import merge
from common.cli import GONE, Interval, steps_or_seconds
from common.errors import run_command
from tests.helpers import tiny_gpt2_directory
from tests.runs import one_line, run, story, trained
from training.options import ROOT, flag, options_of

TRAIN = "--base base --book book.txt --out out --block-size 16 --device cpu"
COMMANDS = {
    "lora": (train.main, f"lora {TRAIN}"),
    "full": (train.main, f"full {TRAIN}"),
    "evaluate": (evaluate.main, "--base base --text book.txt --block-size 16 --device cpu"),
    "compare": (evaluate.main, "--compare run"),
    "generate": (generate.main, "--prompt You --base base --max-new-tokens 1 --device cpu"),
    "merge": (merge.main, "--base base --adapter run --out out"),
}
MODEL = "model.safetensors"
LONG = 300 * "x"


@pytest.fixture(scope="module")
def workspace(base, tmp_path_factory):
    """Return a directory with a good base and book, and with damaged copies of each."""
    place = tmp_path_factory.mktemp("workspace")
    for name in ("base", "llama", "cut", "pointer", "pickle"):
        shutil.copytree(base, place / name)
    config = json.loads((base / "config.json").read_text())
    for name, content in {
        "book.txt": story(),
        "short.txt": story(sentences=3),
        "one.txt": "x",
        "held/run.json": "{}",
        "directory/file": "",
        f"cut/{MODEL}": "cut",
        f"pointer/{MODEL}": "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "pickle/pytorch_model.bin": "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "unfinished/metrics.jsonl": "",
        "llama/config.json": json.dumps(config | {"model_type": "llama"}),
    }.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(content)
    (place / "pickle" / MODEL).unlink()
    os.mkfifo(place / "pipe")
    (place / "latin1.txt").write_text("café au lait", encoding="latin-1")
    tiny_gpt2_directory(place / "other", seed=1)  # with the same shapes
    trained("lora", place / "base", place / "book.txt", place / "run", "--max-steps", 2)
    return place


@pytest.fixture(autouse=True)
def _in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


def state(place: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in place.rglob("*")}


def arguments(line: str) -> list[str]:
    """Return the arguments of a line that begins with a key of COMMANDS. Its options win."""
    name, *options = shlex.split(line)
    return [*COMMANDS[name][1].split(), *options]


def refusal(line: str) -> str:
    """Return the command's single error line. No file may change."""
    before = state(Path.cwd())
    ending = run(COMMANDS[line.split()[0]][0], *arguments(line))
    assert ending.status == 2, ending
    assert ending.stderr.startswith("error: ") and len(ending.stderr.splitlines()) == 1
    assert state(Path.cwd()) == before and not Path("out").exists()
    return ending.stderr


# The tests of the readers of bases, adapters, targets and texts have the full lists. This list
# has each kind of mistake, with one command or two.
MISTAKES = [
    ("lora --book missing.txt", "missing.txt"),
    ("lora --book short.txt", "short.txt: the validation part"),
    ("evaluate --text latin1.txt", "1.txt: not UTF-8"),
    ("evaluate --text one.txt", "1 tokens; too short"),
    ("evaluate --json book.txt", "--json book.txt: is an input (book.txt); name another file"),
    ("evaluate --adapter run --json ./run/adapter_config.json", "is an input (run/adapter_config"),
    ("evaluate --json pipe", "pipe: cannot be written (not a regular file)"),  # such as /dev/stdout
    ("full --block-size 65", "--block-size 65"),
    ("evaluate --block-size 65", "--block-size 65"),
    ("compare held", "run.json: has no options"),
    ("compare unfinished", "unfinished: contains no finished run (run.json); --resume continues a"),
    ("compare --json out", "--compare: takes no --json, only runs"),
    ("compare --text book.txt", "--text: not allowed with argument --compare"),
    ("evaluate --forgotten", "--forgotten compares an adapter with its base on a text: give --ad"),
    ("generate --prompt You ' \n' on", "--prompt is empty"),
    ("generate --prompt -Hello", "give a value that begins with - as --option=-value"),
    ("generate --with-base", "--adapter"),
    ("lora --out held", "--out held: contains a run (run.json); --resume continues it, --ove"),
    ("lora --out book.txt", "--out book.txt: is a file"),
    (f"full --out {LONG}", LONG),
    ("lora --out ./directory/../base --overwrite", "contains config.json, but no run"),
    ("lora --init-adapter run --out run --overwrite", "is an input of --init-adapter"),
    ("lora --resume", "--resume: out contains no checkpoint"),
    ("lora --resume --overwrite", "--over"),
    ("lora --base nowhere", "'nowhere': no such directory, and none of the names auto, mini, gpt2"),
    ("evaluate --base run", "run: is an adapter"),
    ("lora --base run", "run: is an adapter"),
    ("evaluate --base pointer", "pointer/model.safetensors: is a pointer of git-lfs, not the file"),
    ("evaluate --base pickle", "pickle/pytorch_model.bin: is a pointer of git-lfs, not the file"),
    ("evaluate --adapter other", "a whole model"),
    ("evaluate --base llama", "llama/config.json"),
    ("generate --base cut", f"cut/{MODEL}"),
    ("lora --r 33 --init-lora-weights pissa", "rank 33 is outside 1 .. 16"),
    ("lora --r 0", "argument --r/--rank: '0' is not a whole number from 1 to 1,000,000,000"),
    ("lora --layers 9", "'c_attn' is not in the model in these layers, only in layers 0 .. 1"),
    ("lora --init-adapter run --lora-alpha=16", "--init-adapter sets the rank"),
    ("lora --use-dora --target-modules c_attn.q", "exclude each other"),
    ("lora --layers 2-1", "--layers: '1' is not a whole number"),
    ("evaluate --adapter missing", "error: missing: no such directory; name an adapter"),
    ("evaluate --adapter run --base other", "_model.safetensors: was trained on another base"),
    ("lora --init-adapter run --base other", "_model.safetensors: was trained on another base"),
    ("evaluate --adapter run --base auto", "/base' is unknown; name its directory: --base DIR"),
    ("merge --out directory", "--out directory: exists already; name a new directory"),
    ("lora --out 'a\udcffb'", "is not UTF-8; name another directory"),
    ("evaluate --device mps", "--device mps: this machine"),
]


@pytest.mark.parametrize("name", COMMANDS)
def test_mistakes_are_named_in_one_line(name, monkeypatch):
    for backend in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(backend, "is_available", lambda: False)
    of_this_command = [(line, word) for line, word in MISTAKES if line.split()[0] == name]
    assert of_this_command
    for line, word in of_this_command:
        assert word in refusal(line), line


@pytest.mark.parametrize("word", [*GONE, "make sweep", "make estimate"])
def test_an_option_or_command_of_1_0_names_what_to_use(word):
    if word.startswith("--"):
        ended = run(train.main, "lora", f"{word}=1")
        status = ended.status
    else:
        command = word.replace("python", sys.executable).split()
        ended = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
        status = ended.returncode
    assert status == 2
    assert ended.stderr.startswith(f"error: {word} is gone in 2.0: use ")


def test_a_directory_without_permission_is_named_in_one_line(monkeypatch):
    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("storage.weights.find_weights", forbidden)
    assert "Permission denied" in refusal("evaluate")


def test_an_interval_is_steps_or_a_time():
    for text, found in (("5", Interval("5", 5, False)), ("10m", Interval("10m", 600, True))):
        assert steps_or_seconds(text) == found
    for text in ("0", "1.5m", "-1s", "10h", "", "1e999", "1000000000000", 400 * "9"):
        with pytest.raises(argparse.ArgumentTypeError) as error:
            steps_or_seconds(text)
        assert len(str(error.value)) < 150, text


DROPOUTS = {"base_dropout", "lora_dropout"}
MAY_BE_0 = {"seed", "weight_decay", "warmup_ratio", "clip", "layers_to_transform"} | DROPOUTS
NUMBERS = {
    "evaluate": ("block_size", "stride", "val_fraction", "label_shift"),
    "generate": ("max_new_tokens", "top_p"),
}


def numbers_of_training() -> list[str]:
    """Return the options of `train.py lora` whose values are numbers or ranges of numbers."""
    declared = {f.name: f.metadata for f in options_of("lora")}
    return [name for name, option in declared.items() if option.get("type") not in (None, Path)]


@pytest.mark.parametrize("command", ["lora", *NUMBERS])
def test_every_number_has_its_limits(command):
    """No option accepts a negative or an infinite number, or a 0 that makes no sense."""
    main, _ = COMMANDS[command]
    names = NUMBERS.get(command) or numbers_of_training()
    assert command != "lora" or len(names) > 20
    for name in names:
        wrong = ["nan", "-1", "1e999"]
        if name not in MAY_BE_0:
            wrong.append("0")
        for value in wrong:
            line = one_line(run(main, *arguments(f"{command} {flag(name)} {value}")), 2)
            assert flag(name) in line and " is not a" in line, line


def test_a_method_must_be_named():
    for argv in ([], ["dora"], ["--epochs", "1"]):
        ending = run(train.main, *argv)
        assert ending.status == 2 and "method" in ending.stderr


def test_a_reader_that_ends_is_named():
    reader, writer = os.pipe()
    os.close(reader)
    errors = io.StringIO()
    with (
        open(writer, "w") as output,
        redirect_stdout(output),
        redirect_stderr(errors),
        pytest.raises(SystemExit) as ended,
    ):
        run_command(lambda _: print("text"))
    assert ended.value.code == 1
    assert errors.getvalue() == "error: the program that reads the output has ended\n"


def test_a_character_that_stdout_lacks_is_replaced(monkeypatch):
    output = io.BytesIO()
    stdout = io.TextIOWrapper(output, encoding="ascii")
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as ended:
        patched.setattr("sys.stdout", stdout)
        run_command(lambda _: print("caf\u00e9 \u2192 out"))
    assert (ended.value.code, output.getvalue()) == (0, b"caf? ? out\n")


def test_a_file_that_may_not_grow_ends_the_command_in_one_line():
    def write(_):
        raise OSError(errno.EFBIG, "File too large")

    assert one_line(run(write), 1) == "error: File too large"
