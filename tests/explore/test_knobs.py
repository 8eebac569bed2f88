"""Each knob of the page equals the commands on an adapter that is changed in the same way."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import generate
from lora.peft_config import CONFIG
from lora.save import WEIGHTS, save_adapter
from tests.explore.client import FULL, LAYERS, OPTIONS, PROMPT, TEXT, serving
from tests.helpers import TINY, damages, small_tokenizer
from tests.pairs import adapted
from tests.runs import scores, stdout_of, stock_model, trained
from training.options import BOOK


def changed_file(base: Path, adapter: Path, knobs: dict, out: Path) -> Path:
    """Write the adapter that the knobs describe: alpha scaled, B zero, PEFT's truncated SVD."""
    scaled = out / "scaled"
    shutil.copytree(adapter, scaled)
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


def by_generate(base: Path, adapter: Path, *more: object) -> list[str]:
    """Return the texts of `Client.texts`, from generate.py."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    model = ("--base", base, "--device", "cpu", *more)
    prompt = f"--prompt={PROMPT}"
    alone = stdout_of(generate.main, *model, *options, prompt)
    with_adapter = stdout_of(generate.main, *model, *options, prompt, "--adapter", adapter)
    return [text.removesuffix("\n\n") for text in (alone, with_adapter)]


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"strength": 1.5, "rank": 2, "layers": LAYERS[:4]},
    ],
    ids=str,
)
def test_each_knob_does_what_the_commands_do_with_an_adapter_so_changed(
    base, every_layer, client, tmp_path, knobs
):
    adapter = changed_file(base, every_layer, FULL | knobs, tmp_path)
    expected = by_generate(base, adapter)
    found = client.texts(**knobs)
    assert found == expected and found[0] != found[1]

    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    model = ("--base", base, "--text", text, "--block-size", TINY["n_positions"])
    before, _ = scores(tmp_path / "base.json", *model)
    after, _ = scores(tmp_path / "adapter.json", *model, "--adapter", adapter, "--forgotten")
    judged = client.scores(**knobs)
    assert judged["perplexity"][0] == pytest.approx(before["perplexity"], rel=1e-5)
    assert judged["perplexity"][1] == pytest.approx(after["perplexity"], rel=1e-5)
    assert judged["mean_gain"] == pytest.approx(before["loss"] - after["loss"], abs=1e-5)

    assert judged["mean_kl"] == pytest.approx(after["kl_from_base"], abs=1e-5)

    as_trained = client.scores()
    assert (judged["mean_gain"] == as_trained["mean_gain"]) == (not knobs)
    assert (judged["kept"] < 0.99) == ("rank" in knobs)


@pytest.mark.parametrize("knobs", [{"strength": 0}, {"layers": []}])
def test_without_strength_or_layers_the_adapter_is_the_base(client, knobs):
    base, adapter = client.texts(**knobs)
    assert base == adapter == client.texts()[0]
    judged = client.scores(**knobs)
    for name in ("gain", "kl"):
        assert judged[f"mean_{name}"] == 0
        assert all(token.get(name, 0) == 0 for token in judged["tokens"])


@torch.no_grad()
def test_gains_and_likeliest_tokens_are_stock_pefts(base, every_layer, client):
    tokenizer = small_tokenizer(TINY["vocab_size"])
    ids = torch.tensor(tokenizer.encode(TEXT).astype(int))
    log_p = []
    for model in (stock_model(base), stock_model(base, every_layer)):
        log_p.append(model(ids[None]).logits[0].log_softmax(-1))
    judged = client.scores()
    assert "".join(token["text"] for token in judged["tokens"]) == TEXT
    assert len(judged["tokens"]) == len(ids) > len(TEXT) // 2
    assert judged["tokens"][0].keys() == {"text"}

    largest = 0.0
    for t, token in enumerate(judged["tokens"][1:]):
        gain = (log_p[1][t, ids[t + 1]] - log_p[0][t, ids[t + 1]]).item()
        largest = max(largest, abs(gain))
        kl = F.kl_div(log_p[1][t], log_p[0][t], reduction="sum", log_target=True).item()
        assert token["kl"] == pytest.approx(kl, abs=1e-5) and kl > 0
        assert token["gain"] == pytest.approx(gain, abs=1e-4)
        for row in range(2):
            values, which = log_p[row][t].topk(5)
            texts = [tokenizer.decode([i]) for i in which]
            assert [text for text, _ in token["likeliest"][row]] == texts
            assert [p for _, p in token["likeliest"][row]] == pytest.approx(
                values.tolist(), abs=1e-4
            )
    assert largest > 0.5


@pytest.mark.parametrize(
    ("targets", "config", "quantise"),
    [
        (("c_fc", "c_attn"), {"rank_pattern": {"c_fc": 1}, "alpha_pattern": {"h.0.*": 9}}, None),
        (("c_attn",), {}, "int8"),
    ],
    ids=["patterns", "int8"],
)
def test_variants_write_what_generate_writes(base, tmp_path, targets, config, quantise):
    save_adapter(adapted(base, targets, r=2, **config), tmp_path / "adapter", "gpt2")
    more = ("--quantise", quantise) if quantise else ()
    expected = by_generate(base, tmp_path / "adapter", *more)
    with serving(base, tmp_path / "adapter", quantise) as client:
        about = json.loads(client.send("GET", "/api/about")[2])
        layers = [layer["name"] for layer in about["layers"]]
        found = client.texts(rank=about["rank"], layers=layers)
    assert found == expected and found[0] != found[1]


def test_the_page_begins_with_what_the_run_has_not_seen(base, book, runs, monkeypatch):
    monkeypatch.chdir(book.parent)  # run.json has the book's path relative to this directory
    with serving(base, runs["lora"].out) as client:
        about = json.loads(client.send("GET", "/api/about")[2])
        whole = book.read_text()
        assert about["text"] in whole[len(whole) * 8 // 10 :]
        assert about["text"].startswith(about["prompt"]) and about["text"][-1] in ".!"
        assert about["rank"] == 8 and about["adapter"] == str(runs["lora"].out)
        assert [layer["block"] for layer in about["layers"]] == [0, 1]
        client.scores(text=about["text"], rank=8, layers=[])


def test_after_instructions_the_page_begins_with_an_unseen_question(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data.jsonl"
    examples = [{"prompt": f"Gull {i}?", "completion": "At sea."} for i in range(20)]
    data.write_text("".join(f"{json.dumps(example)}\n" for example in examples))
    out = trained("lora", base, data, tmp_path / "run", "--block-size", 60, "--max-steps", 1).out
    with serving(base, out) as client:
        about = json.loads(client.send("GET", "/api/about")[2])
    assert about["prompt"] == "User: Gull 18?\nAssistant:"  # 2 of 20 are for validation
    assert about["text"] == "User: Gull 18?\nAssistant: At sea."


def test_without_its_run_or_book_an_adapter_begins_with_ours(base, runs, tmp_path):
    """Also if the options in run.json are damaged."""
    adapter = shutil.copytree(runs["lora"].out, tmp_path / "adapter")
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    read = {"book": ["no.txt"], "data": str(empty), "val_data": str(empty), "val_fraction": 0.1}
    options = [{"book": ["no.txt"]}, {"book": []}, {"data": str(empty)}, *damages(read)]
    with serving(base, adapter) as client:
        for changed in options:
            report = dict(runs["lora"].report)
            known = report["options"]
            report["options"] = known | changed if isinstance(changed, dict) else changed
            (adapter / "run.json").write_text(json.dumps(report))
            status, _, about = client.send("GET", "/api/about")
            assert status == 200 and json.loads(about)["text"] in BOOK.read_text(), changed
