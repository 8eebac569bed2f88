"""`python -m adapters.inspect`: the table against dense matrices, and the picture."""

import numpy as np
import pytest
import torch

from adapters.inspect import amplification, main
from lora.inject import lora_layers
from lora.save import save_adapter
from tests.pairs import adapted
from tests.runs import one_line, run, stdout_of, table


def test_the_table_is_that_of_the_dense_changes(base, tmp_path):
    model = adapted(base, ("c_attn", "c_proj"), r=4, lora_alpha=6)  # a picture of three panels
    zero = lora_layers(model)["h.1.mlp.c_proj"]
    zero.lora_B.weight.data.zero_()
    save_adapter(model, tmp_path, "gpt2")
    (tmp_path / "file").touch()
    ending = run(main, tmp_path, "--out", tmp_path / "file")  # no picture can be written
    assert ending.status == 0 and "relative to W" not in ending.stdout
    assert ending.stderr.startswith(f"warning: {tmp_path / 'file' / 'spectrum.png'}: cannot be w")
    assert "is a whole model, whose change has no A and B" in one_line(run(main, base), 2)
    rows = table(stdout_of(main, tmp_path, "--base", base))
    assert rows[0][1:3] == ["norm", "relative to W"]
    assert [row[0] for row in rows[2:]] == list(lora_layers(model))
    for layer, row in zip(lora_layers(model).values(), rows[2:], strict=True):
        change = layer.delta_weight().detach().double()
        weight = layer.base_layer.weight
        if layer is zero:
            assert row[1:] == ["0", "0.00%", *["B is zero"] * 8]
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
            *beside_the_weight(weight.detach().double().numpy(), change.numpy(), rank=4),
        ]
    assert (tmp_path / "spectrum.png").stat().st_size > 10_000


def beside_the_weight(weight, change, rank):
    """Return the number of intruders, the least cosine and the amplification, by numpy's SVD."""
    before = np.linalg.svd(weight)[0][:, : min(weight.shape)]
    after = np.linalg.svd(weight + change)[0]
    largest = [
        max(abs(before[:, i] @ after[:, k]) for i in range(before.shape[1])) for k in range(10)
    ]
    u, _, vh = np.linalg.svd(change)
    there = u[:, :rank].T @ weight @ vh[:rank].T
    factor = np.sqrt((change**2).sum() / (there**2).sum())
    intruders = sum(cosine < 0.5 for cosine in largest)
    return f"{intruders} of 10", f"{min(largest):.2f}", f"{factor:.3g}"


def test_zeros_that_pad_a_and_b_do_not_change_the_amplification():
    torch.manual_seed(0)
    weight, b, a = torch.randn(20, 12), torch.randn(20, 2), torch.randn(2, 12)
    padded = torch.nn.functional.pad(b, (0, 6)), torch.nn.functional.pad(a, (0, 0, 0, 6))
    found = []
    for columns, rows in ((b, a), padded):
        u, s, vh = torch.linalg.svd(columns @ rows, full_matrices=False)
        r = columns.shape[1]
        found.append(amplification(weight, u[:, :r], s[:r], vh[:r]))
    assert found[1] == pytest.approx(found[0], rel=1e-4)
