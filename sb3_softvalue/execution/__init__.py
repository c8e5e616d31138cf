"""How an update runs: the choice of the backend (eager, compiled, CUDA graph), the optimizer step, and the batches."""

from sb3_softvalue.execution.batches import sample_batches
from sb3_softvalue.execution.captured import CapturedActions
from sb3_softvalue.execution.choice import BREAK_EVEN_UPDATES, EXECUTIONS, check_autocast, remaining_updates
from sb3_softvalue.execution.executor import Executor
from sb3_softvalue.execution.optimizers import OptimizerStep, learned_params

__all__ = [
    "BREAK_EVEN_UPDATES",
    "EXECUTIONS",
    "CapturedActions",
    "Executor",
    "OptimizerStep",
    "check_autocast",
    "learned_params",
    "remaining_updates",
    "sample_batches",
]
