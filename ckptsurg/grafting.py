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
    taken = [tensor for tensor in plan.tensors if tensor.donor is not None]
    if not taken:
        return base
    extents = dict(base.extents)
    for tensor in taken:
        assert tensor.donor is not None
        donor, name = donors[tensor.donor], tensor.donor_name or tensor.name
        donor.refuse_if_closed()
        if name not in donor.extents:
            message = f"{donor.label}: tensors are grafted from safetensors alone"
            raise UsageError(message, hint=f"`ckptsurg convert {shown(donor.path)} OUT` makes it so")
        extents[tensor.name] = donor.extents[name]
    whole = copy.copy(base)
    whole.homes = {name: base.file_of(name) for name in base.tensors}
    whole.extents = extents
    return whole
