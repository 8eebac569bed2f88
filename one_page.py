"""LoRA on one page: adapt GPT-2 to a book with `python one_page.py`.

LoRA freezes W (out, in) and learns a change B A of low rank r, with only r (in + out) numbers.
In fp32 on one thread, the losses and the adapter equal those of `train.py lora --kernels plain` and
of a loop with PEFT in every bit (tests/test_one_page.py). The full program adds resuming
(training/resume.py), several processes (common/processes.py), other bases (storage/hub.py), a
base in four bits (lora/quantised.py), fast kernels (model/kernels), and merging (lora/merge.py).

Shapes: B rows (not LoRA's B), T tokens, C = n_embd, H heads of width D = C / H, V vocabulary.
"""

import json
import math
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.tokenizer import load_tokenizer

BASE = Path("model/mini")  # or a directory with the config.json and model.safetensors of GPT-2
BOOK = Path("data/book.txt")
OUT = Path("runs/one-page")
R, ALPHA, DROPOUT = 8, 16, 0.05
BLOCK, STRIDE = 128, 16  # a window of 128 tokens starts at every 16th token of the book
BATCH, EPOCHS = 16, 3  # windows per step. An epoch reads each token 128 / 16 = 8 times
PEAK_LR, WARMUP = 3e-4, 0.06  # WARMUP is the share of steps in which the rate rises
WEIGHT_DECAY, CLIP = 0.01, 1.0  # CLIP is the largest norm of the gradient
SEED = 42
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA and torch.cuda.is_bf16_supported(False) else torch.float16


class LoRALinear(nn.Module):
    """y = W x + b + s B A x with s = alpha / r (Hu et al. 2021, equation 3). Names as in PEFT."""

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer  # W (out, in) and b, frozen
        self.lora_dropout = nn.Dropout(DROPOUT)
        self.lora_A = nn.Linear(base_layer.in_features, R, bias=False)  # A (r, in)
        self.lora_B = nn.Linear(R, base_layer.out_features, bias=False)  # B (out, r)
        self.scaling = ALPHA / R
        # A is uniform in +-1/sqrt(in). This second draw gives PEFT's A. B is 0: no change yet.
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, in) -> (B, T, out)
        return self.base_layer(x) + self.scaling * self.lora_B(self.lora_A(self.lora_dropout(x)))


class Attention(nn.Module):
    """Causal self-attention: each token reads from itself and from earlier tokens."""

    def __init__(self, config: dict):
        super().__init__()
        self.n_head = config["n_head"]
        self.attn_pdrop = config["attn_pdrop"]
        self.c_attn = nn.Linear(config["n_embd"], 3 * config["n_embd"])  # q, k, v side by side
        self.c_proj = nn.Linear(config["n_embd"], config["n_embd"])

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        p = self.attn_pdrop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    """Attention, and then an MLP. Each reads a normed x (B, T, C), and adds its output to x."""

    def __init__(self, config: dict):
        super().__init__()
        C = config["n_embd"]
        self.ln_1 = nn.LayerNorm(C)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(C)
        mlp = {"c_fc": nn.Linear(C, 4 * C), "gelu": nn.GELU("tanh"), "c_proj": nn.Linear(4 * C, C)}
        self.mlp = nn.Sequential(OrderedDict(mlp))
        self.dropout = nn.Dropout(config["resid_pdrop"])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attn(self.ln_1(x)))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class GPT2(nn.Module):
    """GPT-2 (Radford et al. 2019), with the parameter names of the released checkpoint."""

    def __init__(self, config: dict):
        super().__init__()
        self.wte = nn.Embedding(config["vocab_size"], config["n_embd"])  # of tokens
        self.wpe = nn.Embedding(config["n_positions"], config["n_embd"])  # of positions
        self.drop = nn.Dropout(config["embd_pdrop"])
        self.h = nn.ModuleList(Block(config) for _ in range(config["n_layer"]))
        self.ln_f = nn.LayerNorm(config["n_embd"])

    def forward(self, ids: Tensor) -> Tensor:  # (B, T) -> logits (B, T, V)
        x = self.drop(self.wte(ids) + self.wpe.weight[: ids.size(1)])  # (B, T, C)
        for block in self.h:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)  # the head is tied to wte


def load_gpt2(directory: Path) -> GPT2:
    """Load GPT-2 in fp32. Files store a projection as (in, out), and nn.Linear as (out, in)."""
    model = GPT2(json.loads((directory / "config.json").read_text()))
    stored = load_file(directory / "model.safetensors")
    prefix = "transformer." if "transformer.wte.weight" in stored else ""  # none on the hub
    for name, parameter in model.named_parameters():
        weight = stored[prefix + name].float()
        is_projection = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        parameter.data = weight.t() if is_projection else weight  # a view: nothing is copied
    return model


def total_loss(model: GPT2, rows: Tensor) -> Tensor:
    """Return -log p(next token) in nats, summed over all tokens of rows (B, T + 1)."""
    with torch.autocast(DEVICE, DTYPE, enabled=CUDA):  # matmuls in DTYPE, and on a CPU in fp32
        logits = model(rows[:, :-1])  # (B, T, V)
    targets = rows[:, 1:].flatten()  # the target of each token is the next token
    return F.cross_entropy(logits.float().flatten(0, 1), targets, reduction="sum")


@torch.no_grad()
def evaluate(model: GPT2, tokens: Tensor) -> float:
    """Return the mean loss over a text (N,). Each token except the first is scored once."""
    model.eval()
    total = 0.0
    for start in range(0, len(tokens) - 1, BLOCK):  # the last target is the next first input
        total += total_loss(model, tokens[None, start : start + BLOCK + 1]).item()
    return total / (len(tokens) - 1)


def learning_rate(step: int, steps: int) -> float:
    """Return the rate: linear warm-up to the peak, and then half a cosine towards 0."""
    warmup = math.ceil(WARMUP * steps)
    if step < warmup:
        return PEAK_LR * (step + 1) / warmup
    return PEAK_LR * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train(model: GPT2, training: Tensor, validation: Tensor) -> float:
    """Train A and B. Save the adapter when it is the best so far, and return the best loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=PEAK_LR, weight_decay=WEIGHT_DECAY, fused=True)
    scaler = torch.amp.GradScaler(DEVICE, enabled=CUDA and DTYPE is torch.float16)
    starts = np.arange(0, len(training) - BLOCK, STRIDE)  # the first token of each window
    steps = EPOCHS * math.ceil(len(starts) / BATCH)
    step, best = 0, math.inf
    for epoch in range(EPOCHS):
        model.train()
        order = np.random.default_rng((SEED, epoch)).permutation(starts)
        for first in range(0, len(order), BATCH):
            positions = order[first : first + BATCH, None] + np.arange(BLOCK + 1)
            rows = training[positions].to(DEVICE)  # (B, T + 1)
            loss = total_loss(model, rows) / rows[:, 1:].numel()  # the mean over tokens
            # The scaler acts only in fp16, where small gradients would become 0. It multiplies the
            # loss by a large factor, and `unscale_` undoes it, so that clipping sees the true norm.
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(trained, CLIP)
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            step += 1
            if step % 10 == 0:  # not after each step, because reading a number waits for a GPU
                print(f"step {step} of {steps}: loss {loss.item():.4f}")
        val_loss = evaluate(model, validation)
        print(f"epoch {epoch + 1} of {EPOCHS}: validation loss {val_loss:.4f}")
        if val_loss < best:
            best = val_loss
            save_adapter(model)
    return best


def save_adapter(model: GPT2) -> None:
    """Write A and B in the two files that PEFT loads."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[f"base_model.model.transformer.{name}"] = parameter.detach().cpu()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(BASE),
        "r": R,
        "lora_alpha": ALPHA,
        "lora_dropout": DROPOUT,
        "target_modules": ["c_attn"],
        "fan_in_fan_out": True,  # transformers keeps c_attn as (in, out)
    }
    OUT.mkdir(parents=True, exist_ok=True)
    save_file(tensors, OUT / "adapter_model.safetensors", {"format": "pt"})
    (OUT / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    model = load_gpt2(BASE)
    tokenizer = load_tokenizer(BASE, model.wte.num_embeddings)
    tokens = torch.from_numpy(tokenizer.encode(BOOK.read_text("utf-8")).astype(np.int64))
    cut = len(tokens) - len(tokens) // 10  # the last tenth is for validation
    validation = tokens[cut:].to(DEVICE)

    torch.manual_seed(SEED)  # for A, and then for the dropouts
    model.requires_grad_(False)  # before A and B exist, which stay trainable
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.endswith("c_attn"):
            model.set_submodule(name, LoRALinear(layer))  # q, k, v: one A, rows of B each
    model.to(DEVICE)
    print(f"base: validation perplexity {math.exp(evaluate(model, validation)):.2f}")
    best = train(model, tokens[:cut], validation)
    print(f"adapter: validation perplexity {math.exp(best):.2f}")
    ids = tokenizer.encode("You climb the stair and").tolist()  # continued by the last epoch's A, B
    while len(ids) < 60 and not tokenizer.decode(ids).endswith((".", "!", "?")):
        logits = model(torch.tensor([ids], device=DEVICE))[0, -1]  # (V,)
        ids += torch.multinomial(F.softmax(logits / 0.8, dim=-1), 1).tolist()
    print(tokenizer.decode(ids))


if __name__ == "__main__":
    main()
