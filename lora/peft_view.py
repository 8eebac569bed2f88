"""Describe how PEFT sees a model: its modules' PEFT names (`lora/targets.py`), and the PEFT class
that wraps it.

PEFT sees our GPT-2 as transformers' GPT2LMHeadModel, as the model's attribute `peft_sees` declares.
There, `lm_head` is a module, all other modules are in `transformer`, and projections are stored as
(in, out).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class PeftView:
    """A model as PEFT sees it."""

    prefix: str = ""  # of each PEFT name
    task_type: str | None = None  # selects PEFT's wrapper class (None: PeftModel)
    fan_in_fan_out: bool = False  # whether W is stored as (in, out)
    ties: Mapping[str, str] = field(default_factory=dict)  # PEFT names of tied modules -> reasons
    fused: str | None = None  # the layer that computes q, k and v


GPT2_VIEW = PeftView(
    prefix="transformer.",
    task_type="CAUSAL_LM",
    fan_in_fan_out=True,
    ties={"lm_head": "the head is tied to wte", "transformer.wte": "wte is tied to the head"},
    fused="c_attn",
)


def peft_view(model: nn.Module) -> PeftView:
    """Return PEFT's view of a model that declares `peft_sees`, of a model from the transformers
    library, or of any other module."""
    if hasattr(model, "can_generate"):
        return PeftView(task_type=_task_type(model))
    if getattr(model, "peft_sees", None) == "GPT2LMHeadModel":
        return GPT2_VIEW
    return PeftView()


def _task_type(model: Any) -> str | None:
    """Return PEFT's task type for a transformers model that reads tokens and generates text. For
    any other model, return None.
    """
    if not model.can_generate() or model.main_input_name != "input_ids":
        return None
    is_encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    return "SEQ_2_SEQ_LM" if is_encoder_decoder else "CAUSAL_LM"
