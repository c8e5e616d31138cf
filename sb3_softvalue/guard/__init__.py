"""Stops a training at the first number that is not finite, with the last good state still in the model."""

from sb3_softvalue.guard.errors import NonFiniteError
from sb3_softvalue.guard.guarded import Guarded

__all__ = ["Guarded", "NonFiniteError"]
