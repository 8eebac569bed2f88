"""A small correct implementation, and for every check toys: the implementation with one mistake.

The tests put each toy on the bench. It must fail the checks that its line names: the check for this
mistake, and then checks that fail with it. It must pass all others.
"""

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_conformance.checks.merging import round_to_nf4


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
        widths: tuple[int, ...] | None = None,
        nf4: bool = False,
    ):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.r, self.alpha, self.p = r, alpha, dropout
        self.use_rslora, self.use_dora, self.transposed = use_rslora, use_dora, fan_in_fan_out
        self.slices, self.nf4 = slices, nf4
        self.unmerged: Tensor | None = None  # a copy of W while the layer is merged
        fan_out, fan_in = self.matrix().shape
        self.widths = widths or (fan_out // 3,) * 3
        if slices:
            rows = sum(self.widths[i] for i in slices)
            self.A = nn.Parameter(torch.empty(len(slices), r, fan_in))
            self.B = nn.Parameter(torch.zeros(rows, r))
        else:
            self.A = nn.Parameter(torch.empty(r, fan_in))
            self.B = nn.Parameter(torch.zeros(fan_out, r))
        self.start()
        if use_dora:
            self.m = nn.Parameter(self.norm(self.matrix().detach().float()))

    def matrix(self) -> Tensor:
        """Return W (out, in)."""
        return self.base.weight.T if self.transposed else self.base.weight

    def start(self) -> None:
        bound = self.A.size(-1) ** -0.5
        nn.init.uniform_(self.A, -bound, bound)

    def is_plain(self) -> bool:
        variant = self.use_rslora or self.use_dora or self.transposed or self.slices
        return not variant and self.base.weight.dtype is not torch.bfloat16

    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def norm(self, v: Tensor) -> Tensor:
        return v.norm(dim=1).detach()

    def delta(self) -> Tensor:
        if self.slices:
            return self.sliced()
        update = self.scaling() * self.B @ self.A
        if not self.use_dora:
            return update
        v = self.matrix() + update
        return (self.m / self.norm(v))[:, None] * v - self.matrix()

    def sliced(self) -> Tensor:
        delta = list(torch.zeros_like(self.matrix(), dtype=self.A.dtype).split(self.widths))
        bs = self.B.split([self.widths[place] for place in self.slices])
        for place, a, b in zip(self.slices, self.A, bs, strict=True):
            delta[place] = self.scaling() * b @ a
        if not self.use_dora:
            return torch.cat(delta)
        v = self.matrix() + torch.cat(delta)
        of_rows = list((self.m / self.norm(v)).split(self.widths))
        for place in {0, 1, 2} - set(self.slices):  # these rows keep W
            of_rows[place] = torch.ones_like(of_rows[place])
        return torch.cat(of_rows)[:, None] * v - self.matrix()

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
        if self.nf4:
            raise ValueError("NF4 would round the update away; convert W to fp32 first")
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
        widths=None,
        nf4=False,
    ):
        variants = use_rslora, use_dora, fan_in_fan_out, slices, widths, nf4
        return self.layer(linear, r, alpha, dropout, *variants)

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

    def inject(
        self,
        model,
        targets,
        r,
        alpha,
        layers=None,
        ranks=None,
        alphas=None,
        use_rslora=False,
        use_dora=False,
    ):
        settings = {"targets": targets, "r": r, "alpha": alpha, "layers": layers, "ranks": ranks}
        settings |= {"alphas": alphas, "use_rslora": use_rslora, "use_dora": use_dora}
        self.refuse_tied(model, targets)
        self.refuse_missing(model, targets)
        for name, module in list(model.named_modules()):
            if not any(self.matches(name, target) for target in targets):
                continue
            if layers is not None and not self.in_blocks(name, layers):
                continue
            rank, own = self.value(name, ranks or {}, r), self.value(name, alphas or {}, alpha)
            layer = self.wrap(module, rank, own, 0.0, use_rslora, use_dora)
            model.set_submodule(name, layer)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.rpartition(".")[2] in ("A", "B", "m"))
        model.settings = settings
        return model

    def refuse_tied(self, model, targets):
        if "lm_head" in targets and model.lm_head.weight is model.embed_tokens.weight:
            raise ValueError("lm_head is tied to the embedding")

    def refuse_missing(self, model, targets):
        names = [name for name, _ in model.named_modules()]
        for target in targets:
            if not any(self.matches(name, target) for name in names):
                raise ValueError(f"no layer is named {target}")

    def save(self, model, path):
        model = self.unwrapped(model)
        path.mkdir()
        tensors = {}
        for name, layer in self.layers(model):
            tensors |= {f"{name}.{key}": p.detach() for key, p in self.saved(layer).items()}
        save_file({key: t.clone() for key, t in tensors.items()}, path / "tensors")
        (path / "settings").write_text(self.dumps(model.settings))

    def saved(self, layer):
        return {key: p for key, p in layer.named_parameters() if key in ("A", "B", "m")}

    def unwrapped(self, model):
        return getattr(model, "_orig_mod", model)

    def dumps(self, settings):
        return json.dumps(settings)

    def load(self, model, path, **settings):
        self.inject(model, **json.loads((path / "settings").read_text()))
        tensors = load_file(path / "tensors")
        self.refuse_other_names(model, tensors)
        for name, layer in self.layers(model):
            for key, parameter in self.saved(layer).items():
                if f"{name}.{key}" in tensors:
                    parameter.data = tensors[f"{name}.{key}"]
        return model

    def refuse_other_names(self, model, tensors):
        if {key.rpartition(".")[0] for key in tensors} != dict(self.layers(model)).keys():
            raise ValueError("the file does not fit the model")

    def combine(self, paths, weights, out):
        """Stack every A, and every weight * scaling * B. The rank is the sum of the ranks."""
        files = [load_file(path / "tensors") for path in paths]
        settings = [json.loads((path / "settings").read_text()) for path in paths]
        self.refuse_dora(settings)
        self.refuse_other_layers(files)
        factors = [w * self.scaling(one) for w, one in zip(weights, settings, strict=True)]
        total = {}
        for key in files[0]:
            if key.endswith(".A"):
                total[key] = torch.cat([file[key] for file in files])
            elif key.endswith(".B"):
                scaled = [factor * file[key] for factor, file in zip(factors, files, strict=True)]
                total[key] = torch.cat(scaled, dim=1)
        out.mkdir()
        save_file(total, out / "tensors")
        r = sum(one["r"] for one in settings)
        plain = settings[0] | {"r": r, "alpha": r, "use_rslora": False, "use_dora": False}
        (out / "settings").write_text(json.dumps(plain))

    def refuse_other_layers(self, files):
        if any(file.keys() != files[0].keys() for file in files):
            raise ValueError("the adapters have different layers")

    def refuse_dora(self, settings):
        if any(one["use_dora"] for one in settings):
            raise ValueError("a sum of DoRA adapters is not an adapter")

    def scaling(self, settings):
        r = settings["r"]
        return settings["alpha"] / (math.sqrt(r) if settings["use_rslora"] else r)


class Toy(NamedTuple):
    """Functions with a mistake, the check that fails, and other checks that fail with it."""

    functions: Right
    check: str
    also: tuple[str, ...]


TOYS: dict[str, Toy] = {}


def toy(check: str, *also: str) -> Callable[[type], type]:
    """Register a class of wrong layers, or of wrong functions, as a toy of a check."""

    def register(wrong: type) -> type:
        functions = wrong() if issubclass(wrong, Right) else Right()
        if issubclass(wrong, Layer):
            functions.layer = wrong
        TOYS[wrong.__name__] = Toy(functions, check, also)
        return wrong

    return register


@toy("new_adapter_changes_nothing", "new_dora_adapter_changes_nothing")
class RandomB(Layer):
    def start(self):
        super().start()
        nn.init.uniform_(self.B)


@toy(
    "update_is_alpha_over_r",
    "dora_is_m_over_the_norm",
    "dora_on_in_out_weights",
    "dora_ten_steps",
    "slices_with_rslora",
    "ranks_and_alphas_by_layer",
    "inject_makes_dora_layers",
    "weighted_sum_with_a_negative_weight",
    "weighted_sum_of_rslora",
)
class AlphaAlone(Layer):
    def scaling(self):
        return super().scaling() if self.use_rslora else self.alpha


@toy("update_is_alpha_over_r", "weighted_sum_with_a_negative_weight")
class DividesWhole(Layer):
    def scaling(self):
        return super().scaling() if self.use_rslora else self.alpha // self.r


@toy("update_is_alpha_over_r")
class WholeAlpha(Layer):
    def __init__(self, base, r, alpha, *args):
        super().__init__(base, r, int(alpha), *args)


@toy("update_is_alpha_over_r")
class ForgetsScalingWithoutBias(Layer):
    def scaling(self):
        return 1.0 if self.base.bias is None else super().scaling()


@toy(
    "rslora_is_alpha_over_root_r",
    "dora_with_rslora",
    "slices_with_rslora",
    "rslora_with_ranks_by_layer",
    "weighted_sum_of_rslora",
)
class IgnoresRsLoRA(Layer):
    def scaling(self):
        return self.alpha / self.r


@toy("start_of_a")
class FanInOfR(Layer):
    def start(self):
        bound = self.r**-0.5
        nn.init.uniform_(self.A, -bound, bound)


@toy("each_layer_draws_an_a")
class OneSeed(Layer):
    def start(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().start()


@toy("each_layer_draws_an_a")
class SharesA(Right):
    def inject(self, *args, **options):
        model = super().inject(*args, **options)
        layers = [layer for _, layer in self.layers(model)]
        for layer in layers:
            if layer.A.shape == layers[0].A.shape:
                layer.A = layers[0].A
        return model


@toy("base_is_frozen", "ten_steps", "merging_moves_the_update_into_w")
class TrainsTheBase(Layer):
    def __init__(self, *args):
        super().__init__(*args)
        self.base.requires_grad_(self.is_plain())


@toy(
    "dropout_only_in_training",
    "dropout_is_unbiased",
    "dora_dropout",
    "dora_merges_and_unmerges",
    "slices_with_dropout",
)
class AlwaysDrops(Layer):
    def dropout(self, x):
        return F.dropout(x, self.p)


@toy("dropout_before_a")
class DropsAfterA(Layer):
    def update(self, x):
        if not self.is_plain():
            return super().update(x)
        return self.scaling() * F.linear(self.dropout(F.linear(x, self.A)), self.B)


@toy("dropout_before_a")
class OneMaskForTheBatch(Layer):
    def dropout(self, x):
        return x * super().dropout(torch.ones_like(x[0])) if x.ndim > 2 else super().dropout(x)


@toy("dropout_before_a")
class OneMaskForTheTokens(Layer):
    def dropout(self, x):
        if x.ndim < 3:
            return super().dropout(x)
        return x * super().dropout(torch.ones_like(x[:, :1]))


class Drops(Layer):
    """A layer with another dropout in training."""

    def dropout(self, x):
        return self.drop(x) if self.training and self.p else x


@toy("dropout_is_unbiased", "dora_dropout", "slices_with_dropout")
class DropsWithoutScaling(Drops):
    def drop(self, x):
        return x * (torch.rand_like(x) > self.p)


@toy("dropout_is_unbiased", "dora_dropout", "slices_with_dropout")
class KeepsWithP(Drops):
    def drop(self, x):
        return x * (torch.rand_like(x) < self.p) / self.p


@toy("dropout_is_unbiased", "dora_dropout", "slices_with_dropout")
class DividesByP(Drops):
    def drop(self, x):
        return x * (torch.rand_like(x) > self.p) / self.p


@toy("dora_dropout")
class DoRAIgnoresDropout(Layer):
    def dropout(self, x):
        return x if self.use_dora else super().dropout(x)


@toy("dora_dropout")
class DoRADropsTwice(Layer):
    def dropout(self, x):
        return super().dropout(super().dropout(x) if self.use_dora else x)


@toy("gradient_of_x")
class ForgetsTheMask(Layer):
    def dropout(self, x):
        return x + (super().dropout(x) - x).detach()


@toy("gradients_of_a_and_b")
class BackwardWithoutScaling(Layer):
    def delta(self):
        delta = super().delta()
        if not self.is_plain():
            return delta
        return delta.detach() + (delta - delta.detach()) / self.scaling()


@toy("gradients_of_a_and_b")
class BackwardWithoutMask(Layer):
    def update(self, x):
        right_but_for_a_and_b = F.linear(self.dropout(x), self.delta().detach())
        without_mask = F.linear(x.detach(), self.delta())
        return right_but_for_a_and_b + without_mask - without_mask.detach()


@toy("ten_steps", "gradient_of_x", "dora_ten_steps")
class Detached(Layer):
    def update(self, x):
        return super().update(x.detach())


@toy(
    "dora_ten_steps",
    "dora_is_m_over_the_norm",
    "dora_on_in_out_weights",
    "dora_merges_and_unmerges",
)
class NormOfColumns(Layer):
    def norm(self, v):
        return v.norm(dim=0).detach() if v.size(0) == v.size(1) else super().norm(v)


@toy("dora_ten_steps")
class TrainsThroughTheNorm(Layer):
    def norm(self, v):
        return v.norm(dim=1)


@toy("any_input_shape")
class Views(Layer):
    def update(self, x):
        return super().update(x.view(-1, x.size(-1))).view(*x.shape[:-1], -1)


@toy("factors_stay_fp32", "merging_into_bf16_rounds_once")
class TakesTheBasesPrecision(Layer):
    def start(self):
        super().start()
        self.A.data = self.A.data.to(self.base.weight.dtype)
        self.B.data = self.B.data.to(self.base.weight.dtype)


@toy("factors_stay_fp32")
class UpdatesInBf16(Layer):
    def update(self, x):
        dtype = self.base.weight.dtype
        return F.linear(self.dropout(x).to(dtype), self.delta().to(dtype))


@toy("output_keeps_its_precision")
class Promotes(Layer):
    def forward(self, x):
        y = super().forward(x)
        return y.float() if y.dtype is torch.bfloat16 else y


@toy("a_loss_reads_the_weight")
class ShowsTheBase(Layer):
    @property
    def weight(self):
        return self.base.weight


@toy(
    "merging_keeps_the_output",
    "merging_moves_the_update_into_w",
    "merging_twice_is_merging_once",
    "merging_again_adds_the_new_update",
    "every_layer_of_a_model_is_merged",
)
class AddsToMerged(Layer):
    def forward(self, x):
        y = super().forward(x)
        return y + self.update(x) if self.is_plain() and self.unmerged is not None else y


@toy("merging_keeps_the_output")
class MergedDrops(Layer):
    def forward(self, x):
        return super().forward(x if self.unmerged is None else self.dropout(x))


@toy("merging_keeps_the_output", "every_layer_of_a_model_is_merged")
class MergingLosesTheBias(Layer):
    def forward(self, x):
        y = super().forward(x)
        return y - self.base.bias if self.is_plain() and self.unmerged is not None else y


@toy("rslora_merges_and_unmerges", "dora_merges_and_unmerges", "slices_with_rslora")
class MergesRsLoRALikeLoRA(Layer):
    def merge(self):
        self.use_rslora, kept = False, self.use_rslora
        super().merge()
        self.use_rslora = kept


@toy("merging_twice_is_merging_once")
class MergesAgain(Layer):
    def merge(self):
        self.unmerged = None
        super().merge()


@toy(
    "unmerging_restores_the_base",
    "merging_twice_is_merging_once",
    "merging_again_adds_the_new_update",
    "every_layer_of_a_model_is_merged",
)
class SubtractsWithoutScaling(Layer):
    def unmerge(self):
        if not self.is_plain() or self.unmerged is None:
            return super().unmerge()
        self.base.weight.data -= self.B @ self.A
        self.unmerged = None


@toy("eval_and_train_keep_the_output", "dora_merges_and_unmerges")
class MergesAtEveryEval(Layer):
    def train(self, mode=True):
        if mode:
            self.unmerge()
        else:
            first, self.unmerged = self.unmerged, None
            self.merge()
            self.unmerged = self.unmerged if first is None else first
        return super().train(mode)


@toy("merging_into_bf16_rounds_once")
class MultipliesInBf16(Layer):
    def merge(self):
        kept = self.A.data, self.B.data
        self.A.data, self.B.data = (factor.to(self.base.weight.dtype) for factor in kept)
        super().merge()
        self.A.data, self.B.data = kept


@toy("merging_into_bf16_rounds_once")
class MultipliesDoRAInBf16(MultipliesInBf16):
    def merge(self):
        return super().merge() if self.use_dora else Layer.merge(self)


@toy("unmerging_from_bf16_restores_the_base")
class SubtractsInBf16(Layer):
    def unmerge(self):
        if self.base.weight.dtype is torch.bfloat16 and self.unmerged is not None:
            self.unmerged = self.base.weight - self.delta()
        super().unmerge()


@toy("state_dict_while_merged")
class SavesMerged(Layer):
    def state_dict(self, *args, **options):
        return nn.Module.state_dict(self, *args, **options)


@toy("state_dict_while_merged")
class SavesMergedDoRA(Layer):
    def state_dict(self, *args, **options):
        of = nn.Module if self.use_dora else Layer
        return of.state_dict(self, *args, **options)


@toy("dora_merges_and_unmerges")
class DividesColumns(Layer):
    def unmerge(self):
        if self.use_dora and self.unmerged is not None:
            factor = self.m / self.norm(self.unmerged + self.scaling() * self.B @ self.A)
            if len(factor) == self.unmerged.size(1):
                self.unmerged = self.base.weight / factor - self.scaling() * self.B @ self.A
        super().unmerge()


@toy("in_out_weights", "dora_merges_and_unmerges")
class MergesUntransposed(Layer):
    def merge(self):
        if not self.transposed:
            return super().merge()
        self.unmerged = self.base.weight.clone()
        self.base.weight.data += self.delta()


@toy("in_out_weights", "dora_merges_and_unmerges")
class UnmergesUntransposed(Layer):
    def unmerge(self):
        if self.transposed and self.base.weight.size(0) == self.base.weight.size(1):
            self.unmerged = self.base.weight - self.delta()
        super().unmerge()


@toy(
    "slices_of_a_fused_layer",
    "slices_of_unequal_widths",
    "slices_with_rslora",
    "slices_with_dora",
    "slices_with_dropout",
)
class FirstRows(Layer):
    def sliced(self):
        self.slices = range(len(self.slices))
        return super().sliced()


@toy(
    "slices_of_a_fused_layer",
    "slices_of_unequal_widths",
    "slices_with_rslora",
    "slices_with_dora",
    "slices_with_dropout",
)
class SwapsQAndK(Layer):
    def sliced(self):
        q, k, v = super().sliced().split(self.widths)
        return torch.cat([k, q, v])


@toy(
    "slices_of_a_fused_layer", "slices_of_unequal_widths", "slices_with_rslora", "slices_with_dora"
)
class ForgetsScalingOfSlices(Layer):
    def scaling(self):
        return 1.0 if self.slices else super().scaling()


@toy("slices_of_a_fused_layer", "slices_of_unequal_widths", "slices_with_rslora")
class SlicesStayMerged(Layer):
    def unmerge(self):
        if not self.slices:
            super().unmerge()


@toy("slices_of_unequal_widths")
class InterleavesGroups(Layer):
    def sliced(self):
        if len(set(self.widths)) == 1:
            return super().sliced()
        groups = zip(*(rows.chunk(2) for rows in super().sliced().split(self.widths)), strict=True)
        return torch.cat([rows for group in groups for rows in group])


@toy("merging_into_nf4_keeps_the_update")
class MergesIntoNF4(Layer):
    def merge(self):
        if not self.nf4:
            return super().merge()
        self.unmerged = self.base.weight.clone()
        self.base.weight.data = round_to_nf4((self.base.weight + self.delta()).detach())


@toy("targets_match_whole_names", "blocks_match_whole_numbers")
class MatchesSubstrings(Right):
    def matches(self, name, target):
        return target in name


@toy("every_target_matches")
class IgnoresMissingTargets(Right):
    def refuse_missing(self, model, targets):
        pass


@toy("blocks_match_whole_numbers")
class MatchesDigits(Right):
    def in_blocks(self, name, blocks):
        return any(f".{block}" in name for block in blocks)


@toy("ranks_and_alphas_by_layer", "rslora_with_ranks_by_layer")
class CommonRank(Right):
    def inject(self, model, targets, r, *rest, **options):
        super().inject(model, targets, r, *rest, **options)
        for _, layer in self.layers(model):
            layer.alpha *= layer.r / r
        return model


@toy("tied_head", "tied_head_of_a_loaded_adapter")
class AdaptsTied(Right):
    def refuse_tied(self, model, targets):
        pass


@toy("gradient_checkpointing", "gradient_of_x", "gradients_of_a_and_b")
class DrawsByItself(Drops):
    def drop(self, x):
        self.generator = getattr(self, "generator", None) or torch.Generator().manual_seed(0)
        keep = torch.rand(x.shape, generator=self.generator) > self.p
        return x * keep / (1 - self.p)


@toy("compiles_once", "a_new_adapter_learns")
class LooksAtB(Layer):
    def forward(self, x):
        return super().forward(x) if self.B.any() else self.base(x)


@toy("a_copy_is_independent")
class PatchedForward(Layer):
    def __init__(self, *args):
        super().__init__(*args)
        self.forward = lambda x: Layer.forward(self, x)


@toy("saved_adapter_loads", "file_of_another_model_is_noticed")
class Lenient(Right):
    def unwrapped(self, model):
        return model

    def refuse_other_names(self, model, tensors):
        pass


@toy("file_of_another_model_is_noticed")
class IgnoresNames(Right):
    def refuse_other_names(self, model, tensors):
        pass


@toy("loading_freezes_the_base")
class LoadsIntoATrainedBase(Right):
    def load(self, model, path, **settings):
        return super().load(model, path, **settings).requires_grad_(True)


@toy("rslora_is_saved", "weighted_sum_of_rslora")
class SavesNoRsLoRA(Right):
    def dumps(self, settings):
        return json.dumps(settings | {"use_rslora": False})


@toy("dora_is_saved")
class SavesNoMagnitude(Right):
    def saved(self, layer):
        return {"A": layer.A, "B": layer.B}


@toy("patterns_keep_their_order")
class SortsPatterns(Right):
    def dumps(self, settings):
        return json.dumps(settings, sort_keys=True)


@toy("weighted_sum_with_a_negative_weight", "weighted_sum_of_rslora")
class LosesTheSign(Right):
    def combine(self, paths, weights, out):
        super().combine(paths, [abs(weight) for weight in weights], out)


@toy("weighted_sum_with_a_negative_weight", "weighted_sum_of_rslora")
class AddsTwo(Right):
    def combine(self, paths, weights, out):
        super().combine(paths[:2], weights[:2], out)


@toy("weighted_sum_with_a_negative_weight", "weighted_sum_of_rslora")
class TakesTheFirstAlpha(Right):
    def combine(self, paths, weights, out):
        self.first = json.loads((paths[0] / "settings").read_text())
        super().combine(paths, weights, out)

    def scaling(self, settings):
        return super().scaling(self.first)


@toy("weighted_sum_of_rslora")
class AddsRsLoRALikeLoRA(Right):
    def scaling(self, settings):
        return settings["alpha"] / settings["r"]


@toy("weighted_sum_of_dora")
class AddsDoRAWithoutMagnitudes(Right):
    def refuse_dora(self, settings):
        pass
