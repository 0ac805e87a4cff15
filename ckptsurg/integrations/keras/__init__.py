"""Keras: make a live model obey a manifest, watch it while it trains, load a checkpoint into it."""

from .callback import FreezeCallback
from .freezing import FrozenModel, freeze
from .loading import load_weights

__all__ = ["FreezeCallback", "FrozenModel", "freeze", "load_weights"]
