"""Compute the content of the page: the base beside the adapter. The knobs change the adapter."""

from argparse import ArgumentTypeError
from collections.abc import Generator, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import generate
from adapters.factors import read_factors
from adapters.inspect import block_and_kind
from adapters.load import load_with_adapter
from common.cli import number
from common.device import Device
from common.errors import UserError
from evaluation.scores import kl_divergence
from lesson.explore.passage import first_texts
from lora import adapter_disabled, lora_layers
from lora.peft_view import peft_view
from model.kernels.fast import set_kernels
from storage.hub import find_adapter
from training.report import perplexity

OPTIONS = ("temperature", "top_k", "top_p", "seed", "max_new_tokens")  # options of generate.py
MOST_NEW_TOKENS = 400
CHUNK = 64  # number of tokens whose logits are in memory at a time
SHOWN = 5  # number of likeliest tokens for each position


class Explorer:
    """A base and its adapter. Every answer has two rows: 0 is the base, 1 the changed adapter.

    A request's knobs are "strength" x, "rank" k and "layers", a list of names. In these layers W
    becomes W + x * (the nearest matrix of rank k to scaling * B A). Other layers equal the base.
    Raises UserError for an adapter that `read_factors` or `load_with_adapter` refuses, and for a
    wrong request.
    """

    def __init__(self, base: str, adapter: Path, device: Device, quantise: str | None = None):
        self.base, self.model, self.tokenizer = load_with_adapter(
            base, adapter, device.dtype, quantise
        )
        self.layers = lora_layers(self.model)
        prefix = peft_view(self.model).prefix
        factors = read_factors(find_adapter(str(adapter)))
        self.spectra = {name: factors[prefix + name].svd() for name in self.layers}
        self.rank = max(layer.config.r for layer in self.layers.values())
        self.adapter = adapter
        self.device = device
        self.model.to(device.torch_device)
        set_kernels(self.model, "fast")
        self.unnamed = generate.padding(self.model, self.tokenizer)

    def about(self) -> dict[str, Any]:
        """Return the page's first content: the adapter's layers, and texts to begin with."""
        layers = []
        for name, (_, s, _) in self.spectra.items():
            block, kind = block_and_kind(name)
            squares = s.square().sum().item()
            layers.append({"name": name, "block": block, "kind": kind, "squared_norm": squares})
        prompt, text = first_texts(self.adapter, self.tokenizer, self.model.config.n_positions)
        return {
            "base": self.base,
            "adapter": str(self.adapter),
            "rank": self.rank,
            "layers": layers,
            "prompt": prompt,
            "text": text,
            "most_new_tokens": MOST_NEW_TOKENS,
        }

    def write(self, request: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """Continue the request's "prompt" in row 0 and then in row 1, as generate.py does with
        these `OPTIONS`.

        Yield pieces of text, each with its row number. Both rows use the same random numbers.
        """
        ids = self.encode(request, "prompt", self.model.config.n_positions)
        words = [f"--{name.replace('_', '-')}={request.get(name)}" for name in OPTIONS]
        args = generate.parse_args(["--prompt=-", *words])
        if args.max_new_tokens > MOST_NEW_TOKENS:
            raise UserError(f"max_new_tokens: {args.max_new_tokens:,} is above {MOST_NEW_TOKENS}")
        self.change(request)

        rows: list[AbstractContextManager] = [adapter_disabled(self.model), nullcontext()]
        for row, adapter in enumerate(rows):
            generator = generate.seeded(self.model, args)
            with self.device.autocast(), adapter:
                for text in generate.stream(self.model, self.tokenizer, ids, args, generator):
                    yield {"row": row, "text": text}

    @torch.inference_mode()
    def score(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Score the request's "text" in both rows, in one window.

        A token's "gain" is the adapter's log p minus the base's log p, and "kl" is
        KL(base || adapter) at the token, both in nats. The first token has no gain and no KL,
        because no token predicts it.
        """
        ids = self.encode(request, "text", self.model.config.n_positions + 1)
        if len(ids) < 2:
            raise UserError("text: has only one token; give at least two")
        kept = self.change(request)

        sequence = self.device.to_device(torch.from_numpy(ids.astype("int64")))  # (T + 1,)
        with self.device.autocast():
            with adapter_disabled(self.model):
                base_hidden = self.model.hidden(sequence[None, :-1])
            hidden = torch.cat((base_hidden, self.model.hidden(sequence[None, :-1])))  # (2, T, C)
        tokens: list[dict[str, Any]] = [{}]
        for part, targets in zip(hidden.split(CHUNK, 1), sequence[1:].split(CHUNK), strict=True):
            tokens += self.judge(part, targets)

        decoder = generate.StreamDecoder(self.tokenizer)
        for token, token_id in zip(tokens, ids.tolist(), strict=True):
            token["text"] = decoder.add(token_id)
        base, adapter = mean_losses(tokens[1:])
        return {
            "tokens": tokens,
            "mean_gain": base - adapter,
            "mean_kl": sum(token["kl"] for token in tokens[1:]) / len(tokens[1:]),
            "perplexity": [perplexity(base), perplexity(adapter)],
            "kept": kept,
        }

    def judge(self, hidden: Tensor, targets: Tensor) -> Iterator[dict[str, Any]]:
        """Yield log p, gain, KL and the likeliest tokens for each of the `targets` (T,). `hidden`
        (2, T, C) contains the hidden states that predict the targets, in both rows.
        """
        with self.device.autocast():
            logits = self.model.logits(hidden)  # (2, T, V)
        log_p = logits.float().log_softmax(-1)
        kl = kl_divergence(*log_p)  # (T,)
        where = targets.expand(2, -1)[..., None]
        of_targets = log_p.gather(-1, where)[..., 0]  # (2, T)
        named = log_p.masked_fill(self.unnamed, -torch.inf)
        highest, likeliest = named.topk(SHOWN)  # (2, T, SHOWN)
        for t in range(len(targets)):
            base, adapter = of_targets[:, t].tolist()
            yield {
                "log_p": [base, adapter],
                "gain": adapter - base,
                "kl": kl[t].item(),
                "likeliest": [
                    self.name(likeliest[row, t].tolist(), highest[row, t].tolist())
                    for row in range(2)
                ],
            }

    def name(self, ids: list[int], log_p: list[float]) -> list[tuple[str, float]]:
        """Return each token's text and log p. U+FFFD means part of a character."""
        texts = [self.tokenizer.decode([token]) for token in ids]
        return list(zip(texts, log_p, strict=True))

    @torch.no_grad()
    def change(self, request: Mapping[str, Any]) -> float:
        """Set A and B to the adapter that the knobs select. Return the share of the update's
        squared norm that the truncation to the knob's rank keeps.

        U_k S_k V_k^T is the nearest matrix of rank k in the Frobenius norm (Eckart & Young 1936,
        https://doi.org/10.1007/BF02288367).
        """
        strength = parse(request, "strength", float, 0, 2)
        rank = parse(request, "rank", int, 1, self.rank)
        layers = request.get("layers")
        if not isinstance(layers, list) or any(str(name) not in self.layers for name in layers):
            raise UserError("layers: is not a list of names of the adapter's layers")

        kept = 0.0
        whole = 0.0
        for name, layer in self.layers.items():
            layer.lora_B.weight.zero_()
            if name not in layers:
                continue
            u, s, vh = self.spectra[name]
            root = s.sqrt() * (torch.arange(len(s)) < rank)  # the rank of A and B stays r
            layer.lora_A.weight.copy_(root[:, None] * vh)
            layer.lora_B.weight.copy_(strength * u * root / (layer.scaling or 1))
            kept += s[:rank].square().sum().item()
            whole += s.square().sum().item()
        return kept / whole if whole else 1.0

    def encode(self, request: Mapping[str, Any], name: str, most: int) -> np.ndarray:
        """Return the token ids (T,) of a text in the request. Raises UserError for T > `most`."""
        text = request.get(name)
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{name}: is empty")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{name}: is not UTF-8 text") from error
        ids = self.tokenizer.encode(text)
        if len(ids) > most:
            raise UserError(f"{name}: has {len(ids):,} tokens; with {self.base}, {most:,} at most")
        return ids


def parse(request: Mapping[str, Any], name: str, kind: type, low: float, high: float) -> Any:
    """Return a number in the request. Raises UserError unless it is from `low` to `high`."""
    try:
        return number(kind, low, high)(str(request.get(name)))
    except ArgumentTypeError as error:
        raise UserError(f"{name}: {error}") from error


def mean_losses(tokens: list[dict[str, Any]]) -> tuple[float, float]:
    """Return the mean of -log p over these tokens, for the base and for the adapter."""
    base = -sum(token["log_p"][0] for token in tokens) / len(tokens)
    adapter = -sum(token["log_p"][1] for token in tokens) / len(tokens)
    return base, adapter
