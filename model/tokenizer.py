"""GPT-2's byte-pair tokenizer: tiktoken's engine over the ranks bundled beside this file."""

from functools import lru_cache
from pathlib import Path

import tiktoken
from tiktoken.load import load_tiktoken_bpe

RANKS = Path(__file__).with_name("r50k_base.tiktoken")
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
END_OF_TEXT = "<|endoftext|>"
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


@lru_cache
def load_tokenizer(vocab_size: int = 50257) -> tiktoken.Encoding:
    """GPT-2's tokenizer, or a smaller one: the first `vocab_size` - 1 ranks and `<|endoftext|>`.

    Ranks are ordered by the merge that made them, and each is a merge of two lower ones, so
    every prefix of them that holds the 256 single bytes is a tokenizer of its own.
    """
    if not 257 <= vocab_size <= 50257:
        raise ValueError(f"vocab_size {vocab_size} is not between 257 and 50,257")
    ranks = load_tiktoken_bpe(str(RANKS), expected_hash=RANKS_SHA256)
    end_of_text = vocab_size - 1
    return tiktoken.Encoding(
        name=f"gpt2-{vocab_size}",
        pat_str=PATTERN,
        mergeable_ranks={piece: rank for piece, rank in ranks.items() if rank < end_of_text},
        special_tokens={END_OF_TEXT: end_of_text},
    )
