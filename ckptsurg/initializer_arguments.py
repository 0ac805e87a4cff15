"""The initializers that a spec can name, with their arguments: what may be written, not what is drawn.

Names and defaults are those of ``torch.nn.init`` (https://pytorch.org/docs/stable/nn.init.html) without the
underscore; ``default``, ``like`` and ``mean`` are ours.
"""

from __future__ import annotations

import copy
import re
from functools import cache
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema

from .documents import Model, fail, suggest
from .tensors import TensorInfo
from .wording import shown

__all__ = ["MODULES", "SAME_FOR_EVERY_NAME", "Init", "Initializer", "refusal"]


class _NoArguments(Model):
    pass


class _Constant(Model):
    val: float


class _Uniform(Model):
    a: float = 0.0
    b: float = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.a > self.b:
            raise fail(f"a ({self.a}) must not be above b ({self.b})")
        return self


class _Normal(Model):
    mean: float = 0.0
    std: Annotated[float, Field(ge=0)] = 1.0


class _TruncNormal(_Uniform):
    mean: float = 0.0
    std: Annotated[float, Field(ge=0)] = 1.0
    a: float = -2.0
    b: float = 2.0


class _Gain(Model):
    gain: float = 1.0


Nonlinearity: TypeAlias = Literal[
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "sigmoid", "tanh", "relu", "leaky_relu", "selu",
]  # fmt: skip


class _Kaiming(Model):
    a: float = 0.0
    mode: Literal["fan_in", "fan_out"] = "fan_in"
    nonlinearity: Nonlinearity = "leaky_relu"


class _Dirac(Model):
    groups: Annotated[int, Field(ge=1)] = 1


class _Sparse(Model):
    sparsity: Annotated[float, Field(ge=0, le=1)]
    std: Annotated[float, Field(ge=0)] = 0.01


#: Modules whose ``reset_parameters`` the initializer ``default`` knows.
MODULES = (
    "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "Bilinear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d",
    "ConvTranspose2d", "ConvTranspose3d", "Embedding", "EmbeddingBag", "GRU", "GroupNorm", "InstanceNorm1d",
    "InstanceNorm2d", "InstanceNorm3d", "LSTM", "LayerNorm", "Linear", "MultiheadAttention", "PReLU", "RMSNorm", "RNN",
    "SyncBatchNorm",
)  # fmt: skip


class _Default(Model):
    module: str | None = None

    @field_validator("module")
    @classmethod
    def _known(cls, module: str | None) -> str | None:
        if module is not None and module not in MODULES:
            raise fail(f'unknown module "{shown(module)}"' + suggest(module, MODULES))
        return module


#: The arguments of each initializer: names and defaults of ``torch.nn.init``.
_ARGUMENTS: dict[str, type[Model]] = {
    "constant": _Constant,
    "default": _Default,
    "dirac": _Dirac,
    "eye": _NoArguments,
    "kaiming_normal": _Kaiming,
    "kaiming_uniform": _Kaiming,
    "like": _NoArguments,
    "mean": _NoArguments,
    "normal": _Normal,
    "ones": _NoArguments,
    "orthogonal": _Gain,
    "sparse": _Sparse,
    "trunc_normal": _TruncNormal,
    "uniform": _Uniform,
    "xavier_normal": _Gain,
    "xavier_uniform": _Gain,
    "zeros": _NoArguments,
}


#: Initializers whose values do not depend on the tensor's name.
SAME_FOR_EVERY_NAME = frozenset(("constant", "dirac", "eye", "mean", "ones", "zeros"))


class Initializer(Model):
    """An initializer and all its arguments; written ``zeros`` or ``{normal: {std: 0.02}}``.

    Attributes:
        name: A name of ``torch.nn.init`` without the underscore, ``default``, ``like`` or ``mean``.
        arguments: Every argument of the initializer, defaults filled in.
    """

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        return {self.name: self.arguments}


def _initializer(value: object) -> object:
    if isinstance(value, Initializer):
        return {"name": value.name, "arguments": value.arguments}
    written: Any = {value: {}} if isinstance(value, str) else value
    if not isinstance(written, dict) or len(written) != 1:
        raise fail("expected an initializer: a name such as zeros, or one name with arguments: {normal: {std: 0.02}}")
    [(name, arguments)] = written.items()
    if name not in _ARGUMENTS:
        raise fail(f'unknown initializer "{shown(name)}"' + suggest(name, list(_ARGUMENTS)))
    if name == "default" and isinstance(arguments, str):
        arguments = {"module": arguments}
    model = _ARGUMENTS[name]
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        example = next(iter(model.model_fields), None)
        tail = f"{{{name}: {{{example}: {shown(arguments, 40)}}}}}" if example else f"{name}"
        raise fail(f"{name}: the arguments have names; write {tail}")
    return {"name": name, "arguments": _checked_arguments(name, model, arguments)}


def _checked_arguments(name: str, model: type[Model], arguments: dict[str, Any]) -> dict[str, Any]:
    known = list(model.model_fields)
    for key in arguments:
        if key not in known:
            takes = suggest(key, known) if known else "; it takes none"
            raise fail(f'{name}: unknown argument "{shown(key)}"{takes}')
    try:
        filled = model.model_validate(arguments)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        message = first["msg"][0].lower() + first["msg"][1:]
        if first["type"] == "literal_error":
            known = re.findall(r"'([^']*)'", first["ctx"]["expected"])
            written = shown(first["input"], 40)
            raise fail(f'{name}: {first["loc"][-1]}: "{written}" is not known' + suggest(written, known)) from None
        if first["type"] == "ckptsurg":
            raise fail(f"{name}: {message}") from None
        argument = first["loc"][-1]
        if first["type"] == "missing":
            raise fail(f'{name}: the argument "{argument}" is missing') from None
        raise fail(f"{name}: {argument}: {message}, found {shown(first['input'], 40)}") from None
    return {key: value for key, value in filled.model_dump().items() if value is not None}


class _WrittenForm:
    """The JSON Schema of an initializer as people write it."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return copy.deepcopy(_written_form())


@cache
def _written_form() -> dict[str, Any]:
    schemas = {model: model.model_json_schema() for model in dict.fromkeys(_ARGUMENTS.values())}
    written: dict[str, Any] = {name: schemas[model] for name, model in _ARGUMENTS.items()}
    written["default"] = {"enum": list(MODULES)}
    bare = [
        name
        for name, model in _ARGUMENTS.items()
        if not any(argument.is_required() for argument in model.model_fields.values())
    ]
    one = {"type": "object", "minProperties": 1, "maxProperties": 1, "additionalProperties": False}
    return {"anyOf": [{"enum": bare}, {**one, "properties": written}]}


#: An initializer as a field of a document.
Init: TypeAlias = Annotated[Initializer, BeforeValidator(_initializer), _WrittenForm()]


# --- What an initializer can draw -------------------------------------------------------------------

#: Largest finite value of each dtype that can be drawn.
_LARGEST = {
    "F64": 1.7976931348623157e308,
    "F32": 3.4028234663852886e38,
    "C64": 3.4028234663852886e38,
    "BF16": 3.3895313892515355e38,
    "F16": 65504.0,
    "F8_E5M2": 57344.0,
    "F8_E5M2FNUZ": 57344.0,
    "F8_E4M3": 448.0,
    "F8_E4M3FNUZ": 240.0,
}
_REAL_ONLY = frozenset(("uniform", "trunc_normal", "xavier_uniform", "kaiming_uniform", "orthogonal", "sparse", "like"))
#: No file system holds so many.
_MOST_ELEMENTS = (1 << 63) - 1
_ANY_RANK = 64
_NEEDS_RANK = {
    "mean": (1, _ANY_RANK),
    "xavier_uniform": (2, _ANY_RANK),
    "xavier_normal": (2, _ANY_RANK),
    "kaiming_uniform": (2, _ANY_RANK),
    "kaiming_normal": (2, _ANY_RANK),
    "orthogonal": (2, _ANY_RANK),
    "eye": (2, 2),
    "sparse": (2, 2),
    "dirac": (3, 5),
}


def refusal(init: Initializer, info: TensorInfo, old: TensorInfo | None = None) -> str | None:
    """Why the initializer cannot draw such a tensor; None where it can.

    Args:
        init: The initializer.
        info: The new tensor.
        old: The one in whose place it is; None of an added one.
    """
    if info.dtype not in _LARGEST:
        return f"{info.dtype} cannot be drawn; only {', '.join(_LARGEST)} can"
    if info.elements > _MOST_ELEMENTS:
        return f"a shape of more than {_MOST_ELEMENTS:,} elements"
    if info.dtype == "C64" and init.name in _REAL_ONLY:
        return f"{init.name} does not draw complex numbers"
    low, high = _NEEDS_RANK.get(init.name, (0, _ANY_RANK))
    rank = len(info.shape)
    if not low <= rank <= high:
        wanted = f"{low}" if low == high else f"{low} to {high}" if high < _ANY_RANK else f"{low} or more"
        return f"{init.name} draws tensors of {wanted} dimensions, this one has {rank}: {list(info.shape)}"
    if init.name == "dirac" and info.shape[0] % init.arguments["groups"]:
        return f"dirac: {info.shape[0]} output channels cannot be parted into {init.arguments['groups']} groups"
    if init.name == "mean" and old is not None:
        if old.shape[1:] != info.shape[1:]:
            change = f"this one goes from {list(old.shape)} to {list(info.shape)}"
            return f"mean is one of whole rows, so the first dimension alone may change; {change}"
        if not old.shape[0]:
            return f"mean: there are no old rows, the shape is {list(old.shape)}"
    bounds = {"constant": ("val",), "uniform": ("a", "b"), "trunc_normal": ("a", "b")}.get(init.name, ())
    for value in (init.arguments[bound] for bound in bounds):
        if abs(value) > _LARGEST[info.dtype]:
            return f"{init.name}: {value} is out of the range of {info.dtype}"
    return None
