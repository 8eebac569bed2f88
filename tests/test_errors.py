"""A user's mistake: one line that names the option or file, status 2, and nothing written."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluate
import generate
import train
from lora.adapter import save_adapter
from tests.adapters import adapted
from tests.helpers import tiny_gpt2_directory
from tests.runs import run, story

TRAIN = "--base base --book book.txt --out out --block-size 16 --device cpu"
COMMANDS = {  # each would succeed
    "lora": (train.main, f"lora {TRAIN}"),
    "full": (train.main, f"full {TRAIN}"),
    "evaluate": (evaluate.main, "--base base --text book.txt --block-size 16 --device cpu"),
    "generate": (generate.main, "--prompt You --base base --max-new-tokens 1 --device cpu"),
}
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
MODEL = "model.safetensors"
LONG = 300 * "x"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A directory with a good base, book and adapter, and with spoilt ones of each."""
    place = tmp_path_factory.mktemp("workspace")
    base, _ = tiny_gpt2_directory(place / "base")
    save_adapter(*adapted(base, ("c_attn",), r=4), place / "adapter", "gpt2")
    (place / "directory").mkdir()
    (place / "held").mkdir()
    (place / "held" / "run.json").write_text("{}")
    shutil.copytree(base, place / "hub" / "models--openai-community--gpt2" / "snapshots" / "main")
    write_texts(place)
    write_bases(place)
    write_adapters(place)
    for name, content in (("garbage", "not JSON"), ("list", "[]"), ("foreign", '{"method": 1}')):
        (place / name).mkdir()
        (place / name / "run.json").write_text(content)
    return place


def write_texts(place: Path) -> None:
    (place / "book.txt").write_text(story())
    (place / "empty.txt").write_text("")
    (place / "latin1.txt").write_bytes("café au lait ".encode("latin-1") * 500)
    (place / "short.txt").write_text(story(sentences=3))
    (place / "one.txt").write_text("x")


def write_bases(place: Path) -> None:
    for name in ("llama", "cut", "nan"):
        shutil.copytree(place / "base", place / name)
    config = json.loads((place / "base" / "config.json").read_text())
    (place / "llama" / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    weights = (place / "base" / MODEL).read_bytes()
    (place / "cut" / MODEL).write_bytes(weights[: len(weights) // 2])
    tensors = load_file(place / "base" / MODEL)
    tensors["transformer.ln_f.weight"][3] = torch.nan
    save_file(tensors, place / "nan" / MODEL)


def write_adapters(place: Path) -> None:
    for name, config in (("wide", {"n_embd": 64}), ("deep", {"n_layer": 3})):
        base, _ = tiny_gpt2_directory(place / f"{name}-base", **config)
        save_adapter(*adapted(base, ("c_attn",), r=4), place / f"{name}-adapter", "gpt2")
    names = ("ia3", "cut", "less", "more")
    ia3, cut, less, more = (place / f"{name}-adapter" for name in names)
    for path in (ia3, cut, less, more):
        shutil.copytree(place / "adapter", path)
    config = json.loads((ia3 / ADAPTER_CONFIG).read_text())
    (ia3 / ADAPTER_CONFIG).write_text(json.dumps(config | {"peft_type": "IA3"}))
    (cut / ADAPTER).write_bytes((cut / ADAPTER).read_bytes()[:-100])
    tensors = load_file(less / ADAPTER)
    save_file(tensors | {"stray": torch.zeros(1)}, more / ADAPTER)
    save_file(dict(list(tensors.items())[1:]), less / ADAPTER)


@pytest.fixture(autouse=True)
def _in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("HF_HUB_CACHE", str(workspace / "hub"))


def state(place: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in place.rglob("*")}


def refusal(main, argv: list[str]) -> str:
    """The one line with which the command ends, having left every file as it was."""
    before = state(Path.cwd())
    ending = run(main, *argv)
    assert ending.status == 2, ending
    assert ending.stderr.startswith("error: ") and len(ending.stderr.splitlines()) == 1
    assert state(Path.cwd()) == before and not Path("out").exists()
    return ending.stderr


def command(line: str) -> tuple:
    """`main` and arguments of a line that begins with a key of COMMANDS; its options win."""
    name, *options = shlex.split(line)
    main, usual = COMMANDS[name]
    return main, [*usual.split(), *options]


@pytest.mark.parametrize("line, word", [
    ("lora --book missing.txt", "missing.txt"),
    ("lora --book empty.txt", "empty.txt: is empty"),
    ("lora --book directory", "directory"),
    ("lora --book latin1.txt", "latin1.txt: not UTF-8"),
    ("lora --book short.txt", "short.txt: its validation part"),
    ("lora --book short.txt --val-fraction 0.9", "short.txt: its training part"),
    ("lora --val-fraction 0.001", "book.txt: its validation part"),
    (f"lora --book {LONG}", LONG),
    ("lora --book 'a\nb'", "a b"),
    ("evaluate --text missing.txt", "missing.txt"),
    ("evaluate --text empty.txt", "empty.txt: is empty"),
    ("evaluate --text directory", "directory"),
    ("evaluate --text latin1.txt", "latin1.txt: not UTF-8"),
    ("evaluate --text one.txt", "one.txt: 1 tokens; too short"),
    ("lora --block-size 65", "--block-size 65"),
    ("full --block-size 65", "--block-size 65"),
    ("evaluate --block-size 65", "--block-size 65"),
    ("evaluate --stride 17", "--stride 17"),
    ("evaluate --json book.txt/scores.json", "book.txt/scores.json"),
    ("evaluate --json directory", "directory"),
    ("evaluate --compare directory", "directory/run.json"),
    ("evaluate --compare missing", "missing/run.json"),
    ("evaluate --compare garbage", "garbage/run.json"),
    ("evaluate --compare list", "list/run.json"),
    ("evaluate --compare foreign", "foreign/run.json"),
    ("generate --prompt ''", "--prompt"),
    ("generate --prompt ' \n\t'", "--prompt"),
    ("generate --prompt You '' again", "--prompt"),
    ("generate --prompt", "--prompt"),
    ("generate --with-base", "--adapter"),
])
def test_texts_and_lengths(line, word):
    assert word in refusal(*command(line))


@pytest.mark.parametrize("line, word", [
    ("lora --out held", "--out held: holds a run (run.json); --resume"),
    ("full --out held", "--overwrite"),
    ("lora --out book.txt", "--out book.txt: is a file"),
    ("lora --out book.txt/out", "book.txt/out"),
    (f"lora --out {LONG}", LONG),
    ("lora --out base", "--out base"),
    ("lora --out base --overwrite", "--out base: is what --base reads"),
    ("full --out ./directory/../base --overwrite", "is what --base reads"),
    ("full --base gpt2 --out hub/models--openai-community--gpt2/snapshots/main --overwrite",
     "is what --base reads"),
    ("lora --init-adapter adapter --out adapter --overwrite", "is what --init-adapter reads"),
    ("lora --resume", "--resume: out holds no checkpoint"),
    ("lora --out directory --resume", "--resume: directory holds no checkpoint"),
    ("lora --resume --overwrite", "--overwrite"),
])
def test_output_directories(line, word):
    assert word in refusal(*command(line))


@pytest.mark.parametrize("line, word", [
    ("lora --r 33", "--r"),
    ("lora --r 1000000", "rank 1000000"),
    ("lora --target-modules c_nothing", "--target-modules: target module 'c_nothing'"),
    ("lora --target-modules c_attn lm_head", "'lm_head'"),
    ("lora --target-modules wte", "'wte'"),
    ("lora --target-modules ln_1", "'ln_1'"),
    ("lora --target-modules ''", "--target-modules"),
    ("lora --target-modules", "--target-modules"),
    ("full --r 8", "--r"),
    ("full --init-adapter adapter", "--init-adapter"),
])
def test_what_lora_is_put_on(line, word):
    assert word in refusal(*command(line))


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("base, word", [
    ("nowhere", "nowhere"), ("''", "--base"), ("gpt2-huge", "gpt2-huge"), (LONG, LONG),
    ("book.txt", "book.txt"), ("directory", "directory"), ("llama", "llama/config.json"),
    ("cut", f"cut/{MODEL}"), ("nan", f"nan/{MODEL}"),
])
def test_bases(name, base, word):
    assert word in refusal(*command(f"{name} --base {base}"))


@pytest.mark.parametrize("use", ["lora --init-adapter", "evaluate --adapter", "generate --adapter"])
@pytest.mark.parametrize("adapter, word", [
    ("missing", f"missing/{ADAPTER_CONFIG}"),
    ("directory", f"directory/{ADAPTER_CONFIG}"),
    ("wide-adapter", f"wide-adapter/{ADAPTER}"),
    ("deep-adapter", f"deep-adapter/{ADAPTER}"),
    ("ia3-adapter", f"ia3-adapter/{ADAPTER_CONFIG}"),
    ("cut-adapter", f"cut-adapter/{ADAPTER}"),
    ("less-adapter", f"less-adapter/{ADAPTER}"),
    ("more-adapter", f"more-adapter/{ADAPTER}"),
    (LONG, LONG),
])
def test_adapters(use, adapter, word):
    assert word in refusal(*command(f"{use} {adapter}"))


NO_NUMBERS = ("nan", "inf", "-inf", "-1", "1e999", "many", "''", 400 * "9")
WHOLE = (*NO_NUMBERS, "1.5", "1000000000000")
NUMBERS = {  # by option: what it refuses beyond what no option takes
    "lora": {
        **dict.fromkeys(("--block-size", "--stride", "--epochs", "--max-steps", "--batch-size",
                         "--grad-accum", "--eval-every", "--log-every", "--r", "--lora-alpha"),
                        (*WHOLE, "0")),
        "--checkpoint-every": (*WHOLE, "0", "0s", "1.5m", "-1s", "10h", "m", "99999999s"),
        "--seed": (*NO_NUMBERS, "1.5", str(2**63)),
        "--label-shift": (*WHOLE, "0", "3"),
        "--lr": (*NO_NUMBERS, "0", "11"),
        "--val-fraction": (*NO_NUMBERS, "0", "1"),
        "--warmup-ratio": (*NO_NUMBERS, "1"),
        "--weight-decay": (*NO_NUMBERS, "11"),
        "--clip": (*NO_NUMBERS, "1e30"),
        "--base-dropout": (*NO_NUMBERS, "1"),
        "--lora-dropout": (*NO_NUMBERS, "1"),
    },
    "evaluate": {
        **dict.fromkeys(("--block-size", "--stride", "--batch-size"), (*WHOLE, "0")),
        "--val-fraction": (*NO_NUMBERS, "0", "1.1"),
        "--label-shift": (*WHOLE, "0", "3"),
    },
    "generate": {
        "--max-new-tokens": (*WHOLE, "0"),
        "--top-k": WHOLE,
        "--top-p": (*NO_NUMBERS, "0", "1.1"),
        "--temperature": (*NO_NUMBERS, "1e30"),
        "--seed": (*NO_NUMBERS, "1.5", str(2**63)),
    },
}


@pytest.mark.parametrize("name, option", [(name, o) for name in NUMBERS for o in NUMBERS[name]])
def test_numbers(name, option):
    for value in NUMBERS[name][option]:
        line = refusal(*command(f"{name} {option} {value}"))
        assert option in line and len(line) < 200, value


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("options, word", [
    ("--device tpu", "--device"), ("--precision fp64", "--precision"), ("--base", "--base"),
    ("--nonsense 1", "--nonsense"), ("stray", "stray"), ("--devic cpu", "--devic"),
])
def test_options(name, options, word):
    assert word in refusal(*command(f"{name} {options}"))


@pytest.mark.parametrize("device, present", [
    ("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_device_that_is_not_there(name, device, present):
    if present:
        pytest.skip(f"this machine has {device}")
    assert f"--device {device}" in refusal(*command(f"{name} --device {device}"))


@pytest.mark.parametrize("argv", [[], ["dora"], ["--epochs", "1"]])
def test_a_method_must_be_named(argv):
    assert "method" in refusal(train.main, argv)


def test_each_command_would_succeed_without_its_mistake(tmp_path):
    for name in COMMANDS:
        main, argv = command(name)
        more = ["--max-steps", "1", "--out", tmp_path / name] if main is train.main else []
        assert run(main, *argv, *more).status == 0


@pytest.mark.parametrize("script, options", [
    ("train.py", "lora --base base --book missing.txt --out out --block-size 16"),
    ("evaluate.py", "--compare missing.txt")])
def test_the_process_itself_ends_so(script, options):
    path = Path(train.__file__).with_name(script)
    ended = subprocess.run([sys.executable, path, *options.split()], capture_output=True, text=True)
    assert ended.returncode == 2 and "missing.txt" in ended.stderr
    assert ended.stderr.startswith("error: ") and len(ended.stderr.splitlines()) == 1
