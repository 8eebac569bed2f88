"""LoRA on one page: adapt GPT-2 to a book with `python one_page.py`.

Read docs/lora.md first, and docs/training.md next. In fp32 on one thread, losses and adapter equal
`train.py lora --kernels plain` and a loop with PEFT, bit for bit (tests/test_one_page.py).

Shapes: B rows (not LoRA's B), T tokens, C = n_embd, H heads of width D = C / H, V vocabulary.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.errors import RunError, UserError, run_command
from data.tokenizer import Tokenizer, load_tokenizer

BASE = "./model/mini"  # a directory of a GPT-2. "./": this is not a name on the hub
BOOK = Path("data/book.txt")
OUT = Path("runs/one-page")
PREFIX = "base_model.model.transformer."  # of the names in PEFT's file
# The settings of `train.py lora`. For data/book.txt, TARGETS ("c_attn", "c_proj", "c_fc"), STRIDE
# 128, BATCH 2, PEAK_LR 4e-3 are better. Another book needs another rate: train.py's RECIPE=best.
TARGETS = ("c_attn",)  # the layers to adapt. Both attention and MLP have a c_proj
R, ALPHA, DROPOUT = 8, 16, 0.05
BLOCK, STRIDE = 128, 16  # a window of 128 tokens starts at every 16th training token
BATCH, EPOCHS, SEED = 16, 3, 42  # BATCH windows per step. An epoch reads most tokens 128 / 16 times
PEAK_LR, WARMUP = 3e-4, 0.06  # the rate rises in the first 6 % of the steps
WEIGHT_DECAY, CLIP = 0.01, 1.0  # CLIP is the largest norm of the gradient
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"  # a CPU computes in fp32, and ignores DTYPE
DTYPE = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


class LoRALinear(nn.Module):
    """y = W x + b + s B A x with s = alpha / r (Hu et al. 2021, section 4.1). Names as in PEFT."""

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer  # W (out, in) and b, frozen
        self.lora_dropout = nn.Dropout(DROPOUT)
        self.lora_A = nn.Linear(base_layer.in_features, R, bias=False)  # A (r, in)
        self.lora_B = nn.Linear(R, base_layer.out_features, bias=False)  # B (out, r)
        self.scaling = ALPHA / R
        # A is uniform in +-1/sqrt(in), drawn a second time as in PEFT. B is 0: no change yet.
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
        self.c_attn = nn.Linear(config["n_embd"], 3 * config["n_embd"])  # all q, then all k, all v
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
        self.ln_1 = nn.LayerNorm(C, config["layer_norm_epsilon"])
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(C, config["layer_norm_epsilon"])
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C), "c_proj": nn.Linear(4 * C, C)})
        self.dropout = nn.Dropout(config["resid_pdrop"])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attn(self.ln_1(x)))
        hidden = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")  # (B, T, 4 C)
        return x + self.dropout(self.mlp["c_proj"](hidden))


class GPT2(nn.Module):
    """GPT-2 (Radford et al. 2019), with the parameter names of the released checkpoint."""

    def __init__(self, config: dict):
        super().__init__()
        self.wte = nn.Embedding(config["vocab_size"], config["n_embd"])  # of tokens
        self.wpe = nn.Embedding(config["n_positions"], config["n_embd"])  # of positions
        self.drop = nn.Dropout(config["embd_pdrop"])
        self.h = nn.ModuleList(Block(config) for _ in range(config["n_layer"]))
        self.ln_f = nn.LayerNorm(config["n_embd"], config["layer_norm_epsilon"])

    def forward(self, ids: Tensor) -> Tensor:  # (B, T) -> logits (B, T, V)
        x = self.drop(self.wte(ids) + self.wpe.weight[: ids.size(1)])  # (B, T, C)
        for block in self.h:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)  # the head is tied to wte


def load_gpt2(directory: Path) -> GPT2:
    """Load GPT-2 in fp32. Files store the blocks' matrices as (in, out), nn.Linear as (out, in)."""
    config = json.loads((directory / "config.json").read_text())
    for field, *computed in (  # all values that this page computes. Absent: the first one
        ("activation_function", "gelu_new", "gelu_pytorch_tanh"),
        ("n_inner", None, 4 * config["n_embd"]),
        ("reorder_and_upcast_attn", False),
        ("scale_attn_by_inverse_layer_idx", False),
        ("scale_attn_weights", True),
    ):
        if config.get(field, computed[0]) not in computed:
            raise UserError(f"{directory}: this page does not compute {field} {config[field]!r}")
    model = GPT2(config)
    stored = load_file(directory / "model.safetensors")  # names with or without "transformer."
    for name, parameter in model.named_parameters():
        weight = stored[name if name in stored else f"transformer.{name}"].float()
        parameter.data = weight.t() if name.startswith("h.") else weight  # t() keeps vectors
    return model


def total_loss(model: GPT2, rows: Tensor) -> Tensor:
    """Return -log p(next token) in nats, summed over all tokens of rows (B, T + 1)."""
    with torch.autocast(DEVICE, DTYPE, enabled=CUDA):  # matmuls in DTYPE, and on a CPU in fp32
        logits = model(rows[:, :-1])  # (B, T, V)
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")


@torch.no_grad()
def evaluate(model: GPT2, tokens: Tensor) -> float:
    """Return the mean loss over a text (N,). Each token except the first is scored once."""
    model.eval()  # no dropout, also in `report`
    total = 0.0
    for start in range(0, len(tokens) - 1, BLOCK):  # a last target is the next first input
        total += total_loss(model, tokens[None, start : start + BLOCK + 1]).item()
    return total / (len(tokens) - 1)


def learning_rate(step: int, steps: int) -> float:
    """Return the rate: linear warm-up to the peak, and then half a cosine towards 0."""
    warmup = math.ceil(WARMUP * steps)
    if step < warmup:
        return PEAK_LR * (step + 1) / warmup
    return PEAK_LR * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train(model: GPT2, training: Tensor, validation: Tensor) -> None:
    """Train A and B. Save the adapter of the lowest validation loss, B = 0 included."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=PEAK_LR, weight_decay=WEIGHT_DECAY, fused=True)
    scaler = torch.amp.GradScaler(DEVICE, enabled=CUDA and DTYPE is torch.float16)
    windows = training.unfold(0, BLOCK + 1, STRIDE)  # (N, T + 1): T inputs, and the last target
    steps = EPOCHS * math.ceil(len(windows) / BATCH)
    step, best = 0, evaluate(model, validation)  # still the loss of the base, because B is 0
    save_adapter(model)  # also replaces the adapter of an earlier run
    for epoch in range(EPOCHS):
        model.train()
        order = np.random.default_rng((SEED, epoch)).permutation(len(windows))  # another each epoch
        for batch in torch.from_numpy(order).to(DEVICE).split(BATCH):
            rows = windows[batch]  # (B, T + 1)
            loss = total_loss(model, rows) / rows[:, 1:].numel()  # the mean over tokens
            scaler.scale(loss).backward()  # a large loss, because fp16 rounds small gradients to 0
            scaler.unscale_(optimizer)  # divides them again, so that clipping sees the true norm
            nn.utils.clip_grad_norm_(trained, CLIP)
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            step += 1
            if step % 10 == 0:  # not after each step, because reading a number waits for a GPU
                print(f"step {step} of {steps}: training perplexity {loss.exp().item():.2f}")
        val_loss = evaluate(model, validation)
        if not val_loss < 700:  # NaN, or too large for `exp`
            raise RunError(f"the validation loss is {val_loss}; lower PEAK_LR")
        print(f"epoch {epoch + 1} of {EPOCHS}: validation perplexity {math.exp(val_loss):.2f}")
        if val_loss < best:
            best = val_loss
            save_adapter(model)


def save_adapter(model: GPT2) -> None:
    """Write A and B in the two files that PEFT loads."""
    tensors = {PREFIX + n: p.data for n, p in model.named_parameters() if p.requires_grad}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": BASE,
        "r": R,
        "lora_alpha": ALPHA,
        "lora_dropout": DROPOUT,
        "target_modules": TARGETS,
        "fan_in_fan_out": True,  # transformers keeps these layers as (in, out)
    }
    OUT.mkdir(parents=True, exist_ok=True)
    save_file(tensors, OUT / "adapter_model.safetensors", {"format": "pt"})
    (OUT / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def report(name: str, model: GPT2, validation: Tensor, tokenizer: Tokenizer) -> None:
    """Print the perplexity, exp(mean loss), and a prompt with 50 tokens drawn from the model."""
    print(f"{name}: validation perplexity {math.exp(evaluate(model, validation)):.2f}")
    torch.manual_seed(SEED)  # the same draws for the base and the adapter
    ids = tokenizer.encode("You climb the stair and").tolist()
    for _ in range(50):
        logits = model(torch.tensor([ids], device=DEVICE))[0, -1]  # (V,)
        p = F.softmax(logits / 0.8, dim=-1)  # a temperature below 1 favours likely tokens
        ids += torch.multinomial(p, 1).tolist()
    print(tokenizer.decode(ids))


def main(_: object = None) -> None:
    if not set() < set(TARGETS) <= {"c_attn", "c_proj", "c_fc"}:  # a string has characters
        raise UserError(f"TARGETS {TARGETS!r} must be a tuple of c_attn, c_proj, c_fc")
    torch.backends.cuda.enable_cudnn_sdp(False)  # its gradients are wrong on some GPUs
    model = load_gpt2(Path(BASE)).to(DEVICE)
    tokenizer = load_tokenizer(Path(BASE), model.wte.num_embeddings)  # refuses a larger vocabulary
    ids = tokenizer.encode(BOOK.read_text("utf-8")).astype(np.int64)  # (N,), from uint16
    tokens = torch.from_numpy(ids).to(DEVICE)  # once, so that no step waits for a copy
    cut = len(tokens) - len(tokens) // 10  # the last tenth is for validation
    report("base", model, tokens[cut:], tokenizer)
    torch.manual_seed(SEED)  # for A, and then for the dropouts
    model.requires_grad_(False)  # before A and B exist, which stay trainable
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in TARGETS:
            model.set_submodule(name, LoRALinear(layer))  # in c_attn, q, k and v share one A
    train(model.to(DEVICE), tokens[:cut], tokens[cut:])
    for name, tensor in load_file(OUT / "adapter_model.safetensors").items():  # the best one
        model.get_parameter(name.removeprefix(PREFIX)).data = tensor.to(DEVICE)
    report("adapter", model, tokens[cut:], tokenizer)
    print(f"The adapter is in {OUT}.")


if __name__ == "__main__":
    run_command(main)  # ends a known mistake with one line
