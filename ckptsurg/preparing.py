"""A plan with all that belongs to it: the edits of config.json, and what is likely not meant."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from . import planning
from .checkpoints import Checkpoint
from .config import CONFIG_NAME, Configs, edited_config
from .config_checks import disagreements
from .describing import base_files
from .errors import DocumentError, Problem, SpecError, UsageError
from .initializer_arguments import SAME_FOR_EVERY_NAME
from .parsing import Text
from .plans import Plan, Reviewed
from .spec import Spec
from .texts import read_text
from .wording import enumerate_names, shown

__all__ = ["Prepared", "kept_plan", "prepared", "spec_of"]

MAX_PLAN_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is to be carried out.

    Attributes:
        plan: The plan, its notes complete.
        config: The new content of config.json; None where it is not edited.
    """

    plan: Plan
    config: bytes | None

    def reviewed(self, spec: Spec, base: Checkpoint, donors: Mapping[str, Checkpoint]) -> Plan:
        """The plan with what it was made of, to be kept."""
        return self.plan.model_copy(update={"reviewed": _made_of(spec, base, donors)})

    def refuse_unlike(self, kept: Plan, spec: Spec, base: Checkpoint, donors: Mapping[str, Checkpoint]) -> None:
        """Raise UsageError if a plan that was kept is not what its spec makes of the base now."""
        found = _made_of(spec, base, donors)
        assert kept.reviewed is not None
        for name, before, now in (
            (base.label, kept.reviewed.base, found.base),
            *((f"the donor {shown(key)}", kept.reviewed.donors.get(key), now) for key, now in found.donors.items()),
        ):
            if before != now:
                raise UsageError(f"{name}: is not what the plan was made of: its headers are others", hint=_AGAIN)
        tensors = {tensor.name: tensor for tensor in kept.tensors}
        for tensor in self.plan.tensors:
            if tensors.pop(tensor.name, None) != tensor:
                raise UsageError(
                    f"the plan and its spec differ in {shown(tensor.name)}: one of them was edited", hint=_AGAIN
                )
        if tensors or self.plan.seed != kept.seed:
            raise UsageError("the plan and its spec differ: one of them was edited", hint=_AGAIN)


_AGAIN = "plan again, and look at it again"


def _made_of(spec: Spec, base: Checkpoint, donors: Mapping[str, Checkpoint]) -> Reviewed:
    return Reviewed(
        spec=spec.as_written,
        spec_digest=spec.digest(),
        base=tuple(base_files(base, "blake3")),
        donors={name: tuple(base_files(donor, "blake3")) for name, donor in sorted(donors.items())},
    )


def kept_plan(given: object) -> Plan | None:
    """A plan that was kept, or the one at a path; None for anything else, such as a spec.

    Raises:
        UsageError: if it does not say what it was made of.
        DocumentError: if it is no valid plan.
    """
    if isinstance(given, Plan):
        plan = given
    elif isinstance(given, str | os.PathLike) and os.fspath(given).endswith(".json"):
        text = read_text(Path(given), DocumentError, limit=MAX_PLAN_BYTES)
        if not isinstance(text.data, dict) or "tensors" not in text.data:
            return None
        plan = Plan.from_text(text)
    else:
        return None
    if plan.reviewed is None:
        hint = "`ckptsurg plan SPEC CKPT -o PLAN` keeps one that does"
        raise UsageError("the plan does not say what it was made of", hint=hint)
    return plan


def spec_of(plan: Plan) -> Spec:
    """The spec that a kept plan was made to.

    Raises:
        UsageError: if it is another than the plan says.
        SpecError: if it is not valid.
    """
    assert plan.reviewed is not None
    spec = Spec.from_text(Text("the plan's spec", plan.reviewed.spec))
    if spec.digest() != plan.reviewed.spec_digest:
        raise UsageError("the plan's spec was edited: its digest is another", hint=_AGAIN)
    return spec


def prepared(spec: Spec, base: Checkpoint, donors: Mapping[str, Checkpoint] | None = None) -> Prepared:
    """The plan and the new config.json, with what is wrong in either reported together.

    Raises:
        SpecError: if the spec does not fit the base.
        CheckpointError: if a config.json that is to be edited is malformed.
    """
    if spec.config is not None:
        base.refuse_remote_folder()
    problems: list[Problem] = []
    config = Configs(None, None)
    try:
        config = edited_config(spec, base.folder)
    except SpecError as error:
        problems += error.problems
    try:
        plan = planning.plan(spec, base, donors)
    except SpecError as error:
        raise SpecError(spec.label, [*error.problems, *problems]) from None
    if problems:
        raise SpecError(spec.label, problems)
    notes = [*plan.notes, *base.warnings, *config.notes, *_parted(plan, base), *_of_config(spec, plan, base, config)]
    return Prepared(plan.model_copy(update={"notes": tuple(notes)}), config.content)


def _of_config(spec: Spec, plan: Plan, base: Checkpoint, config: Configs) -> list[str]:
    """Where config.json does not say what the output's tensors are."""
    if config.before is None or config.after is None:
        return []
    output = {
        tensor.output_name: ("" if tensor.action == "add" else tensor.name, tensor.info) for tensor in plan.output
    }
    rules = {one.name: one.rule for one in plan.tensors if one.action == "drop" and one.rule is not None}
    patterns = {rule: spec.pattern_at(rule) for rule in set(rules.values())}
    dropped = {name: patterns[rule] for name, rule in rules.items()}
    if notes := disagreements(config.before, config.after, base.tensors, output, dropped):
        return notes
    resized = [one.name for one in plan.output if one.action == "reinit" and one.shape != base.tensors[one.name].shape]
    if resized and spec.config is None:
        return [f"{enumerate_names(resized, 2)}: a new shape, and {CONFIG_NAME} stays as it is; see `config`"]
    return []


def _parted(plan: Plan, base: Checkpoint) -> list[str]:
    """Names of one tensor in the base that stand for several in the output."""
    output = {tensor.name: tensor for tensor in plan.output}
    notes = []
    for names in base.tied:
        left = [output[name] for name in names if name in output]
        kinds = {(one.action, one.shape, one.frozen, one.rows, str(one.init), one.dtype, one.donor) for one in left}
        is_random = any(one.init is not None and one.init.name not in SAME_FOR_EVERY_NAME for one in left)
        if len(kinds) > 1 or (is_random and len(left) > 1):
            notes.append(f"{enumerate_names(names)}: one tensor in the base, and not in the output")
    return notes
