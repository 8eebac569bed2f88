"""PEFT: pip install peft. NF4 needs bitsandbytes."""

import peft
from torch import nn
from transformers.pytorch_utils import Conv1D


def wrap(
    linear,
    r,
    alpha,
    dropout,
    use_rslora=False,
    use_dora=False,
    fan_in_fan_out=False,
    nf4=False,
):
    if fan_in_fan_out:
        stored = linear
        linear = Conv1D(*reversed(stored.weight.shape))
        linear.weight, linear.bias = stored.weight, stored.bias
    model = nn.Sequential(nf4_linear(linear) if nf4 else linear)
    model.is_loaded_in_4bit = nf4
    config = peft.LoraConfig(
        target_modules=["0"],
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_rslora=use_rslora,
        use_dora=use_dora,
        fan_in_fan_out=fan_in_fan_out,
    )
    return peft.get_peft_model(model, config).base_model.model[0]


def nf4_linear(linear):
    try:
        from bitsandbytes.nn import Linear4bit
    except ImportError as error:
        raise NotImplementedError("NF4 needs bitsandbytes") from error
    quantised = Linear4bit(*linear.weight.T.shape, bias=False, quant_type="nf4")
    quantised.load_state_dict(linear.state_dict())
    return quantised.to("cpu")


def factors(layer):
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def merge(module):
    if isinstance(module, peft.PeftModel):
        module.merge_adapter()
    else:
        module.merge()


def unmerge(module):
    if isinstance(module, peft.PeftModel):
        module.unmerge_adapter()
    else:
        module.unmerge()


def inject(
    model,
    targets,
    r,
    alpha,
    layers=None,
    ranks=None,
    alphas=None,
    use_rslora=False,
    use_dora=False,
):
    config = peft.LoraConfig(
        target_modules=targets,
        r=r,
        lora_alpha=alpha,
        layers_to_transform=layers,
        rank_pattern=ranks or {},
        alpha_pattern=alphas or {},
        use_rslora=use_rslora,
        use_dora=use_dora,
    )
    return peft.get_peft_model(model, config)


def save(model, path):
    model.save_pretrained(path)


def load(model, path, **settings):
    return peft.PeftModel.from_pretrained(model, path)


def combine(paths, weights, out):
    from lora_conformance.models import Model

    model = peft.PeftModel.from_pretrained(Model(), paths[0], "adapter_0")
    names = [f"adapter_{i}" for i in range(len(paths))]
    for name, path in zip(names[1:], paths[1:], strict=True):
        model.load_adapter(path, name)
    model.add_weighted_adapter(names, weights, out.name, combination_type="cat")
    model.save_pretrained(out.parent, selected_adapters=[out.name])
