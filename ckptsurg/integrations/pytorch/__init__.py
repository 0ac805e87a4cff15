"""PyTorch: make a live model obey a manifest, and watch it while it trains."""

from .freezing import FrozenModel, freeze, source_of
from .guard import Guard

__all__ = ["FrozenModel", "Guard", "freeze", "source_of"]
