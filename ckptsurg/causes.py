"""Why frozen tensors moved: the cause codes."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CAUSES", "UNSETTLED", "Cause", "explained"]

#: What stands for a cause that the evidence does not settle.
UNSETTLED = "not settled"


@dataclass(frozen=True, slots=True)
class Cause:
    """A mechanism that moves frozen tensors.

    Attributes:
        explanation: What happens, in one sentence.
        remedy: What to do about it, in one sentence.
    """

    explanation: str
    remedy: str


CAUSES = {
    "zero_grad_not_none": Cause(
        "its gradient was zero instead of None, and momentum, Adam's averages and weight decay move what has one",
        "freeze before the optimizer is built, and clear gradients with zero_grad(set_to_none=True)",
    ),
    "weight_decay": Cause(
        "weight decay alone moves it: values shrink by one ratio, though no gradient reaches them",
        "build the optimizer from the trainable parameters alone; ckptsurg.freeze holds frozen rows of one that trains",
    ),
    "late_freeze": Cause(
        "requires_grad was turned off after the backward pass, so the gradient was there and the step used it",
        "freeze before the backward pass, or set the gradient to None when freezing",
    ),
    "stale_optimizer": Cause(
        "the optimizer holds a parameter that was replaced in the model since",
        "build the optimizer after whatever replaces parameters: sharding, a new head, loading with assign=True",
    ),
    "optimizer_ignores_none": Cause(
        "the optimizer moved a parameter that had no gradient",
        "give this optimizer the trainable parameters alone",
    ),
    "never_frozen": Cause(
        "its requires_grad was on from the beginning, and the optimizer moved it like any other",
        "freeze with ckptsurg.freeze, which refuses patterns that match nothing and checks the flags",
    ),
    "reenabled": Cause(
        "requires_grad was turned on again after the freeze, or another parameter was put in its place that has it on",
        "freeze after whatever did that, and build the optimizer after the freeze",
    ),
    "tied": Cause(
        "it shares its storage with a parameter that trains",
        "freeze both or neither, or untie them",
    ),
    "reparametrised": Cause(
        "a reparametrisation keeps it under other names and computes it anew",
        "freeze before the reparametrisation or without it, or remove it before saving",
    ),
    "batchnorm_stats": Cause(
        "running statistics are buffers, and follow the data whenever their layer is in training mode",
        "freeze with ckptsurg.freeze, which keeps the layer in evaluation mode, and leave its `training` alone",
    ),
    "spectral_norm": Cause(
        "spectral normalisation refines its vectors at every forward pass in training mode",
        "freeze with ckptsurg.freeze, which keeps it in evaluation mode, and leave its `training` alone",
    ),
    "embedding_max_norm": Cause(
        "the forward pass of an embedding with max_norm shrinks the rows that it looks up",
        "renormalise once and set max_norm to None, or leave the embedding out of the freeze",
    ),
    "observer": Cause(
        "a quantisation observer records the range of what it sees at every forward pass",
        "turn observers off before freezing: model.apply(torch.ao.quantization.disable_observer)",
    ),
    "router_bias": Cause(
        "load balancing writes the router's bias outside the optimizer",
        "turn the update of the router's bias off, or let the bias train",
    ),
    "merge_roundtrip": Cause(
        "an adapter was merged and unmerged, and rounding does not give every value back",
        "save without merging, or keep the base weights and save the adapter alone",
    ),
    "ema_rounding": Cause(
        "values moved by an ulp or so, as in a moving average of weights that stand still",
        "leave frozen tensors out of the average, or save the model itself",
    ),
    "dtype_only": Cause(
        "the values went through a cast to another dtype",
        "keep the published dtype in memory and in the file; autocast computes in another without casting weights",
    ),
    "sign_of_zero": Cause(
        "zeros changed their sign, as adding 0.0 to -0.0 does",
        "do not compute with frozen weights: copy them",
    ),
    "nan_payload": Cause(
        "NaNs changed their bits, as any arithmetic on them may",
        "do not compute with frozen weights: copy them",
    ),
    "not_saved": Cause(
        "it was left out when the checkpoint was saved",
        "save all parameters, not only those that train; or verify the base that it is loaded from",
    ),
}


def explained(code: str) -> str:
    """A cause with its explanation and remedy, in one line."""
    return f"{code}: {CAUSES[code].explanation}; {CAUSES[code].remedy}"
