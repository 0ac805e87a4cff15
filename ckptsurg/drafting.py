"""A spec drafted from a checkpoint: commented YAML, with examples that fit these tensors.

The draft is planned before anybody sees it, and so is the draft with each example: one that does not fit is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml

from .blocks import Stack, find_stacks, find_stages
from .commented import Entry, Examples, aligned, plain, prose, quoted, rendered
from .errors import SpecError, UsageError
from .heads import (
    Head,
    Heads,
    find_heads,
    linear_layers,
    says_tied,
    twins_of,
    vocabularies,
    width_of_body,
)
from .layers import from_metadata
from .matching import Names
from .parsing import Text
from .patterns import PatternError
from .planning import plan
from .selectors import module_and_leaf, selected_names
from .spec import Spec
from .tensors import TensorSource
from .wording import counted, enumerate_names, shown, size

__all__ = ["SCHEMA_NAME", "draft"]

#: Of the JSON Schema that a draft names, beside it.
SCHEMA_NAME = "ckptsurg-spec.schema.json"
#: Of examples of one kind.
_MOST = 3
#: Of a head in an example.
_CLASSES = 10
#: By which config.json says how many classes a head has: as numbers, and as maps that would contradict them.
_NUMBERS, _LABELS = ("num_labels", "num_classes"), ("id2label", "label2id")
_STATISTICS = ("running_mean", "moving_mean")


def draft(
    source: TensorSource,
    config: Mapping[str, Any] | None = None,
    *,
    freeze_all_but: Sequence[str] = (),
    new_head: int | None = None,
    head: str | None = None,
    name: str | None = None,
    schema: str = SCHEMA_NAME,
) -> str:
    """A spec for a checkpoint, as commented YAML. Nothing is read but names, dtypes and shapes.

    Args:
        source: The checkpoint.
        config: Its config.json; None where it has none.
        freeze_all_but: Patterns of what trains; without any it is the head.
        new_head: How many outputs the head gets, which is drawn anew; None leaves it as it is.
        head: A pattern of the head's tensors; None to have it told from names and shapes.
        name: What the spec is called.
        schema: Path from the spec, or address, of the JSON Schema by which an editor completes it.

    Raises:
        SpecError: if a pattern cannot be read or selects nothing.
        UsageError: if the head cannot be told or is no layer like Linear, or a number or pattern is no good.
    """
    if new_head is not None and (type(new_head) is not int or new_head < 1):
        raise UsageError(f"the new head needs a number of outputs from 1, found {shown(new_head, 40)}")
    for pattern in (*freeze_all_but, *([head] if head is not None else [])):
        if pattern.startswith("!"):
            raise UsageError(f'"{shown(pattern)}": give what trains, without !')
        selected_names(source.tensors, [pattern], getattr(source, "metadata", None))
    drafting = _Drafting(source, config, freeze_all_but, new_head, head)
    entries = drafting.entries(name, schema)
    return rendered(_checked(entries, source))


def _checked(entries: Sequence[Entry], source: TensorSource) -> list[Entry]:
    """The entries, without examples that do not fit the source.

    Raises:
        SpecError: if the draft itself does not.
    """
    _plan(rendered(entries), source)
    return [one for entry in entries if (one := _fitting(entry, entries, source)) is not None]


def _fitting(entry: Entry, entries: Sequence[Entry], source: TensorSource) -> Entry | None:
    if isinstance(entry, str):
        return entry
    # Items of a list that take away one after another take away at least as much each by itself.
    if len(entry.parts) > 1 and _fits(rendered(entries, entry.parts), source):
        return entry
    fitting = [part for part in entry.parts if _fits(rendered(entries, [part]), source)]
    return replace(entry, parts=fitting) if fitting else None


def _fits(text: str, source: TensorSource) -> bool:
    try:
        _plan(text, source)
    except SpecError:
        return False
    return True


def _plan(text: str, source: TensorSource) -> None:
    plan(Spec.from_text(Text("draft", yaml.safe_load(text))), source)


def _last(stack: Stack) -> int:
    """Of how many blocks at the end an example speaks."""
    return 2 if stack.count > 3 else 1


def _listed(heads: Iterable[Head]) -> str:
    return enumerate_names(one.module or one.tensors[0] for one in heads)


# --- What there is to say about a checkpoint --------------------------------------------------------


class _Drafting:
    """One draft in the making."""

    def __init__(
        self,
        source: TensorSource,
        config: Mapping[str, Any] | None,
        freeze_all_but: Sequence[str],
        new_head: int | None,
        head: str | None,
    ) -> None:
        self._source, self._config, self._new_head = source, config, new_head
        self._tensors = source.tensors
        self._layers = from_metadata(getattr(source, "metadata", None))
        self._names = Names(self._tensors, self._layers)
        self._named_head = head
        self._stacks = find_stacks(self._tensors)
        self._found = found = find_heads(self._tensors)
        self._tied = {name for group in getattr(source, "tied", ()) for name in group}
        if says_tied(config) and found.found is not None:
            self._tied |= twins_of(found.found, self._tensors)
        self._heads = self._named(head) if head is not None else [found.found] if found.found is not None else []
        if new_head is not None and head is None:
            self._refuse_to_guess(found)
        self._trained = self._patterns_of_what_trains(freeze_all_but)

    # --- The head

    def _named(self, pattern: str) -> list[Head]:
        """The layers whose tensors a pattern selects.

        Raises:
            UsageError: if it selects anything else, or layers that cannot all get the new number of outputs.
        """
        names = set(self._match(pattern))
        heads = [one for one in linear_layers(self._tensors) if names >= set(one.tensors)]
        if odd := self._names.in_order(names - {name for one in heads for name in one.tensors}):
            message = f'"{shown(pattern)}" selects {enumerate_names(odd, 3)}, which no layer like Linear has'
            raise UsageError(message, hint="--head names a head; --freeze-all-but takes any pattern of what trains")
        if self._new_head is not None and len({one.outputs for one in heads}) > 1:
            sizes = enumerate_names(f"{one.module} ({one.outputs:,})" for one in heads)
            message = f'"{shown(pattern)}" selects layers with other numbers of outputs each: {sizes}'
            raise UsageError(message, hint="name the last of them")
        tables = {self._tensors[name].shape for name in vocabularies(self._tensors)}
        return [
            replace(one, reason="you named it as the head", is_of_tokens=one.weight.shape in tables) for one in heads
        ]

    def _refuse_to_guess(self, found: Heads) -> None:
        """Raise UsageError if there is no head that may be given another number of outputs unasked."""
        if found.found is None:
            maybe = f"; it may be one of: {_listed(found.candidates)}" if found.candidates else ""
            outer = f"; outside the blocks there are: {_listed(found.others)}" if found.others else ""
            hint = f"--head PATTERN names it{maybe}{outer}" if maybe or outer else _HOW_TO_ADD
            raise UsageError(f"{self._source.label}: which layer is the head cannot be told", hint=hint)
        if found.found.is_of_tokens or self._is_tied(found.found):
            message = f"{self._source.label}: {shown(found.found.module)} has an output for each token"
            raise UsageError(f"{message}, and is no classifier", hint=_HOW_TO_ADD)

    def _is_tied(self, head: Head) -> bool:
        return head.tensors[0] in self._tied

    # --- Patterns

    def _match(self, pattern: str) -> list[str]:
        try:
            return self._names.in_order({name for _, some in self._names.match(pattern) for name in some})
        except PatternError:
            return []

    def _patterns_of(self, head: Head) -> Sequence[str]:
        """Its module, if that as a pattern selects its tensors and no others; else each of them."""
        is_pattern = not head.module.startswith("!") and set(self._match(head.module)) == set(head.tensors)
        return [head.module] if is_pattern else head.tensors

    def _patterns_of_what_trains(self, given: Sequence[str]) -> list[tuple[str, str]]:
        """Patterns with a remark each, none of which adds nothing to those before it."""
        found = [(pattern, "", "which you named") for pattern in given]
        if not given or self._new_head is not None:
            heads = [one for one in self._heads if self._named_head is not None or not self._is_tied(one)]
            found += [(pattern, "the head, ", one.reason) for one in heads for pattern in self._patterns_of(one)]
        trained: set[str] = set()
        kept = []
        for pattern, what, why in found:
            names = set(self._match(pattern))
            if not names <= trained:
                kept.append((pattern, f"but for {what}{counted(len(names - trained))}: {why}"))
            trained |= names
        return kept

    # --- Entries

    def entries(self, name: str | None, schema: str) -> list[Entry]:
        tensors = self._tensors.values()
        called = name or "draft"
        if self._new_head is not None and name is not None:
            called += f"-{counted(self._new_head, 'output').replace(' ', '-').replace(',', '')}"
        address = schema if "://" in schema else shown(schema).replace(" ", "%20")
        nbytes = size(sum(info.nbytes for info in tensors))
        return [
            f"# yaml-language-server: $schema={address}",
            *prose(f"Drafted by `ckptsurg init`, from {counted(len(self._tensors))}, {nbytes}. Editors complete it by"
                    " the schema above, which is what `ckptsurg schema spec` prints."),
            *prose("What begins with # and no space is an example that fits this checkpoint: take the # away. Then"
                    " see what the spec does with `ckptsurg plan`, which reads headers only."),
            "version: 1",
            f"name: {plain(called)}",
            *self._freeze(),
            *self._reinit(),
            *self._config_edits(),
            *self._additions(),
            *self._drops(),
        ]  # fmt: skip

    def _freeze(self) -> list[Entry]:
        entries: list[Entry] = [
            "",
            *prose("What training must not change; all else trains. Of several lines the later wins, and ! takes away."
                    " A pattern is a tensor's name, or that of a module for all that is below it."),
            *self._remarks_on_heads(),
            "freeze:",
        ]  # fmt: skip
        rows = [("**", "everything keeps its bits" + ("," if self._trained else "; nothing trains so far"))]
        rows += [(f"!{pattern}", remark) for pattern, remark in self._trained]
        entries += [f"  {line}" for line in aligned([(f"- {quoted(row)}", remark) for row, remark in rows])]
        further = [(f"- {quoted(f'!{pattern}')}", remark) for pattern, remark in self._further()]
        if further:
            parts = [[line] for line in aligned(further)]
            entries.append(Examples("What may train besides:", parts, 2))
        for leaf in _STATISTICS:
            if norms := [name for name in self._tensors if module_and_leaf(name)[1] == leaf]:
                keep = "keeps" if len(norms) == 1 else "keep"
                intro = (
                    f"{counted(len(norms), 'norm layer')} {keep} running statistics ({leaf} ...), which follow the data"
                    " in training mode, with gradients or without. Frozen, they stand still: the layer is kept in"
                    " evaluation mode. To let these layers train:"
                )
                entries.append(Examples(intro, [[f'- {{match: "!**", where: {{beside: {leaf}}}}}']], 2))
        return entries

    def _remarks_on_heads(self) -> list[str]:
        remarks = []
        if not self._heads and self._named_head is None:
            remarks.append(
                f"Which layer is the head cannot be told; it may be one of: {_listed(self._found.candidates)}."
                if self._found.candidates
                else "No layer looks like a head by its name and shape."
            )
        if tied := self._names.in_order(self._tied):
            remarks.append(f"Tied, one tensor in the model: {enumerate_names(tied)}. Freeze all of them or none.")
        elif not self._heads and says_tied(self._config) and (tables := vocabularies(self._tensors)):
            remarks.append(
                f"A head that predicts tokens is tied to {enumerate_names(tables)}, as config.json says: it has no"
                " tensor of its own, and what becomes of the one becomes of both."
            )
        return [line for remark in remarks for line in prose(remark)]

    def _further(self) -> list[tuple[str, str]]:
        """Patterns of what else people train, with a remark each."""
        found: list[tuple[str, str]] = []
        if self._layers:
            found.append(("layers[-3:]", "the last three layers, in the model's order"))
        stages = find_stages(self._tensors)
        found += [
            (
                f"{one.stem}{one.numbers[-1]}",
                f"the last of {shown(one.stem)}{{{one.numbers[0]}..{one.numbers[-1]}}}",
            )
            for one in stages[:_MOST]
        ]
        # Of stages that are stacks of blocks themselves, the last is example enough.
        earlier = {f"{one.stem}{number}" for one in stages for number in one.numbers[:-1]}
        for stack in [one for one in self._stacks if one.path not in earlier][:_MOST]:
            last = _last(stack)
            what = f"the last {'two ' if last == 2 else ''}of {stack.count} blocks"
            found.append((f"{stack.path}[-{last}:]", what))
        biases = self._match("**.bias")
        if len(biases) > 1:
            found.append(("**.bias", "every bias"))
        return [
            (pattern, f"{remark}: {counted(len(names))}")
            for pattern, remark in found
            if (names := self._match(pattern))
        ]

    def _reinit(self) -> list[Entry]:
        if self._new_head is None:
            return self._reinit_example()
        old = sorted({one.outputs for one in self._heads})
        was = f"instead of {' or '.join(f'{count:,}' for count in old)}"
        text = f"The head, drawn anew for {counted(self._new_head, 'output')} {was}, from the seed."
        entries: list[Entry] = ["", *prose(text), "seed: 0", "reinit:"]
        for one in self._heads:
            for number, lines in enumerate(self._rules(one, self._new_head)):
                entries += [f"  {line}" for line in lines]
                if number == 0 and lines[0].startswith("- match"):
                    intro = "Old outputs keep their rows, and only new ones are drawn:"
                    entries.append(Examples(intro, [["keep: true"]], 4))
        return entries

    def _reinit_example(self) -> list[Entry]:
        heads = [one for one in self._heads if not one.is_of_tokens and not self._is_tied(one)]
        if not heads:
            return []
        lines = ["reinit:", *(f"  {line}" for one in heads for rule in self._rules(one, _CLASSES) for line in rule)]
        if edits := self._edits(_CLASSES):
            lines += ["config:", *(f"  {line}" for line in edits)]
        old = enumerate_names([f"{one.outputs:,}" for one in heads])
        intro = (
            f"A new head with {_CLASSES} outputs where there are {old}, which `--new-head {_CLASSES}` of init writes:"
        )
        return ["", Examples(intro, [lines])]

    def _rules(self, head: Head, outputs: int) -> list[list[str]]:
        """The lines of the rules by which a head is drawn anew."""
        if head.axis != 0:  # Dense of Keras: what it draws itself
            rank = len(head.weight.shape) - 1
            inits = ((rank, "xavier_uniform"), (0, "zeros"))
            return [
                [f"- {{match: {quoted(name)}, shape: {{{axis}: {outputs}}}, init: {init}}}"]
                for name, (axis, init) in zip(head.tensors, inits, strict=False)
            ]
        init = "default" if head.has_bias or len(head.weight.shape) > 2 else "{default: Linear}"
        rest = [f"  shape: {{0: {outputs}}}", f"  init: {init}"]
        return [[f"- match: {quoted(pattern)}", *rest] for pattern in self._patterns_of(head)]

    def _edits(self, outputs: int) -> list[str]:
        """Lines that say in config.json how many classes there are."""
        if self._config is None:
            return []
        keys = [key for key in _NUMBERS if key in self._config]
        if not keys and ("model_type" in self._config or any(key in self._config for key in _LABELS)):
            keys = [_NUMBERS[0]]
        if not keys:
            return []
        unset = [key for key in _LABELS if key in self._config]
        return [
            f"set: {{{', '.join(f'{key}: {outputs}' for key in keys)}}}",
            *([f"unset: [{', '.join(unset)}]"] if unset else []),
        ]

    def _config_edits(self) -> list[Entry]:
        if self._new_head is None or any(one.is_of_tokens for one in self._heads):
            return []
        if not (edits := self._edits(self._new_head)):
            return []
        text = "What config.json says of the head; from the labels' names their number would be read, so they go."
        return ["", *prose(text), "config:", *(f"  {line}" for line in edits)]

    def _additions(self) -> list[Entry]:
        """A head for a body that has none, or none that classifies."""
        if self._new_head is not None or any(not one.is_of_tokens for one in self._heads) or self._found.candidates:
            return []
        if (width := width_of_body(self._tensors)) is None:
            return []
        module = "classifier"
        while self._match(module):
            module += "_2"
        features = width.shape[0]
        if any(name.endswith("/kernel") for name in self._tensors):  # as Keras calls and draws them
            kernel = (f"{module}/kernel", f"[{features}, {_CLASSES}]", "xavier_uniform")
            added = (kernel, (f"{module}/bias", f"[{_CLASSES}]", "zeros"))
        else:
            weight = (f"{module}.weight", f"[{_CLASSES}, {features}]", "{normal: {std: 0.02}}")
            added = (weight, (f"{module}.bias", f"[{_CLASSES}]", "zeros"))
        lines = ["add:"]
        lines += [
            f"  - {{name: {name}, shape: {shape}, dtype: {width.dtype}, init: {init}}}" for name, shape, init in added
        ]
        if edits := self._edits(_CLASSES):
            lines += ["config:", *(f"  {line}" for line in edits)]
        intro = (
            f"A classifier of {_CLASSES} classes on the {width.shape[0]:,} features that come out. Call it what your"
            " model's code calls it, and leave the bias out if it has none:"
        )
        return ["", Examples(intro, [lines])]

    def _without_blocks(self, stack: Stack, last: int) -> Entry:
        lines = [f"drop: {quoted(f'{stack.path}[-{last}:]')}"]
        intro = f"A model without the last {'two of its' if last == 2 else 'of its'} {stack.count} blocks"
        config = self._config or {}
        keys = [key for key, value in config.items() if "layer" in key and type(value) is int and value == stack.count]
        if len(keys) == 1 and self._new_head is None:
            lines += ["config:", f"  set: {{{plain(keys[0])}: {stack.count - last}}}"]
        elif len(keys) == 1:
            intro += f"; with it, set {shown(keys[0])} to {stack.count - last} under `config`"
        elif self._config is not None:
            intro += "; with it, say under `config` how many are left"
        return Examples(f"{intro}:", [lines])

    def _drops(self) -> list[Entry]:
        for stack in self._stacks[:1]:
            if stack.alike >= (last := _last(stack)):
                return ["", self._without_blocks(stack, last)]
        if self._match("**.num_batches_tracked"):
            intro = (
                "Counters of batches, of which BatchNorm makes use only where its momentum is None, can be left out:"
            )
            return ["", Examples(intro, [['drop: "**.num_batches_tracked"']])]
        return []


_HOW_TO_ADD = "without --new-head the draft shows how a classifier is added; --head PATTERN names a layer that is one"
