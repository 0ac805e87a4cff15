"""Variables of a Keras model as a TensorSource, on any backend.

Keras gives a variable a path, but not always the same one: what is ``sequential/dense/kernel`` in a model that was just
built is ``dense/kernel`` when it comes from a ``.keras`` file. So names are computed from where a variable stands.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import keras
import numpy as np
from keras.src.models.functional import Functional
from keras.src.utils.naming import to_snake_case

from ..errors import FreezeError
from ..layers import LAYERS_KEY, Layer, to_text
from ..numpy_types import element_type
from ..tensors import CHUNK_BYTES, Buffer, TensorInfo
from ..wording import enumerate_names, shown
from .dtypes import DTYPES

__all__ = ["KerasVariables", "Place", "assign_bytes", "bytes_of", "info_of", "places_of"]


class KerasVariables:
    """A TensorSource over the weights of a model.

    A name is the names of the layers from the model, itself left out, down to the one that owns the variable, and
    the variable's own. A functional model inside adds none, as in Keras's paths: ``block_13_expand/kernel``. Where
    two variables would be called the same, both have the names of such models too.

    Args:
        model: A model, or a single layer, that is built.
        wanted: Names of a manifest. A variable that is not among them by its name, but by another one that Keras has or
            had for it (``variable.path``), is called so.

    Attributes:
        label: How messages call it.
        variables: The variables by name, in the order of ``model.weights``.
        places: Where each stands in the model, by name.
        tensors: Dtype and shape by name; a dtype that safetensors lacks has Keras's own name.
        metadata: Of a file that they are written to: the model's layers in their order.

    Raises:
        FreezeError: if the model is not built, or two variables cannot be told apart by name.
    """

    def __init__(self, model: keras.Layer, wanted: Collection[str] = ()) -> None:
        self.label = f"the model ({type(model).__name__})"
        _refuse_unbuilt(model, self.label)
        places = places_of(model)
        names = _names(model, places, self.label)
        if wanted:
            names = _as_wanted(model, places, names, wanted)
        self.places: Mapping[str, Place] = dict(zip(names, places, strict=True))
        self.variables: Mapping[str, keras.Variable] = {name: place.variable for name, place in self.places.items()}
        self.tensors: Mapping[str, TensorInfo] = {name: info_of(one) for name, one in self.variables.items()}
        by_identity = {id(variable): name for name, variable in self.variables.items()}
        layers = [_described(layer, by_identity) for layer in _layers_of(model)]
        self.metadata: Mapping[str, str] = {"format": "keras", LAYERS_KEY: to_text(layers)}

    def read(self, name: str) -> Iterator[Buffer]:
        return bytes_of(self.variables[name])


@dataclass(frozen=True, slots=True)
class Place:
    """A variable and where it stands.

    Attributes:
        variable: The variable.
        owners: The layers from the model, itself left out, down to the one that owns the variable.
        others: The same where further layers own it.
    """

    variable: keras.Variable
    owners: tuple[keras.Layer, ...]
    others: list[tuple[keras.Layer, ...]] = field(default_factory=list)

    @property
    def segments(self) -> list[str]:
        """The layers' names and the variable's own."""
        return self._segments(self.owners)

    @property
    def all_segments(self) -> list[list[str]]:
        """The same for every layer that owns it."""
        return [self._segments(owners) for owners in (self.owners, *self.others)]

    def _segments(self, owners: Sequence[keras.Layer]) -> list[str]:
        return [*(layer.name for layer in owners), self.variable.name]

    @property
    def name(self) -> str:
        """The same without functional models."""
        layers = [layer.name for layer in self.owners if not isinstance(layer, Functional)]
        return "/".join([*layers, self.variable.name])


def places_of(model: keras.Layer) -> list[Place]:
    """The weights of a model and where they stand, in the order of ``model.weights``; a shared one by its first."""
    found: dict[int, Place] = {}
    seen: set[int] = set()

    def visit(layer: keras.Layer, owners: tuple[keras.Layer, ...]) -> None:
        if id(layer) in seen:
            return
        seen.add(id(layer))
        for variable in (*layer._trainable_variables, *layer._non_trainable_variables):
            if id(variable) in found:
                found[id(variable)].others.append(owners)
            else:
                found[id(variable)] = Place(variable, owners)
        for below in layer._flatten_layers(recursive=False, include_self=False):
            visit(below, (*owners, below))

    visit(model, ())
    return list(found.values())


def _refuse_unbuilt(model: keras.Layer, label: str) -> None:
    if not model.built or any(variable._value is None for variable in model.weights):
        raise FreezeError(
            f"{label} is not built: it has no weights yet",
            hint="give it an Input, call it once on data, or call its build(input_shape)",
        )


def _names(model: keras.Layer, places: Sequence[Place], label: str) -> list[str]:
    names = [place.name for place in places]
    count = Counter(names)
    names = ["/".join(place.segments) if count[name] > 1 else name for name, place in zip(names, places, strict=True)]
    if same := [name for name, number in Counter(names).items() if number > 1]:
        raise FreezeError(
            f"{label} has several variables that are called the same: {enumerate_names(same)}",
            hint="give the layers, and the weights in a layer, names of their own",
        )
    return names


def _as_wanted(model: keras.Layer, places: Sequence[Place], names: Sequence[str], wanted: Collection[str]) -> list[str]:
    """The names, where they are not wanted replaced by wanted ones that can mean nothing else."""
    chosen = list(names)
    for others in (_other_names, _endings):
        free = set(wanted).difference(chosen)
        claims: dict[str, list[int]] = defaultdict(list)
        for number, name in enumerate(chosen):
            found = free.intersection(others(model, places[number])) if name not in wanted else ()
            if len(found) == 1:
                claims[next(iter(found))].append(number)
        for name, claimants in claims.items():
            if len(claimants) == 1:
                chosen[claimants[0]] = name
    return _renumbered(model, places, chosen, wanted)


def _other_names(model: keras.Layer, place: Place) -> set[str]:
    """What Keras calls a variable, and its place in full; each with and without the model's name in front."""
    own = f"{model.name}/"
    found = {place.variable.path, place.variable.path.removeprefix(own), place.name, *map("/".join, place.all_segments)}
    return found | {own + name for name in found}


def _endings(model: keras.Layer, place: Place) -> set[str]:
    """The ends of its place, of a layer's name at least and the variable's: files have such paths."""
    return {"/".join(segments[start:]) for segments in place.all_segments for start in range(len(segments) - 1)}


def _renumbered(
    model: keras.Layer, places: Sequence[Place], names: Sequence[str], wanted: Collection[str]
) -> list[str]:
    """The names, with Keras's numbers as they were where the model was made before.

    A layer that a custom layer makes without a name is ``dense_3``, as there were three before it in the process. So
    what Keras has numbered is told by the order of the numbers, if there are as many of a kind as are wanted.
    """
    chosen = list(names)
    kinds: dict[str, list[int]] = defaultdict(list)
    for number, name in enumerate(names):
        if name not in wanted and (kind := _kind(model, places[number])) is not None:
            kinds[kind].append(number)
    free = set(wanted).difference(chosen) if kinds else ()
    for kind, own in kinds.items():
        found = sorted((_numbers(match), match[0]) for name in free if (match := re.fullmatch(kind, name)))
        made = sorted((_numbers(match), number) for number in own if (match := re.fullmatch(kind, places[number].name)))
        if len(found) == len(made):
            for (_, number), (_, name) in zip(made, found, strict=True):
                chosen[number] = name
    return chosen


def _kind(model: keras.Layer, place: Place) -> str | None:
    """An expression for a name whatever Keras's numbers in it; None where it has none that may differ."""
    parents = (model, *place.owners)
    parts = [
        f"{re.escape(stem)}(?:_([0-9]+))?" if (stem := _stem(parent, layer)) else re.escape(layer.name)
        for parent, layer in pairwise(parents)
        if not isinstance(layer, Functional)
    ]
    own = place.variable.name
    parts.append("variable(?:_([0-9]+))?" if re.fullmatch("variable(_[0-9]+)?", own) else re.escape(own))
    kind = "/".join(parts)
    return f"(?:{re.escape(model.name)}/)?{kind}" if "(?:_" in kind else None


def _stem(parent: keras.Layer, layer: keras.Layer) -> str | None:
    """What Keras has numbered to name a layer anew whenever the model is made; None if it is a lasting name."""
    if _is_of_keras(layer) and (_is_of_keras(parent) or isinstance(parent, Functional | keras.Sequential)):
        return None  # their names are in the configuration that is saved
    stem: str = to_snake_case(type(layer).__name__)
    return stem if re.fullmatch(f"{re.escape(stem)}(_[0-9]+)?", layer.name) else None


def _is_of_keras(layer: keras.Layer) -> bool:
    return type(layer).__module__.startswith("keras.src.")


def _numbers(match: re.Match[str]) -> tuple[int, ...]:
    return tuple(int(number or 0) for number in match.groups())


def _layers_of(model: keras.Layer) -> Sequence[keras.Layer]:
    """The layers of a model in its own order."""
    if isinstance(model, keras.Model):
        return list(model.layers)
    return list(model._flatten_layers(recursive=False, include_self=False))


def _described(layer: keras.Layer, names: Mapping[int, str]) -> Layer:
    tensors = [names[id(variable)] for variable in layer.weights]
    below = _layers_of(layer) if isinstance(layer, keras.Model) else ()
    return Layer(layer.name, tensors, [_described(one, names) for one in below])


def info_of(variable: keras.Variable) -> TensorInfo:
    """Dtype and shape of what a variable holds; autocast does not count."""
    dtype = str(variable._dtype)
    return TensorInfo(DTYPES.get(dtype, dtype), tuple(int(size) for size in variable.shape))


def bytes_of(variable: keras.Variable) -> Iterator[Buffer]:
    """The little-endian bytes of a variable, in chunks of ``CHUNK_BYTES``."""
    if keras.backend.backend() == "torch":
        from . import pytorch

        yield from pytorch.bytes_of(variable._value)
        return
    array = np.ascontiguousarray(np.asarray(_fetched(variable._value))).reshape(-1)
    view = array.view(np.uint8)
    for start in range(0, len(view), CHUNK_BYTES):
        yield view[start : start + CHUNK_BYTES].data


def _fetched(value: Any) -> Any:
    """A value of TensorFlow or JAX as numpy has it; theirs know bfloat16 and float8 as ml_dtypes does."""
    return value.numpy() if hasattr(value, "numpy") else value


def assign_bytes(variable: keras.Variable, info: TensorInfo, chunks: Iterable[Buffer]) -> None:
    """Put bytes into a variable, bit for bit.

    Args:
        variable: One of that dtype and shape.
        info: Dtype and shape of what the bytes are.
        chunks: All of them, little-endian.

    Raises:
        FreezeError: if the variable has another dtype or shape.
    """
    if info_of(variable) != info:
        raise FreezeError(f'"{shown(variable.path)}" is {info_of(variable)}, and was to become {info}')
    raw = bytearray()
    for chunk in chunks:  # join() would ask for all of them first, and each is valid until the next
        raw += chunk
    if keras.backend.backend() == "torch":
        import torch

        if not raw:
            return
        with torch.no_grad():
            value = variable._value
            value.copy_(torch.frombuffer(raw, dtype=torch.uint8).view(value.dtype).reshape(value.shape))
        return
    variable._direct_assign(np.frombuffer(raw, element_type(info.dtype)).reshape(info.shape))
