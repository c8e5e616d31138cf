"""A training in and out of a folder: whole or not at all, without pickle, to continue as if it had never stopped."""

from sb3_softvalue.checkpoint.callback import ResumableCheckpoint
from sb3_softvalue.checkpoint.folder import has_checkpoint
from sb3_softvalue.checkpoint.save_load import Resumed, load_checkpoint, save_checkpoint
from sb3_softvalue.checkpoint.schema import CheckpointError

__all__ = ["CheckpointError", "ResumableCheckpoint", "Resumed", "has_checkpoint", "load_checkpoint", "save_checkpoint"]
