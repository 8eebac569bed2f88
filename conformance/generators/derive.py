"""LoRA and DoRA in NumPy and fp64, with gradients and AdamW written out by hand.

The test vectors come from this file, which shares no code with `lora/`. Every sum is `math.fsum`,
which rounds once. So no sum depends on the machine or on the order of the terms.

Shapes: x (n, in), W (out, in), b (out,), A (r, in), B (out, r), y and g = dL/dy (n, out).
"""

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Settings = Mapping[str, Any]
LR, BETA1, BETA2, EPS, WEIGHT_DECAY = 0.01, 0.9, 0.999, 1e-8, 0.01
STEPS = 10


def matmul(a: Array, b: Array) -> Array:
    """Return a b for a (n, k) and b (k, m)."""
    return np.array([[math.fsum(row * column) for column in b.T] for row in a])


def row_sums(a: Array) -> Array:
    return np.array([math.fsum(row) for row in a])


def scaling(settings: Settings) -> float:
    """Return alpha / r, or alpha / sqrt(r) for rsLoRA."""
    r = settings["r"]
    return settings["alpha"] / (math.sqrt(r) if settings["use_rslora"] else r)


class LoRA:
    """y = W x + b + s B A h, with h = x, or h = mask * x / (1 - p) for a dropout's mask (n, in)."""

    trained: tuple[str, ...] = ("A", "B")

    def __init__(self, settings: Settings, tensors: Mapping[str, Array]):
        self.s = scaling(settings)
        self.t = dict(tensors)  # W (out, in), b, A, B
        self.keep = tensors["mask"] / (1 - settings["dropout"]) if "mask" in tensors else 1.0

    def forward(self, x: Array) -> Array:
        t = self.t
        update = matmul(matmul(x * self.keep, t["A"].T), t["B"].T)
        return matmul(x, t["W"].T) + t["b"] + self.s * update

    def gradients(self, x: Array, g: Array) -> dict[str, Array]:
        """Return dB = s g^T (h A^T), dA = s (g B)^T h, and dx = g W + s g B A * keep."""
        t = self.t
        h = x * self.keep
        gb = matmul(g, t["B"])  # (n, r)
        return {
            "dA": self.s * matmul(gb.T, h),
            "dB": self.s * matmul(g.T, matmul(h, t["A"].T)),
            "dx": matmul(g, t["W"]) + self.s * matmul(gb, t["A"]) * self.keep,
        }

    def merged(self) -> Array:
        """Return W + s B A."""
        return self.t["W"] + self.s * matmul(self.t["B"], self.t["A"])


class DoRA(LoRA):
    """y = f V x + b with V = W + s B A and f = m / ||V||. m (out,) is trained, too.

    ||V|| (out,) is the norm of each row of V. The gradients treat ||V|| as a constant. With a
    dropout's mask, y = W x + (f V - W) h + b, as in the authors' code and in PEFT: the mask falls
    on everything that is not the base.
    """

    trained = ("A", "B", "m")

    def direction(self) -> tuple[Array, Array]:
        """Return V (out, in) and the norms of the rows of V (out,)."""
        v = super().merged()
        return v, np.sqrt(row_sums(v * v))

    def forward(self, x: Array) -> Array:
        merged, w = self.merged(), self.t["W"]
        if "mask" in self.t:
            return matmul(x, w.T) + matmul(x * self.keep, (merged - w).T) + self.t["b"]
        return matmul(x, merged.T) + self.t["b"]

    def gradients(self, x: Array, g: Array) -> dict[str, Array]:
        """Return dA = s B^T G, dB = s G A^T, dx = f g V and dm = sum of g * V x / ||V|| over the n
        rows. G = (f g)^T x is the gradient of V. With a mask, h takes the place of x.
        """
        v, norm = self.direction()
        fg = g * (self.t["m"] / norm)
        h = x * self.keep
        dv = matmul(fg.T, h)
        dx = matmul(fg, v)
        if "mask" in self.t:
            base = matmul(g, self.t["W"])
            dx = base + (dx - base) * self.keep
        return {
            "dA": self.s * matmul(self.t["B"].T, dv),
            "dB": self.s * matmul(dv, self.t["A"].T),
            "dx": dx,
            "dm": row_sums((g * matmul(h, v.T)).T) / norm,
        }

    def merged(self) -> Array:
        """Return f V."""
        v, norm = self.direction()
        return (self.t["m"] / norm)[:, None] * v


class Fused:
    """LoRA on slices of a layer whose output contains q, k and v.

    The i-th adapted slice has the rows `rows[i]` of W, the factor A[i] (r, in), and its rows of B.
    The other rows of W get no update.
    Shapes: A (slices, r, in). B has the rows of all adapted slices in order, (rows, r), or
    (slices, out / 3, r) for thirds.
    """

    trained = ("A", "B")

    def __init__(self, settings: Settings, tensors: Mapping[str, Array]):
        self.s = scaling(settings)
        self.t = dict(tensors)
        self.rows = adapted_rows(settings)

    def pairs(self) -> list[tuple[list[int], Array, Array]]:
        """Return the rows of W, A and B of each slice."""
        b = self.t["B"].reshape(-1, self.t["B"].shape[-1])
        ends = np.cumsum([len(rows) for rows in self.rows])[:-1]
        return list(zip(self.rows, self.t["A"], np.split(b, ends), strict=True))

    def merged(self) -> Array:
        merged = self.t["W"].copy()
        for rows, a, b in self.pairs():
            merged[rows] += self.s * matmul(b, a)
        return merged

    def forward(self, x: Array) -> Array:
        return matmul(x, self.merged().T) + self.t["b"]

    def gradients(self, x: Array, g: Array) -> dict[str, Array]:
        pairs = self.pairs()
        db = [self.s * matmul(g[:, rows].T, matmul(x, a.T)) for rows, a, _ in pairs]
        return {
            "dA": np.stack([self.s * matmul(matmul(g[:, rows], b).T, x) for rows, _, b in pairs]),
            "dB": np.concatenate(db).reshape(self.t["B"].shape),
            "dx": matmul(g, self.merged()),
        }


def adapted_rows(settings: Settings) -> list[list[int]]:
    """Return the rows of W that each adapted slice updates: as given, or thirds of W."""
    width = settings["out"] // 3
    thirds = [list(range(i * width, (i + 1) * width)) for i in settings["slices"]]
    return settings.get("rows", thirds)


def loss_and_gradient(y: Array, target: Array) -> tuple[float, Array]:
    """Return L = mean((y - target)^2) and dL/dy."""
    difference = y - target
    return math.fsum((difference**2).ravel()) / y.size, 2 * difference / y.size


class AdamW:
    """AdamW as in PyTorch: the decay first, then a step with bias-corrected moments."""

    def __init__(self) -> None:
        self.power1 = self.power2 = 1.0  # beta^t
        self.moments: dict[str, tuple[Array, Array]] = {}

    def step(self, parameters: dict[str, Array], gradients: Mapping[str, Array]) -> None:
        """Replace each parameter. A gradient's name is the parameter's name with a d in front."""
        self.power1 *= BETA1
        self.power2 *= BETA2
        for name, p in parameters.items():
            g = gradients["d" + name]
            m, v = self.moments.get(name, (np.zeros_like(p), np.zeros_like(p)))
            m = BETA1 * m + (1 - BETA1) * g
            v = BETA2 * v + (1 - BETA2) * g * g
            self.moments[name] = m, v
            m_hat = m / (1 - self.power1)
            v_hat = v / (1 - self.power2)
            parameters[name] = p * (1 - LR * WEIGHT_DECAY) - LR * m_hat / (np.sqrt(v_hat) + EPS)


def round_to_bf16(a: Array) -> Array:
    """Return the nearest bf16 numbers (eight significant bits, ties to even), as fp64."""
    mantissa, exponent = np.frexp(a)  # 0.5 <= |mantissa| < 1
    return np.ldexp(np.rint(mantissa * 256) / 256, exponent)


# The 16 levels of 4-bit NormalFloat (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314,
# appendix E), as fp32 numbers.
NF4_LEVELS: Array = np.array(
    [
        -1.0,
        -0.6961928,
        -0.52507305,
        -0.3949175,
        -0.28444138,
        -0.18477343,
        -0.091050036,
        0.0,
        0.0795803,
        0.1609302,
        0.2461123,
        0.33791524,
        0.44070983,
        0.562617,
        0.72295684,
        1.0,
    ],
    np.float32,
).astype(np.float64)


def round_to_nf4(a: Array) -> Array:
    """Return NF4 values: each block of 64 numbers is divided by its largest magnitude, rounded to
    the nearest level, and multiplied again.
    """
    blocks = a.reshape(-1, 64)
    absmax = abs(blocks).max(1, keepdims=True)
    nearest = abs((blocks / absmax)[:, :, None] - NF4_LEVELS).argmin(2)
    return (NF4_LEVELS[nearest] * absmax).reshape(a.shape)
