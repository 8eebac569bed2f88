"""Compare two assistants blindly: `python -m lesson.examples.pairs ONE.jsonl OTHER.jsonl`.

Both files contain answers to the same questions, in a form of `data/instructions.py`. For each
question, the program shows both answers in a random order, and reads a vote from standard input.
After the last question or Ctrl-D, it counts the votes.
"""

import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from common.cli import Parser, number
from common.errors import UserError, run_command
from lesson.examples.chat import read_conversations

# In four of five comparisons, this many votes without ties give p < 0.05.
ADVICE = "needed: 23 votes if one is better in 80 % of them, 54 votes for 70 %, 210 votes for 60 %"
Pair = tuple[str, tuple[str, str]]  # a question, and the answers in both files


def read_pairs(one: Path, other: Path) -> list[Pair]:
    """Read both files. Raises UserError if they differ in a question."""
    files = [read_conversations(path) for path in (one, other)]
    if len(files[0]) != len(files[1]):
        raise UserError(f"{one} has {len(files[0])} answers, but {other} has {len(files[1])}")
    pairs = []
    for count, (first, second) in enumerate(zip(*files, strict=True), 1):
        if first[:-1] != second[:-1]:
            raise UserError(f"{other}: question {count} differs from question {count} of {one}")
        question = "\n".join(f"{turn['role']}: {turn['content']}" for turn in first[:-1])
        pairs.append((question, (first[-1]["content"], second[-1]["content"])))
    return pairs


def votes(pairs: list[Pair], seed: int) -> Iterator[int | None]:
    """Show each pair. Yield the better file, 0 or 1, or None for a tie."""
    rng = random.Random(seed)
    for count, (question, answers) in enumerate(pairs, 1):
        shown = rng.sample((0, 1), 2)  # the file of the answer that is shown first, and the other
        print(f"\n[{count}/{len(pairs)}] {question}")
        print(f"\n1: {answers[shown[0]]}\n\n2: {answers[shown[1]]}")
        vote = ""
        while vote not in ("1", "2", "="):
            print("\nbetter (1, 2 or =)? ", end="", flush=True)
            line = sys.stdin.readline()
            if not line:
                return
            vote = line.strip()
        yield None if vote == "=" else shown[int(vote) - 1]


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided p-value: how likely equal assistants differ at least this much.

    If the assistants are equal, wins ~ Binomial(n, 1/2) with n = wins + losses.
    """
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(max(wins, losses), n + 1)) / 2**n
    return min(1.0, 2 * tail)


def main(argv=None) -> None:
    parser = Parser(prog="lesson.examples.pairs", description=__doc__)
    parser.add_argument("one", type=Path, metavar="ONE.jsonl")
    parser.add_argument("other", type=Path, metavar="OTHER.jsonl")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of the random order")
    args = parser.parse_args(argv)

    cast = list(votes(read_pairs(args.one, args.other), args.seed))
    wins, losses = cast.count(0), cast.count(1)
    print(f"\n\nbetter: {args.one} {wins}, {args.other} {losses}, ties {cast.count(None)}")
    print(f"two-sided sign test without ties: p = {sign_test(wins, losses):.2g}")
    print(ADVICE)


if __name__ == "__main__":
    run_command(main)
