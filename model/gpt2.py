"""GPT-2 as released: pre-norm blocks, tanh GELU, learned positions, and a head tied to `wte`.

Parameters are named as in the released checkpoint (`wte`, `h.0.attn.c_attn`, ...). The checkpoint
stores the projections as (in, out). Here the projections are `nn.Linear`s, (out, in), and
`storage/weights.py` transposes the weights.

Paper: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".

This file needs only PyTorch. By default, `set_kernels` in `model/kernels/fast.py` replaces the
loss, and on a CPU also dropout and attention, by faster functions.

Shapes: B batch, T tokens, C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100  # marks a target that is not scored (F.cross_entropy's default)


@dataclass
class GPT2Config:
    """The fields of a Hugging Face GPT-2 `config.json` that change the result, and token ids."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # width of the MLP (None: 4 * n_embd)
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    activation_function: str = "gelu_new"  # GPT-2's tanh form ("gelu": the erf form)
    token_ids: dict = field(default_factory=dict)  # such as `bos_token_id`. Only saved, not used


class KVCache:
    """Keys and values of the tokens seen so far: two tensors (B, H, T, D) per block."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return self.blocks[0][0].size(2) if self.blocks else 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append a block's new keys and values. Return all keys and values of the block."""
        if layer in self.blocks:
            past_k, past_v = self.blocks[layer]
            k, v = torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)
        else:
            k, v = k.contiguous(), v.contiguous()  # a view would keep q in memory
        self.blocks[layer] = k, v
        return k, v


class Attention(nn.Module):
    """Causal multi-head self-attention with q, k and v fused into one projection, `c_attn`."""

    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.attn_pdrop = config.attn_pdrop
        self.attention = F.scaled_dot_product_attention  # replaced by `set_kernels`
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # `inject` puts a LoRALinear here
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = map(self.split_heads, self.c_attn(x).split(C, dim=2))  # (B, H, T, D) each
        if cache is None:
            p = self.attn_pdrop if self.training else 0.0
            y = self.attention(q, k, v, dropout_p=p, is_causal=True)
        else:
            k, v = cache.extend(self.layer, k, v)
            # The first call needs a causal mask. A later call has one token, and no mask.
            # Up to torch 2.11, Apple's GPU misreads a q that is a view (pytorch#163597).
            y = F.scaled_dot_product_attention(q.contiguous(), k, v, is_causal=T > 1)

        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))

    def split_heads(self, x: Tensor) -> Tensor:
        """Turn (B, T, C) into (B, H, T, D)."""
        B, T, C = x.shape
        return x.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)


class MLP(nn.Module):
    """Compute c_proj(gelu(c_fc(x))): from width C to n_inner (4 C) and back, token by token."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, inner)
        self.c_proj = nn.Linear(inner, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)
        self.act = nn.GELU("none" if config.activation_function == "gelu" else "tanh")

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(nn.Module):
    """Compute x = x + attn(ln_1(x)), and then x + mlp(ln_2(x)), for x (B, T, C)."""

    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


def tied_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of -log p(target) over the scored tokens, in nats, fp32.

    hidden is (N, C), weight (V, C), targets (N,), and p = softmax(hidden weight^T) in fp32. A
    target of IGNORE_INDEX is not scored.
    """
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return each target's -log p in nats, fp32 (N,), and whether the target is the likeliest
    token, bool (N,). For a target of IGNORE_INDEX, return 0 and False. Shapes as above.
    """
    logits = F.linear(hidden, weight)  # (N, V)
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return losses, logits.argmax(-1) == targets


class GPT2(nn.Module):
    """The language model, with random weights. `wte` is also the head.

    Dropouts draw random numbers in the same order as in PEFT. The embedding draws first. Then each
    block draws in this order: LoRA of c_attn, attention weights, LoRA of c_proj, attention output,
    LoRA of the MLP, and MLP output.
    """

    peft_sees = "GPT2LMHeadModel"  # the equal model of transformers, for `lora/peft_view.py`

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # True: store only blocks' inputs, recompute the rest
        self.wte = new_embedding(config.vocab_size, config.n_embd)
        self.wpe = new_embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.tied_cross_entropy = tied_cross_entropy  # replaced by `set_kernels`, as is the next
        self.tied_token_losses = token_losses
        if not self.wte.weight.is_meta:
            self.init_weights()

    def forward(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """Map token ids (B, T) to logits (B, T, V). With a cache, `idx` is the new tokens."""
        return self.logits(self.hidden(idx, cache))

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """Map token ids (B, T) to the final hidden states (B, T, C) that the tied head reads.

        If the cache is not empty, T must be 1. Raises ValueError for a larger T, and if the cache
        and `idx` together have more than `n_positions` tokens.
        """
        past = 0 if cache is None else len(cache)
        if past and idx.size(1) > 1:
            raise ValueError("a cache that is not empty takes one token at a time")
        total = past + idx.size(1)
        if total > self.config.n_positions:
            raise ValueError(f"{total} tokens are more than n_positions {self.config.n_positions}")

        positions = torch.arange(past, total, device=idx.device)  # (T,)
        x = self.drop(self.embed(idx, positions))  # (B, T, C)
        for block in self.h:
            if self.gradient_checkpointing and self.training and cache is None:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, cache)
        return self.ln_f(x)

    def embed(self, idx: Tensor, positions: Tensor) -> Tensor:
        """Return wte[idx] + wpe[positions], (B, T, C), in the precision of the LayerNorms (fp32).

        Full fine-tuning trains the embeddings in fp32, but commands load them in the precision in
        which they compute. So evaluation under autocast rounds the embeddings to this precision, to
        measure the model as a command with this precision will load it.
        """
        tok = self.wte(idx)  # (B, T, C)
        pos = self.wpe(positions)  # (T, C)
        if torch.is_autocast_enabled(idx.device.type) and not torch.is_grad_enabled():
            low = torch.get_autocast_dtype(idx.device.type)
            tok = tok.to(low)
            pos = pos.to(low)
        return tok.to(self.ln_f.weight.dtype) + pos.to(self.ln_f.weight.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states (..., C) to logits (..., V)."""
        return F.linear(hidden, self.wte.weight)

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of -log p(target) over the scored tokens, in nats.

        idx and targets are (B, T). A target of IGNORE_INDEX is not scored. The result is a sum, not
        a mean, so that the losses of micro-batches can be added.
        """
        hidden = self.hidden(idx).flatten(0, 1)  # (B * T, C)
        return self.tied_cross_entropy(hidden, self.wte.weight, targets.flatten())

    @torch.no_grad()
    def token_losses(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return each target's -log p in nats, fp32 (B, T), and whether the target is the likeliest
        token, bool (B, T). For a target of IGNORE_INDEX, return 0 and False.
        """
        hidden = self.hidden(idx).flatten(0, 1)  # (B * T, C)
        losses, hits = self.tied_token_losses(hidden, self.wte.weight, targets.flatten())
        return losses.view_as(targets), hits.view_as(targets)

    def set_dropout(self, p: float) -> None:
        """Set the probability of all dropouts of the base: embedding, attention and residual."""
        self.drop.p = p
        for block in self.h:
            assert isinstance(block, Block)
            block.attn.attn_pdrop = p
            block.attn.resid_dropout.p = p
            block.mlp.dropout.p = p

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw weights with std initializer_range, as transformers does. Biases are 0.

        The 2 * n_layer projections that add to the residual stream are scaled by
        1 / sqrt(2 * n_layer) (paper, 2.3). OpenAI's code draws `wpe` with std 0.01 instead.
        """
        std = self.config.initializer_range
        residual_std = std / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                parameter.normal_(0.0, residual_std)
            elif parameter.ndim == 2:
                parameter.normal_(0.0, std)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.fill_(1.0)  # LayerNorm weights


def new_embedding(rows: int, width: int) -> nn.Embedding:
    """Return an embedding with an uninitialised weight. The caller must set the weight.

    `nn.Embedding(rows, width)` would draw a random weight. On the meta device, this draw would
    import PyTorch's compiler.
    """
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)
