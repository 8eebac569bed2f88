"""`one_page.py` equals `train.py lora --kernels plain` and a loop with PEFT in every bit."""

import json
import math
import runpy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import one_page
import train
from benchmarks import ours, peft_loop
from common.errors import RunError, UserError
from storage.hf_compat import stock_name
from tests.helpers import TINY, small_tokenizer, tiny_gpt2_directory
from tests.runs import run, stock_model, story, validation_loss

BLOCK, STRIDE, BATCH, EPOCHS, STEPS = 16, 12, 4, 2, 40
LR, CLIP = 1.0, 0.5  # with c_attn alone, the first epoch is the best. Many gradients are clipped
SETTINGS = {"BLOCK": BLOCK, "STRIDE": STRIDE, "BATCH": BATCH, "EPOCHS": EPOCHS}
SETTINGS |= {"PEAK_LR": LR, "CLIP": CLIP, "CUDA": False, "DEVICE": "cpu"}
SCALER, MULTINOMIAL = torch.amp.GradScaler, torch.multinomial
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model.transformer."


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A base with GPT-2's dropouts, and two books of 40 steps. The last batch of an epoch is short.
    One book repeats a token until its validation part, so nothing that is learned helps."""
    directory = tmp_path_factory.mktemp("one_page")
    fields = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.1)
    fields["layer_norm_epsilon"] = 0.01
    base, _ = tiny_gpt2_directory(directory / "base", n_head=2, **fields)
    tokenizer = small_tokenizer(TINY["vocab_size"])
    ids = tokenizer.encode(story())[: 59 * BLOCK * 10 // 9]
    useless = np.where(np.arange(len(ids)) < len(ids) * 0.9, ids[0], ids)
    texts = {}
    for name, kept in (("useful", ids), ("useless", useless)):
        book = directory / f"{name}.txt"
        book.write_text(tokenizer.decode(kept))
        ids = tokenizer.encode(book.read_text()).astype(np.int64)
        cut = len(ids) - len(ids) // 10
        texts[name] = SimpleNamespace(
            base=base, book=book, training=ids[:cut], validation=ids[cut:], useful=name == "useful"
        )
    return texts


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Several threads split sums in an order that varies."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


CASES = [
    ("useful", ("c_attn",)),
    ("useful", ("c_attn", "c_proj", "c_fc")),
    ("useless", ("c_attn",)),
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def page(texts, tmp_path_factory, request):
    """Run the whole page. Return the losses, each summed over a batch, A and B after the last step,
    the model with the saved adapter, the lines, and the probabilities of the sampled tokens.
    """
    losses = []
    trained = []
    last = {}
    lines = []
    drawn = []
    total_loss, train_page = one_page.total_loss, one_page.train

    def recorded_loss(model, rows):
        loss = total_loss(model, rows)
        if model.training:
            losses.append(loss.item())
        return loss

    def recorded_train(model, *texts):
        train_page(model, *texts)
        trained.append(model)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                last[f"{PREFIX}{name}"] = parameter.detach().clone()

    out = tmp_path_factory.mktemp("page")
    name, targets = request.param
    with pytest.MonkeyPatch.context() as patch:
        set_constants(patch, texts[name], out, TARGETS=targets)
        patch.setattr(one_page, "total_loss", recorded_loss)
        patch.setattr(one_page, "train", recorded_train)
        # The scaler of fp16 multiplies by a power of two, so it changes no bit in fp32.
        patch.setattr(torch.amp, "GradScaler", lambda device, enabled: SCALER(device))
        patch.setattr(torch, "multinomial", lambda p, n: drawn.append(p) or MULTINOMIAL(p, n))
        patch.setattr("builtins.print", lambda line: lines.append(line))
        one_page.main()
    model = trained[0].eval()
    return SimpleNamespace(
        text=texts[name],
        targets=targets,
        losses=losses,
        last=last,
        model=model,
        out=out,
        lines=lines,
        drawn=drawn,
    )


def set_constants(patch, text, out, **others):
    places = {"BASE": str(text.base), "BOOK": text.book, "OUT": out}
    for name, value in (SETTINGS | places | others).items():
        patch.setattr(one_page, name, value)


def assert_equal_losses(here, there):
    for step, (page, other) in enumerate(zip(here, there, strict=True), 1):
        assert page == other, f"step {step} is the first that differs"


def assert_equal_tensors(here, there):
    assert here.keys() == there.keys()
    assert [name for name in here if not torch.equal(here[name], there[name])] == []


def test_the_page_equals_the_program(page, tmp_path, monkeypatch):
    losses = []
    train_step = train.train_step

    def recorded(*arguments):
        loss, grad_norm = train_step(*arguments)
        losses.append(loss.item())
        return loss, grad_norm

    monkeypatch.setattr(train, "train_step", recorded)
    argv = f"lora --kernels plain --device cpu --precision fp32 --epochs {EPOCHS}".split()
    argv += ["--block-size", BLOCK, "--stride", STRIDE, "--batch-size", BATCH]
    argv += ["--lr", LR, "--clip", CLIP, "--target-modules", *page.targets]
    argv += ["--base", page.text.base, "--book", page.text.book, "--out", tmp_path]
    ending = run(train.main, *argv)
    assert ending.status == 0, ending.stderr
    assert len(losses) == STEPS
    assert_equal_losses(page.losses, losses)
    assert_equal_tensors(load_file(page.out / WEIGHTS), load_file(tmp_path / WEIGHTS))
    saved_b = [x for name, x in load_file(page.out / WEIGHTS).items() if "lora_B" in name]
    assert any(x.any() for x in saved_b) == page.text.useful
    saved = load_file(page.out / WEIGHTS)
    if page.targets == ("c_attn",):  # it keeps the best, not the last
        assert not all(torch.equal(saved[name], x) for name, x in page.last.items())
    fields, others = (json.loads((x / CONFIG).read_text()) for x in (page.out, tmp_path))
    expected = {name: others[name] for name in fields}
    assert fields == expected | {"base_model_name_or_path": str(page.text.base)}
    assert stock_name("mini") == one_page.BASE  # a path, and not a name on the hub


def test_the_page_equals_a_loop_with_peft(page):
    values = {"block_size": BLOCK, "stride": STRIDE, "batch_size": BATCH, "precision": "fp32"}
    values |= {"lr": LR, "clip": CLIP}
    options = ours.options("lora", "--target-modules", *page.targets, base=page.text.base, **values)
    model = peft_loop.build(options)
    count = len(range(0, len(page.text.training) - BLOCK, STRIDE))
    batches = []
    for epoch in range(EPOCHS):
        order = np.random.default_rng((42, epoch)).permutation(count)
        batches += np.split(order, range(BATCH, count, BATCH))
    losses, _ = peft_loop.train(model, options, page.text.training, batches)

    means = [x / (BLOCK * len(b)) for x, b in zip(page.losses, batches, strict=True)]
    assert_equal_losses(means, losses)
    assert len({len(batch) for batch in batches}) == 2  # the last batch of an epoch is shorter
    assert_equal_tensors(page.last, peft_loop.adapter_tensors(model))


def test_the_page_reports_the_base_and_the_saved_adapter(page):
    base, base_text, *_, adapter, text, end = page.lines
    validation = torch.from_numpy(page.text.validation)
    for line, model in (
        (base, stock_model(page.text.base)),
        (adapter, stock_model(page.text.base, page.out)),
    ):
        perplexity = math.exp(validation_loss(model, validation))
        assert float(line.rpartition(" ")[2]) == pytest.approx(perplexity, abs=0.006)
    assert str(page.out) in end

    prompt = "You climb the stair and"
    ids = torch.tensor(small_tokenizer(TINY["vocab_size"]).encode(prompt))[None].long()
    firsts = page.drawn[0], page.drawn[len(page.drawn) // 2]
    for first, written, adapter in zip(firsts, (base_text, text), (None, page.out), strict=True):
        logits = stock_model(page.text.base, adapter)(ids).logits[0, -1]
        torch.testing.assert_close(first, (logits / 0.8).softmax(-1))
        assert written.startswith(prompt)
        assert not first.requires_grad


def test_a_loss_that_is_nan_ends_the_run_and_an_older_adapter(texts, tmp_path, monkeypatch):
    set_constants(monkeypatch, texts["useful"], tmp_path, PEAK_LR=1e30)
    (tmp_path / WEIGHTS).write_bytes(b"of an earlier run")
    with pytest.raises(RunError, match="the validation loss is nan; lower PEAK_LR"):
        one_page.main()
    saved = load_file(tmp_path / WEIGHTS)
    assert not any(x.any() for name, x in saved.items() if "lora_B" in name)


@pytest.mark.parametrize("targets", ["c_attn", ("c_attn", "c_fcc"), ("wte",), ()])
def test_targets_that_match_nothing_are_refused(monkeypatch, targets):
    monkeypatch.setattr(one_page, "TARGETS", targets)
    with pytest.raises(UserError, match="must be a tuple of"):
        one_page.main()


FIELDS = {"activation_function": "gelu", "n_inner": 8, "reorder_and_upcast_attn": True}
FIELDS |= {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False}


@pytest.mark.parametrize("field", FIELDS)
def test_another_gpt2_than_the_page_computes_is_refused(texts, tmp_path, field):
    config = json.loads((texts["useful"].base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {field: FIELDS[field]}))
    with pytest.raises(UserError, match=f"does not compute {field} {FIELDS[field]!r}"):
        one_page.load_gpt2(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_the_loss_is_scaled_in_fp16_alone(monkeypatch, dtype):
    enabled = []
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, **given: enabled.append(given))
    monkeypatch.setattr(one_page, "evaluate", lambda *_: 0.0)
    monkeypatch.setattr(one_page, "save_adapter", lambda model: None)
    for name, value in (("CUDA", True), ("DTYPE", dtype), ("EPOCHS", 0), ("BLOCK", 0)):
        monkeypatch.setattr(one_page, name, value)
    one_page.train(torch.nn.Linear(1, 1), torch.zeros(1), torch.zeros(1))
    assert enabled == [{"enabled": dtype == torch.float16}]


def test_a_gpu_that_emulates_bf16_computes_in_fp16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    assert runpy.run_path(one_page.__file__)["DTYPE"] is torch.float16
