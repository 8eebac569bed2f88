"""Make a GPT-2 faster: `set_kernels(model, "fast")`.

| replaced | by | why |
|---|---|---|
| `nn.Dropout` on a CPU | one random word for four elements | drawing words is slow |
| attention on a CPU | matmul, softmax, dropout | the fused kernel: no dropout, slow in bf16 |
| the loss and the scores | logits in chunks | whole logits would take the most memory |

The functions compute the same, but on a CPU, dropouts draw other random numbers. On other devices
and under torch.compile, PyTorch computes dropout and attention. tests/model/test_fast.py compares
each function with the function that it replaces.
"""

from torch import Tensor, nn

from model.gpt2 import GPT2, Attention
from model.kernels import cuda_loss, loss
from model.kernels.cpu import causal_attention, dropout


class FastDropout(nn.Dropout):
    """Set each element to 0 with probability p. Scale all other elements by 1 / (1 - p)."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training)


def set_kernels(model: GPT2, kernels: str) -> None:
    """Choose the "fast" operations of this folder, or the "plain" operations of PyTorch.

    Call it after `inject`, so that LoRA's dropout also becomes a `FastDropout`, and with the model
    on its device.

    "plain" equals transformers with SDPA attention and the activation gelu_pytorch_tanh bit for
    bit. For this purpose, "plain" also stores the frozen projections as (in, out), the layout of
    transformers. With another layout, a BLAS may sum in another order. Layers without a bias, such
    as A and B, keep their layout.
    """
    if kernels == "plain":
        for layer in model.modules():
            if not isinstance(layer, nn.Linear) or layer.bias is None:
                continue
            if not layer.weight.requires_grad:
                layer.weight.data = layer.weight.data.t().contiguous().t()
        return

    kernel = cuda_loss if model.wte.weight.is_cuda else loss
    model.tied_cross_entropy = kernel.tied_cross_entropy
    model.tied_token_losses = kernel.token_losses
    for module in list(model.modules()):
        if isinstance(module, Attention):
            module.attention = causal_attention  # type: ignore[assignment]
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, FastDropout(child.p).train(child.training))
