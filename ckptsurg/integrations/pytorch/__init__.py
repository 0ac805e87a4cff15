"""PyTorch: make a live model obey a manifest, and watch it while it trains."""

from .freezing import FrozenModel, freeze
from .guard import Guard
from .live import source_of
from .watching import Watch

__all__ = ["FrozenModel", "Guard", "Watch", "freeze", "source_of"]
