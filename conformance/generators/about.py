"""What `vectors.json` contains beside the cases: formulas, names and tolerances."""

from typing import Any

from generators.derive import BETA1, BETA2, EPS, LR, NF4_LEVELS, STEPS, WEIGHT_DECAY
from lora_conformance import __version__

FORMULAS = {
    "shapes": "x (n, in), W (out, in), b (out,), A (r, in), B (out, r), y and target (n, out)",
    "scaling": "s = alpha / r. With use_rslora, s = alpha / sqrt(r)",
    "output": "y = x W^T + b + s h A^T B^T, with h = x",
    "bias": "A case with `bias` false has no b, which is then left out of y",
    "dropout": "h = mask * x / (1 - dropout). The base gets x without the mask. With use_dora, "
    "y = x W^T + b + h (merged_W - W)^T, so the mask falls on everything except the base",
    "merged_W": "merged_W = W + s B A, without dropout",
    "layout": "W and merged_W have the layout of the case. In (in, out) they are transposed, and A "
    "and B are not",
    "dora": "V = W + s B A. norm (out,) is the Euclidean norm of each row of V, over the inputs. "
    "merged_W = (m / norm) V, row by row. y = x merged_W^T + b, so the bias is not scaled",
    "slices": "W has three slices of out / 3 rows: 0 is q, 1 is k, 2 is v. The i-th number in "
    "`slices` names the rows to which s B[i] A[i] is added. The other rows get no update. With "
    "`rows`, the slices are unequal, as with grouped queries, or interleaved: rows[i] lists the "
    "rows of W of the i-th adapted slice, and B has the rows of all adapted slices in this order",
    "experts": "y[e] = x W[e]^T + s x A[e]^T B[e]^T for each expert e, without a bias, and "
    "merged_W[e] = W[e] + s B[e] A[e]. dx is the sum over the experts. L is the mean over all of y",
    "sums": "`adapters` are added with `weights` w: merged_W = W + the sum of w[i] (merged_W of "
    "adapter i - W), and y = x merged_W^T + b. The names of tensors end in the adapter's number",
    "loss": "L = the mean of (y - target)^2 over all n * out elements",
    "gradients": "of L. DoRA's norm counts as a constant",
    "two-layers": "y = layer1(relu(layer0(x))). The names of tensors end in the layer's number",
    "adamw": "Step t = 1, 2, ... on the same batch with the same mask, for each trained p in A, B "
    "and m, with gradient g and m1 = m2 = 0 at the start: first p = p (1 - lr weight_decay). Then "
    "m1 = beta1 m1 + (1 - beta1) g, and m2 = beta2 m2 + (1 - beta2) g^2. Then p = p - lr u / "
    "(sqrt(v) + eps), with u = m1 / (1 - beta1^t) and v = m2 / (1 - beta2^t)",
    "bf16": "rounded to eight significant bits, to the nearest number, ties to even",
    "nf4": "W consists of blocks of 64 numbers, row by row. Each is a level of 4-bit NormalFloat "
    "times the largest magnitude of the block, which is not rounded. `nf4_levels` has the levels",
}
INPUTS = {
    "x": "input",
    "W": "frozen weight",
    "b": "frozen bias",
    "A": "factor. Fused: (slices, r, in). Experts: (experts, r, in)",
    "B": "factor. Fused: (slices, out / 3, r), or (rows, r). Experts: (experts, out, r)",
    "A_peft": "experts: A as in PEFT's files, (experts * r, in)",
    "B_peft": "experts: B as in PEFT's files, (out, r * experts). The expert is the last index",
    "m": "DoRA's magnitude (out,). It is not at its start, so it differs from the norm of W",
    "mask": "dropout's mask (n, in), of zeros and ones",
    "target": "target of the loss",
}
RESULTS = {
    "y": "output",
    "dA": "gradient of A",
    "dB": "gradient of B",
    "dm": "gradient of m",
    "dx": "gradient of x",
    "merged_W": "W with the update",
    "merged_W_bf16": "merged_W of a bf16 base, rounded once to bf16",
    "merged_W_nf4": "merged_W of an NF4 base, rounded to NF4 again. It loses most of the update",
    "losses": "L before each step of AdamW",
    "A_steps": "A after each step (10, ...). The shape is that of the vector in the case's file: "
    "lora-64, lora-96x40 and dora-in-out-40x96 store only the last step (1, ...)",
    "B_steps": "B after the same steps as A_steps",
    "m_steps": "m after each step (10, ...)",
}
TOLERANCES = {
    "F64": {
        "tolerance": 1e-10,
        "reason": "PEFT in fp64 is off by at most 3e-15, because it sums in another order. A "
        "constant in fp32, such as s, may be off by 6e-8",
    },
    "F32": {
        "tolerance": 1e-5,
        "reason": "PEFT in fp32 is off by at most 5e-7, and by 3e-6 after ten steps of nf4-base",
    },
    "F16": {
        "tolerance": 5e-3,
        "reason": "PEFT in fp16 is off by at most 1.5e-3. AdamW's eps is 0 in fp16, so take the "
        "steps in fp32, and round the results",
    },
    "BF16": {
        "tolerance": 3e-2,
        "reason": "PEFT in bf16 is off by at most 1.7e-2. A step is not much more than a rounding "
        "of the parameters, so take the steps in fp32, and round the results",
    },
}
ABOUT: dict[str, Any] = {
    "version": __version__,
    "license": "CC0-1.0",
    "format": "A safetensors file for each case, named by the case. All tensors are fp64 and "
    "row-major. Your results may also be fp32, fp16 or bf16. `cases` has the settings of "
    "each case. A tensor is an input or a result.",
    "formulas": FORMULAS,
    "inputs": INPUTS,
    "results": RESULTS,
    "error": "max |result - vector| / max |vector|, for each tensor",
    "tolerances": TOLERANCES,
    "nf4_levels": NF4_LEVELS.tolist(),
    "exact": ["merged_W_bf16"],
    "steps": {
        "lr": LR,
        "betas": [BETA1, BETA2],
        "eps": EPS,
        "weight_decay": WEIGHT_DECAY,
        "count": STEPS,
    },
}
