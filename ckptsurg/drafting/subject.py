"""What a draft speaks of: a checkpoint, which layer is its head, and what of it trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import UsageError
from ..layers import from_metadata
from ..matching import Names
from ..patterns import PatternError
from ..tensors import TensorSource
from ..wording import counted, enumerate_names, shown
from .blocks import find_stacks
from .heads import Head, Heads, find_heads, linear_layers, says_tied, twins_of, vocabularies

__all__ = ["Subject", "listed"]

_HOW_TO_ADD = "without --new-head the draft shows how a classifier is added; --head PATTERN names a layer that is one"


def listed(heads: Iterable[Head]) -> str:
    """Names of heads, for a message."""
    return enumerate_names(one.module or one.tensors[0] for one in heads)


class Subject:
    """A checkpoint under draft, and what is wanted of it.

    Attributes:
        heads: The layers that are the head; none where that cannot be told.
        tied: Names of tensors that are one in the model.
        stacks: Its stacks of numbered blocks.
        trained: Patterns of what trains, with a remark each.
        named: The names of what was asked to train, by pattern.

    Raises:
        UsageError: if the head cannot be told where a new one is wanted, or is no layer like Linear.
    """

    def __init__(
        self,
        source: TensorSource,
        config: Mapping[str, Any] | None,
        freeze_all_but: Sequence[str],
        new_head: int | None,
        head: str | None,
    ) -> None:
        self.source, self.config, self.new_head = source, config, new_head
        self.tensors = source.tensors
        self.layers = from_metadata(getattr(source, "metadata", None))
        self.names = Names(self.tensors, self.layers)
        self.named_head = head
        self.stacks = find_stacks(self.tensors)
        self.found = found = find_heads(self.tensors)
        self.tied = {name for group in getattr(source, "tied", ()) for name in group}
        if says_tied(config) and found.found is not None:
            self.tied |= twins_of(found.found, self.tensors)
        self.heads = self._named(head) if head is not None else [found.found] if found.found is not None else []
        if new_head is not None and head is None:
            self._refuse_to_guess(found)
        self.trained = self._patterns_of_what_trains(freeze_all_but)
        self.named = [set(self.match(pattern)) for pattern in freeze_all_but]

    def _named(self, pattern: str) -> list[Head]:
        """The layers whose tensors a pattern selects.

        Raises:
            UsageError: if it selects anything else, or layers that cannot all get the new number of outputs.
        """
        names = set(self.match(pattern))
        heads = [one for one in linear_layers(self.tensors) if names >= set(one.tensors)]
        if odd := self.names.in_order(names - {name for one in heads for name in one.tensors}):
            message = f'"{shown(pattern)}" selects {enumerate_names(odd, 3)}, which no layer like Linear has'
            raise UsageError(message, hint="--head names a head; --freeze-all-but takes any pattern of what trains")
        if self.new_head is not None and len({one.outputs for one in heads}) > 1:
            sizes = enumerate_names(f"{one.module} ({one.outputs:,})" for one in heads)
            message = f'"{shown(pattern)}" selects layers with other numbers of outputs each: {sizes}'
            raise UsageError(message, hint="name the last of them")
        tables = {self.tensors[name].shape for name in vocabularies(self.tensors)}
        return [
            replace(one, reason="you named it as the head", is_of_tokens=one.weight.shape in tables) for one in heads
        ]

    def _refuse_to_guess(self, found: Heads) -> None:
        """Raise UsageError if there is no head that may be given another number of outputs unasked."""
        if found.found is None:
            maybe = f"; it may be one of: {listed(found.candidates)}" if found.candidates else ""
            outer = f"; outside the blocks there are: {listed(found.others)}" if found.others else ""
            hint = f"--head PATTERN names it{maybe}{outer}" if maybe or outer else _HOW_TO_ADD
            raise UsageError(f"{self.source.label}: which layer is the head cannot be told", hint=hint)
        if found.found.is_of_tokens or self.is_tied(found.found):
            message = f"{self.source.label}: {shown(found.found.module)} has an output for each token"
            raise UsageError(f"{message}, and is no classifier", hint=_HOW_TO_ADD)

    def is_tied(self, head: Head) -> bool:
        return head.tensors[0] in self.tied

    def match(self, pattern: str) -> list[str]:
        try:
            return self.names.in_order({name for _, some in self.names.match(pattern) for name in some})
        except PatternError:
            return []

    def patterns_of(self, head: Head) -> Sequence[str]:
        """Its module, if that as a pattern selects its tensors and no others; else each of them."""
        is_pattern = not head.module.startswith("!") and set(self.match(head.module)) == set(head.tensors)
        return [head.module] if is_pattern else head.tensors

    def _patterns_of_what_trains(self, given: Sequence[str]) -> list[tuple[str, str]]:
        """Patterns with a remark each, none of which adds nothing to those before it."""
        found = [(pattern, "what you named, ", "") for pattern in given]
        if not given or self.new_head is not None:
            heads = [one for one in self.heads if self.named_head is not None or not self.is_tied(one)]
            found += [(pattern, "the head, ", one.reason) for one in heads for pattern in self.patterns_of(one)]
        trained: set[str] = set()
        kept = []
        for pattern, what, why in found:
            names = set(self.match(pattern))
            if not names <= trained:
                remark = f"but for {what}{counted(len(names - trained))}"
                kept.append((pattern, f"{remark}: {why}" if why else remark))
            trained |= names
        return kept
