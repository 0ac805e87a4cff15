"""What a draft says of its subject: the keys of a spec with comments, and examples that may fit."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..config_checks import edits
from ..planning.output_names import renumbered
from ..selectors import module_and_leaf
from ..wording import counted, enumerate_names, shown, size
from .blocks import Stack, find_stages
from .commented import Entry, Examples, aligned, plain, prose, quoted
from .heads import Head, says_tied, vocabularies, width_of_body
from .subject import Subject, listed

__all__ = ["entries_of"]

#: Of examples of one kind.
_MOST = 3
#: Of a head in an example.
_CLASSES = 10
#: By which config.json says how many classes a head has: as numbers, and as maps that would contradict them.
_NUMBERS, _LABELS = ("num_labels", "num_classes"), ("id2label", "label2id")
_STATISTICS = ("running_mean", "moving_mean")


def _last(stack: Stack) -> int:
    """Of how many blocks at the end an example speaks."""
    return 2 if stack.count > 3 else 1


def _middle(stack: Stack) -> int:
    """The first of as many in the middle."""
    return (stack.count - _last(stack) + 1) // 2


def entries_of(subject: Subject, name: str | None, schema: str) -> list[Entry]:
    """All that a draft says, examples not yet tried."""
    return _Entries(subject).all(name, schema)


class _Entries:
    def __init__(self, subject: Subject) -> None:
        self._of = subject

    def all(self, name: str | None, schema: str) -> list[Entry]:
        tensors = self._of.tensors.values()
        called = name or "draft"
        if self._of.new_head is not None and name is not None:
            called += f"-{counted(self._of.new_head, 'output').replace(' ', '-').replace(',', '')}"
        address = schema if "://" in schema else shown(schema).replace(" ", "%20")
        nbytes = size(sum(info.nbytes for info in tensors))
        entries: list[Entry] = [
            f"# yaml-language-server: $schema={address}",
            *prose(f"Drafted by `ckptsurg init`, from {counted(len(self._of.tensors))}, {nbytes}. Editors complete it"
                    " by the schema above, which is what `ckptsurg schema spec` prints."),
            *prose("What begins with # and no space is an example that fits this checkpoint: take the # away. Then"
                    " see what the spec does with `ckptsurg plan`, which reads headers only."),
            "version: 1",
            f"name: {plain(called)}",
            *self._freeze(),
            *self._reinit(),
            *self._config_edits(),
            *self._additions(),
        ]  # fmt: skip
        return [*entries, *self._drops(entries)]

    def _freeze(self) -> list[Entry]:
        entries: list[Entry] = [
            "",
            *prose("What training must not change; all else trains. Of several lines the later wins, and ! takes away."
                    " A pattern is a tensor's name, or that of a module for all that is below it."),
            *self._remarks_on_heads(),
            "freeze:",
        ]  # fmt: skip
        rows = [("**", "everything keeps its bits" + ("," if self._of.trained else "; nothing trains so far"))]
        rows += [(f"!{pattern}", remark) for pattern, remark in self._of.trained]
        entries += [f"  {line}" for line in aligned([(f"- {quoted(row)}", remark) for row, remark in rows])]
        further = [(f"- {quoted(f'!{pattern}')}", remark) for pattern, remark in self._further()]
        if further:
            parts = [[line] for line in aligned(further)]
            entries.append(Examples("What may train besides:", parts, 2))
        for leaf in _STATISTICS:
            if norms := [name for name in self._of.tensors if module_and_leaf(name)[1] == leaf]:
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
        if not self._of.heads and self._of.named_head is None:
            remarks.append(
                f"Which layer is the head cannot be told; it may be one of: {listed(self._of.found.candidates)}."
                if self._of.found.candidates
                else "No layer looks like a head by its name and shape."
            )
        if tied := self._of.names.in_order(self._of.tied):
            remarks.append(f"Tied, one tensor in the model: {enumerate_names(tied)}. Freeze all of them or none.")
        elif not self._of.heads and says_tied(self._of.config) and (tables := vocabularies(self._of.tensors)):
            remarks.append(
                f"A head that predicts tokens is tied to {enumerate_names(tables)}, as config.json says: it has no"
                " tensor of its own, and what becomes of the one becomes of both."
            )
        return [line for remark in remarks for line in prose(remark)]

    def _further(self) -> list[tuple[str, str]]:
        """Patterns of what else people train, with a remark each."""
        found: list[tuple[str, str]] = []
        if self._of.layers:
            found.append(("layers[-3:]", "the last three layers, in the model's order"))
        stages = find_stages(self._of.tensors)
        found += [
            (
                f"{one.stem}{one.numbers[-1]}",
                f"the last of {shown(one.stem)}{{{one.numbers[0]}..{one.numbers[-1]}}}",
            )
            for one in stages[:_MOST]
        ]
        # Of stages that are stacks of blocks themselves, the last is example enough.
        earlier = {f"{one.stem}{number}" for one in stages for number in one.numbers[:-1]}
        for stack in [one for one in self._of.stacks if one.path not in earlier][:_MOST]:
            last = _last(stack)
            what = f"the last {'two ' if last == 2 else ''}of {stack.count} blocks"
            found.append((f"{stack.path}[-{last}:]", what))
        biases = self._of.match("**.bias")
        if len(biases) > 1:
            found.append(("**.bias", "every bias"))
        return [
            (pattern, f"{remark}: {counted(len(names))}")
            for pattern, remark in found
            # Whoever names one block does not want to hear of two.
            if (names := self._of.match(pattern)) and not any(named <= set(names) for named in self._of.named)
        ]

    def _reinit(self) -> list[Entry]:
        if self._of.new_head is None:
            return self._reinit_example()
        old = sorted({one.outputs for one in self._of.heads})
        was = f"instead of {' or '.join(f'{count:,}' for count in old)}"
        text = f"The head, drawn anew for {counted(self._of.new_head, 'output')} {was}, from the seed."
        entries: list[Entry] = ["", *prose(text), "seed: 0", "reinit:"]
        for one in self._of.heads:
            for number, lines in enumerate(self._rules(one, self._of.new_head)):
                entries += [f"  {line}" for line in lines]
                if number == 0 and lines[0].startswith("- match"):
                    intro = "Old outputs keep their rows, and only new ones are drawn:"
                    entries.append(Examples(intro, [["keep: true"]], 4))
        return entries

    def _reinit_example(self) -> list[Entry]:
        heads = [one for one in self._of.heads if not one.is_of_tokens and not self._of.is_tied(one)]
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
        return [[f"- match: {quoted(pattern)}", *rest] for pattern in self._of.patterns_of(head)]

    def _edits(self, outputs: int) -> list[str]:
        """Lines that say in config.json how many classes there are."""
        if self._of.config is None:
            return []
        keys = [key for key in _NUMBERS if key in self._of.config]
        if not keys and ("model_type" in self._of.config or any(key in self._of.config for key in _LABELS)):
            keys = [_NUMBERS[0]]
        if not keys:
            return []
        unset = [key for key in _LABELS if key in self._of.config]
        return [
            f"set: {{{', '.join(f'{key}: {outputs}' for key in keys)}}}",
            *([f"unset: [{', '.join(unset)}]"] if unset else []),
        ]

    def _config_edits(self) -> list[Entry]:
        if self._of.new_head is None or any(one.is_of_tokens for one in self._of.heads):
            return []
        if not (edits := self._edits(self._of.new_head)):
            return []
        text = "What config.json says of the head; from the labels' names their number would be read, so they go."
        return ["", *prose(text), "config:", *(f"  {line}" for line in edits)]

    def _additions(self) -> list[Entry]:
        """A head for a body that has none, or none that classifies."""
        if (
            self._of.new_head is not None
            or any(not one.is_of_tokens for one in self._of.heads)
            or self._of.found.candidates
        ):
            return []
        if (width := width_of_body(self._of.tensors)) is None:
            return []
        module = "classifier"
        while self._of.match(module):
            module += "_2"
        features = width.shape[0]
        if any(name.endswith("/kernel") for name in self._of.tensors):  # as Keras calls and draws them
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

    def _without_blocks(self, stack: Stack, others: Sequence[Entry]) -> Entry:
        """Blocks are taken out of the middle, and config.json is made to agree; ``others`` stands above."""
        first, count = _middle(stack), _last(stack)
        pattern = f"{stack.path}[{first}:{first + count}]"
        lines = [f"drop: {{match: {quoted(pattern)}, renumber: true}}"]
        gone = set(self._of.match(pattern))
        left = [name for name in self._of.tensors if name not in gone]
        called = renumbered(left, sorted(gone))
        output = {called.get(name, name): (name, self._of.tensors[name]) for name in left}
        which = "the two blocks" if count == 2 else "the block"
        intro = f"A model without {which} in the middle, of {stack.count}; the later ones get their numbers"
        said = {} if self._of.config is None else edits(self._of.config, self._of.tensors, output)
        keys = [f"{plain(path)}: {json.dumps(value)}" for path, value in said.items()]
        if keys and self._of.new_head is not None:
            intro += f". With it, set {enumerate_names(keys)} under `config`"
        elif keys:
            lines += ["config:", "  set:", *(f"    {key}" for key in keys)]
            if any("config:" in part for one in others if isinstance(one, Examples) for part in one.parts):
                intro += ". Taken together with the example above, `config` is written once, with the keys of both"
        elif self._of.config is not None:
            intro += "; with it, say under `config` how many are left"
        return Examples(f"{intro}:", [lines])

    def _drops(self, others: Sequence[Entry]) -> list[Entry]:
        for stack in self._of.stacks[:1]:
            if stack.alike >= max(1, stack.count - 1 - _middle(stack)):
                return ["", self._without_blocks(stack, others)]
        if self._of.match("**.num_batches_tracked"):
            intro = (
                "Counters of batches, of which BatchNorm makes use only where its momentum is None, can be left out:"
            )
            return ["", Examples(intro, [['drop: "**.num_batches_tracked"']])]
        return []
