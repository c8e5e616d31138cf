"""How an update runs: the choice between eager, compiled and CUDA graph, the optimizers' step, and the batches."""

from sb3_softvalue.execution.batches import sample_batches
from sb3_softvalue.execution.captured_actions import CapturedActions
from sb3_softvalue.execution.choice import BREAK_EVEN_UPDATES, EXECUTIONS, check_autocast, updates_to_come
from sb3_softvalue.execution.executor import Executor
from sb3_softvalue.execution.optimizers import OptimizerStep

__all__ = [
    "BREAK_EVEN_UPDATES",
    "EXECUTIONS",
    "CapturedActions",
    "Executor",
    "OptimizerStep",
    "check_autocast",
    "sample_batches",
    "updates_to_come",
]
