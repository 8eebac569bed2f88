"""Generate text from a base, with or without an adapter; with --chat, answer what you type."""

if __name__ == "__main__":  # before torch, whose import takes seconds
    from common import signals
    signals.end_in_one_line()

import codecs
import sys
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from common.cli import Parser, add_device_options, number
from common.device import Device, tune_process
from common.errors import UserError, run_command
from common.files import brief, is_utf8
from data.instructions import encode
from data.tokens import require_end_of_text
from lora.inject import adapter_disabled
from lora.load import add_model_options, load_model
from lora.several import load_several
from model.gpt2 import GPT2
from model.sampling import generate, generate_rows
from model.tokenizer import Tokenizer


def parse_args():
    parser = Parser(prog="generate.py", description=__doc__)
    add_model_options(parser, nargs="+")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", nargs="+", metavar="TEXT",
                      help="one text or several; each is continued by itself")
    what.add_argument("--chat", action="store_true",
                      help="answer every line of the input, in the form of data/instructions.py")
    parser.add_argument("--max-new-tokens", type=number(int, 1), default=200, metavar="N")
    parser.add_argument("--temperature", type=number(float, 0.0, 100.0), default=0.8,
                        help="0 always takes the likeliest token (default: %(default)s)")
    parser.add_argument("--top-k", type=number(int, 0), default=50,
                        help="draw from the k likeliest tokens; 0: from all (default: %(default)s)")
    parser.add_argument("--top-p", type=number(float, 1e-9, 1.0), default=1.0,
                        help="draw from the likeliest tokens that together reach this probability")
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=42)
    parser.add_argument("--with-base", action="store_true",
                        help="first show what the base alone writes, for comparison")
    add_device_options(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    for prompt in args.prompt or ():
        if not prompt.strip():
            raise UserError("--prompt is empty: give the text to continue")
        if not is_utf8(prompt):
            raise UserError(f"--prompt {brief(prompt)}: is not UTF-8 text")
    if args.with_base and not (args.adapter and args.prompt):
        raise UserError("--with-base compares with an adapter: give --adapter and --prompt")
    if args.chat and len(args.adapter or ()) > 1:
        raise UserError("--chat answers with one adapter: give one --adapter")
    tune_process()
    device = Device.pick(args.device, args.precision)
    if args.adapter and len(args.adapter) > 1:
        return write_side_by_side(args, device)
    [adapter] = args.adapter or [None]
    name, model, tokenizer = load_model(args.base, adapter, device.dtype)
    device.hold(model)
    with device.autocast():
        if args.with_base:
            print(f"=== {name}\n")
            with adapter_disabled(model):
                write_texts(model, tokenizer, args)
            print(f"=== {name} with {adapter}\n")
        write = chat if args.chat else write_texts
        write(model, tokenizer, args)


def write_side_by_side(args, device: Device) -> None:
    """Continue each prompt with every adapter, all in one batch."""
    (name, model, tokenizer), adapters = load_several(args.base, args.adapter, device.dtype)
    device.hold(model)
    names = ([None] if args.with_base else []) + [str(directory) for directory in args.adapter]
    rows = [(prompt, adapter) for prompt in args.prompt for adapter in names]
    adapters.use([adapter for _, adapter in rows])
    with device.autocast():
        texts = continue_rows(model, tokenizer, [prompt for prompt, _ in rows], args)
    for (prompt, adapter), text in zip(rows, texts, strict=True):
        print(f"=== {name} with {adapter}\n" if adapter else f"=== {name}\n")
        print(f"{prompt}{text}\n")


def write_texts(model: GPT2, tokenizer: Tokenizer, args) -> None:
    """Continue the prompts on stdout: one token by token, several in one batch."""
    if len(args.prompt) > 1:
        for prompt, text in zip(args.prompt, continue_rows(model, tokenizer, args.prompt, args),
                                strict=True):
            print(f"{prompt}{text}\n")
        return
    print(args.prompt[0], end="", flush=True)
    for text in stream_text(model, tokenizer, args.prompt[0], args.max_new_tokens,
                            **sampling(model, args)):
        print(text, end="", flush=True)
    print("\n")


def continue_rows(model: GPT2, tokenizer: Tokenizer, prompts: list[str], args) -> list[str]:
    """Return the continuations of the prompts, each as if it were the only one of its batch."""
    settings = [sampling(model, args) for _ in prompts]  # a generator each, seeded alike
    generators = [each.pop("generator") for each in settings]
    rows = [[] for _ in prompts]
    for tokens in generate_rows(model, [as_ids(model, tokenizer.encode(p)) for p in prompts],
                                args.max_new_tokens, generators, never=padding(model, tokenizer),
                                **settings[0]):
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if token >= 0 and len(row) < args.max_new_tokens:
                row.append(token)
        if all(tokenizer.end_of_text in row for row in rows):
            break
    return ["".join(decode(tokenizer, row)) for row in rows]


def sampling(model: GPT2, args) -> dict:
    """Return the sampling options, with a generator freshly seeded."""
    generator = torch.Generator(model.wte.weight.device).manual_seed(args.seed)
    return {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p,
            "generator": generator}


def chat(model: GPT2, tokenizer: Tokenizer, args) -> None:
    """Answer stdin line by line, each line after all that was said before it; the oldest turns are
    forgotten when the context has no room for them and an answer.
    """
    require_end_of_text(tokenizer)  # now, and not after the first answer
    sys.stdin.reconfigure(errors="replace")
    context, settings, turns = model.config.n_positions, sampling(model, args), []
    room = context - min(args.max_new_tokens, context // 2)
    ready = "> " if sys.stdin.isatty() else ""
    print(ready, end="", flush=True)
    for line in sys.stdin:
        turns.append(("User", line.strip()))
        for first in range(0, len(turns), 2):
            ids = np.append(encode(turns[first:], tokenizer)[0], tokenizer.encode("Assistant:"))
            if len(ids) <= room:
                break
        answer = ""
        for text in stream_text(model, tokenizer, ids, args.max_new_tokens, **settings):
            print(text if answer else text.lstrip(), end="", flush=True)
            answer += text
        print(f"\n{ready}", end="", flush=True)
        turns.append(("Assistant", answer.strip()))


def stream_text(model: GPT2, tokenizer: Tokenizer, prompt: str | np.ndarray, max_new_tokens: int,
                **sampling) -> Iterator[str]:
    """Continue `prompt`, a text or ids; yield pieces as they become whole characters."""
    ids = as_ids(model, tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
    return decode(tokenizer, generate(model, ids, max_new_tokens, never=padding(model, tokenizer),
                                      **sampling))


def as_ids(model: GPT2, ids: np.ndarray) -> Tensor:
    return torch.from_numpy(ids.astype("int64")).to(model.wte.weight.device)


def padding(model: GPT2, tokenizer: Tokenizer) -> Tensor:
    """Return where the model's vocabulary is padding and holds no token, bool (V,)."""
    mask = torch.ones(model.config.vocab_size, dtype=torch.bool, device=model.wte.weight.device)
    mask[list(tokenizer.bytes_of)] = False
    return mask


def decode(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text of the tokens up to the end of text, in pieces of whole characters."""
    # A token may end in the middle of a character.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if token == tokenizer.end_of_text:
            break
        yield decoder.decode(tokenizer.bytes_of[token])
    yield decoder.decode(b"", final=True)


if __name__ == "__main__":
    run_command(main)
