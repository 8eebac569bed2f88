# %% [markdown]
# # LoRA from scratch
#
# The layer built from scratch, put into a small GPT-2, trained for 30 steps, inspected, merged, and
# compared with PEFT. On a CPU it takes a minute. This notebook is made from `lora_from_scratch.py`
# (`python -m lesson.notebook.make`); the explanations are in `docs/lora.md`.

# %%
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# The GPT-2, its tokenizer and the book are the project's, whose root is here or above.
here_and_above = (Path.cwd(), *Path.cwd().parents)
root = next(path for path in here_and_above if (path / "train.py").exists())
sys.path.insert(0, str(root))

from data.tokens import load_books
from data.windows import Windows, split
from model.hub import find_base
from model.sampling import generate
from model.tokenizer_files import load_tokenizer
from model.weights import load_gpt2

torch.manual_seed(0)

# %% [markdown]
# ## The layer
#
# $y = W x + b + \frac{\alpha}{r} B A x$, with $W$ and $b$ frozen. $A$ narrows to $r$ numbers,
# $B$ widens again. $B$ starts at zero, so that a new adapter changes nothing.


# %%
class LoRA(nn.Module):
    def __init__(self, base: nn.Linear, r: int = 8, alpha: float = 16):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scaling = alpha / r
        bound = 1 / math.sqrt(base.in_features)
        self.A = nn.Parameter(torch.empty(r, base.in_features).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(base.out_features, r))

    def forward(self, x):  # (..., in) -> (..., out)
        return self.base(x) + self.scaling * (x @ self.A.T) @ self.B.T


# %% [markdown]
# ## Into GPT-2
#
# `mini` is a GPT-2 of 6 layers that comes with the project. Freeze all of it, and wrap each block's
# `c_attn`, the projection to q, k and v.

# %%
directory = find_base("mini")[1]
model = load_gpt2(directory).eval()
ids = torch.randint(model.config.vocab_size, (2, 64))
base_logits = model(ids).detach()

model.requires_grad_(False)
layers = {}
for name, module in list(model.named_modules()):
    if isinstance(module, nn.Linear) and name.endswith(".c_attn"):
        layers[name] = LoRA(module)
        model.set_submodule(name, layers[name])

trained = [p for p in model.parameters() if p.requires_grad]
count = sum(p.numel() for p in trained)
total = sum(p.numel() for p in model.parameters())
print(f"trained: {count:,} of {total:,} parameters")
print("a new adapter changes no logit:", torch.equal(model(ids), base_logits))

# %% [markdown]
# ## The book
#
# Windows of 64 tokens. Each position is scored on the token after it, so the targets are the inputs
# one token later. The last tenth of the book is the validation part.

# %%
tokenizer = load_tokenizer(directory, model.config.vocab_size)
book = load_books([root / "data" / "book.txt"], tokenizer)
training_part, validation_part = split(book, 0.1)
windows = Windows(training_part, block_size=64, stride=64)
validation = Windows(validation_part, block_size=64, stride=64)


def loss_on(inputs, targets):  # (B, T) each
    logits = model(inputs)  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # ignores -100: padding


@torch.no_grad()
def perplexity():
    """Return the validation part's, nearly: the last batch is smaller but counts as much."""
    losses = [loss_on(*batch).item() for batch in validation.evaluation_batches()]
    return math.exp(sum(losses) / len(losses))


def words(tokens):
    return [tokenizer.bytes_of[token].decode() for token in tokens.tolist()]


before = perplexity()
inputs, targets = windows.batch(np.arange(2))
print("inputs: ", words(inputs[0, :10]))
print("targets:", words(targets[0, :10]))
print(f"the base's perplexity: {before:.1f}")

# %% [markdown]
# ## The first gradient
#
# With $G = \partial L / \partial W$: $\; dB = s\, G A^T$ and $dA = s\, B^T G$. $B$ is zero, so
# that $A$'s first gradient is zero, and only $B$ moves.

# %%
loss_on(inputs, targets).backward()
first_gradients = {}
for matrix in ("A", "B"):
    norms = [getattr(layer, matrix).grad.norm().item() for layer in layers.values()]
    first_gradients[matrix] = math.hypot(*norms)
print("norms of the first gradients:", first_gradients)

# %% [markdown]
# ## Thirty steps
#
# The loop of `train.py`, without mixed precision, schedule, clipping and dropout.

# %%
optimizer = torch.optim.AdamW(trained, lr=1e-2)
batches = windows.epoch_order(seed=0, epoch=0)[: 30 * 8].reshape(30, 8)
for step, batch in enumerate(batches):
    loss = loss_on(*windows.batch(batch))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 5 == 0:
        print(f"step {step:2}: loss {loss.item():.3f}")
after = perplexity()
print(f"perplexity: {before:.1f} -> {after:.1f}")

# %% [markdown]
# ## What was learnt
#
# $B A$ is a matrix of $W$'s shape, (768, 256), and has rank 8: the other singular values are
# zero, but for rounding.

# %%
first = layers["h.0.attn.c_attn"]
update = (first.scaling * first.B @ first.A).detach()
spectrum = torch.linalg.svdvals(update)
for i, value in enumerate(spectrum[:10].tolist(), 1):
    bar = "#" * round(60 * value / spectrum[0].item())
    print(f"{i:2} {value:8.4f} {bar}")

# %% [markdown]
# ## What it writes
#
# The base and the adapted model go on from the same words, with the same random numbers.


# %%
def write(gpt2, prompt="You climb the stair and"):
    start = torch.from_numpy(tokenizer.encode(prompt).astype("int64"))
    drawn = generate(gpt2, start, 40, generator=torch.Generator().manual_seed(1), top_k=50)
    return prompt + b"".join(tokenizer.bytes_of[token] for token in drawn).decode(errors="replace")


print("base:   ", write(load_gpt2(directory)))
print("adapted:", write(model))

# %% [markdown]
# ## Merge
#
# $W + s B A$ is a matrix like $W$: the merged model is a plain GPT-2 again.

# %%
with torch.no_grad():
    adapted_logits = model(ids)
    for name, layer in layers.items():
        layer.base.weight += layer.scaling * layer.B @ layer.A
        model.set_submodule(name, layer.base)
    merged_logits = model(ids)
print("the adapter changed the logits by up to", (adapted_logits - base_logits).abs().max().item())
print("merging changed them by up to", (merged_logits - adapted_logits).abs().max().item())

# %% [markdown]
# ## The same in PEFT
#
# If `peft` is installed: its model, on the same base, with our A and B in place of its own.

# %%
try:
    import peft
    import transformers
except ImportError:
    print("not installed: make setup")
else:
    base = transformers.GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True)
    theirs = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, layer in layers.items():
            full_name = f"base_model.model.transformer.{name}"
            theirs.get_parameter(f"{full_name}.lora_A.default.weight").copy_(layer.A)
            theirs.get_parameter(f"{full_name}.lora_B.default.weight").copy_(layer.B)
        peft_difference = (theirs(ids).logits - adapted_logits).abs().max().item()
    print("PEFT's logits differ from ours by up to", peft_difference)
