"""LyCORIS: pip install lycoris-lora."""

from lycoris import LoConModule
from torch import nn

from lora_conformance.bench import Missing


class Layer(nn.Module):
    """The module that LyCORIS makes, and the layer whose forward the module replaces."""

    def __init__(self, linear, update):
        super().__init__()
        self.linear = linear
        self.update = update
        update.apply_to()

    def forward(self, x):
        return self.linear(x)

    def state_dict(self, *args, **options):
        raise Missing("LyCORIS saves a network of updates, apart from the model")


def wrap(linear, r, alpha, dropout, use_rslora=False, use_dora=False):
    linear.requires_grad_(False)
    update = LoConModule(
        "update",
        linear,
        lora_dim=r,
        alpha=alpha,
        dropout=dropout,
        weight_decompose=use_dora,
        rs_lora=use_rslora,
    )
    return Layer(linear, update)


def factors(layer):
    return layer.update.lora_down.weight, layer.update.lora_up.weight


def merge(layer):
    layer.update.restore()  # gives the layer its old forward
    layer.update.onfly_merge()


def unmerge(layer):
    layer.update.onfly_restore()
    layer.update.apply_to()
