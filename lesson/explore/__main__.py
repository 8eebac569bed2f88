"""Write a web page that shows what an adapter learned: `python -m lesson.explore runs/lora`.

The page is one file. It needs no server and no network: open it in a browser.
"""

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import generate
from adapters.load import load_with_adapter
from common.cli import BASE_OPTION, Parser
from common.device import Device, tune_process
from common.errors import UserError, run_command
from data.instructions import read_examples
from data.tokenizer import Tokenizer
from data.tokens import load_books
from data.windows import split
from lora import LoRALinear, adapter_disabled, lora_layers
from model.gpt2 import GPT2, IGNORE_INDEX
from storage.runs import read_run
from training.options import BOOK

PAGE = Path(__file__).with_name("page.html")
LENGTH = 150  # tokens of the passage
NEW_TOKENS = 80  # of a continuation
SHOWN = 5  # likeliest tokens at each position
STRENGTHS = (0, 0.5, 1, 1.5, 2)
DEFAULTS = {"book": [BOOK], "data": None, "val_fraction": 0.1}


def first_texts(adapter: Path, tokenizer: Tokenizer, most: int) -> tuple[str, np.ndarray]:
    """Return a prompt, and the tokens of a passage that begins with the prompt, at most `most`.

    Both come from the validation part of the adapter's run, or of data/book.txt if the run or its
    text is missing.
    """
    try:
        return from_run(read_run(adapter)["options"], tokenizer, most)
    except UserError:
        return from_run(DEFAULTS, tokenizer, most)


def from_run(options: dict[str, Any], tokenizer: Tokenizer, most: int) -> tuple[str, np.ndarray]:
    if options["data"]:  # the first validation example, whose prompt ends before the answer
        path = Path(options["val_data"] or options["data"])
        validation = read_examples(path, tokenizer, options["block_size"])
        if not options["val_data"]:
            _, validation = split(validation, options["val_fraction"])
        ids, targets, *_ = validation[0]
        answer = int(np.argmax(targets != IGNORE_INDEX)) + 1
        return tokenizer.decode(ids[:answer]), ids[:most]
    books = [Path(book) for book in options["book"]]
    _, validation = split(load_books(books, tokenizer), options["val_fraction"])
    text = tokenizer.decode(validation.ids[: 4 * most])
    _, _, paragraphs = text.partition("\n\n")  # the split may cut the first paragraph
    text = (paragraphs if paragraphs.strip() else text).strip()
    ids = tokenizer.encode(text)[:most]
    if len(ids) < 2:
        raise UserError("the validation part has fewer than two tokens")
    return " ".join(text.split()[:5]), ids


def continuation(model: GPT2, tokenizer: Tokenizer, prompt: str) -> str:
    """Continue a prompt as `generate.py --max-new-tokens 80` does, with its seed."""
    args = generate.parse_args(["--prompt=-", f"--max-new-tokens={NEW_TOKENS}"])
    ids = tokenizer.encode(prompt)
    return "".join(generate.stream(model, tokenizer, ids, args, generate.seeded(model, args)))


def token_scores(rows: Tensor, ids: Tensor, model: GPT2, tokenizer: Tokenizer) -> list[dict]:
    """Return each token's text, its log p by the base and by the adapter, and the likeliest tokens
    of both with their probabilities. The first token has only a text, as no token predicts it.

    `rows` (2, T, V) are log p of every next token. `ids` (T + 1,) are the passage.
    """
    named = rows.masked_fill(generate.padding(model, tokenizer), -math.inf)
    highest, likeliest = named.topk(SHOWN)  # (2, T, SHOWN)
    decoder = generate.StreamDecoder(tokenizer)
    tokens: list[dict[str, Any]] = [{"text": decoder.add(int(ids[0]))}]
    for t, token in enumerate(ids[1:].tolist()):
        of_row = [
            [
                (tokenizer.decode([one]), math.exp(log_p))
                for one, log_p in zip(
                    likeliest[row, t].tolist(), highest[row, t].tolist(), strict=True
                )
            ]
            for row in (0, 1)
        ]
        log_p = rows[:, t, token].tolist()
        tokens.append({"text": decoder.add(token), "log_p": log_p, "likeliest": of_row})
    return tokens


def by_size(layer: LoRALinear) -> tuple[Tensor, Tensor]:
    """Return B' (out, k) and A' (k, in) with B' A' = B A, in the order of B A's singular values.

    The first n columns of B' and rows of A' give the nearest matrix of rank n (Eckart & Young 1936,
    https://doi.org/10.1007/BF02288367). QR keeps the decomposed matrix small, (r, r).
    """
    q_b, r_b = torch.linalg.qr(layer.lora_B.weight)
    q_a, r_a = torch.linalg.qr(layer.lora_A.weight.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ (u * s), vh @ q_a.T


def perplexities(model: GPT2, ids: Tensor) -> list[dict[str, Any]]:
    """Return the perplexities of the passage with the update cut to a rank and multiplied by each
    of STRENGTHS, by rank: the powers of two below r, and r. This changes A and B.
    """
    layers = lora_layers(model).values()
    factors = [by_size(layer) for layer in layers]
    r = max(layer.config.r for layer in layers)
    table = []
    for rank in sorted({r} | {2**i for i in range(r.bit_length()) if 2**i < r}):
        row = []
        for strength in STRENGTHS:
            for layer, (b, a) in zip(layers, factors, strict=True):
                kept = min(rank, len(a))
                layer.lora_A.weight[:kept] = a[:kept]
                layer.lora_B.weight.zero_()
                layer.lora_B.weight[:, :kept] = strength * b[:, :kept]
            logits = model(ids[None, :-1])[0]
            row.append(F.cross_entropy(logits, ids[1:]).exp().item())
        table.append({"rank": rank, "perplexities": row})
    return table


@torch.no_grad()
def content(base: str, adapter: Path) -> dict[str, Any]:
    """Compute everything that the page shows, in fp32 on the CPU.

    Raises UserError if the directory has no adapter of the base, or a DoRA adapter.
    """
    name, model, tokenizer = load_with_adapter(base, adapter)
    layers = lora_layers(model)
    if any(layer.config.use_dora for layer in layers.values()):
        raise UserError(f"{adapter}: is DoRA, which has no strength or rank to vary")
    prompt, passage = first_texts(adapter, tokenizer, min(LENGTH, model.config.n_positions))
    ids = torch.from_numpy(passage.astype("int64"))
    texts, rows = [], []
    for side in (adapter_disabled(model), nullcontext()):
        with side:
            texts.append(continuation(model, tokenizer, prompt))
            rows.append(model(ids[None, :-1])[0].log_softmax(-1))  # (T, V)
    return {
        "adapter": str(adapter),
        "base": name,
        "layers": len(layers),
        "prompt": prompt,
        "texts": texts,
        "tokens": token_scores(torch.stack(rows), ids, model, tokenizer),
        "strengths": STRENGTHS,
        "table": perplexities(model, ids),
    }


def page(found: dict[str, Any]) -> str:
    """Return the page. In its JSON, no `<` remains that could end the script or begin a tag."""
    return PAGE.read_text().replace("{{data}}", json.dumps(found).replace("<", "\\u003c"))


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="lesson.explore", description=__doc__)
    parser.add_argument("adapter", type=Path, metavar="DIR", help="a finished run, or any adapter")
    parser.add_argument("--base", **BASE_OPTION)
    parser.add_argument("--out", type=Path, default=Path("explore.html"), metavar="FILE")
    args = parser.parse_args(argv)
    tune_process(Device.pick("cpu"))
    args.out.write_text(page(content(args.base, args.adapter)))
    print(f"written to {args.out.resolve()}: open it in a browser")


if __name__ == "__main__":
    run_command(main)
