"""The layers of a model in their order, where a checkpoint knows it: what ``layers[:-5]`` speaks of.

Names of Keras say nothing of order, and layers without weights have none at all. So the order travels with the
tensors, as text in a file's metadata: under ``ckptsurg.layers`` a JSON list with an object for each layer, with its
``name``, the names of its ``tensors``, those below it included, and, if it is a model itself, ``layers`` of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

__all__ = ["LAYERS_KEY", "Layer", "LayerPaths", "from_metadata", "to_text"]

#: Of the metadata.
LAYERS_KEY = "ckptsurg.layers"
#: How deep models may stand in models.
_DEEPEST = 32


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of a model.

    Attributes:
        name: Its name.
        tensors: The names of all tensors in it and below it; of a Dropout there are none.
        layers: If it is a model itself, its own layers in their order.
    """

    name: str
    tensors: Sequence[str]
    layers: Sequence[Layer] = ()


def to_text(layers: Sequence[Layer]) -> str:
    """The layers of a model as they are written to metadata."""
    return json.dumps([_written(layer) for layer in layers], separators=(",", ":"), ensure_ascii=False)


def from_metadata(metadata: Mapping[str, str] | None) -> Sequence[Layer]:
    """The layers of the model that a file is of; none where its metadata does not tell."""
    text = (metadata or {}).get(LAYERS_KEY)
    if text is None:
        return ()
    try:
        return [_read(one) for one in json.loads(text)]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return ()  # somebody else's key: it is only text


def _written(layer: Layer) -> dict[str, Any]:
    below = {"layers": [_written(one) for one in layer.layers]} if layer.layers else {}
    return {"name": layer.name, "tensors": list(layer.tensors), **below}


def _read(written: Any, depth: int = 0) -> Layer:
    name, tensors, below = written["name"], written["tensors"], written.get("layers", [])
    if depth > _DEEPEST:
        raise ValueError
    for text in (name, *tensors):
        text.encode()
    return Layer(name, tuple(tensors), tuple(_read(one, depth + 1) for one in below))


class LayerPaths:
    """Where tensors stand in a model: further names for them, by layers' names and by their numbers.

    ``base/layers/3/kernel`` is a tensor of the fourth layer of the model called base; where base is the second layer,
    ``layers/1/layers/3/kernel`` is so too. Above the last, a path has either names or numbers alone.

    Attributes:
        tensors: Pairs of a path and the tensor's name. Tensors of a layer may share a path.
        children: How many layers there are, by the path of the model's layers: ``base/layers``.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.tensors: list[tuple[str, str]] = []
        self.children: dict[str, int] = {}
        self._gather(layers, "", "")

    def _gather(self, layers: Sequence[Layer], by_name: str, by_number: str) -> None:
        """Take in the layers of a model, whose path ends in a slash, written in the one way and in the other."""
        for prefix in {by_name, by_number}:
            self.children[f"{prefix}layers"] = len(layers)
        for number, layer in enumerate(layers):
            here = f"{by_name}{layer.name}/", f"{by_name}layers/{number}/", f"{by_number}layers/{number}/"
            paths = product(dict.fromkeys(here), layer.tensors)
            self.tensors += [(path + _inside(name, layer.name), name) for path, name in paths]
            if layer.layers:
                self._gather(layer.layers, here[0], here[2])


def _inside(tensor: str, layer: str) -> str:
    """What a tensor is called inside its layer."""
    _, found, inside = f"/{tensor}".rpartition(f"/{layer}/")
    return inside if found else tensor
