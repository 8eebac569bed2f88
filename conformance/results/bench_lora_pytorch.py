"""lora-pytorch: pip install lora-pytorch. It has no alpha."""

from lora_pytorch import LoRA

lacks = {"update_is_alpha_over_r": "there is no alpha"}


def wrap(linear, r, alpha, dropout):
    layer = LoRA.from_module(linear, rank=r)
    layer.lora_module.dropout.p = dropout
    return layer


def factors(layer):
    return layer.lora_module.in_proj, layer.lora_module.out_proj
