"""Pseudo-Latin filler text from a seed: invented words, in sentences that come again and again."""

import random

ONSETS = ("b", "c", "d", "f", "gr", "l", "m", "n", "p", "pl", "qu", "r", "s", "st", "t", "tr", "v")
VOWELS = ("a", "e", "i", "o", "u", "ae")
CODAS = ("", "", "", "l", "m", "n", "r", "s")
ENDINGS = ("a", "ae", "am", "are", "ent", "em", "is", "it", "o", "or", "um", "us")
LEXICON = 120  # words
POOL = 12  # sentences
PARAGRAPH = 8  # sentences


def pseudo_latin(words: int, seed: int) -> str:
    """`words` words or a few more: sentences drawn independently from a pool of POOL."""
    rng = random.Random(seed)
    lexicon = [_word(rng) for _ in range(LEXICON)]
    pool = [_sentence(rng, lexicon) for _ in range(POOL)]
    drawn: list[str] = []
    while words > 0:
        drawn.append(rng.choice(pool))
        words -= len(drawn[-1].split())
    paragraphs = (drawn[i : i + PARAGRAPH] for i in range(0, len(drawn), PARAGRAPH))
    return "".join(" ".join(paragraph) + "\n" for paragraph in paragraphs)


def _word(rng: random.Random) -> str:
    syllables = [rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
                 for _ in range(rng.randint(0, 2))]
    return "".join(syllables) + rng.choice(ONSETS) + rng.choice(ENDINGS)


def _sentence(rng: random.Random, lexicon: list[str]) -> str:
    """6 to 14 words, often with a comma."""
    words = [rng.choice(lexicon) for _ in range(rng.randint(6, 14))]
    if rng.random() < 0.6:
        words[len(words) // 2] += ","
    return " ".join(words).capitalize() + "."
