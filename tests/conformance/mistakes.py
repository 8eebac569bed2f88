"""Mistakes that an earlier bench passed, each with the check that must find it.

They are the blind spots that a maintainer found. Like the toys, they change `Right` in one place.
"""

import json
import math

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_conformance.checks.merging import round_to_nf4
from tests.conformance.toys import Layer, Right

MISTAKES: dict[str, tuple[Right, str]] = {}


def mistake(check):
    def register(wrong):
        functions = wrong() if issubclass(wrong, Right) else Right()
        if issubclass(wrong, Layer):
            functions.layer = wrong
        MISTAKES[wrong.__name__] = functions, check
        return wrong

    return register


class NoMerge(Layer):
    """Neither merges nor unmerges, for some kinds of layers."""

    def applies(self):
        raise NotImplementedError

    def merge(self):
        return None if self.applies() else super().merge()


NO_OP = "merging_moves_the_update_into_w"


@mistake(NO_OP)
class NoOpDoRA(NoMerge):
    def applies(self):
        return self.use_dora


@mistake(NO_OP)
class NoOpBf16(NoMerge):
    def applies(self):
        return self.base.weight.dtype is torch.bfloat16


@mistake(NO_OP)
class NoOpSlices(NoMerge):
    def applies(self):
        return self.slices


@mistake(NO_OP)
class NoOpInOut(NoMerge):
    def applies(self):
        return self.transposed


@mistake(NO_OP)
class NoOpRsLoRA(NoMerge):
    def applies(self):
        return self.use_rslora


@mistake(NO_OP)
class NoOpWithoutDropout(NoMerge):
    def applies(self):
        return not self.p


@mistake(NO_OP)
class NoDropoutAndNoMerge(Right):
    def wrap(self, linear, r, alpha, dropout, **options):
        if dropout:
            raise NotImplementedError("there is no dropout")
        return super().wrap(linear, r, alpha, dropout, **options)

    def merge(self, module):
        pass

    def unmerge(self, module):
        pass


@mistake("merging_into_nf4_keeps_the_update")
class NoOpNF4(NoMerge):
    def applies(self):
        return self.nf4


@mistake("every_layer_of_a_model_is_merged")
class MergesTheFirst(Right):
    def merge(self, module):
        self.layers(module)[0][1].merge()


@mistake("every_layer_of_a_model_is_merged")
class SkipsAfterTheSecond(Right):
    def merge(self, module):
        for _, layer in self.layers(module)[:2]:
            layer.merge()


@mistake("every_layer_of_a_model_is_merged")
class UnmergesTheFirst(Right):
    def unmerge(self, module):
        self.layers(module)[0][1].unmerge()


@mistake("new_dora_adapter_changes_nothing")
class MagnitudesOfARandomLayer(Layer):
    def __init__(self, *args):
        super().__init__(*args)
        if self.use_dora:
            self.m.data = self.norm(torch.randn_like(self.matrix()) / 4)


@mistake("dora_on_in_out_weights")
class NormOfRowsInOut(Layer):
    def norm(self, v):
        square = self.transposed and v.size(0) == v.size(1)
        return v.norm(dim=0 if square else 1).detach()


class InjectIgnores(Right):
    def inject(self, *args, use_rslora=False, use_dora=False, ranks=None, **options):
        use_rslora, use_dora = self.kept(use_rslora, use_dora, ranks)
        given = {"use_rslora": use_rslora, "use_dora": use_dora, "ranks": ranks}
        return super().inject(*args, **given, **options)


@mistake("inject_makes_dora_layers")
class InjectIgnoresDoRA(InjectIgnores):
    def kept(self, use_rslora, use_dora, ranks):
        return use_rslora, False


@mistake("rslora_with_ranks_by_layer")
class InjectIgnoresRsLoRA(InjectIgnores):
    def kept(self, use_rslora, use_dora, ranks):
        return False, use_dora


@mistake("rslora_with_ranks_by_layer")
class InjectIgnoresRsLoRAWithRanks(InjectIgnores):
    def kept(self, use_rslora, use_dora, ranks):
        return use_rslora and not ranks, use_dora


@mistake("merging_into_bf16_rounds_once")
class RoundsTwice(Layer):
    def delta(self):
        delta = super().delta()
        if self.base.weight.dtype is torch.bfloat16:
            delta = delta.bfloat16().float()
        return delta


@mistake("dora_with_rslora")
class DoRAForgetsRsLoRA(Layer):
    def scaling(self):
        return self.alpha / self.r if self.use_dora else super().scaling()


@mistake("dora_dropout")
class DoRAWithDropoutIsLoRA(Layer):
    def delta(self):
        if not (self.use_dora and self.p and self.training):
            return super().delta()
        return self.scaling() * self.B @ self.A


@mistake("slices_with_rslora")
class SlicesForgetRsLoRA(Layer):
    def scaling(self):
        return self.alpha / self.r if self.slices else super().scaling()


@mistake("each_layer_draws_an_a")
class SlicesDrawOneA(Layer):
    def start(self):
        super().start()
        if self.slices:
            self.A.data[:] = self.A.data[0].clone()


@mistake("dropout_only_in_training")
class LeavesEvaluation(Right):
    def wrap(self, *args, **options):
        return super().wrap(*args, **options).eval()


@mistake("loading_freezes_the_base")
class LoadingUntiesTheHead(Right):
    def load(self, model, path, **settings):
        super().load(model, path, **settings)
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.data.clone(), False)
        return model


@mistake("slices_with_dropout")
class SlicesIgnoreDropout(Layer):
    def dropout(self, x):
        return x if self.slices else super().dropout(x)


@mistake("slices_with_dora")
class SlicesIgnoreDoRA(Layer):
    def sliced(self):
        kept, self.use_dora = self.use_dora, False
        delta = super().sliced()
        self.use_dora = kept
        return delta


@mistake("dora_magnitudes_stay_fp32")
class MagnitudesInBf16(Layer):
    def __init__(self, *args):
        super().__init__(*args)
        if self.use_dora:
            self.m.data = self.m.data.to(self.base.weight.dtype)


@mistake("loading_keeps_each_precision")
class LoadsIntoTheBasesPrecision(Right):
    def load(self, model, path, **settings):
        super().load(model, path, **settings)
        for _, layer in self.layers(model):
            for parameter in self.saved(layer).values():
                parameter.data = parameter.data.to(layer.base.weight.dtype)
        return model


@mistake("tied_head_of_a_loaded_adapter")
class LoadsATiedHead(Right):
    loading = False

    def load(self, model, path, **settings):
        self.loading = True
        return super().load(model, path, **settings)

    def refuse_tied(self, model, targets):
        if not self.loading:
            super().refuse_tied(model, targets)


@mistake("saving_while_merged")
class SavesZerosWhileMerged(Right):
    def saved(self, layer):
        scale = 0 if layer.unmerged is not None else 1
        return {key: scale * p if scale == 0 else p for key, p in super().saved(layer).items()}


@mistake("ranks_and_alphas_by_layer")
class KeyMatchesABeginning(Right):
    def value(self, name, patterns, common):
        keys = {key.removesuffix(".proj"): value for key, value in patterns.items()}
        return next((v for k, v in keys.items() if k in name), common)


@mistake("weighted_sum_of_other_layers")
class SumsTheLayersOfTheFirst(Right):
    def combine(self, paths, weights, out):
        keys = load_file(paths[0] / "tensors").keys()
        for path in paths[1:]:
            file = load_file(path / "tensors")
            first = load_file(paths[0] / "tensors")
            save_file({k: file.get(k, torch.zeros_like(first[k])) for k in keys}, path / "tensors")
        super().combine(paths, weights, out)


@mistake("weighted_sum_with_a_negative_weight")
class SumsEqualRanksApart(Right):
    def combine(self, paths, weights, out):
        files = [load_file(path / "tensors") for path in paths]
        settings = [json.loads((path / "settings").read_text()) for path in paths]
        if len({one["r"] for one in settings}) > 1 or settings[0]["layers"]:
            return super().combine(paths, weights, out)
        total = {}
        for key in files[0]:
            parts = []
            for file, weight, one in zip(files, weights, settings, strict=True):
                factor = math.sqrt(abs(weight) * self.scaling(one))
                parts.append(
                    (factor if key.endswith("A") else math.copysign(factor, weight)) * file[key]
                )
            total[key] = sum(parts)
        out.mkdir()
        save_file(total, out / "tensors")
        plain = settings[0] | {"alpha": settings[0]["r"], "use_rslora": False}
        (out / "settings").write_text(json.dumps(plain))


@mistake("every_layer_of_a_model_is_merged")
class UnmergesTwoBlocks(Right):
    def unmerge(self, module):
        for _, layer in self.layers(module)[:4]:
            layer.unmerge()


@mistake("merging_keeps_the_base_frozen")
class TrainsTheMergedBase(Layer):
    def merge(self):
        super().merge()
        self.base.weight = nn.Parameter(self.base.weight.data)


@mistake("merging_keeps_the_base_frozen")
class TrainsTheUnmergedBase(Layer):
    def unmerge(self):
        super().unmerge()
        self.base.weight = nn.Parameter(self.base.weight.data)


@mistake("update_is_alpha_over_r")
class ScalingInBf16(Layer):
    def scaling(self):
        return torch.tensor(super().scaling()).bfloat16().item()


@mistake("a_new_adapter_learns")
class SkipsWhileBIsZero(Layer):
    def forward(self, x):
        return torch.where(self.B.any(), super().forward(x), self.base(x))


@mistake("merging_again_adds_the_new_update")
class KeepsTheFirstUpdate(Layer):
    def merge(self):
        first = self.__dict__.setdefault("first", self.delta())
        kept, self.delta = self.delta, lambda: first
        super().merge()
        self.delta = kept


@mistake("nf4_keeps_its_numbers")
class BlocksOfColumns(Layer):
    def __init__(self, *args):
        super().__init__(*args)
        if self.nf4:
            self.base.weight.data = round_to_nf4(self.base.weight.data.T.contiguous()).T


@mistake("a_frozen_adapter_is_saved")
class SavesWhatTrains(Right):
    def saved(self, layer):
        return {key: p for key, p in super().saved(layer).items() if p.requires_grad}

    def refuse_other_names(self, model, tensors):
        pass
