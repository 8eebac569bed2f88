"""GPT-2's byte-pair tokenizer: tiktoken's engine over the ranks bundled beside this file."""

from base64 import b64decode
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import tiktoken

from errors import UserError

RANKS = Path(__file__).with_name("r50k_base.tiktoken")
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
END_OF_TEXT = "<|endoftext|>"
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


@lru_cache
def load_tokenizer(vocab_size: int = 50257) -> tiktoken.Encoding:
    """GPT-2's tokenizer, or a smaller one: the first `vocab_size` - 1 ranks and `<|endoftext|>`.

    Ranks are ordered by the merge that made them, and each is a merge of two lower ones, so
    every prefix of them that holds the 256 single bytes is a tokenizer of its own. Raises
    UserError for a size that has none and for damaged ranks.
    """
    if not 257 <= vocab_size <= 50257:
        raise UserError(f"the base's vocab_size is {vocab_size}; GPT-2's tokenizer serves "
                        "257 to 50257")
    ranks = load_ranks(RANKS)
    end_of_text = vocab_size - 1
    return tiktoken.Encoding(
        name=f"gpt2-{vocab_size}",
        pat_str=PATTERN,
        mergeable_ranks={piece: rank for piece, rank in ranks.items() if rank < end_of_text},
        special_tokens={END_OF_TEXT: end_of_text},
    )


def load_ranks(path: Path) -> dict[bytes, int]:
    """Each token's bytes and rank, from lines of base64 and number. Raises UserError if changed.

    tiktoken's own loader would copy the file to a shared temporary directory and read that.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if sha256(content).hexdigest() != RANKS_SHA256:
        raise UserError(f"{path}: is damaged; take the project's own copy again")
    return {b64decode(token): int(rank) for token, rank in map(bytes.split, content.splitlines())}
