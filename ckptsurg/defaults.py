"""What ``default`` means: the ``reset_parameters`` of the torch module that owns a tensor, read off its siblings.

The rules are those of torch.nn (torch/nn/modules/*.py); a test compares each with a fresh module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod, sqrt

from .initializer_arguments import Initializer
from .tensors import TensorInfo

__all__ = ["Ambiguous", "resolve_default"]

_NORMS = frozenset(
    (
        *("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "GroupNorm", "LayerNorm", "RMSNorm"),
        *("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"),
    )
)
_RECURRENT = frozenset(("RNN", "LSTM", "GRU"))

_ZEROS = Initializer(name="zeros")
_ONES = Initializer(name="ones")


class Ambiguous(ValueError):
    """The module cannot be told from the tensor and its siblings."""


def resolve_default(name: str, info: TensorInfo, siblings: Mapping[str, TensorInfo], module: str | None) -> Initializer:
    """The initializer that ``default`` stands for.

    Args:
        name: Last segment of the tensor's name.
        info: Its dtype and (new) shape.
        siblings: All tensors of the same module by last segment, with their new shapes, this one included.
        module: The class of torch.nn where the user named it.

    Raises:
        Ambiguous: with a message that says what to write.
    """
    if name in ("running_mean", "num_batches_tracked") and (module in _NORMS or "running_var" in siblings):
        return _ZEROS
    if name == "running_var" and (module in _NORMS or "running_mean" in siblings):
        return _ONES
    return _RULES.get(module or _owner(name, info, siblings), _linear_or_convolution)(name, info, siblings)


def _owner(name: str, info: TensorInfo, siblings: Mapping[str, TensorInfo]) -> str:
    """The class of torch.nn that has these tensors."""
    weight, bias = siblings.get("weight"), siblings.get("bias")
    if name.startswith(("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr_l")):
        return "RNN"
    if name in (
        "in_proj_weight",
        "in_proj_bias",
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
        "bias_k",
        "bias_v",
    ):
        return "MultiheadAttention"
    if name not in ("weight", "bias") or weight is None:
        raise Ambiguous(
            f"`default` cannot tell which module owns it, no sibling is called weight; write {_line('Linear')}"
        )
    rank = len(weight.shape)
    if bias is not None and weight.shape == bias.shape:
        return "LayerNorm"
    if "running_mean" in siblings:
        return "BatchNorm2d"
    if bias is None and rank == 1:
        raise Ambiguous(f"`default` cannot tell a norm from a PReLU; write {_line('RMSNorm')} or {_line('PReLU')}")
    if bias is None and rank == 2:
        raise Ambiguous(
            f"`default` cannot tell a Linear from an Embedding; write {_line('Linear')} or {_line('Embedding')}"
        )
    if rank < 2:
        raise Ambiguous(f"`default` knows no module with a weight of shape {list(weight.shape)}; write another init")
    return "Linear" if rank == 2 else "Conv2d"


def _line(module: str) -> str:
    return f"init: {{default: {module}}}"


def _uniform(bound: float) -> Initializer:
    return Initializer(name="uniform", arguments={"a": -bound, "b": bound})


def _norm(name: str, info: TensorInfo, siblings: Mapping[str, TensorInfo]) -> Initializer:
    return _ZEROS if name == "bias" else _ONES


def _embedding(name: str, info: TensorInfo, siblings: Mapping[str, TensorInfo]) -> Initializer:
    return Initializer(name="normal", arguments={"mean": 0.0, "std": 1.0})


def _prelu(name: str, info: TensorInfo, siblings: Mapping[str, TensorInfo]) -> Initializer:
    return Initializer(name="constant", arguments={"val": 0.25})


def _linear_or_convolution(name: str, info: TensorInfo, siblings: Mapping[str, TensorInfo]) -> Initializer:
    """``kaiming_uniform_(weight, a=sqrt(5))``; the bias within 1 / sqrt(fan-in of the weight)."""
    if name != "bias":
        if len(info.shape) < 2:
            raise Ambiguous(f"{list(info.shape)} is no shape of such a module's weight; write another init")
        arguments = {"a": sqrt(5), "mode": "fan_in", "nonlinearity": "leaky_relu"}
        return Initializer(name="kaiming_uniform", arguments=arguments)
    weight = siblings.get("weight")
    if weight is None or len(weight.shape) < 2:
        raise Ambiguous(
            "`default` needs the fan-in of the weight beside this bias, and there is none; write init: zeros"
        )
    fan_in = prod(weight.shape[1:])
    return _uniform(1 / sqrt(fan_in)) if fan_in else _ZEROS


def _bilinear(name: str, info: TensorInfo, siblings: Mapping[str, TensorInfo]) -> Initializer:
    weight = siblings.get("weight", info)
    if len(weight.shape) != 3:
        raise Ambiguous(f"the weight of a Bilinear has 3 dimensions, this one {list(weight.shape)}")
    return _uniform(1 / sqrt(weight.shape[1])) if weight.shape[1] else _ZEROS


def _recurrent(name: str, info: TensorInfo, siblings: Mapping[str, TensorInfo]) -> Initializer:
    """Uniform within 1 / sqrt(hidden size), which the projection or else the hidden weight tells."""
    candidates = (siblings.get(key) for key in ("weight_hr_l0", "weight_hh_l0", "weight_hh"))
    hidden = next((weight for weight in candidates if weight is not None), None)
    if hidden is None or len(hidden.shape) != 2:
        raise Ambiguous("`default` needs the hidden size, and there is no weight_hh_l0 beside this; write another init")
    return _uniform(1 / sqrt(hidden.shape[1])) if hidden.shape[1] else _ZEROS


def _attention(name: str, info: TensorInfo, siblings: Mapping[str, TensorInfo]) -> Initializer:
    """Xavier for the projections in; the projection out is a Linear, but for its bias."""
    if len(info.shape) < 2:
        return _ZEROS
    if name == "weight":
        return _linear_or_convolution(name, info, siblings)
    name_of_init = "xavier_normal" if name in ("bias_k", "bias_v") else "xavier_uniform"
    return Initializer(name=name_of_init, arguments={"gain": 1.0})


_Rule = Callable[[str, TensorInfo, Mapping[str, TensorInfo]], Initializer]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_NORMS, _norm),
    **dict.fromkeys(_RECURRENT, _recurrent),
    "Bilinear": _bilinear,
    "Embedding": _embedding,
    "EmbeddingBag": _embedding,
    "MultiheadAttention": _attention,
    "PReLU": _prelu,
}
