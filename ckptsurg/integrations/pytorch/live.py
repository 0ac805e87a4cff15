"""A live model under the names of its checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...errors import FreezeError
from ...frameworks.pytorch import METADATA, bytes_of, info_of, live_tensors, unreadable, whole_of, without_memory
from ...manifest import Manifest
from ...renaming import Renaming, align, renamed, unwrapped
from ...tensors import Buffer, TensorInfo
from ...wording import shown
from .parts import Part

__all__ = ["LiveModel", "LiveTensors", "Roles", "source_of"]


@dataclass(frozen=True, slots=True)
class Roles:
    """What a manifest makes of a model's tensors, by live name.

    Attributes:
        frozen: What is frozen as a whole.
        rows: What is frozen in a part, and trains in the rest: first row and the one after the last.
        trainable: What is meant to train.
    """

    frozen: Sequence[str]
    rows: Mapping[str, tuple[int, int]]
    trainable: Sequence[str]


class LiveModel:
    """A model, and which of its tensors stand for which of a checkpoint's.

    Which name stands for which is settled once. The tensors themselves are looked up at every use, since wrappers and
    loaders put others in their place.

    Attributes:
        model: The model.
        parts: All of the model, as its checkpoint cuts it.
        partners: For each name of the checkpoint that the model has, the one in ``parts`` that stands for it.
    """

    def __init__(self, model: nn.Module, wanted: Collection[str], names: Renaming | None = None) -> None:
        """Settle the names.

        Args:
            model: The model.
            wanted: Names of the checkpoint.
            names: From the model's names to these; None tells them from the model.
        """
        self.model = model
        self.parts, self.partners = _settled(model, wanted, names)
        self._live = [name for part in self.parts for name in part.live]
        self._holders = {name: part for part in self.parts for name in part.saved}

    @property
    def names(self) -> Collection[str]:
        """What the model calls all its tensors now."""
        return live_tensors(self.model).keys()

    def now(self) -> dict[str, torch.Tensor]:
        """The model's tensors as they are now, by the names that ``parts`` have for them."""
        return self.found_in(live_tensors(self.model))

    def found_in(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Those of a state dict of the model, by the names that ``parts`` have for them."""
        return {name: tensors[own] for name, own in align(self._live, _as_used(tensors, self.model)).items()}

    def holding(self, name: str) -> Part:
        """The part that holds a tensor of the checkpoint.

        Raises:
            KeyError: if none does.
        """
        return self._holders[self.partners[name]]

    def roles(self, manifest: Manifest) -> Roles:
        """What a manifest makes of the model's tensors."""
        frozen: list[str] = []
        rows: dict[str, tuple[int, int]] = {}
        trainable: list[str] = []
        for name in self.partners:
            record, part = manifest.tensors[name], self.holding(name)
            if record.rows is not None:
                rows |= dict.fromkeys(part.live, (record.rows.start, record.rows.stop))
            else:
                (frozen if record.frozen else trainable).extend(part.live)
        return Roles(tuple(dict.fromkeys(frozen)), rows, tuple(dict.fromkeys(trainable)))

    def source(self, without: Collection[str] = ()) -> LiveTensors:
        """The model as a TensorSource under its checkpoint's names, as it is now.

        Args:
            without: Names of the checkpoint to leave out.
        """
        gone = {self.partners[name] for name in without if name in self.partners}
        parts = [part for part in self.parts if not gone.intersection(part.saved)]
        return self._source(parts, self.now(), f"the model ({type(self.model).__name__})")

    def infos(self) -> dict[str, TensorInfo]:
        """Dtype and shape of what the model has, by the names of the checkpoint that was wanted."""
        tensors = self.source().tensors
        return {name: tensors[own] for name, own in self.partners.items()}

    def source_of(self, state: Mapping[str, torch.Tensor], label: str) -> LiveTensors:
        """A state dict of the model as a TensorSource under its checkpoint's names."""
        return self._source(self.parts, self.found_in(state), label)

    @staticmethod
    def _source(parts: Sequence[Part], live: Mapping[str, torch.Tensor], label: str) -> LiveTensors:
        return LiveTensors([part for part in parts if all(name in live for name in part.live)], live, label)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """While every parameter is there in one piece: FullyShardedDataParallel flattens and shards them.

        Every process of the group has to enter. FSDP2 (``fully_shard``) needs nothing: its shards know their place.

        Raises:
            FreezeError: if parameters were sharded by a wrapper that is not part of the model.
        """
        distributed: Any = sys.modules.get("torch.distributed.fsdp")
        wrapper = getattr(distributed, "FullyShardedDataParallel", None)
        flattened = [name for name, one in self.model.named_parameters() if getattr(one, "_fsdp_flattened", False)]
        if wrapper is None or not flattened:
            yield
            return
        wrapped = [path for path, module in self.model.named_modules() if isinstance(module, wrapper)]
        for name in flattened:
            if not any(not path or name.startswith(f"{path}.") for path in wrapped):
                raise FreezeError(
                    f'"{shown(name)}" is sharded by FullyShardedDataParallel from outside the model',
                    hint="tell the frozen model of the wrapper: frozen.attach(wrapped)",
                )
        with wrapper.summon_full_params(self.model, writeback=False):
            yield


def source_of(model: nn.Module, wanted: Collection[str] = ()) -> LiveTensors:
    """A live model as a TensorSource.

    Args:
        model: The model.
        wanted: Names of the checkpoint that it is compared with; the model's own stand where they fit none.
    """
    return LiveModel(model, wanted).source()


def _settled(
    model: nn.Module, wanted: Collection[str], names: Renaming | None
) -> tuple[Sequence[Part], Mapping[str, str]]:
    live = live_tensors(model)
    used = _as_used(live, model)
    called = used if names is None else renamed(live, names)
    partners = align(wanted, {new: new for new in called.values()})
    if names is None and len(partners) < len(wanted) and (parts := _converted(model, live, wanted)) is not None:
        saved = align(wanted, {name: name for part in parts for name in part.saved})
        if len(saved) > len(partners):
            return parts, saved
    return [Part((used[name],), (new,)) for name, new in called.items()], partners


def _as_used(live: Collection[str], model: nn.Module) -> dict[str, str]:
    """What each tensor is called after the one that the model computes with.

    PEFT trains copies of whole modules, one for each adapter, of which one is active; and a model that it gives prompts
    stands in its wrapper without another around it.
    """
    copies: dict[str, str] = {}
    bare = ""
    peft: Any = sys.modules.get("peft")  # whoever has such a model has imported it
    for path, module in model.named_modules() if peft is not None else ():
        start = f"{path}." if path else ""
        if isinstance(module, peft.utils.ModulesToSaveWrapper):
            for one in module.modules_to_save:  # the copies of adapters that are not active stand for nothing
                own = start if one in module.active_adapters else f"{start}inactive.{one}."
                copies[f"{start}modules_to_save.{one}."] = own
        # A model with adapters is wrapped twice (base_model.model), one with prompts once.
        if isinstance(module, peft.PeftModel) and not isinstance(module.base_model, peft.tuners.tuners_utils.BaseTuner):
            bare = f"{start}base_model."
    used: dict[str, str] = {}
    for name in live:
        own = next((start + name[len(copy) :] for copy, start in copies.items() if name.startswith(copy)), name)
        used[name] = own.removeprefix(bare)
    return used


def _converted(model: nn.Module, live: Mapping[str, torch.Tensor], wanted: Collection[str]) -> list[Part] | None:
    """The parts of a model of transformers, which renames and fuses what it loads; None for other models."""
    transformers: Any = sys.modules.get("transformers")  # whoever has such a model has imported it
    if transformers is None:
        return None
    for path, module in model.named_modules():
        if isinstance(module, transformers.PreTrainedModel) and unwrapped(path) in ("", "base_model"):
            from .converted import parts_as_saved

            bare = {unwrapped(used): live[name] for name, used in _as_used(live, model).items()}
            return parts_as_saved(module, bare, wanted)
    return None


class LiveTensors:
    """A TensorSource over the parts of a model, under the names of its checkpoint.

    Attributes:
        label: How messages call it.
        tensors: Dtype and shape by name.
    """

    def __init__(self, parts: Sequence[Part], live: Mapping[str, torch.Tensor], label: str) -> None:
        self.label, self.metadata = label, METADATA
        self._live = live
        self._parts = {name: part for part in parts for name in part.saved}
        self.tensors = {name: info for part in parts for name, info in _infos(part, live).items()}
        self._split: tuple[Part, Mapping[str, torch.Tensor]] | None = None  # the last part: its names come in a row

    def read(self, name: str) -> Iterator[Buffer]:
        return bytes_of(self.tensor(name))

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor of the checkpoint, as the model has it now.

        Raises:
            FreezeError: if it has no bytes to look at.
        """
        part = self._parts[name]
        for one in part.live:
            if reason := unreadable(self._live[one]):
                raise FreezeError(f'{self.label}: "{shown(one)}" {reason}')
        if part.split is None:
            return self._live[part.live[0]].detach()
        if self._split is None or self._split[0] is not part:
            self._split = part, part.cut({one: whole_of(self._live[one]) for one in part.live})
        return self._split[1][name]


def _infos(part: Part, live: Mapping[str, torch.Tensor]) -> dict[str, TensorInfo]:
    if part.split is None:
        return {part.saved[0]: info_of(live[part.live[0]])}
    twins = {name: without_memory(live[name]) for name in part.live}
    return {name: info_of(tensor) for name, tensor in part.cut(twins).items()}
