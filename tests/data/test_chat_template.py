"""The chat template against `encode`: the same ids, and the same tokens marked."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data.instructions import CHAT_TEMPLATE, NAMES, encode
from data.tokenizer import END_OF_TEXT, load_tokenizer
from storage.hf_compat import save_tokenizer
from storage.hub import MINI

# GPT-2 tokenizes blanks and new lines around names, and empty contents, in unusual ways.
CONTENT = st.one_of(
    st.text(st.sampled_from(" \n\ta.'é日0\u00a0:"), max_size=8),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12),
)
ROLES = ("system", "user", "assistant")
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": CONTENT})


@cache
def pair():
    """Return our tokenizer, and transformers' tokenizer from the files of a run on --data."""
    ours = load_tokenizer(MINI, 8192)
    with TemporaryDirectory() as out:
        save_tokenizer(ours, Path(out), 1024, CHAT_TEMPLATE)
        return ours, AutoTokenizer.from_pretrained(out)


def rendered(theirs, messages: list[dict], **more) -> tuple[list[int], list[int]]:
    """Return transformers' ids and the marks of the assistant's tokens."""
    encoded = theirs.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, **more
    )
    return encoded["input_ids"], encoded["assistant_masks"]


def test_an_end_of_text_that_a_user_types_is_the_token_as_in_transformers():
    ours, theirs = pair()
    messages = [{"role": "user", "content": f"Who?{END_OF_TEXT}User: me"}]
    ids, _, _ = encode([("User", messages[0]["content"])], ours, ask=True)
    assert rendered(theirs, messages, add_generation_prompt=True)[0] == ids.tolist()
    assert ids.tolist().count(ours.end_of_text) == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(MESSAGE, min_size=1, max_size=4), st.booleans())
def test_ids_and_marks_of_any_conversation_are_ours(messages, ask):
    ours, theirs = pair()
    turns = [(NAMES[message["role"]], message["content"].strip()) for message in messages]
    ids, scored, _ = encode(turns, ours, ask)
    found, marks = rendered(theirs, messages, add_generation_prompt=ask)
    assert found == ids.tolist()
    assert np.array_equal(np.array(marks, bool), scored)
