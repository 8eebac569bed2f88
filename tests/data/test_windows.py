"""The split, the training windows and the evaluation windows."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.windows import Windows, split
from model.gpt2 import IGNORE_INDEX


def test_the_last_tokens_are_the_validation_part():
    for length, fraction, validation in (
        (1000, 0.1, 100),
        (1009, 0.1, 100),
        (7, 0.5, 3),
        (10, 1.0, 10),
        (5, 0.001, 0),
    ):
        train_part, val_part = split(np.arange(length), fraction)
        assert train_part.tolist() == list(range(length - validation))
        assert val_part.tolist() == list(range(length - validation, length))


@settings(deadline=None)
@given(
    length=st.integers(0, 40),
    block=st.integers(1, 12),
    stride=st.integers(1, 15),
    shift=st.sampled_from([1, 2]),
)
def test_windows_are_those_of_a_plain_loop(length, block, stride, shift):
    tokens = list(range(100, 100 + length))
    expected = []
    for start in range(0, length, stride):
        if start + block + shift <= length:  # a shorter last window is dropped
            expected.append(
                (tokens[start : start + block], tokens[start + shift : start + shift + block])
            )
    windows = Windows(np.array(tokens, dtype=np.uint16), block, stride, shift)
    assert len(windows) == len(expected)
    inputs, targets = windows.inputs_and_targets(np.arange(len(windows))[::-1])
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == targets.shape == (len(expected), block)
    assert list(zip(inputs.tolist(), targets.tolist(), strict=True)) == expected[::-1]


@settings(deadline=None, max_examples=100)
@given(
    data=st.data(),
    length=st.integers(3, 60),
    block=st.integers(1, 20),
    shift=st.sampled_from([1, 2]),
    batch_size=st.integers(1, 5),
)
def test_evaluation_scores_each_token_once_from_what_comes_before(
    data, length, block, shift, batch_size
):
    stride = data.draw(st.integers(1, block))
    tokens = np.arange(length, dtype=np.uint16)  # each token equals its position
    windows = Windows(tokens, block, stride, shift, byte_counts=10 * tokens)
    batches = list(windows.evaluation_batches(batch_size))
    assert all(len(inputs) == batch_size for inputs, _ in batches[:-1])
    scored = []
    for inputs, targets in batches:
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.shape == targets.shape == (len(inputs), block)
        for row_in, row_out in zip(inputs, targets, strict=True):
            counts = row_out != IGNORE_INDEX
            assert (row_out[counts] == row_in[counts] + shift).all()
            seen = row_in[: counts.nonzero().max() + 1].tolist()
            assert seen == list(range(seen[0], seen[0] + len(seen))) and seen[0] % stride == 0
            scored += row_out[counts].tolist()
    assert scored == list(range(shift, length))
    assert windows.scored_bytes == 10 * sum(scored)
