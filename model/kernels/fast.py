"""Make a GPT-2 faster: `accelerate(model)`.

Each class below computes the same function as the parent class, but on a CPU, dropouts draw other
random numbers. `accelerate` sets the class of a model's modules to these classes. Parameters,
buffers and names stay unchanged.

| replaced | by | why |
|---|---|---|
| `nn.Dropout` on a CPU | one random word for four elements | drawing words is slow |
| attention on a CPU | matmul, softmax, dropout | the fused kernel: no dropout, slow in bf16 |
| the loss and the scores | logits in chunks | whole logits would take the most memory |

On other devices and under torch.compile, dropout and attention are the operations of PyTorch that
the parent classes use.
`python -m benchmarks.operations` measures the gain of each class (docs/speed.md), and
tests/model/test_fast.py compares each class with the parent class.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from model.gpt2 import GPT2, Attention
from model.kernels import cuda_loss, loss
from model.kernels.cpu import causal_attention, dropout


class FastDropout(nn.Dropout):
    """Set each element to 0 with probability p. Scale all other elements by 1 / (1 - p)."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training)


class FastAttention(Attention):
    """Causal self-attention, computed by `causal_attention`."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = self.attn_pdrop if self.training else 0.0
        return causal_attention(q, k, v, p)


class FastGPT2(GPT2):
    """GPT-2 that computes logits chunk by chunk in training and scoring."""

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        hidden = self.hidden(idx).flatten(0, 1)  # (B * T, C)
        kernel = cuda_loss if hidden.is_cuda else loss
        return kernel.tied_cross_entropy(hidden, self.wte.weight, targets.flatten())

    @torch.no_grad()
    def token_losses(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(idx).flatten(0, 1)  # (B * T, C)
        kernel = cuda_loss if hidden.is_cuda else loss
        losses, hits = kernel.token_losses(hidden, self.wte.weight, targets.flatten())
        return losses.view_as(targets), hits.view_as(targets)


FAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.Dropout: FastDropout,
    Attention: FastAttention,
    GPT2: FastGPT2,
}


def accelerate(model: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]] = FAST) -> None:
    """Set the class of each module to the fast class, if `classes` has one. Call `accelerate` after
    `inject`, so that LoRA's dropout also gets a fast class.
    """
    for module in model.modules():
        kind = type(module)
        if kind in classes:
            module.__class__ = classes[kind]


def set_kernels(model: GPT2, kernels: str) -> None:
    """Choose the "fast" operations of this file, or the "plain" operations of PyTorch.

    "plain" equals transformers with SDPA attention and the activation gelu_pytorch_tanh bit for
    bit. For this purpose, "plain" also stores the frozen projections as (in, out), the layout of
    transformers. With another layout, a BLAS may sum in another order. Layers without a bias, such
    as A and B, keep their layout.
    """
    if kernels == "fast":
        accelerate(model)
        return
    for module in model.modules():
        if not isinstance(module, nn.Linear) or module.bias is None:
            continue
        if not module.weight.requires_grad:
            module.weight.data = module.weight.data.t().contiguous().t()
