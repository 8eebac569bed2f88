"""The page of `make explore`: it refuses strangers, and shows what the commands compute."""

import json
import shutil
import signal
import subprocess
import sys
import threading
from http.client import HTTPConnection
from types import SimpleNamespace

import peft
import pytest
from safetensors.torch import load_file, save_file

import generate
from common.device import Device
from lesson.explore import __main__ as command
from lesson.explore.explorer import Explorer
from lora.peft_config import CONFIG
from lora.save import WEIGHTS, save_adapter
from tests.helpers import TINY
from tests.pairs import ALL_FOUR, adapted
from tests.runs import one_line, run, scores, stdout_of, stock_model
from training.options import BOOK, ROOT

PROMPT = "-You climb “the stair” <b>"  # like an option and markup; characters of several tokens
TEXT = "The keeper turns “naïve”."
OPTIONS = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 5, "max_new_tokens": 25}
FIRST_BLOCK = [f"h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
LAYERS = FIRST_BLOCK + [name.replace("h.0", "h.1") for name in FIRST_BLOCK]
WHOLE = {"strength": 1, "rank": 3, "layers": LAYERS}  # the adapter as it was trained


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    directory = tmp_path_factory.mktemp("explore") / "adapter"
    save_adapter(adapted(base, ALL_FOUR, r=3, lora_alpha=2), directory, "gpt2")
    return directory


@pytest.fixture(scope="module")
def page(base, adapter):
    """Serve the page. Its `send` returns a request's status, headers and text."""
    with command.Server(0) as server:
        server.explorer = Explorer(str(base), adapter, Device.pick("cpu"))
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()

        def send(method, path, body=None, **headers):
            connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read().decode()

        def ask(what, **request):
            status, _, text = send("POST", f"/api/{what}", json.dumps(WHOLE | OPTIONS | request))
            assert status == 200, text
            return [json.loads(line) for line in text.splitlines()]

        yield SimpleNamespace(send=send, ask=ask)
        server.shutdown()
        thread.join()


def texts(page, **knobs):
    """Return the texts of the base and of the adapter after PROMPT, which is included."""
    *pieces, end = page.ask("write", prompt=PROMPT, **knobs)
    assert end == {"done": True}
    rows = [PROMPT, PROMPT]
    for piece in pieces:
        rows[piece["row"]] += piece["text"]
    return rows


def changed_file(base, adapter, knobs, out):
    """Write the adapter that the knobs describe: alpha scaled, B zero, PEFT's truncated SVD."""
    scaled = shutil.copytree(adapter, out / "scaled")
    config = json.loads((scaled / CONFIG).read_text())
    config["lora_alpha"] *= knobs["strength"]
    (scaled / CONFIG).write_text(json.dumps(config))
    tensors = load_file(scaled / WEIGHTS)
    for key, tensor in tensors.items():
        layer = key.removeprefix("base_model.model.transformer.").removesuffix(".lora_B.weight")
        if key.endswith("lora_B.weight") and layer not in knobs["layers"]:
            tensor.zero_()
    save_file(tensors, scaled / WEIGHTS)
    model = peft.PeftModel.from_pretrained(stock_model(base), scaled, "scaled")
    halves = (["scaled", "scaled"], [0.5, 0.5])  # PEFT does not truncate a single adapter
    model.add_weighted_adapter(*halves, "cut", combination_type="svd", svd_rank=knobs["rank"])
    model.save_pretrained(out, selected_adapters=["cut"])
    return out / "cut"


@pytest.mark.parametrize("knobs", [WHOLE, {"strength": 1.5, "rank": 2, "layers": FIRST_BLOCK}])
def test_the_page_has_the_texts_and_scores_of_the_commands(base, adapter, page, tmp_path, knobs):
    changed = changed_file(base, adapter, knobs, tmp_path)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    options += ["--base", base, "--device", "cpu", f"--prompt={PROMPT}"]
    written = [stdout_of(generate.main, *options, *more) for more in ((), ("--adapter", changed))]
    assert [f"{text}\n\n" for text in texts(page, **knobs)] == written
    assert written[0] != written[1]

    (tmp_path / "text.txt").write_text(TEXT)
    model = ("--base", base, "--text", tmp_path / "text.txt", "--block-size", TINY["n_positions"])
    before, _ = scores(tmp_path / "base.json", *model)
    after, _ = scores(tmp_path / "new.json", *model, "--adapter", changed, "--forgotten")
    [found] = page.ask("score", text=TEXT, **knobs)
    expected = [before["perplexity"], after["perplexity"]]
    assert found["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert found["mean_gain"] == pytest.approx(before["loss"] - after["loss"], abs=1e-5)
    assert found["mean_kl"] == pytest.approx(after["kl_from_base"], abs=1e-5)
    assert (found["kept"] < 0.99) == (knobs["rank"] == 2)


def test_what_is_foreign_wrong_or_too_large_is_refused_in_one_line(page):
    good = json.dumps(WHOLE | {"text": TEXT})
    for path, body, headers, status, words in (
        ("/api/score", good, {"Host": "lora.example:80"}, 403, "this server answers on 127.0.0.1:"),
        ("/api/score", good, {"Origin": "http://lora.example"}, 403, "its own page only"),
        ("/../README.md", good, {}, 404, "no such thing"),
        ("/api/score", None, {"Content-Length": str(10**9)}, 413, "at most 65,536 are read"),
        ("/api/score", "[" * 60_000, {}, 400, "is not JSON"),
        ("/api/score", json.dumps(WHOLE | {"text": " "}), {}, 200, "text: is empty"),
        ("/api/score", good.replace("h.0", "h.9"), {}, 200, "layers: is not a list"),
        ("/api/score", good.replace(": 3", ": 4"), {}, 200, "rank: '4' is not a whole number"),
    ):
        answered, _, text = page.send("POST", path, body, **headers)
        assert (answered, text.count("\n")) == (status, 1) and words in json.loads(text)["error"]
    assert page.ask("score", text=TEXT)[0]["mean_gain"] != 0  # the server still works


def test_the_command_serves_the_page_until_it_is_interrupted(base, adapter, runs):
    for directory, reason in ((runs["full"].out, "is a whole model"), ("no", "no such directory")):
        assert reason in one_line(run(command.main, directory, "--base", base, "--port", 0), 2)
    arguments = [adapter, "--base", base, "--port", "0", "--device", "cpu"]
    started = [sys.executable, "-m", "lesson.explore", *arguments]
    with subprocess.Popen(started, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        port = int(line.removeprefix("open http://127.0.0.1:").removesuffix(" (Ctrl-C ends)\n"))
        answers = {}
        for path in ("/", "/api/about"):
            connection = HTTPConnection("localhost", port, timeout=60)
            connection.request("GET", path)
            answers[path] = connection.getresponse()
        assert answers["/"].read() == command.PAGE.read_bytes()
        assert "default-src 'none'; script-src 'sha256-" in str(answers["/"].headers)
        about = json.loads(answers["/api/about"].read())
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert about["rank"] == 3 and [layer["name"] for layer in about["layers"]] == LAYERS
    assert about["text"] in BOOK.read_text() and about["text"].startswith(about["prompt"])
