"""Small models of transformers, and a plain model, with our adapter and with PEFT's adapter."""

from collections.abc import Callable
from typing import NamedTuple

import peft
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from lora.config import LoRAConfig
from lora.inject import inject
from tests.helpers import perturb, relative_difference, token_ids
from tests.pairs import our_name

IDS = token_ids(97, 2, 12)
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
VECTORS = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
DECODER = SMALL | {"num_key_value_heads": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {"num_key_value_heads": 2, **TOKENS}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}


class Plain(nn.Module):
    """Residual blocks whose linear layers have names of GPT-2 and T5, a head, and no config."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(12, 32)
        self.blocks = nn.ModuleList()
        for _ in range(2):
            self.blocks.append(nn.ModuleDict({"q": nn.Linear(32, 48), "c_attn": nn.Linear(48, 32)}))
        self.head = nn.Linear(32, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = x + block["c_attn"](F.gelu(block["q"](x)))
        return self.head(x)


class Case(NamedTuple):
    """A model, its inputs, the endings of its layers' names, and the file's task."""

    make: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    targets: list[str]
    task_type: str | None


def causal(make: Callable, **config: object) -> Case:
    return Case(
        lambda: make(**DECODER, **config), {"input_ids": IDS}, ["q_proj", "down_proj"], "CAUSAL_LM"
    )


def named(family: str, **config: object) -> Case:
    """Return a small causal model of a family of transformers, such as "Qwen2Moe"."""

    def build() -> nn.Module:
        fields = getattr(transformers, f"{family}Config")(**SMALL | config)
        return getattr(transformers, f"{family}ForCausalLM")(fields)

    return Case(build, {"input_ids": IDS}, [], "CAUSAL_LM")


def llama(**config: object) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))


def small_llama() -> nn.Module:
    """A random Llama with a tied head, for the tokenizer of `write_small_tokenizer(..., 317)`."""
    torch.manual_seed(0)
    return llama(
        vocab_size=317,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
        bos_token_id=316,
        eos_token_id=316,
    )


def qwen(**config: object) -> nn.Module:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config))


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=97,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )
    return transformers.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        num_labels=5,
    )
    return transformers.ViTForImageClassification(config)


CASES = {
    "llama": causal(llama, tie_word_embeddings=False),
    "llama-tied": causal(llama, tie_word_embeddings=True),
    "qwen": causal(qwen, tie_word_embeddings=True),
    "t5": Case(t5, {"input_ids": IDS, "decoder_input_ids": IDS}, ["q", "wo"], "SEQ_2_SEQ_LM"),
    "vit": Case(vit, {"pixel_values": IMAGES}, ["attention.q_proj", "v_proj"], None),
    "plain": Case(Plain, {"x": VECTORS}, ["q", "head"], None),
}


def make(case: Case) -> nn.Module:
    """Return the model in evaluation mode, with random but reproducible parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = case.make()
        perturb(model, 0.05)
    return model.eval()


def output(model: nn.Module, case: Case) -> Tensor:
    result = model(**case.inputs)
    return getattr(result, "logits", result)


def both(case: Case, targets: list[str] | str, **fields: object) -> tuple:
    """Return the model with our adapter and with PEFT's adapter, from one seed."""
    fields = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1} | fields
    ours = make(case)
    torch.manual_seed(3)
    inject(ours, LoRAConfig(target_modules=targets, **fields))

    task = {"task_type": case.task_type}
    torch.manual_seed(3)
    theirs = peft.get_peft_model(
        make(case), peft.LoraConfig(target_modules=targets, **fields, **task)
    )
    return ours, theirs


def steps(model: nn.Module, case: Case) -> dict[str, Tensor]:
    """Take 5 steps with all dropouts on. Return the losses, and the first and last gradients."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0)
    seen = {}
    for step in range(5):
        torch.manual_seed(step)
        logits = output(model.train(), case).float()
        targets = torch.arange(logits[..., 0].numel()) % logits.size(-1)
        loss = F.cross_entropy(logits.flatten(0, -2), targets)
        optimizer.zero_grad()
        loss.backward()
        seen[f"loss {step}"] = loss.detach()
        if step in (0, 4):
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    seen[f"{step} {short(name)}"] = parameter.grad.clone()
        optimizer.step()
    model.eval()
    return seen


def short(name: str) -> str:
    return our_name(name).removeprefix("base_model.model.")


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert ours.keys() == theirs.keys() and ours
    for name, value in ours.items():
        expected = theirs[name]
        assert value.dtype == expected.dtype
        if not torch.equal(value, expected):
            assert relative_difference(value, expected) < tolerance, name
