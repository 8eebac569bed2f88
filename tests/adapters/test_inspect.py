"""`python -m adapters.inspect`: its table against dense matrices, and its picture."""

import torch

from adapters.files import save_adapter
from adapters.inspect import block_and_kind, describe, main
from lora.inject import lora_layers
from tests.pairs import adapted
from tests.runs import one_line, run, stdout_of, table


def test_the_table_is_that_of_the_dense_changes(base, tmp_path):
    model, config = adapted(base, ("c_attn", "c_fc"), r=4, lora_alpha=6)
    zero = lora_layers(model)["h.1.mlp.c_fc"]
    zero.lora_B.weight.data.zero_()
    save_adapter(model, config, tmp_path, "gpt2")
    assert "of the weight's" not in stdout_of(main, tmp_path, "--out", tmp_path / "pictures")
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["spectrum.png"]
    assert "no such directory" in one_line(run(main, tmp_path, "--base", ""), 2)
    rows = table(stdout_of(main, tmp_path, "--base", base))
    assert rows[0][1:3] == ["norm", "of the weight's"]
    assert [row[0] for row in rows[2:]] == list(lora_layers(model))
    for layer, row in zip(lora_layers(model).values(), rows[2:], strict=True):
        change = layer.delta_weight().detach().double()
        weight = layer.base_layer.weight
        if layer is zero:
            assert row[1:] == ["0", "0.00%", *["B is zero"] * 5]
            continue
        s = torch.linalg.svdvals(change)[:4]
        p = s.square() / s.square().sum()
        holding = next(k for k in range(1, 5) if p[:k].sum() >= 0.9)
        assert row[1:] == [
            f"{change.norm():.4g}",
            f"{change.norm() / weight.norm():.2%}",
            *(f"{x:.3g}" for x in s[:3]),
            f"{holding} of 4",
            f"{(-p * p.log()).sum().exp():.1f}",
        ]
    assert (tmp_path / "spectrum.png").stat().st_size > 10_000


def test_the_cells_of_known_singular_values():
    assert describe(torch.tensor([3.0, 3.0, 3.0, 0.0])) == ["3", "3", "3", "3 of 4", "3.0"]
    assert describe(torch.tensor([4.0, 1.0, 1.0]))[3] == "2 of 3"  # 16/18, 17/18
    assert describe(torch.tensor([2.0])) == ["2", "0", "0", "1 of 1", "1.0"]


def test_a_layers_block_and_kind():
    assert block_and_kind("h.3.attn.c_attn") == (3, "h.*.attn.c_attn")
    assert block_and_kind("encoder.block.10.layer.0.q") == (10, "encoder.block.*.layer.0.q")
    assert block_and_kind("fc1.lm_head") == (0, "fc1.lm_head")
