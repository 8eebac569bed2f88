"""A Trainer from Python, without a command line, a plan or a file."""

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from data.windows import Batch, Windows, batches
from lora import LoRAConfig, adapter_state_dict, inject, trained_parameters
from model.kernels.fast import set_kernels
from storage.weights import load_gpt2
from tests.runs import BLOCK, WEIGHTS, token_parts, trained
from train import learning_rate, train_step
from training.trainer import make_trainer

SEED = 42  # the default of train.py


def test_gpt2_is_trained_as_by_the_command(base, book, tmp_path):
    text = Windows(token_parts(book)[0].numpy(), BLOCK, BLOCK)
    torch.manual_seed(SEED)
    model = inject(load_gpt2(base), LoRAConfig(target_modules=["c_attn"], lora_dropout=0.05))
    set_kernels(model, "fast")
    trainer = make_trainer(model.train())
    steps = list(batches(text, size=8, epochs=2, seed=SEED))
    losses = []
    for step, batch in enumerate(steps):
        loss, _ = train_step(trainer, batch, learning_rate(step, len(steps), 3e-3, 0.06))
        losses.append(loss.item() / batch.num_tokens)

    run = trained("lora", base, book, tmp_path, "--batch-size", 8, "--epochs", 2, "--lr", 3e-3)
    assert run.column("loss") == losses
    saved = load_file(tmp_path / WEIGHTS["lora"])  # the last epoch is the best
    here = adapter_state_dict(model)
    assert all(torch.equal(saved[name], tensor) for name, tensor in here.items())


def test_any_module_with_a_loss_is_trained_as_by_a_plain_loop():
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        return inject(model, LoRAConfig(r=2, target_modules=["0", "2"], lora_dropout=0))

    inputs = torch.randn(4, 5, 6)
    targets = torch.randint(3, (4, 5))
    here = make()

    def loss(x, y):
        return F.cross_entropy(here(x), y, reduction="sum")

    trainer = make_trainer(here, loss, clip=0.1)
    for x, y in zip(inputs, targets, strict=True):
        halves = [(x[:2], y[:2]), (x[2:], y[2:])]  # accumulated, and weighted by targets
        train_step(trainer, Batch(halves, len(y)), lr=0.01)

    there = make()
    parameters = list(trained_parameters(there).values())
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.01)
    for x, y in zip(inputs, targets, strict=True):
        optimizer.zero_grad()
        F.cross_entropy(there(x), y).backward()
        nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()
    for name, parameter in trained_parameters(here).items():
        torch.testing.assert_close(parameter, dict(there.named_parameters())[name])
    assert here[0].lora_B.weight.any()
