"""Compare Riemannian preconditioning with PEFT's code and with the definition."""

from shlex import split

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora.inject import inject, lora_layers
from lora.variants import make_config
from lora.variants.riemannian import precondition
from model.kernels.fast import set_kernels
from storage.weights import load_gpt2
from tests import runs
from tests.helpers import relative_difference, tiny_gpt2_directory
from tests.pairs import IDS, parameters, randomize
from train import learning_rate

optimizers = pytest.importorskip("peft.optimizers", reason="an old PEFT")
SMALL = split("--max-steps 12 --batch-size 4 --lr 3e-3 --clip 0.1 --riemannian")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    rates = {"embd_pdrop": 0, "attn_pdrop": 0, "resid_pdrop": 0}
    return tiny_gpt2_directory(tmp_path_factory.mktemp("base"), **rates)[0]


@pytest.mark.skipif(not hasattr(optimizers, "create_riemannian_optimizer"), reason="an old PEFT")
@pytest.mark.parametrize("options", ["", "--use-dora --target-modules c_attn c_proj"])
def test_a_run_in_fp64_is_pefts(base, book, tmp_path, options):
    """PEFT inverts by an SVD, so the last digits differ. Rounding must not hide more."""
    argv = (*SMALL, *split(options), *runs.NO_DROPOUT["lora"])
    ours = runs.trainer("lora", base, book, tmp_path, *argv, "--kernels", "plain")
    ours.model.double()
    made = ours.options
    stock = runs.stock_linear_model(base)
    torch.manual_seed(made.seed)
    fields = {"r": 8, "lora_alpha": 16, "target_modules": list(made.target_modules)}
    config = peft.LoraConfig(**fields, use_dora=made.use_dora)
    theirs = peft.get_peft_model(stock, config).double().train()
    set_kernels(theirs, "plain")  # the same memory layout of the frozen weights
    optimizer = optimizers.create_riemannian_optimizer(
        theirs, torch.optim.AdamW, lr=made.lr, reg=1e-6, weight_decay=made.weight_decay
    )

    trained = [p for p in theirs.parameters() if p.requires_grad]
    batches = list(ours.batches())
    for step, batch in enumerate(batches):
        ours.step(batch)
        [(inputs, targets)] = batch.micro_batches()
        F.cross_entropy(theirs(input_ids=inputs).logits.flatten(0, 1), targets.flatten()).backward()
        norm = nn.utils.clip_grad_norm_(trained, made.clip)
        assert norm > made.clip  # so the order of clipping and preconditioning matters
        optimizer.param_groups[0]["lr"] = learning_rate(
            step, len(batches), made.lr, made.warmup_ratio
        )
        optimizer.step()
        optimizer.zero_grad()
    expected = parameters(theirs.base_model.model.transformer)
    assert expected.keys() == parameters(ours.model).keys() and len(expected) >= 4
    for name, parameter in parameters(ours.model).items():
        # DoRA computes the norm of V in fp32, and Adam amplifies the rounding error.
        assert relative_difference(parameter, expected[name]) < (1e-5 if made.use_dora else 1e-6)


def with_gradients(base, targets):
    model = load_gpt2(base)
    inject(model, make_config(r=3, lora_dropout=0.0, target_modules=targets))
    randomize(model)
    model.hidden(IDS).square().sum().backward()
    return model


def change(layer):
    """Return a gradient step's change of B A to first order: dB A + B dA, (out, in) in fp64."""
    b = layer.lora_B.weight.detach().double()
    a = layer.lora_A.weight.detach().double()
    factor = next(layer.lora_B.parameters())
    db = torch.zeros_like(b)
    if factor.ndim == 2:
        db = factor.grad.double()
    else:  # each slice's block is in its rows and its columns
        d = factor.shape[1]
        for i, place in enumerate(layer.lora_B.places):
            db[place * d : (place + 1) * d, 3 * i : 3 * i + 3] = factor.grad[i].double()
    return db @ a + b @ layer.lora_A.weight.grad.double()


@pytest.mark.parametrize("targets", [("c_attn", "mlp.c_proj"), ("c_attn.q", "c_attn.v")])
def test_a_step_projects_the_gradient_however_the_product_is_split(base, targets):
    """dB A + B dA is G P_A + P_B G, slice by slice. G is the product's gradient, and P are the
    projections on the rows of A and the columns of B. The split of the product has no effect.
    """
    plain, model = (with_gradients(base, targets) for _ in range(2))
    sizes = torch.tensor([[5.0, 1.0, 0.2], [0.2, 1.0, 5.0]])  # of the two slices
    with torch.no_grad():
        for layer in lora_layers(model).values():
            b = next(layer.lora_B.parameters())
            a = layer.lora_A.weight
            stretch = torch.diag_embed(sizes[: len(a) // 3])
            a.copy_((stretch @ a.view(-1, 3, a.shape[1])).view_as(a))
            b.copy_((b @ stretch.inverse()).view_as(b))
    model.zero_grad()
    model.hidden(IDS).square().sum().backward()
    for one, other in zip(lora_layers(plain).values(), lora_layers(model).values(), strict=True):
        assert relative_difference(change(other), change(one)) > 0.1
    precondition(plain)
    precondition(model)
    for one, other in zip(lora_layers(plain).values(), lora_layers(model).values(), strict=True):
        assert relative_difference(change(other), change(one)) < 1e-3
