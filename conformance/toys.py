"""A small correct implementation, and for every check a toy: the implementation with one mistake.

The tests put each toy on the bench. Each toy must fail its check.
"""

import json
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Layer(nn.Module):
    """y = base(x) + D dropout(x), where D (out, in) is the update that merging adds to W."""

    def __init__(
        self,
        base: nn.Module,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        fan_in_fan_out: bool = False,
        slices: tuple[int, ...] = (),
    ):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.r, self.alpha, self.p = r, alpha, dropout
        self.use_rslora, self.use_dora, self.transposed = use_rslora, use_dora, fan_in_fan_out
        self.slices = slices
        self.unmerged: Tensor | None = None  # a copy of W while the layer is merged
        fan_out, fan_in = self.weight().shape
        if slices:
            self.A = nn.Parameter(torch.empty(len(slices), r, fan_in))
            self.B = nn.Parameter(torch.zeros(len(slices), fan_out // 3, r))
        else:
            self.A = nn.Parameter(torch.empty(r, fan_in))
            self.B = nn.Parameter(torch.zeros(fan_out, r))
        self.start()
        if use_dora:
            self.m = nn.Parameter(self.norm(self.weight().detach()))

    def weight(self) -> Tensor:
        return self.base.weight.T if self.transposed else self.base.weight

    def start(self) -> None:
        bound = self.A.size(-1) ** -0.5
        nn.init.uniform_(self.A, -bound, bound)

    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def norm(self, v: Tensor) -> Tensor:
        return v.norm(dim=1)

    def delta(self) -> Tensor:
        if self.slices:
            return self.sliced()
        update = self.scaling() * self.B @ self.A
        if not self.use_dora:
            return update
        v = self.weight() + update
        return (self.m / self.norm(v).detach())[:, None] * v - self.weight()

    def sliced(self) -> Tensor:
        delta = list(torch.zeros_like(self.weight(), dtype=self.A.dtype).chunk(3))
        for place, a, b in zip(self.slices, self.A, self.B, strict=True):
            delta[place] = self.scaling() * b @ a
        return torch.cat(delta)

    def dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training)

    def update(self, x: Tensor) -> Tensor:
        return F.linear(self.dropout(x), self.delta())

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.unmerged is not None:
            return y
        return y + self.update(x.to(self.A.dtype)).to(y.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        if self.unmerged is None:
            delta = self.delta().T if self.transposed else self.delta()
            self.unmerged = self.base.weight.clone()
            self.base.weight.copy_(self.base.weight + delta)

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.unmerged is not None:
            self.base.weight.copy_(self.unmerged)
            self.unmerged = None

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
        if self.unmerged is not None:
            raise ValueError("the layer is merged; unmerge it first")
        return super().state_dict(*args, **options)


class Right:
    """The functions of the bench, for a class of layers."""

    layer: type[Layer] = Layer

    def wrap(
        self,
        linear,
        r,
        alpha,
        dropout,
        use_rslora=False,
        use_dora=False,
        fan_in_fan_out=False,
        slices=(),
    ):
        return self.layer(linear, r, alpha, dropout, use_rslora, use_dora, fan_in_fan_out, slices)

    def factors(self, layer):
        return layer.A, layer.B

    def layers(self, module):
        return [(name, m) for name, m in module.named_modules() if isinstance(m, Layer)]

    def merge(self, module):
        for _, layer in self.layers(module):
            layer.merge()

    def unmerge(self, module):
        for _, layer in self.layers(module):
            layer.unmerge()

    def matches(self, name, target):
        return f".{name}".endswith(f".{target}")

    def in_blocks(self, name, blocks):
        return any(f".{block}." in name for block in blocks)

    def value(self, name, patterns, common):
        return next((v for k, v in patterns.items() if self.matches(name, k)), common)

    def inject(self, model, targets, r, alpha, layers=None, ranks=None, alphas=None):
        ranks, alphas = ranks or {}, alphas or {}
        self.refuse_tied(model, targets)
        model.requires_grad_(False)
        for name, module in list(model.named_modules()):
            if not any(self.matches(name, target) for target in targets):
                continue
            if layers is not None and not self.in_blocks(name, layers):
                continue
            rank, own = self.value(name, ranks, r), self.value(name, alphas, alpha)
            model.set_submodule(name, self.wrap(module, rank, own, 0.0))
        model.settings = [targets, r, alpha, layers, ranks, alphas]
        return model

    def refuse_tied(self, model, targets):
        if "lm_head" in targets:
            raise ValueError("lm_head is tied to the embedding")

    def save(self, model, path):
        model = self.unwrapped(model)
        path.mkdir()
        tensors = {}
        for name, layer in self.layers(model):
            tensors |= {f"{name}.A": layer.A, f"{name}.B": layer.B}
        save_file({key: t.detach().contiguous() for key, t in tensors.items()}, path / "tensors")
        (path / "settings").write_text(self.dumps(model.settings))

    def unwrapped(self, model):
        return getattr(model, "_orig_mod", model)

    def dumps(self, settings):
        return json.dumps(settings)

    def load(self, model, path, **settings):
        self.inject(model, *json.loads((path / "settings").read_text()))
        tensors = load_file(path / "tensors")
        self.refuse_other_names(model, tensors)
        for name, layer in self.layers(model):
            if f"{name}.A" in tensors:
                layer.A.data, layer.B.data = tensors[f"{name}.A"], tensors[f"{name}.B"]
        return model

    def refuse_other_names(self, model, tensors):
        if {key[:-2] for key in tensors} != dict(self.layers(model)).keys():
            raise ValueError("the file does not fit the model")

    def combine(self, paths, weights, out):
        """Stack every A, and every weight * B. The rank is the sum of the ranks."""
        files = [load_file(path / "tensors") for path in paths]
        targets, r, alpha, *rest = json.loads((paths[0] / "settings").read_text())
        total = {}
        for key in files[0]:
            if key.endswith(".A"):
                total[key] = torch.cat([file[key] for file in files])
            else:
                scaled = [
                    self.weighted(file[key], w) for file, w in zip(files, weights, strict=True)
                ]
                total[key] = torch.cat(scaled, dim=1)
        out.mkdir()
        save_file(total, out / "tensors")
        n = len(paths)
        (out / "settings").write_text(json.dumps([targets, n * r, n * alpha, *rest]))

    def weighted(self, b, weight):
        return b * weight


TOYS: dict[str, Right] = {}


def toy(check: str) -> Callable[[type], type]:
    """Register a class of wrong layers, or of wrong functions, as the toy of a check."""

    def register(wrong: type) -> type:
        functions = wrong() if issubclass(wrong, Right) else Right()
        if issubclass(wrong, Layer):
            functions.layer = wrong
        TOYS[check] = functions
        return wrong

    return register


@toy("new_adapter_changes_nothing")
class RandomB(Layer):
    def start(self):
        super().start()
        nn.init.uniform_(self.B)


@toy("update_is_alpha_over_r")
class AlphaAlone(Layer):
    def scaling(self):
        return self.alpha


@toy("rslora_is_alpha_over_root_r")
class IgnoresRsLoRA(Layer):
    def scaling(self):
        return self.alpha / self.r


@toy("start_of_a")
class FanInOfR(Layer):
    def start(self):
        bound = self.r**-0.5
        nn.init.uniform_(self.A, -bound, bound)


@toy("base_is_frozen")
class TrainsTheBase(Layer):
    def __init__(self, *args):
        super().__init__(*args)
        self.base.requires_grad_(True)


@toy("dropout_only_in_training")
class AlwaysDrops(Layer):
    def dropout(self, x):
        return F.dropout(x, self.p)


@toy("dropout_before_a")
class DropsAfterA(Layer):
    def update(self, x):
        return self.scaling() * F.linear(self.dropout(F.linear(x, self.A)), self.B)


@toy("dropout_is_unbiased")
class DropsWithoutScaling(Layer):
    def dropout(self, x):
        return x * (torch.rand_like(x) > self.p) if self.training else x


@toy("gradient_of_x")
class ForgetsTheMask(Layer):
    def dropout(self, x):
        return x + (super().dropout(x) - x).detach()


@toy("ten_steps")
class Detached(Layer):
    def update(self, x):
        return super().update(x.detach())


@toy("dora_ten_steps")
class NormOfColumns(Layer):
    def norm(self, v):
        return v.norm(dim=0)


@toy("any_input_shape")
class Views(Layer):
    def update(self, x):
        return super().update(x.view(-1, x.size(-1))).view(*x.shape[:-1], -1)


@toy("factors_stay_fp32")
class TakesTheBasesPrecision(Layer):
    def start(self):
        super().start()
        self.A.data = self.A.data.to(self.base.weight.dtype)
        self.B.data = self.B.data.to(self.base.weight.dtype)


@toy("output_keeps_its_precision")
class Promotes(Layer):
    def forward(self, x):
        return self.base(x) + self.update(x.to(self.A.dtype)).float()


@toy("merging_keeps_the_output")
class AddsToMerged(Layer):
    def forward(self, x):
        return self.base(x) + self.update(x)


@toy("merging_twice_is_merging_once")
class MergesAgain(Layer):
    def merge(self):
        self.unmerged = None
        super().merge()


@toy("unmerging_restores_the_base")
class SubtractsWithoutScaling(Layer):
    def unmerge(self):
        self.base.weight.data -= self.B @ self.A
        self.unmerged = None


@toy("eval_and_train_keep_the_output")
class MergesAtEveryEval(Layer):
    def train(self, mode=True):
        if not mode:
            self.unmerged = None
            self.merge()
        return super().train(mode)


@toy("merging_into_bf16_rounds_once")
class MultipliesInBf16(Layer):
    def delta(self):
        dtype = self.base.weight.dtype
        return (self.scaling() * self.B).to(dtype) @ self.A.to(dtype)


@toy("unmerging_from_bf16_restores_the_base")
class SubtractsInBf16(Layer):
    def unmerge(self):
        self.base.weight.data -= self.delta()
        self.unmerged = None


@toy("state_dict_while_merged")
class SavesMerged(Layer):
    def state_dict(self, *args, **options):
        return nn.Module.state_dict(self, *args, **options)


@toy("dora_merges_and_unmerges")
class DividesColumns(Layer):
    def merge(self):
        self.factor = self.m / self.norm(self.weight() + self.scaling() * self.B @ self.A)
        super().merge()

    def unmerge(self):
        self.base.weight.data = self.base.weight / self.factor - self.scaling() * self.B @ self.A
        self.unmerged = None


@toy("in_out_weights")
class MergesUntransposed(Layer):
    def merge(self):
        self.unmerged = self.base.weight.clone()
        self.base.weight.data += self.delta()


@toy("slices_of_a_fused_layer")
class FirstRows(Layer):
    def sliced(self):
        self.slices = range(len(self.slices))
        return super().sliced()


@toy("targets_match_whole_names")
class MatchesSubstrings(Right):
    def matches(self, name, target):
        return target in name


@toy("blocks_match_whole_numbers")
class MatchesDigits(Right):
    def in_blocks(self, name, blocks):
        return any(f".{block}" in name for block in blocks)


@toy("ranks_and_alphas_by_layer")
class CommonRank(Right):
    def inject(self, model, targets, r, *rest, **options):
        super().inject(model, targets, r, *rest, **options)
        for _, layer in self.layers(model):
            layer.alpha *= layer.r / r


@toy("tied_head")
class AdaptsTied(Right):
    def refuse_tied(self, model, targets):
        pass


@toy("gradient_checkpointing")
class DrawsByItself(Layer):
    def dropout(self, x):
        self.generator = getattr(self, "generator", None) or torch.Generator().manual_seed(0)
        keep = torch.rand(x.shape, generator=self.generator) > self.p
        return x * keep / (1 - self.p)


@toy("compiles_once")
class LooksAtB(Layer):
    def forward(self, x):
        return super().forward(x) if self.B.any() else self.base(x)


@toy("a_copy_is_independent")
class PatchedForward(Layer):
    def __init__(self, *args):
        super().__init__(*args)
        self.forward = lambda x: Layer.forward(self, x)


class Lenient(Right):
    def unwrapped(self, model):
        return model

    def refuse_other_names(self, model, tensors):
        pass


toy("saved_adapter_loads")(Lenient)
toy("file_of_another_model_is_noticed")(Lenient)


@toy("patterns_keep_their_order")
class SortsPatterns(Right):
    def dumps(self, settings):
        return json.dumps(settings, sort_keys=True)


@toy("weighted_sum_with_a_negative_weight")
class LosesTheSign(Right):
    def weighted(self, b, weight):
        return b * abs(weight)
