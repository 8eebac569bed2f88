# %% [markdown]
# # LoRA from scratch
#
# This notebook is for readers who know PyTorch, and have read [LoRA in ten
# minutes](../../docs/lora.md). It imports [the one page](../../one_page.py), which adapts GPT-2 to
# a book, and looks into it: the shapes of A and B, their start, the update that they learn, and
# merging. All cells take about a minute of one processor core. On another processor, the last
# digits of the stored outputs differ.
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
import tempfile

import matplotlib.pyplot as plt
import torch
from torch import nn

import one_page
from common.figures import LORA, STYLE
from data.tokenizer import load_tokenizer
from one_page import LoRALinear, evaluate, load_gpt2

plt.rcParams.update(STYLE)

# %% [markdown]
# ## 1. The base and the book
#
# The *base* is the model that we adapt. Here it is `mini`, a GPT-2 of 6.9 million parameters that
# comes with this project and has not seen the book. The model never trains on the last tenth of the
# book, so the *perplexity* on this tenth shows what it learned and not what it memorised. At a
# perplexity of 50, a model is as unsure as if it guessed among 50 equally likely tokens.

# %%
directory = root / "model/mini"
base = load_gpt2(directory).to(one_page.DEVICE)
tokenizer = load_tokenizer(directory, base.wte.num_embeddings)
ids = tokenizer.encode((root / "data/book.txt").read_text("utf-8")).astype("int64")
tokens = torch.from_numpy(ids).to(one_page.DEVICE)
cut = len(tokens) - len(tokens) // 10
training, validation = tokens[:cut], tokens[cut:]


def perplexity(model):
    return math.exp(evaluate(model, validation))


base_perplexity = perplexity(base)
print(f"{len(training):,} tokens to train on, {len(validation):,} to validate on")
print(f"perplexity of the base: {base_perplexity:.1f}")

# %% [markdown]
# ## 2. One layer
#
# LoRA leaves a weight $W$ (out, in) as it is, and adds the product of two thin matrices, $B$ (out,
# r) and $A$ (r, in):
#
# $$y = W x + b + s B A x, \qquad s = \frac{\alpha}{r}$$

# %%
torch.manual_seed(0)
linear = load_gpt2(directory).requires_grad_(False).h[0].attn.c_attn
layer = LoRALinear(linear)
for name, parameter in layer.named_parameters():
    state = "trained" if parameter.requires_grad else "frozen"
    print(f"{name:18} {tuple(parameter.shape)!s:12} {parameter.numel():8,} {state}")
print(f"s = {one_page.ALPHA} / {one_page.R} = {layer.scaling}")

# %% [markdown]
# $A$ and $B$ have far fewer numbers than $W$. Now look at their start: $A$ is random, and $B$ is
# zero. So $B A = 0$, and the new layer has exactly the output of the old layer.

# %%
A, B = layer.lora_A.weight, layer.lora_B.weight
print(f"A is between {A.min():.4f} and {A.max():.4f}: 1 / sqrt(in) = {1 / linear.in_features**0.5}")
print("B is zero:", not B.any())
x = torch.randn(4, linear.in_features)
layer.eval()
starts_as_the_base = torch.equal(layer(x), linear(x))
print("the output is the old output:", starts_as_the_base)

# %% [markdown]
# How can $B$ leave zero? Its gradient contains $A x$, which is not zero. The gradient of $A$
# contains $B$, so in the first step, only $B$ moves.

# %%
layer(x).square().mean().backward()
first_gradients = A.grad.norm().item(), B.grad.norm().item()
print("norm of the gradient: A {:.4f}, B {:.4f}".format(*first_gradients))

# %% [markdown]
# If both began at zero, neither would ever move. And if both were random, the layer would change
# the model before the first step. Try it: start $B$ as PyTorch starts a linear layer.


# %%
def adapted(targets=("c_attn", "c_proj", "c_fc")):
    """Return the base, frozen, with a LoRA layer round each target, as the one page does."""
    torch.manual_seed(0)
    model = load_gpt2(directory).requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets:
            model.set_submodule(name, LoRALinear(module))
    return model.to(one_page.DEVICE)


def lora_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


damaged = adapted()
for lora in lora_layers(damaged).values():
    lora.lora_B.reset_parameters()
damaged_perplexity = perplexity(damaged)
new_perplexity = perplexity(adapted())
print(f"perplexity with B = 0: {new_perplexity:.1f}; both random: {damaged_perplexity:.1f}")

# %% [markdown]
# ## 3. Train
#
# The one page has a training loop, so we only change its settings: small batches, windows without
# overlap, and one epoch at a rate that suits this book. `train` also saves the adapter.

# %%
one_page.TARGETS = ("c_attn", "c_proj", "c_fc")
one_page.STRIDE, one_page.BATCH, one_page.EPOCHS, one_page.PEAK_LR = 128, 2, 1, 4e-3
one_page.OUT = Path(tempfile.mkdtemp()) / "adapter"

model = adapted()
trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
print(f"{len(lora_layers(model))} layers, {trained:,} trained numbers")
one_page.train(model, training, validation)
one_page.report("base", base, validation, tokenizer)
one_page.report("adapter", model, validation, tokenizer)

# %% [markdown]
# Texts of such a small model make little sense, but the second has the voice of the book: "you", in
# the present tense.

# %% [markdown]
# ## 4. What did it learn?
#
# The update of a layer is $\Delta W = s B A$, a matrix as large as $W$. The *singular value
# decomposition* writes it as a sum of terms $\sigma_k u_k v_k^T$, the largest first. A term reads
# one direction of the input, $v_k$, and writes one direction of the output, $u_k$. The *rank* of a
# matrix is how many terms it needs.


# %%
@torch.no_grad()
def update(layer):
    return layer.scaling * layer.lora_B.weight @ layer.lora_A.weight


updates = {name: update(layer) for name, layer in lora_layers(model).items()}
one = updates["h.0.attn.c_attn"]
values = torch.linalg.svdvals(one)
print(f"the update is {tuple(one.shape)}; its first singular values:")
print([round(value, 4) for value in values[:10].tolist()])

plt.figure(figsize=(6.4, 3))
plt.plot(range(1, 21), values[:20].cpu(), "o-", color=LORA)
plt.title("Singular values of the update of the first c_attn")
plt.xlabel("number of the singular value")
plt.xticks(range(1, 21))
plt.show()

# %% [markdown]
# Eight values are not zero, because $B A$ has at most rank $r = 8$. Are all eight needed? Keep only
# the $k$ largest terms in each layer, and score the model again.

# %%
svds = {name: torch.linalg.svd(change, full_matrices=False) for name, change in updates.items()}
cut_perplexities = []
for k in (0, 1, 2, 4, 8):
    cut_model = load_gpt2(directory).requires_grad_(False).to(one_page.DEVICE)
    for name, (u, s, vh) in svds.items():
        cut_model.get_parameter(f"{name}.weight").add_((u[:, :k] * s[:k]) @ vh[:k])
    cut_perplexities.append(perplexity(cut_model))
    print(f"rank {k}: perplexity {cut_perplexities[-1]:.1f}")

# %% [markdown]
# Rank 0 is the base. A few terms have most of the gain, which is why a low rank is enough.

# %% [markdown]
# ## 5. Merge
#
# Is a model with LoRA slower to use? It need not be. $W + s B A$ is a matrix like $W$, so add the
# update to $W$, and remove the wrapper. The merged model is a plain GPT-2 with the same logits.

# %%
window = validation[None, :32]
model.eval()
with torch.no_grad():
    base_logits, adapted_logits = base(window), model(window)
    for name, layer in lora_layers(model).items():
        layer.base_layer.weight += updates[name]
        model.set_submodule(name, layer.base_layer)
    merged_logits = model(window)
print("the adapter changed the logits by up to", (adapted_logits - base_logits).abs().max().item())
print("merging changed them by up to", (merged_logits - adapted_logits).abs().max().item())

# %% [markdown]
# ## 6. The same in PEFT
#
# `train` saved the adapter in the format of PEFT, Hugging Face's library. PEFT loads the file, and
# computes the same logits. (The cell needs `peft` and `transformers`.)

# %%
try:
    import peft
    import transformers
except ImportError:
    print("not installed: pip install peft transformers")
else:
    gpt2 = transformers.GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(gpt2, one_page.OUT).eval().to(one_page.DEVICE)
    with torch.no_grad():
        peft_difference = (theirs(window).logits - adapted_logits).abs().max().item()
    print("logits differ by up to", peft_difference)

# %% [markdown]
# Read next: [one training step](../../docs/training.md), [a model of your
# own](../../docs/real-weights.md), [LoRA in depth](../../docs/lora-in-depth.md), and the
# [exercises](../../docs/exercises.md).
