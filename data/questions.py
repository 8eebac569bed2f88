"""Read questions with one right choice, for classification without a classification head.

    {"prompt": "Who speaks?", "choices": ["Orla", "Jory"], "answer": 1}

`answer` is the index of the right choice, from 0. The model reads the prompt as the user's turn and
a choice as the assistant's turn (`data/instructions.py`).
"""

from dataclasses import dataclass

from common.files import brief
from data.json_lines import refuse_unknown

FORM = (
    'the text "prompt", "choices", a list of two texts or more, and "answer", the index of the '
    "right choice, from 0"
)


@dataclass(frozen=True)
class Question:
    """A prompt, its choices, and the index of the right choice, from 0."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


def question(example: dict) -> Question:
    """Turn the JSON of a line into a question. Raises ValueError if the line is not a question."""
    if not isinstance(example, dict):
        raise ValueError(f"needs {FORM}")
    refuse_unknown(example, {"prompt", "choices", "answer"}, FORM)
    texts = [example.get("prompt")]
    if isinstance(example.get("choices"), list):
        texts += example["choices"]
    if len(texts) < 3 or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"needs {FORM}")

    prompt, *choices = [str(text).strip() for text in texts]
    answer = example.get("answer")
    if "" in choices or len(set(choices)) < len(choices):
        raise ValueError("has an empty choice, or the same choice twice")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"answer {brief(answer)} is not from 0 to {len(choices) - 1}")
    return Question(prompt, tuple(choices), answer)
