"""The program of docs/export.md: PEFT adds adapters of this project, here rsLoRA and patterns."""

import json
import re
from pathlib import Path

import torch

from adapters.load import load_with_adapter
from lora.peft_config import CONFIG
from lora.save import save_adapter
from tests.helpers import relative_difference
from tests.pairs import ALL_FOUR, IDS, adapted, randomize
from tests.runs import stock_model

PAGE = Path(__file__).resolve().parents[2] / "docs" / "export.md"
PATTERNS = {"rank_pattern": {"h.0.attn.c_attn": 6}, "alpha_pattern": {"c_fc": 5}}


@torch.no_grad()
def test_the_sum_has_the_dense_update_and_a_plain_config(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dense = stock_model(base)
    for name, weight, targets, config in (
        ("a", 1.0, ALL_FOUR, {"r": 3, "use_rslora": True, **PATTERNS}),
        ("b", -0.5, ("c_attn",), {"r": 2, "lora_alpha": 5}),
    ):
        model = adapted(base, targets, **config)
        randomize(model, seed=len(targets))
        save_adapter(model, tmp_path / "runs" / name, str(base))
        merged = stock_model(base, tmp_path / "runs" / name).merge_and_unload()
        for key, tensor in stock_model(base).state_dict().items():
            dense.state_dict()[key].add_(merged.state_dict()[key] - tensor, alpha=weight)

    programs = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    [program] = [code for code in programs if "add_weighted_adapter" in code]
    exec(program, {})

    config = json.loads(Path("runs/sum", CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == 16
    assert not (config["use_rslora"] or config["rank_pattern"] or config["alpha_pattern"])
    found = load_with_adapter(str(base), Path("runs/sum")).model(IDS)
    # PEFT's SVD rounds in fp32. This changes the logits by 2e-5 on a processor with AVX-512.
    assert relative_difference(found, dense(IDS).logits) < 1e-4
    assert relative_difference(found, stock_model(base)(IDS).logits) > 0.1
