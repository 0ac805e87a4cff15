"""Where a program is in the steps of optimizers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType

import torch

__all__ = ["goes_backward", "stepped_by", "uncompiled", "under_way"]

#: What torch (2.0 and later) wraps around the ``step`` of every optimizer; hooks run in it. It is looked for on the
#: stack because a counter would stay up when a step raises. Were it not found, nested steps would pass for outer ones.
_WRAPPER = torch.optim.Optimizer.profile_hook_step(lambda *_: None).__code__


def under_way(optimizer: torch.optim.Optimizer | None = None) -> int:
    """How many steps have begun and not ended: some optimizers step others, or what they inherit.

    Args:
        optimizer: Count its own alone; None counts those of all.
    """
    frame: FrameType | None = sys._getframe()
    count = 0
    while frame is not None:
        if frame.f_code is _WRAPPER and (optimizer is None or frame.f_locals.get("self") is optimizer):
            count += 1
        frame = frame.f_back
    return count


def stepped_by(optimizer: torch.optim.Optimizer) -> dict[int, torch.Tensor]:
    """The parameters of an optimizer, by identity."""
    return {id(parameter): parameter for group in optimizer.param_groups for parameter in group["params"]}


def goes_backward(args: Sequence[object], options: Mapping[str, object]) -> bool:
    """Whether a step was given a closure, so that gradients come inside of it.

    Args:
        args: Positional arguments of the step, the optimizer first, as a hook gets them.
        options: Its keyword arguments.
    """
    return any(given is not None for given in (*args[1:], *options.values()))


def uncompiled(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook that a compiled step calls, and does not try to compile."""
    wrapped: Callable[..., None] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return wrapped
