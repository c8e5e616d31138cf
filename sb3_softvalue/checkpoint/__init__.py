"""A training in and out of a folder: whole or not at all, without pickle, to go on as if it had never stopped."""

from sb3_softvalue.checkpoint.callback import ResumableCheckpoint
from sb3_softvalue.checkpoint.folder import CheckpointError, has_checkpoint
from sb3_softvalue.checkpoint.save_load import load_checkpoint, save_checkpoint

__all__ = ["CheckpointError", "ResumableCheckpoint", "has_checkpoint", "load_checkpoint", "save_checkpoint"]
