"""Text from a base, with or without an adapter; or, with --chat, answers to what you type."""

if __name__ == "__main__":  # before torch, whose import takes seconds
    from common import signals
    signals.end_in_one_line()

import codecs
import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from common.cli import Parser, add_device_options, number
from common.device import Device, tune_process
from common.errors import UserError, run_command
from common.files import brief
from data.instructions import encode
from lora.inject import adapter_disabled
from lora.load import add_model_options, load_model
from model.gpt2 import GPT2, KVCache
from model.tokenizer import Tokenizer


def parse_args():
    parser = Parser(prog="generate.py", description=__doc__)
    add_model_options(parser)
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
        if prompt != prompt.encode(errors="replace").decode():
            raise UserError(f"--prompt {brief(prompt)}: is not UTF-8 text")
    if args.with_base and not (args.adapter and args.prompt):
        raise UserError("--with-base compares with an adapter: give --adapter and --prompt")
    device = Device.pick(args.device, args.precision)
    tune_process()
    name, model, tokenizer = load_model(args.base, args.adapter)
    device.hold(model.requires_grad_(False))
    with device.autocast():
        if args.with_base:
            print(f"=== {name}\n")
            with adapter_disabled(model):
                write_texts(model, tokenizer, args)
            print(f"=== {name} with {args.adapter}\n")
        (chat if args.chat else write_texts)(model, tokenizer, args)


def write_texts(model: GPT2, tokenizer: Tokenizer, args) -> None:
    """Continue every prompt on stdout, token by token, each as if it were the only one."""
    for prompt in args.prompt:
        print(prompt, end="", flush=True)
        for text in stream_text(model, tokenizer, prompt, args.max_new_tokens,
                                **sampling(model, args)):
            print(text, end="", flush=True)
        print("\n")


def sampling(model: GPT2, args) -> dict:
    """What `generate` draws by, from the seed on."""
    generator = torch.Generator(model.wte.weight.device).manual_seed(args.seed)
    return {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p,
            "generator": generator}


def chat(model: GPT2, tokenizer: Tokenizer, args) -> None:
    """Answer stdin line by line, each line after all that was said before it; the oldest turns are
    forgotten when the context has no room for them and an answer.
    """
    sys.stdin.reconfigure(errors="replace")
    context, draw, turns = model.config.n_positions, sampling(model, args), []
    room = context - min(args.max_new_tokens, context // 2)
    ready = "> " * sys.stdin.isatty()
    print(ready, end="", flush=True)
    for line in sys.stdin:
        turns.append(("User", line.strip()))
        for first in range(0, len(turns), 2):
            ids = np.append(encode(turns[first:], tokenizer)[0], tokenizer.encode("Assistant:"))
            if len(ids) <= room:
                break
        answer = ""
        for text in stream_text(model, tokenizer, ids, args.max_new_tokens, **draw):
            print(text if answer else text.lstrip(), end="", flush=True)
            answer += text
        print(f"\n{ready}", end="", flush=True)
        turns.append(("Assistant", answer.strip()))


def stream_text(model: GPT2, tokenizer: Tokenizer, prompt: str | np.ndarray, max_new_tokens: int,
                **sampling) -> Iterator[str]:
    """The continuation of `prompt`, a text or ids, in pieces as they become whole characters."""
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    ids = torch.from_numpy(ids.astype("int64")).to(model.wte.weight.device)
    padding = torch.ones(model.config.vocab_size, dtype=torch.bool, device=ids.device)
    padding[list(tokenizer.bytes_of)] = False
    # A token may end in the middle of a character.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in generate(model, ids, max_new_tokens, never=padding, **sampling):
        if token == tokenizer.end_of_text:
            break
        yield decoder.decode(tokenizer.bytes_of[token])
    yield decoder.decode(b"", final=True)


@torch.inference_mode()
def generate(
    model: GPT2, ids: Tensor, max_new_tokens: int, *, temperature: float = 1.0, top_k: int = 0,
    top_p: float = 1.0, generator: torch.Generator | None = None, never: Tensor | None = None,
) -> Iterator[int]:
    """Draw tokens one by one after `ids` (T,), T >= 1, but those that are `never` drawn, bool (V,);
    the caller decides when to stop.

    Keys and values of past tokens are cached. When the context is full, its older half is
    forgotten and the rest is read again: learned positions cannot be shifted in the cache.
    """
    context = model.config.n_positions
    window, cache = ids[-context:], KVCache()
    new = window
    for _ in range(max_new_tokens):
        if len(window) > context:
            window, cache = window[-max(1, context // 2) :], KVCache()
            new = window
        logits = model(new[None], cache)[0, -1].float()  # (V,)
        if never is not None:
            logits = logits.masked_fill(never, -torch.inf)
        new = sample(logits, temperature, top_k, top_p, generator)  # (1,)
        window = torch.cat((window, new))
        yield new.item()


def sample(
    logits: Tensor, temperature: float, top_k: int, top_p: float,
    generator: torch.Generator | None,
) -> Tensor:
    """One token id (1,) from logits (V,), by temperature, top-k and nucleus (top-p) sampling.

    Nucleus: Holtzman et al. 2019, https://arxiv.org/abs/1904.09751. The likeliest token always
    stays; a temperature of 0, or too small to divide by, takes it.
    """
    if temperature < 1e-6:
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    if top_p < 1:
        ordered, index = logits.softmax(-1).sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # probability of all that is likelier
        logits = logits.index_fill(0, index[before >= top_p], -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


if __name__ == "__main__":
    run_command(main)
