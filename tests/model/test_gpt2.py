"""Compare the model with transformers: logits, gradients, dropout, initial weights, sizes."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers

from model.gpt2 import GPT2, GPT2Config, KVCache
from storage.weights import load_gpt2
from tests.helpers import relative_difference, tiny_gpt2_directory, token_ids

CONFIGS = [
    {
        "activation_function": "gelu_new",
        "n_embd": 24,
        "n_head": 3,
        "n_layer": 3,
        "n_inner": 7,
        "n_positions": 17,
        "vocab_size": 499,
        "layer_norm_epsilon": 1e-3,
    },
    {"activation_function": "gelu"},
]


@pytest.fixture
def model(base):
    return load_gpt2(base)


@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_logits_are_those_of_transformers(tmp_path, config):
    directory, theirs = tiny_gpt2_directory(tmp_path, **config)
    ids = token_ids(theirs.config.vocab_size, 2, theirs.config.n_positions)
    assert relative_difference(load_gpt2(directory)(ids), theirs(ids).logits) < 1e-5


def test_autocast_rounds_trained_embeddings_in_evaluation_alone(model):
    ids = token_ids(317, 2, 5)
    positions = torch.arange(5)
    exact = model.embed(ids, positions)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.embed(ids, positions), exact)
        with torch.no_grad():
            rounded = model.embed(ids, positions)
    assert rounded.dtype == torch.float32 and 1e-4 < relative_difference(rounded, exact) < 1e-2


@torch.no_grad()
def test_cached_logits_are_those_without_a_cache_and_the_attention_reads_no_views(model):
    """Up to torch 2.11, the kernel of Apple's GPU for few tokens misreads views."""

    def attend(*qkv, attend=F.scaled_dot_product_attention, **options):
        assert all(x.is_contiguous() for x in qkv)
        return attend(*qkv, **options)

    ids = token_ids(317, 2, 64)
    cache = KVCache()
    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        logits = [model(part, cache) for part in ids.split([61, 1, 1, 1], dim=1)]
    assert len(cache) == 64
    assert relative_difference(torch.cat(logits, dim=1), model(ids)) < 1e-5
    with pytest.raises(ValueError, match="one token at a time"):
        model(ids[:, :2], cache)


@torch.no_grad()
def test_more_tokens_than_positions_are_refused(model):
    cache = KVCache()
    model(token_ids(317, 1, 64), cache)
    for ids, past in ((token_ids(317, 1, 65), None), (token_ids(317, 1, 1), cache)):
        with pytest.raises(ValueError, match="65 tokens are more than n_positions 64"):
            model(ids, past)


def logits_in_training(model, ids):
    torch.manual_seed(5)
    with torch.no_grad():
        return model.train()(ids)


def test_dropout_in_training_is_that_of_transformers_draw_for_draw(tmp_path):
    directory, theirs = tiny_gpt2_directory(
        tmp_path, embd_pdrop=0.1, attn_pdrop=0.2, resid_pdrop=0.3
    )
    ours = load_gpt2(directory)
    ids = token_ids(theirs.config.vocab_size, 2, 64)
    without = ours(ids)

    def assert_same_draws():
        logits = logits_in_training(ours, ids)
        assert relative_difference(logits, logits_in_training(theirs, ids).logits) < 1e-5
        assert relative_difference(logits, without) > 0.01

    assert_same_draws()
    ours.set_dropout(0.0)
    assert torch.equal(logits_in_training(ours, ids), without)
    ours.set_dropout(0.25)
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.25
    assert_same_draws()


def test_a_new_model_is_drawn_from_the_distributions_of_transformers():
    sizes = {"vocab_size": 300, "n_positions": 64, "n_embd": 64, "n_layer": 8, "n_head": 4}
    fields = {**sizes, "initializer_range": 0.03}
    torch.manual_seed(0)
    ours = GPT2(GPT2Config(**fields))
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**fields)).transformer
    for name, parameter in ours.named_parameters():
        expected = theirs.get_parameter(name)
        if parameter.ndim == 1:
            assert torch.equal(parameter, expected), name
        else:
            assert parameter.std().item() == pytest.approx(expected.std().item(), rel=0.1), name
            assert abs(parameter.mean().item()) < 0.1 * expected.std().item(), name
