"""LoRA+: train B at a higher learning rate than A."""

from collections.abc import Mapping

from torch import Tensor


def parameter_groups(parameters: Mapping[str, Tensor], ratio: float | None) -> list[dict]:
    """Return an optimizer's groups, each with `scale`, the factor of its learning rate.

    LoRA+ gives B, and DoRA's vectors, `ratio` times A's learning rate (Hayou et al. 2024,
    https://arxiv.org/abs/2402.12354; the groups are those of PEFT's create_loraplus_optimizer).
    A `ratio` of None leaves one group.
    """
    if ratio is None:
        return [{"params": list(parameters.values()), "scale": 1.0}]

    slower = []
    faster = []
    for name, parameter in parameters.items():
        if "lora_B" in name or parameter.ndim == 1:
            faster.append(parameter)
        else:
            slower.append(parameter)
    return [{"params": slower, "scale": 1.0}, {"params": faster, "scale": ratio}]
