"""Twenty-two mistakes that shipped, taken from threads that do not know the bench.

Each names its thread and the check that must find it. "" stands for a mistake that no check finds.
"""

import torch
import torch.nn.functional as F
from torch import nn

from tests.conformance.toys import Layer, Right

MISTAKES: dict[str, tuple[Right, str]] = {}


def shipped(thread, check):
    def register(wrong):
        functions = wrong() if issubclass(wrong, Right) else Right()
        if issubclass(wrong, Layer):
            functions.layer = wrong
        MISTAKES[f"{thread} {wrong.__name__}"] = functions, check
        return wrong

    return register


class MergesWith(Layer):
    """Merges with another scaling."""

    merging = False

    def merge(self):
        self.merging = True
        super().merge()
        self.merging = False

    def scaling(self):
        return self.other() if self.merging else super().scaling()


@shipped("paiml/aprender #2189", "rslora_merges_and_unmerges")
class MergesRsLoRAUnscaled(MergesWith):
    def other(self):
        return 1.0 if self.use_rslora else Layer.scaling(self)


@shipped("FastVideo #870", "merging_keeps_the_output")
class MergesUnscaled(MergesWith):
    def scaling(self):
        return 1.0 if self.merging else super().scaling()


@shipped("verl #3050", "merging_keeps_the_output")
class MergesWithAlphaZero(MergesWith):
    def other(self):
        return 0.0


@shipped("cosmos-predict2.5 #15", "start_of_a")
class StartsAtZero(Layer):
    def start(self):
        nn.init.zeros_(self.A)


@shipped("paiml/aprender #2232", "ten_steps")
class SeversTheGraph(Layer):
    def update(self, x):
        return super().update(x).detach()

    def forward(self, x):
        y = super().forward(x)
        return y if self.unmerged is not None else y + 0 * (self.A.sum() + self.B.sum())


@shipped("paiml/aprender #2092", "eval_and_train_keep_the_output")
class PlainInTraining(Layer):
    def forward(self, x):
        return self.base(x) if self.training else super().forward(x)


@shipped("SteerableConditionalDiffusion #1", "loading_freezes_the_base")
class TrainsEverything(Right):
    def inject(self, *args, **options):
        return super().inject(*args, **options).requires_grad_(True)


@shipped("peft #3111", "weighted_sum_with_a_negative_weight")
class SumsScaledTwice(Right):
    def scaling(self, settings):
        return super().scaling(settings) ** 2


@shipped("sglang #18883", "unmerging_restores_the_base")
class SharesTheCopyOfW(Layer):
    def merge(self):
        merged = self.unmerged is not None
        super().merge()
        if not merged:
            self.unmerged = self.base.weight.detach()


@shipped("candle-lora #26", "merging_moves_the_update_into_w")
class MergesACopy(Layer):
    def merge(self):
        self.base.weight.clone().add_(1)


@shipped("mlx-examples #396", "saved_adapter_loads")
class LoadsOnlyTheSettings(Right):
    def saved(self, layer):
        return {key: p for key, p in super().saved(layer).items() if key == "A"}


@shipped("peft #2348", "dora_is_m_over_the_norm")
class NormOfInputs(Layer):
    def norm(self, v):
        return v.norm(dim=0 if v.size(0) == v.size(1) else 1).detach()


@shipped("ComfyUI #15458", "dora_is_m_over_the_norm")
class NormOfW(Layer):
    def norm(self, v):
        return super().norm(self.matrix())


@shipped("stable-diffusion-webui #16151", "dora_is_m_over_the_norm")
class ScalesTheDifference(Layer):
    def delta(self):
        if not self.use_dora:
            return super().delta()
        v = self.matrix() + self.B @ self.A
        decomposed = (self.m / self.norm(v))[:, None] * v
        return self.scaling() * (decomposed - self.matrix())


@shipped("fsdp_qlora #68", "dora_is_m_over_the_norm")
class DoRAIgnoresAlpha(Layer):
    def scaling(self):
        return 1.0 if self.use_dora else super().scaling()


@shipped("microsoft/LoRA #105", "slices_of_a_fused_layer")
class MergesSlicesIntoTheFirstRows(Layer):
    def merge(self):
        kept = self.slices
        self.slices = tuple(range(len(kept)))
        super().merge()
        self.slices = kept


@shipped("Megatron-LM #411", "dropout_only_in_training")
class NoDropoutAfterEval(Layer):
    def dropout(self, x):
        if not self.training:
            self.p = 0.0
        return F.dropout(x, self.p, self.training)


@shipped("peft #3318", "blocks_match_whole_numbers")
class TakesTheLastNumber(Right):
    def in_blocks(self, name, blocks):
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        return numbers[-1] in blocks


@shipped("vllm #10844", "slices_of_a_fused_layer")
class SlicesLoseTheBias(Layer):
    def forward(self, x):
        y = super().forward(x)
        return y - self.base.bias if self.slices else y


@shipped("peft #2194", "ranks_and_alphas_by_layer")
class LooksAlphaUpByTheRanksKey(Right):
    def inject(self, model, targets, r, alpha, layers=None, ranks=None, alphas=None, **options):
        found = {key: value for key, value in (alphas or {}).items() if key in (ranks or {})}
        return super().inject(model, targets, r, alpha, layers, ranks, found, **options)


@shipped("sglang #24239", "slices_of_unequal_widths")
class LosesV(Layer):
    def sliced(self):
        delta = super().sliced()
        if len(set(self.widths)) == 1:
            return delta
        return torch.cat([delta[: -self.widths[2]], 0 * delta[-self.widths[2] :]])


@shipped("onediff #926", "saved_adapter_loads")
class SavesTheScaling(Right):
    def saved(self, layer):
        found = super().saved(layer)
        return found | {"A": layer.scaling() * layer.A} if not layer.use_dora else found
