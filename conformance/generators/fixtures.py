"""Write the fixtures: `python -m generators.fixtures [--out DIRECTORY]`.

Weights are drawn by NumPy from seeds, and cut to bf16, so every precision can store them exactly.
A seed is passed over unless every prompt gets other greedy tokens with the adapter than without
it, with at least `DISTINCT` different tokens, and each token beats the second best by `MARGIN`.
"""

import argparse
import json
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import peft
import safetensors.torch
import tokenizers
import torch
import transformers
from peft.tuners.lora import Embedding, LoraLayer
from safetensors.numpy import save_file
from torch import Tensor, nn

from lora_conformance import __version__
from lora_conformance.fixtures import HERE, INDEX, LOGITS

PROMPTS = ("The lamp is", "One, two, three", "def add(a, b):")
NEW_TOKENS = 12
MARGIN = 0.05
DISTINCT = 5
END = "<|endoftext|>"
WORDS = "the and that was with his had for not she you this but from have are one they all in is "
WORDS += "lamp would said"
VOCABULARY = 320
SMALL = {
    "vocab_size": VOCABULARY,
    "bos_token_id": VOCABULARY - 1,
    "eos_token_id": VOCABULARY - 1,
    "pad_token_id": VOCABULARY - 1,
}
GROUPED = SMALL | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
GPT2 = SMALL | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
EXPERTS = {
    "hidden_size": 32,
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "norm_topk_prob": True,  # as in the published models
}
BASES: dict[str, dict[str, Any]] = {
    "gpt2": GPT2 | {"model_type": "gpt2"},
    "llama": GROUPED | {"model_type": "llama"},
    "qwen3": GROUPED | {"model_type": "qwen3", "tie_word_embeddings": True},
    "qwen3-moe": GROUPED | EXPERTS | {"model_type": "qwen3_moe", "num_experts_per_tok": 2},
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


class Adapter(NamedTuple):
    """One adapter. `tests` says what an engine must do, and `config` has fields of PEFT."""

    base: str
    tests: str
    config: dict[str, Any]
    dtype: torch.dtype = torch.float32


ADAPTERS = {
    "gpt2-attention": Adapter(
        "gpt2",
        "scaling 3; W is stored as (in, out); the config's dropout is for training only",
        {"r": 4, "lora_alpha": 12, "lora_dropout": 0.1, "target_modules": ["c_attn"]},
    ),
    "gpt2-all-linear": Adapter(
        "gpt2",
        "c_proj is two layers, of the attention and of the MLP; scaling 1.5",
        {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"},
    ),
    "gpt2-rslora-patterns": Adapter(
        "gpt2",
        "scaling alpha / sqrt(r) with each layer's rank and alpha",
        {
            "r": 4,
            "lora_alpha": 2,
            "use_rslora": True,
            "target_modules": ["c_attn", "c_fc"],
            "rank_pattern": {"h.0.attn.c_attn": 9},
            "alpha_pattern": {"c_fc": 5},
        },
    ),
    "llama-attention": Adapter(
        "llama",
        "q has twice the rows of k and v; scaling 0.5",
        {"r": 8, "lora_alpha": 4, "target_modules": ATTENTION},
    ),
    "llama-mlp-rslora": Adapter(
        "llama",
        "scaling alpha / sqrt(r), not alpha / r",
        {"r": 4, "lora_alpha": 4, "use_rslora": True, "target_modules": MLP},
    ),
    "llama-patterns": Adapter(
        "llama",
        "rank and alpha of single layers; q and v of a fused layer, with other ranks, but not k",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 6},
            "alpha_pattern": {"v_proj": 3},
        },
    ),
    "llama-embedding": Adapter(
        "llama",
        "an adapter of the embedding, whose A is (r, vocabulary); the file has a copy of W",
        {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens"]},
    ),
    "llama-head": Adapter(
        "llama",
        "an adapter of the head; the file has a copy of W",
        {"r": 4, "lora_alpha": 8, "target_modules": ["lm_head", "v_proj"]},
    ),
    "llama-bf16": Adapter(
        "llama",
        "A and B are stored in bf16",
        {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"},
        torch.bfloat16,
    ),
    "qwen3-dora": Adapter(
        "qwen3",
        "DoRA: m / ||W + s B A|| for each row, with m other than ||W||",
        {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": ["q_proj", "v_proj", *MLP]},
    ),
    "qwen3-one-layer": Adapter(
        "qwen3",
        "only the second block, only k and up",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["k_proj", "up_proj"],
            "layers_to_transform": [1],
        },
    ),
    "qwen3-tied-head": Adapter(
        "qwen3",
        "an adapter of a tied head must not change the embedding",
        {"r": 4, "lora_alpha": 8, "target_modules": ["lm_head"]},
    ),
    "qwen3-moe-attention": Adapter(
        "qwen3-moe",
        "q and o of a mixture of experts, without the experts",
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"]},
    ),
    "qwen3-moe-experts": Adapter(
        "qwen3-moe",
        "experts: rows of A are grouped by expert, columns of B by rank",
        {
            "r": 3,
            "lora_alpha": 6,
            "target_modules": [],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
}


def tokenizer() -> tokenizers.Tokenizer:
    """Return a byte-level BPE: 256 bytes, merges that build the beginnings of `WORDS`, `END`."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS.split():
        start = "Ġ"  # the space before a word
        for letter in word:
            merges[start, letter] = None
            start += letter
    pairs = list(merges)[: VOCABULARY - 1 - len(letters)]
    words = [*letters, *(a + b for a, b in pairs)]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({word: i for i, word in enumerate(words)}, pairs)
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([END])
    assert made.get_vocab_size() == VOCABULARY
    return made


def write_tokenizer(directory: Path) -> None:
    tokenizer().save(str(directory / "tokenizer.json"))
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "add_prefix_space": False,
        "model_max_length": 128,
    }
    write_json(directory / "tokenizer_config.json", fields)


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class Random:
    """Draw normal numbers that bf16 can store."""

    def __init__(self, seed: int):
        self.numbers = np.random.default_rng(seed)

    def like(self, tensor: Tensor, std: float, mean: float = 0.0) -> Tensor:
        drawn = self.numbers.normal(mean, std, tuple(tensor.shape)).astype(np.float32)
        return torch.from_numpy((drawn.view(np.uint32) & 0xFFFF0000).view(np.float32))


@torch.no_grad()
def write_base(directory: Path, fields: dict[str, Any], seed: int) -> None:
    """Write a base with random weights."""
    config = transformers.AutoConfig.for_model(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config)
    draw = Random(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim == 1:
            mean = 1.0 if name.endswith("weight") else 0.0  # norms and biases
            parameter.copy_(draw.like(parameter, 0.1, mean))
        else:
            outer = any(part in name for part in ("embed_tokens", "wte", "wpe", "lm_head"))
            gain = 3.0 if outer else 2.0
            parameter.copy_(draw.like(parameter, gain * parameter.shape[-1] ** -0.5))
    model.save_pretrained(directory)
    stored = json.loads((directory / "config.json").read_text())
    if "num_local_experts" in stored:  # the name of transformers 5; other readers need this one
        stored["num_experts"] = stored["num_local_experts"]
    write_json(directory / "config.json", stored)
    write_tokenizer(directory)


@torch.no_grad()
def write_adapter(directory: Path, base: Path, adapter: Adapter, seed: int) -> None:
    """Write a random adapter, whose update has 0.7 times the standard deviation of W."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", **adapter.config)
    model: Any = peft.get_peft_model(load(base), config)
    draw = Random(seed)
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    for layer in layers:
        factors: list[Tensor]
        if isinstance(layer, Embedding):
            factors = [layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]]
        else:
            factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        in_layer = getattr(layer, "parameter_name", "weight")
        std = getattr(layer.get_base_layer(), in_layer).std().item()
        update = layer.scaling["default"] * layer.r["default"] ** 0.5
        for factor in factors:
            factor.copy_(draw.like(factor, (0.7 * std / update) ** 0.5))
        for magnitude in layer.lora_magnitude_vector.values():
            magnitude.weight.copy_(draw.like(magnitude.weight, 0.3, 1.0) * magnitude.weight)
    model.save_pretrained(directory)

    (directory / "README.md").unlink(missing_ok=True)
    stored = json.loads((directory / "adapter_config.json").read_text())
    stored["base_model_name_or_path"] = f"bases/{adapter.base}"
    for field in ("target_modules", "target_parameters"):
        if isinstance(stored[field], list):
            stored[field].sort()  # PEFT writes a set in a random order
    write_json(directory / "adapter_config.json", stored)
    path = directory / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors = {name: tensor.to(adapter.dtype) for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


def load(base: Path, adapter: Path | None = None) -> Any:
    """Load a base, and an adapter if given, with stock transformers and PEFT in fp32."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    if adapter:
        model = peft.PeftModel.from_pretrained(model, str(adapter))
    return model.eval()


@contextmanager
def in_fp64(model: nn.Module) -> Iterator[None]:
    """Compute everything in fp64, also where transformers asks for fp32 (norms, softmax, RoPE)."""
    with ExitStack() as stack:
        for name in ("float32", "float"):
            stack.enter_context(mock.patch.object(torch, name, torch.float64))
        stack.enter_context(mock.patch.object(Tensor, "float", Tensor.double))
        model.double()
        for module in model.modules():
            if hasattr(module, "inv_freq"):  # RoPE's frequencies, which were computed in fp32
                module.__init__(module.config)  # type: ignore[misc]
        yield


class Result(NamedTuple):
    """Logits at each prompt's last token, greedy tokens, and their smallest margin."""

    logits: np.ndarray  # (prompts, vocabulary)
    tokens: list[list[int]]
    margin: float


@torch.no_grad()
def compute(model: nn.Module, prompts: Sequence[Sequence[int]]) -> Result:
    first = []
    tokens = []
    margin = np.inf
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(NEW_TOKENS):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            if len(ids) == len(prompt):
                first.append(logits.numpy())
            best, second = logits.topk(2).values.tolist()
            margin = min(margin, best - second)
            ids.append(int(logits.argmax()))
        tokens.append(ids[len(prompt) :])
    return Result(np.stack(first), tokens, margin)


def search(write: Any, directory: Path, base: Path, prompts: list, without: list | None) -> Result:
    """Write with one seed after the other until the result can tell right from wrong."""
    for seed in count():
        shutil.rmtree(directory, ignore_errors=True)
        write(seed)
        model = load(base, directory if without else None)
        with in_fp64(model):
            result = compute(model, prompts)
        differs = without is None or all(
            a != b for a, b in zip(result.tokens, without, strict=True)
        )
        ends = any(VOCABULARY - 1 in tokens for tokens in result.tokens)
        varied = all(len(set(tokens)) >= DISTINCT for tokens in result.tokens)
        if differs and varied and not ends and result.margin >= MARGIN:
            return result
    raise AssertionError  # the loop does not end


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="generators.fixtures", description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, metavar="DIRECTORY")
    out = parser.parse_args(argv).out
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    prompts = [tokenizer().encode(text).ids for text in PROMPTS]
    results: dict[str, Result] = {}
    for name, fields in BASES.items():
        base = out / "bases" / name
        results[name] = search(
            lambda seed, base=base, fields=fields: write_base(base, fields, seed),
            base,
            base,
            prompts,
            None,
        )
    fixtures = {}
    for name, adapter in ADAPTERS.items():
        base = out / "bases" / adapter.base
        directory = out / "adapters" / name
        without = results[adapter.base].tokens
        result = search(
            lambda seed, d=directory, b=base, a=adapter: write_adapter(d, b, a, seed),
            directory,
            base,
            prompts,
            without,
        )
        results[name] = result
        fixtures[name] = {
            "base": f"bases/{adapter.base}",
            "adapter": f"adapters/{name}",
            "tests": adapter.tests,
            "tokens": result.tokens,
            "tokens_without_adapter": without,
            "margin": round(result.margin, 4),
        }
    content = {
        "version": __version__,
        "license": "CC0-1.0",
        "made_with": {p.__name__: p.__version__ for p in (transformers, peft)},
        "tolerance": {"logits in fp32, relative to the largest": 1e-5},
        "prompts": [
            {"text": text, "tokens": ids} for text, ids in zip(PROMPTS, prompts, strict=True)
        ],
        "fixtures": fixtures,
    }
    (out / INDEX.name).write_text(json.dumps(content, indent=1) + "\n")
    save_file({name: result.logits for name, result in results.items()}, out / LOGITS.name)


if __name__ == "__main__":
    main()
