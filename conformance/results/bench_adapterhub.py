"""AdapterHub: pip install adapters. It adapts models, so the layer is part of a small BERT."""

import torch
from transformers import BertConfig, BertModel

import adapters


def wrap(linear, r, alpha, dropout, use_dora=False):
    if linear.weight.dtype is not torch.float32:
        raise NotImplementedError("A and B have the dtype that the caller chooses")
    fan_out, fan_in = linear.weight.shape
    config = BertConfig(
        hidden_size=fan_in,
        intermediate_size=fan_out,
        num_hidden_layers=1,
        num_attention_heads=1,
        vocab_size=8,
    )
    model = BertModel(config)
    model.encoder.layer[0].intermediate.dense = linear
    adapters.init(model)
    lora = adapters.LoRAConfig(
        r=r,
        alpha=alpha,
        dropout=dropout,
        use_dora=use_dora,
        selfattn_lora=False,
        intermediate_lora=True,
    )
    model.add_adapter("lora", config=lora)
    model.train_adapter("lora")
    return model.encoder.layer[0].intermediate.dense


def factors(layer):
    return layer.loras["lora"].lora_A, layer.loras["lora"].lora_B


def merge(layer):
    layer.merge_adapter("lora")


def unmerge(layer):
    layer.reset_adapter()
