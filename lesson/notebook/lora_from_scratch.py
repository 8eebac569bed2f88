# %% [markdown]
# # LoRA from scratch
#
# This notebook is for readers who know PyTorch, and have read [the one page](../../one_page.py) and
# [LoRA in ten minutes](../../docs/lora.md). It runs what that page describes. We fine-tune a
# language model on a book, look at the change of the weights, and find that most of the change is
# not needed. This leads to LoRA. We build LoRA, get it wrong in five ways, get it right, and
# compare it with Hugging Face's PEFT.
#
# All cells took about two minutes of one thread of an Intel Xeon. On another processor, the last
# digits of the stored outputs differ, and the runs that diverge differ more.
#
# On a hosted notebook service, put the address of the project's git repository into the next cell.
# On your own machine, run the next cell unchanged. It does nothing there.

# %%
import subprocess
import sys
from pathlib import Path

REPOSITORY = ""  # what you would give to `git clone`

root = next((p for p in (Path.cwd(), *Path.cwd().parents) if (p / "train.py").exists()), None)
if root is None:
    assert REPOSITORY, "put the address of the project's git repository into REPOSITORY"
    root = Path("gpt2-lora").resolve()
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", REPOSITORY, root], check=True)
    needed = f"{root}[commands,plots,hub]"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", needed], check=True)
sys.path.insert(0, str(root))

# %%
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.figures import BASE, FULL, LORA, STYLE
from data.tokenizer import load_tokenizer
from data.tokens import load_books
from data.windows import Windows, split
from lesson.figures import RANDOM, name_line
from model.sampling import generate
from storage.hub import find_base
from storage.weights import load_gpt2

STEPS = 60  # of each training run
plt.rcParams.update(STYLE)

# %% [markdown]
# ## 1. A model and a book
#
# The *base* is the model that we adapt. Here it is `mini`, a GPT-2 of 6.9 million parameters that
# comes with this project and has not seen the book. We cut the book into windows of 128
# tokens. The model predicts each token from the tokens before it, so one window gives 128
# predictions in one pass.
#
# We never train on the last tenth of the book, the validation part, so its *perplexity* shows what
# the model learned and not what it memorised. At a perplexity of 50, the model is as unsure as if
# it guessed among 50 equally likely tokens.

# %%
directory = find_base("mini")[1]
base = load_gpt2(directory)
tokenizer = load_tokenizer(directory, base.config.vocab_size)
training_part, validation_part = split(load_books([root / "data/book.txt"], tokenizer).ids, 0.1)
windows = Windows(training_part, block_size=128, stride=128)
validation = Windows(validation_part, block_size=128, stride=128)


def loss_on(model, batch, reduction="mean"):
    inputs, targets = batch  # (B, T) each
    logits = model(inputs)  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


@torch.no_grad()
def perplexity(model):
    losses = [loss_on(model, batch, "sum").item() for batch in validation.evaluation_batches(16)]
    return math.exp(sum(losses) / (len(validation_part) - 1))  # its first token is not predicted


inputs, targets = windows.inputs_and_targets(np.arange(1))
for name, ids in (("read", inputs), ("predict", targets)):
    print(f"{name:8}", [tokenizer.decode([i]) for i in ids[0, :9]])
base_perplexity = perplexity(base)
print(f"perplexity of the base: {base_perplexity:.1f}")

# %% [markdown]
# The base knows little about this book: it guesses among more than fifty tokens.

# %% [markdown]
# ## 2. Fine-tune it
#
# Each of `mini`'s 6 blocks has four weight matrices. `c_attn` makes queries, keys and values, the
# attention's `c_proj` mixes the results of the heads, and the MLP has `c_fc` and another `c_proj`.
# We train these 24 matrices and freeze embeddings, norms and biases, because LoRA will adapt the
# same matrices. In this notebook, *full fine-tuning* means training these matrices. The loop is
# plain: AdamW, 4 windows per step, and a learning rate that falls to zero.

# %%
epochs = [windows.epoch_order(seed=0, epoch=epoch) for epoch in range(2)]
batches = np.concatenate(epochs)[: 4 * STEPS].reshape(STEPS, 4)


def train(model, lr, steps=STEPS):
    """Return the loss before each step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        loss = loss_on(model, windows.inputs_and_targets(batches[step]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def matrices(model):
    return {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear)}


full = load_gpt2(directory).requires_grad_(False)
for weight in matrices(full).values():
    weight.requires_grad_(True)
full_losses = train(full, lr=7e-4)
full_perplexity = perplexity(full)
trained_by_full = sum(weight.numel() for weight in matrices(full).values())
print(f"trained: {trained_by_full:,} numbers in {len(matrices(full))} matrices")
print(f"perplexity: {base_perplexity:.1f} -> {full_perplexity:.1f}")

# %% [markdown]
# Full fine-tuning works, but it is expensive, because every trained number needs a gradient and two
# more numbers for AdamW. Every book also needs a file as large as the model. Could we train less?

# %% [markdown]
# ## 3. What changed?
#
# Training changed each matrix from $W$ to $W + \Delta W$. The *singular value decomposition* writes
# $\Delta W$ as a sum of simple matrices, the largest first. Each term is a column times a row,
# $\sigma_k u_k v_k^T$. It reads one direction of the input, $v_k$, and writes one direction of the
# output, $u_k$. The *singular value* $\sigma_k$ is the size of the term, and the *rank* of a matrix
# is the number of terms that the matrix needs.
#
# If $\Delta W$ were random, no term would matter much more than its neighbours. So we draw a random
# matrix of the same size beside it.

# %%
with torch.no_grad():
    before = matrices(base)
    changes = {name: weight - before[name] for name, weight in matrices(full).items()}
svds = {name: torch.linalg.svd(change, full_matrices=False) for name, change in changes.items()}

one = changes["h.0.attn.c_attn"]
noise = torch.randn_like(one)
noise *= one.norm() / noise.norm()
plt.figure(figsize=(6.4, 3))
for matrix, name, k, colour in (
    (one, "the change", 12, FULL),
    (noise, "a random matrix of its size", 100, RANDOM),
):
    values = torch.linalg.svdvals(matrix)
    share = values[:8].square().sum() / values.square().sum()
    print(f"{name}: the first 8 of 256 terms contain {share:.0%} of the squared norm")
    plt.plot(range(1, 257), values, color=colour)
    name_line(plt.gca(), name, (k, values[k]), colour, offset=(6, 8))
plt.title("Singular values of the change of the first c_attn")
plt.xlabel("k")
plt.show()

# %% [markdown]
# A few terms are much larger than the other terms, so the change is far from random. If the small
# terms do not matter, then we need not learn them.

# %% [markdown]
# ## 4. Cut it
#
# Which terms does the model need? Keep only the $k$ largest terms of each of the 24 changes.

# %%
cut = load_gpt2(directory).requires_grad_(False)
kept = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256]
after_cut = []
for k in kept:
    for name, weight in matrices(cut).items():
        u, s, v = svds[name]
        weight.copy_(before[name] + (u[:, :k] * s[:k]) @ v[:k])
    after_cut.append(perplexity(cut))
    print(f"rank {k:3}: perplexity {after_cut[-1]:.1f}")

plt.figure(figsize=(6.4, 3))
plt.plot([str(k) for k in kept], after_cut, "o-", color=FULL)
plt.title("Perplexity with each change cut to rank k")
plt.xlabel("k")
plt.show()

# %% [markdown]
# Rank 256 is the whole change, and rank 0 is the base. Rank 8 keeps most of the gain, with a
# fraction of the numbers. But we had to train all numbers before we could cut.

# %% [markdown]
# ## 5. Train eight terms from the start
#
# So begin with eight terms. Eight columns times eight rows are a product $B A$, with $B$ (out, 8)
# and $A$ (8, in). Freeze $W$, and train $A$ and $B$ instead of $\Delta W$:
#
# $$y = W x + b + s B A x, \qquad s = \frac{\alpha}{r}$$
#
# $r$ is the rank. $\alpha$ is a constant, the subject of section 10.


# %%
class LoRALinear(nn.Module):
    def __init__(self, base_layer, r=8, alpha=16):
        super().__init__()
        self.base_layer = base_layer  # W and b, frozen
        self.scaling = alpha / r
        bound = 1 / math.sqrt(base_layer.in_features)
        self.lora_A = nn.Parameter(torch.empty(r, base_layer.in_features).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(base_layer.out_features, r))

    def forward(self, x):  # (..., in) -> (..., r) -> (..., out)
        return self.base_layer(x) + self.scaling * (x @ self.lora_A.T) @ self.lora_B.T


def adapted(alpha=16):
    """Return the base, frozen, with a LoRA layer around each of the 24 matrices, and the layers."""
    torch.manual_seed(0)
    model = load_gpt2(directory).requires_grad_(False)
    layers = {name: LoRALinear(model.get_submodule(name), alpha=alpha) for name in matrices(model)}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return model, layers


model, layers = adapted()
trained_by_lora = sum(p.numel() for p in model.parameters() if p.requires_grad)
print(layers["h.0.attn.c_attn"])
print(f"trained: {trained_by_lora:,} numbers in place of {trained_by_full:,}")

# %% [markdown]
# LoRA trains a twenty-fourth of the numbers. How should A and B start?

# %% [markdown]
# ## 6. Both zero: stuck
#
# With $A = B = 0$, the new layers change nothing, which sounds safe. Train for ten steps, and score
# the base on the same windows.

# %%
with torch.no_grad():
    base_losses = [
        loss_on(base, windows.inputs_and_targets(batch)).item() for batch in batches[: STEPS // 6]
    ]

zero_model, zero_layers = adapted()
for layer in zero_layers.values():
    nn.init.zeros_(layer.lora_A)
zero_losses = train(zero_model, lr=7e-4, steps=STEPS // 6)
print("the base:  ", [round(loss, 4) for loss in base_losses])
print("both zero: ", [round(loss, 4) for loss in zero_losses])
gradients = [p.grad for layer in zero_layers.values() for p in (layer.lora_A, layer.lora_B)]
print("largest gradient:", max(gradient.abs().max().item() for gradient in gradients))

# %% [markdown]
# Nothing ever moves, because the gradient of $B$ contains $A x$, which is zero, and the gradient of
# $A$ contains $B$, which is also zero.

# %% [markdown]
# ## 7. Both random: damaged
#
# Then let neither be zero. Draw $B$ as PyTorch would draw it.

# %%
random_model, random_layers = adapted()
for layer in random_layers.values():
    nn.init.kaiming_uniform_(layer.lora_B, a=math.sqrt(5))
random_losses = train(random_model, lr=7e-4, steps=STEPS // 6)
print("the base:    ", [round(loss, 2) for loss in base_losses])
print("both random: ", [round(loss, 2) for loss in random_losses])

# %% [markdown]
# The first loss is far above the loss of the base, because random changes of all 24 matrices
# damaged the model. Ten steps do not repair it.

# %% [markdown]
# ## 8. A random, B zero: LoRA
#
# If one factor is zero, the layer changes nothing. If the other factor is random, the zero factor
# gets a gradient, so training can start. Our class already starts with a random A and a zero B.

# %%
lora_losses = train(model, lr=7e-4, steps=STEPS // 6)
print("the base:        ", [round(loss, 2) for loss in base_losses])
print("A random, B zero:", [round(loss, 2) for loss in lora_losses])

plt.figure(figsize=(6.4, 3))
for losses, name, colour in (
    (random_losses, "both random", RANDOM),
    (zero_losses, "both zero", BASE),
    (lora_losses, "A random, B zero", LORA),
):
    gained = np.array(losses) - np.array(base_losses)
    plt.plot(gained, ".-", color=colour)
    name_line(plt.gca(), name, (len(gained) - 1, gained[-1]), colour)
plt.title("Training loss, less the base's on the same windows")
plt.xlabel("steps taken")
plt.show()

# %% [markdown]
# The loss starts exactly at the loss of the base, and falls.

# %% [markdown]
# ## 9. Full fine-tuning's rate: slow
#
# Train for all steps, at the learning rate that was right for full fine-tuning.

# %%
slow_model, _ = adapted()
slow_losses = train(slow_model, lr=7e-4)
slow_perplexity = perplexity(slow_model)
print(f"full fine-tuning: {full_perplexity:.1f}; LoRA at the same rate: {slow_perplexity:.1f}")

# %% [markdown]
# The result is poor. But rank 8 is not the reason, because the full change, cut to rank 8, had
# learned far more. LoRA moves too slowly.

# %% [markdown]
# ## 10. The wrong alpha: broken
#
# The update is multiplied by $s = \alpha / r$. To move it further, raise $\alpha$ from 16 to 2048.

# %%
loud_model, _ = adapted(alpha=2048)
train(loud_model, lr=7e-4)
loud_perplexity = perplexity(loud_model)
print(f"alpha 2048: {loud_perplexity:.1f}; the base: {base_perplexity:.1f}")

# %% [markdown]
# This $\alpha$ is far too large. With AdamW, $\alpha$ works as a second learning rate for $B$,
# because AdamW moves each number of $B$ by about the rate, and $s$ multiplies the move. One
# learning rate is easier to tune than two, so leave $\alpha$ at 16.

# %% [markdown]
# ## 11. The right rate
#
# Why is the rate of full fine-tuning too low? A first step of AdamW moves each trained number by
# the rate. Full fine-tuning moves the numbers of $W$. LoRA moves the numbers of $B$, and the change
# of $W$ is this move times the small numbers in $A$.

# %%
step_model, step_layers = adapted()
train(step_model, lr=1.0, steps=1)
layer = step_layers["h.0.attn.c_attn"]
first_move = (layer.scaling * layer.lora_B @ layer.lora_A).square().mean().sqrt().item()
print(f"a first step moves a weight of W by lr in full fine-tuning, by {first_move:.2f} lr in LoRA")

tuned_model, tuned_layers = adapted()
tuned_losses = train(tuned_model, lr=8e-3)
tuned_perplexity = perplexity(tuned_model)
fast_model, _ = adapted()
train(fast_model, lr=3e-2)
fast_perplexity = perplexity(fast_model)
print(f"lr 7e-4: {slow_perplexity:.1f}; 8e-3: {tuned_perplexity:.1f}; 3e-2: {fast_perplexity:.1f}")

runs = (
    ("full, 7e-4", full_losses, FULL, "-"),
    ("LoRA, 7e-4", slow_losses, LORA, ":"),
    ("LoRA, 8e-3", tuned_losses, LORA, "-"),
)
plt.figure(figsize=(6.4, 3.4))
for name, losses, colour, line in runs:
    smooth = np.convolve(losses, np.ones(5) / 5, "valid")  # the mean of five steps
    plt.plot(smooth, line, color=colour)
    name_line(plt.gca(), name, (len(smooth) - 1, smooth[-1]), colour)
plt.title("Training loss, by method and rate")
plt.xlabel("steps taken")
plt.show()

# %% [markdown]
# At eleven times the rate, LoRA learns more than the cut to rank 8 kept: training finds eight
# better terms. A rate nearly four times higher is too fast, and worse than no training.

# %% [markdown]
# ## 12. Texts of the model
#
# The base and the adapted model continue the same words. They use the same random numbers, so that
# only the adapter makes a difference.


# %%
def write(model, prompt="You climb the stair and"):
    start = torch.from_numpy(tokenizer.encode(prompt).astype("int64"))
    drawn = generate(model, start, 40, generator=torch.Generator().manual_seed(1), top_k=50)
    return prompt + tokenizer.decode(drawn)


before_text = write(base)
after_text = write(tuned_model)
print("BEFORE:", before_text)
print("AFTER: ", after_text)

# %% [markdown]
# Texts of such a small model make little sense, but they have the book's voice: "you", in the
# present tense.

# %% [markdown]
# ## 13. The change that LoRA learned
#
# These are the singular values of LoRA's change of the matrix in section 3.

# %%
layer = tuned_layers["h.0.attn.c_attn"]
learned = torch.linalg.svdvals((layer.scaling * layer.lora_B @ layer.lora_A).detach())
plt.figure(figsize=(6.4, 3))
for values, name, k, colour in (
    (torch.linalg.svdvals(one), "full fine-tuning's change", 10, FULL),
    (learned, "LoRA's", 4, LORA),
):
    plt.plot(range(1, 33), values[:32], ".-", color=colour)
    name_line(plt.gca(), name, (k + 1, values[k]), colour, offset=(6, 8))
plt.title("Singular values of the change of the first c_attn")
plt.xlabel("k")
plt.show()

# %% [markdown]
# Eight values are large, because $B A$ has rank 8 at most. The other values are zero, up to
# rounding.

# %% [markdown]
# ## 14. Merge
#
# Is a LoRA model slower to use? It need not be. $W + s B A$ is a matrix like $W$, so add the update
# to $W$, and remove the wrapper.

# %%
ids = inputs[:, :32]
with torch.no_grad():
    base_logits = base(ids)
    adapted_logits = tuned_model(ids)
    for name, layer in tuned_layers.items():
        layer.base_layer.weight += layer.scaling * layer.lora_B @ layer.lora_A
        tuned_model.set_submodule(name, layer.base_layer)
    merged_logits = tuned_model(ids)
print("the adapter changed the logits by up to", (adapted_logits - base_logits).abs().max().item())
print("merging changed them by up to", (merged_logits - adapted_logits).abs().max().item())
print(f"perplexity, merged: {perplexity(tuned_model):.1f}")

# %% [markdown]
# The merged model is a plain GPT-2, as fast as the base, with the outputs of the adapted model.

# %% [markdown]
# ## 15. The same with this project
#
# `inject` adds LoRA to the linear layers of a PyTorch model. Its layers also have dropout, mixed
# precision and files that PEFT reads. Copy our A and B into these layers:

# %%
from lora import LoRAConfig, inject, lora_layers

ours = load_gpt2(directory)
inject(ours, LoRAConfig(r=8, lora_alpha=16, lora_dropout=0, target_modules="all-linear"))
with torch.no_grad():
    for name, injected in lora_layers(ours).items():
        injected.lora_A.weight.copy_(tuned_layers[name].lora_A)
        injected.lora_B.weight.copy_(tuned_layers[name].lora_B)
    our_difference = (ours(ids) - adapted_logits).abs().max().item()
print("logits differ by up to", our_difference)

# %% [markdown]
# `inject` gives the same model. To train a new adapter with the step of `train.py`, which clips
# gradients and also works in mixed precision, make a `Trainer`:

# %%
from data.windows import batches as epoch_of_batches
from train import train_step
from training.trainer import make_trainer

model = inject(load_gpt2(directory), LoRAConfig(target_modules="all-linear"))
trainer = make_trainer(model)
for batch in epoch_of_batches(windows, size=4):
    train_step(trainer, batch, lr=4e-3)
print(f"perplexity: {perplexity(model.eval()):.1f}")

# %% [markdown]
# ## 16. The same in PEFT
#
# PEFT, Hugging Face's library, gets the same A and B. (The cell needs `peft` and `transformers`.)

# %%
try:
    import peft
    import transformers
except ImportError:
    print("not installed: pip install peft transformers")
else:
    gpt2 = transformers.GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32)
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True
    )
    theirs = peft.get_peft_model(gpt2, config).eval()
    with torch.no_grad():
        for name, layer in tuned_layers.items():
            full_name = f"base_model.model.transformer.{name}"
            theirs.get_parameter(f"{full_name}.lora_A.default.weight").copy_(layer.lora_A)
            theirs.get_parameter(f"{full_name}.lora_B.default.weight").copy_(layer.lora_B)
        peft_difference = (theirs(ids).logits - adapted_logits).abs().max().item()
    print("logits differ by up to", peft_difference)

# %% [markdown]
# Our class of ten lines has the same outputs as PEFT.

# %% [markdown]
# ## 17. On a model of your own
#
# This program trains an adapter for a model of transformers, and merges the adapter. The program is
# a text and not a cell, because it downloads a model.
#
# ```python
# import torch
# from peft import PeftModel
# from transformers import AutoModelForCausalLM, AutoTokenizer
#
# from lora import LoRAConfig, inject, load_adapter, merge, save_adapter, unwrap
#
# name = "HuggingFaceTB/SmolLM2-135M-Instruct"  # on the hub, or a directory
# steps, batch_size, block_size, peak = 40, 8, 128, 2e-3
# device = "cuda" if torch.cuda.is_available() else "cpu"
# tokenizer = AutoTokenizer.from_pretrained(name)
# model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
# ids = tokenizer(open("data/book.txt").read(), return_tensors="pt").input_ids[0]
# windows = ids[: len(ids) // block_size * block_size].view(-1, block_size)  # (N, T)
#
# inject(model, LoRAConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear"))
# trained = [p for p in model.parameters() if p.requires_grad]  # A and B
# optimizer = torch.optim.AdamW(trained, lr=peak, weight_decay=0.01)
# schedule = torch.optim.lr_scheduler.OneCycleLR(
#     optimizer, peak, steps, pct_start=0.1, cycle_momentum=False
# )
# model.train()
# for step in range(steps):
#     batch = windows[torch.randint(len(windows), (batch_size,))].to(device)  # (B, T)
#     with torch.autocast(device, torch.bfloat16):
#         loss = model(input_ids=batch, labels=batch).loss  # it shifts the labels itself
#     optimizer.zero_grad()
#     loss.backward()
#     torch.nn.utils.clip_grad_norm_(trained, 1.0)
#     optimizer.step()
#     schedule.step()  # a warm-up of 4 steps, then a cosine
#     print(f"step {step + 1}: loss {loss.item():.4f}")
# save_adapter(model, "adapter", name)  # two files in PEFT's format
#
# base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
# in_peft = PeftModel.from_pretrained(base, "adapter")  # stock PEFT reads them
#
# model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
# load_adapter(model, "adapter")  # so does this project
# merge(model)  # W + s B A
# unwrap(model)  # a plain model again, which transformers can save
# model.save_pretrained("merged")
# tokenizer.save_pretrained("merged")
# ```
#
# [Real weights](../../docs/real-weights.md) explains this program, and has the results of a similar
# command. Read next: [one training step](../../docs/training.md), [LoRA in
# depth](../../docs/lora-in-depth.md), the [exercises](../../docs/exercises.md), and the
# [findings](../../docs/findings.md).
