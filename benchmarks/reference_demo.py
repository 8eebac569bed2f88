"""What the reference's measure measures, shown on LoRA runs that differ in one thing each."""

import contextlib
import io
import math
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.pseudo_latin import POOL, pseudo_latin
from benchmarks.reference_protocol import (
    BLOCK,
    EPOCHS,
    SCORED,
    SHIFT,
    VAL_FRACTION,
    load_best,
    reference_loss,
    run_train,
    token_scores,
    train_arguments,
)
from cli import BOOK, print_table
from data.tokens import load_tokens
from data.windows import split
from evaluate import Scores, perplexity
from files import write_text
from generate import stream_text
from model.checkpoint import load_config
from model.gpt2 import GPT2

STEPS = 300
BATCH_SIZE = 4
# A small base in few steps: more to train, and no noise. The rest is the protocol's.
FASTER = (f"--lr 5e-3 --batch-size {BATCH_SIZE} --target-modules c_attn c_fc c_proj "
          "--base-dropout 0 --lora-dropout 0")
VAL_WINDOWS = 128
RUN_LENGTH = 16  # tokens in a row, looked for in the training part
PROMPT_WORDS, SAMPLE_TOKENS = 4, 48
LABEL_COLUMNS = ("LoRA trained on", "after next: loss", "perplexity", "accuracy",
                 "next token: loss", "perplexity", "accuracy")
TEXT_COLUMNS = ("text", "stride", "steps", "passes", "seen before", "base's perplexity", "val loss",
                "perplexity", "each token once")


def demonstrate(opts: Namespace) -> dict:
    """Print both tables and the samples; returns the figures."""
    began = time.perf_counter()
    opts.max_steps, opts.val_windows = opts.max_steps or STEPS, opts.val_windows or VAL_WINDOWS
    text = pseudo_latin(opts.words, opts.seed)
    print(f"base {Path(opts.base).name}; LoRA by the reference's protocol, but {FASTER} "
          f"--max-steps {opts.max_steps}")
    with TemporaryDirectory() as folder:
        opts.runs, opts.latin = Path(folder), Path(folder) / "pseudo-latin.txt"
        write_text(opts.latin, text)
        models = {"base": load_best(opts, "base", opts.runs)}
        for shift, name in ((2, "the token after next"), (1, "the next token")):
            models[name] = train_lora(opts, opts.latin, "--label-shift", str(shift))[1]
        facts = {"labels": compare_labels(opts, models), "samples": show_samples(models, text),
                 "texts": compare_texts(opts), "floor": show_floor(opts, text)}
    return {"max_steps": opts.max_steps, "options": FASTER, "words": opts.words, **facts,
            "val_windows": opts.val_windows, "seconds": round(time.perf_counter() - began, 1)}


def train_lora(opts: Namespace, book: Path, *more: str) -> tuple[dict, GPT2]:
    """`run.json` and the model of a run of `max_steps` on `book`, if `more` says nothing else."""
    out = opts.runs / "lora"
    arguments = train_arguments(
        Namespace(**vars(opts) | {"book": book}), "lora", out, "--overwrite", *FASTER.split(),
        "--epochs", str(opts.max_steps), *more)
    with contextlib.redirect_stdout(io.StringIO()):
        return run_train(arguments), load_best(opts, "lora", out)


def parts(opts: Namespace, book: Path) -> tuple[np.ndarray, np.ndarray]:
    """The book's training and validation tokens."""
    return split(load_tokens(book, load_config(opts.directory).vocab_size), VAL_FRACTION)


def compare_labels(opts: Namespace, models: dict[str, GPT2]) -> dict:
    """One book, one seed, as many steps, and the label one token further or not."""
    val_tokens = parts(opts, opts.latin)[1]
    scores = {name: [token_scores(model, val_tokens, shift, opts.precision) for shift in (2, 1)]
              for name, model in models.items()}
    print("\nthe same training but for the label, on pseudo-Latin (validation part, each token "
          "once)\n")
    print_table(LABEL_COLUMNS, [(name, *cells(after_next), *cells(next_token))
                                for name, (after_next, next_token) in scores.items()])
    return {name: {key: asdict(s) | {"perplexity": s.perplexity}
                   for key, s in zip(("label_shift_2", "label_shift_1"), both, strict=True)}
            for name, both in scores.items()}


def cells(scores: Scores) -> tuple[str, str, str]:
    return f"{scores.loss:.4f}", f"{scores.perplexity:.3f}", f"{scores.accuracy:.1%}"


def show_samples(models: dict[str, GPT2], text: str) -> dict[str, str]:
    """The likeliest continuation of a sentence of the validation part by each model."""
    sentence = text[int(0.95 * len(text)) :].replace("\n", " ").split(". ")[1].split()
    prompt = " ".join(sentence[:PROMPT_WORDS])
    samples = {"prompt": prompt, "the text itself": " ".join(sentence[PROMPT_WORDS:]) + "."}
    for name, model in models.items():
        pieces = stream_text(model, prompt, SAMPLE_TOKENS, temperature=0, top_k=0, top_p=1.0)
        samples[name] = " ".join("".join(pieces).split())
    print(f"\n{prompt} ... (greedy, {SAMPLE_TOKENS} tokens)\n")
    for name, sample in list(samples.items())[1:]:
        print(f"    {name + ':':22} {sample}")
    return samples


def compare_texts(opts: Namespace) -> list[dict]:
    """The reference's measure after the protocol on texts, strides and numbers of steps."""
    epochs = ("--epochs", str(EPOCHS), "--max-steps", str(10**9))
    base = load_best(opts, "base", opts.runs)
    base_losses = {book: measure(opts, base, parts(opts, book)[1]) for book in (opts.latin, BOOK)}
    rows = [compare_text(opts, name, book, stride, *more) | {"base_loss": base_losses[book]}
            for name, book, stride, more in (
                ("pseudo-Latin", opts.latin, 1, ()),
                ("pseudo-Latin", opts.latin, BLOCK, ()),
                (f"pseudo-Latin, {EPOCHS} epochs", opts.latin, BLOCK, epochs),
                (BOOK.name, BOOK, 1, ()))]
    print(f"\nthe reference's measure ({opts.val_windows} windows) on a text that repeats itself "
          "and on one that does not\n")
    print_table(TEXT_COLUMNS, [
        (row["text"], str(row["stride"]), str(row["steps"]), f"{row['passes']:.1f}",
         f"{row['seen_before']:.1%}", f"{perplexity(row['base_loss']):.2f}", f"{row['loss']:.4f}",
         f"{perplexity(row['loss']):.3f}", f"{perplexity(row['token_loss']):.3f}") for row in rows])
    return rows


def compare_text(opts: Namespace, name: str, book: Path, stride: int, *more: str) -> dict:
    run, model = train_lora(opts, book, "--stride", str(stride), *more)
    train_tokens, val_tokens = parts(opts, book)
    return {"text": name, "stride": stride, "steps": run["steps"],
            "passes": run["steps"] * BATCH_SIZE * SCORED / len(train_tokens),
            "seen_before": share_seen(train_tokens, val_tokens),
            "loss": measure(opts, model, val_tokens),
            "token_loss": token_scores(model, val_tokens, SHIFT, opts.precision).loss}


def measure(opts: Namespace, model: GPT2, val_tokens: np.ndarray) -> float:
    return reference_loss(model, val_tokens, BATCH_SIZE, opts.val_windows, opts.precision)


def share_seen(train_tokens: np.ndarray, val_tokens: np.ndarray) -> float:
    """The share of the validation part's runs of tokens that the training part has as well."""
    known, runs = ([tokens[i : i + RUN_LENGTH].tobytes()
                    for i in range(len(tokens) - RUN_LENGTH + 1)]
                   for tokens in (train_tokens, val_tokens))
    return sum(map(set(known).__contains__, runs)) / len(runs)


def show_floor(opts: Namespace, text: str) -> float:
    """The entropy of the text for whoever knows its sentences, nats a token."""
    tokens = sum(map(len, parts(opts, opts.latin)))
    floor = math.log(POOL) * text.count(".") / tokens
    print(f"\nseen before: the share of the validation part's runs of {RUN_LENGTH} tokens that the "
          f"training part contains.\nwhoever knows the {POOL} sentences still has to guess which "
          f"comes next: {math.log(POOL):.2f} nats a sentence,\n{floor:.4f} a token, a next-token "
          f"perplexity of {math.exp(floor):.3f}; no model can do better on average")
    return floor
