"""Generate text from a base, with or without an adapter. With --chat, answer the user's lines."""

import argparse
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adapters.load import load_with_adapter
from common.cli import KERNELS_OPTION, Parser, add_device_options, add_model_options, number
from common.device import Device, tune_process
from common.errors import UserError, run_command
from data.instructions import encode
from data.tokenizer import Tokenizer
from data.tokens import require_end_of_text
from lora.inject import adapter_disabled
from model.gpt2 import GPT2
from model.kernels.fast import set_kernels
from model.sampling import generate


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="generate.py", description=__doc__)
    add_model_options(parser, nargs="+")
    what = parser.add_mutually_exclusive_group(required=True)
    about = "one text or several texts. Each is continued separately"
    what.add_argument("--prompt", nargs="+", metavar="TEXT", help=about)
    about = "answer each line of standard input, in the chat format of data/instructions.py"
    what.add_argument("--chat", action="store_true", help=about)
    parser.add_argument("--max-new-tokens", type=number(int, 1), default=200, metavar="N")
    about = "0 always takes the likeliest token (default: 0.8)"
    parser.add_argument("--temperature", type=number(float, 0.0, 100.0), default=0.8, help=about)
    about = "draw from the k likeliest tokens. 0: from all tokens (default: 50)"
    parser.add_argument("--top-k", type=number(int, 0), default=50, help=about)
    about = "draw from the likeliest tokens that together reach this probability (default: all)"
    parser.add_argument("--top-p", type=number(float, 1e-9, 1.0), default=1.0, help=about)
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=42)
    about = "first show the continuation by the base, for comparison"
    parser.add_argument("--with-base", action="store_true", help=about)
    add_device_options(parser)
    parser.add_argument("--kernels", **KERNELS_OPTION)
    args = parser.parse_args(argv)

    if not all(prompt.strip() for prompt in args.prompt or ()):
        raise UserError("--prompt is empty: give the text to continue")
    if args.with_base and not (args.adapter and args.prompt):
        raise UserError("--with-base compares with an adapter: give --adapter and --prompt")
    if args.chat and args.adapter and len(args.adapter) > 1:
        raise UserError("--chat answers with one adapter: give one --adapter")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    device = Device.pick(args.device, args.precision)
    tune_process(device)
    adapters: list[Path | None] = args.adapter or [None]
    for i, adapter in enumerate(adapters):  # one after the other, each with the same seed
        use_adapter(adapter, args, device, with_base=args.with_base and i == 0)


def use_adapter(
    adapter: Path | None, args: argparse.Namespace, device: Device, with_base: bool
) -> None:
    """Load the base, with the adapter if any, and chat or continue the prompts. With `with_base`,
    the base continues the prompts first."""
    base, model, tokenizer = load_with_adapter(args.base, adapter, device.dtype, args.quantise)
    model.to(device.torch_device)
    set_kernels(model, args.kernels)
    with device.autocast():
        if args.chat:
            chat(model, tokenizer, args)
            return
        if with_base:
            print(f"=== {base}\n")
            with adapter_disabled(model):
                write_texts(model, tokenizer, args)
        if args.with_base or len(args.adapter or ()) > 1:
            print(f"=== {base} with {adapter}\n")
        write_texts(model, tokenizer, args)


def write_texts(model: GPT2, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Print each prompt and its continuation, each character as soon as its tokens are drawn."""
    for prompt in args.prompt:
        print(prompt, end="", flush=True)
        for text in stream(model, tokenizer, tokenizer.encode(prompt), args, seeded(model, args)):
            print(text, end="", flush=True)
        print("\n")


def seeded(model: GPT2, args: argparse.Namespace) -> torch.Generator:
    return torch.Generator(model.wte.weight.device).manual_seed(args.seed)


def chat(model: GPT2, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Answer stdin line by line. Drop the oldest turns when the chat exceeds the context."""
    require_end_of_text(tokenizer)  # fail now, not after the first answer
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    ready = "> " if sys.stdin.isatty() else ""
    context = model.config.n_positions
    room = context - min(args.max_new_tokens, context // 2)
    generator = seeded(model, args)
    turns: list[tuple[str, str]] = []

    print(ready, end="", flush=True)
    for line in sys.stdin:
        turns.append(("User", line.strip()))
        ids = encode(turns, tokenizer, ask=True)[0]
        while len(ids) > room and len(turns) > 1:
            del turns[:2]
            ids = encode(turns, tokenizer, ask=True)[0]
        answer = ""
        for text in stream(model, tokenizer, ids, args, generator):
            print(text if answer.strip() else text.lstrip(), end="", flush=True)
            answer += text
        print(f"\n{ready}", end="", flush=True)
        turns.append(("Assistant", answer.strip()))


def stream(
    model: GPT2,
    tokenizer: Tokenizer,
    prompt: np.ndarray,
    args: argparse.Namespace,
    generator: torch.Generator,
) -> Iterator[str]:
    """Continue a prompt (token ids). Yield the next complete characters after each token. The text
    ends at an end-of-text token, or after `args.max_new_tokens` tokens.
    """
    decoder = StreamDecoder(tokenizer, prompt.tolist())
    for token in generate(
        model,
        torch.from_numpy(prompt.astype("int64")).to(model.wte.weight.device),
        args.max_new_tokens,
        generator=generator,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        suppress_tokens=padding(model, tokenizer),
    ):
        if token == tokenizer.end_of_text:
            break
        yield decoder.add(token)
    yield decoder.finish()


class StreamDecoder:
    """Decode tokens one by one into whole characters. `ids` are the tokens of the prompt."""

    def __init__(self, tokenizer: Tokenizer, ids: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self.ids = list(ids)
        self.length = len(tokenizer.decode(self.ids))

    def add(self, token: int) -> str:
        """Return the characters that this token completes."""
        self.ids.append(token)
        return self._rest(self.tokenizer.decode(self.ids).rstrip("\ufffd"))

    def finish(self) -> str:
        """Return U+FFFD if the last character is incomplete, otherwise ""."""
        return self._rest(self.tokenizer.decode(self.ids))

    def _rest(self, text: str) -> str:
        rest = text[self.length :]
        self.length += len(rest)
        return rest


def padding(model: GPT2, tokenizer: Tokenizer) -> Tensor:
    """Return a mask, bool (V,), that is True for each id that is not in the tokenizer."""
    mask = torch.ones(model.config.vocab_size, dtype=torch.bool, device=model.wte.weight.device)
    mask[list(tokenizer.vocabulary.values())] = False
    return mask


if __name__ == "__main__":
    run_command(main)
