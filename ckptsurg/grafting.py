"""A base some of whose tensors are another checkpoint's."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from .checkpoints import Checkpoint
from .errors import UsageError
from .plans import Plan
from .wording import shown

__all__ = ["grafted"]


def grafted(base: Checkpoint, plan: Plan, donors: Mapping[str, Checkpoint]) -> Checkpoint:
    """The base, with the bytes of grafted tensors where a donor has them; it is closed with the base and the donors.

    Raises:
        UsageError: if the bytes of a donor do not lie in its files as they are.
    """
    extents = dict(base.extents)
    for tensor in plan.tensors:
        if tensor.donor is None:
            continue
        donor, name = donors[tensor.donor], tensor.donor_name or tensor.name
        donor.refuse_if_closed()
        if name not in donor.extents:
            message = f"{donor.label}: tensors are grafted from safetensors alone"
            raise UsageError(message, hint=f"`ckptsurg convert {shown(donor.path)} OUT` makes it so")
        extents[tensor.name] = donor.extents[name]
    if len(extents) == len(base.extents) and not any(tensor.donor for tensor in plan.tensors):
        return base
    whole = copy.copy(base)
    whole.homes = {name: base.file_of(name) for name in base.tensors}
    whole.extents = extents
    return whole
