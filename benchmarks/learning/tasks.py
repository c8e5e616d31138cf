"""What is trained on what: tasks, algorithms, and one run of an algorithm on a task."""

import dataclasses
from typing import Any, NamedTuple


class Task(NamedTuple):
    """What is to be learned."""

    env: str
    steps: int
    evaluate_every: int
    seeds: tuple[int, ...]
    """Fixed before anything was run"""
    hyperparameters: dict[str, Any]
    """Beside the algorithms' common defaults: those of RL Zoo's sac.yml, where it has the task"""


SEEDS, TUNING_SEEDS = (0, 1, 2, 3, 4), (10, 11, 12)
MUJOCO = {"learning_starts": 10_000}
TASKS = {
    "Pendulum-v1": Task("Pendulum-v1", 20_000, 1_000, SEEDS, {"learning_rate": 1e-3}),
    "HalfCheetah-v5": Task("HalfCheetah-v5", 100_000, 5_000, SEEDS[:4], MUJOCO),
    "InvertedPendulum-v5": Task("InvertedPendulum-v5", 25_000, 2_500, SEEDS, {}),
    "Reacher-v5": Task("Reacher-v5", 50_000, 2_500, SEEDS, {}),
    "InvertedDoublePendulum-v5": Task("InvertedDoublePendulum-v5", 40_000, 2_500, SEEDS, {}),
    "Hopper-v5": Task("Hopper-v5", 100_000, 5_000, SEEDS[:4], MUJOCO),
    "Walker2d-v5": Task("Walker2d-v5", 100_000, 5_000, SEEDS[:4], MUJOCO),
    # For choosing hyper-parameters: seeds of their own, so that what is chosen is judged on others
    "InvertedDoublePendulum-v5-15k": Task("InvertedDoublePendulum-v5", 15_000, 1_000, TUNING_SEEDS, {}),
    "HalfCheetah-v5-50k": Task("HalfCheetah-v5", 50_000, 5_000, TUNING_SEEDS, MUJOCO),
    "HalfCheetah-v5-1M": Task("HalfCheetah-v5", 1_000_000, 5_000, SEEDS[:4], MUJOCO),
}
# Mean return of 100 episodes of uniformly random actions, the 0 of normalised scores; 1 is the IQM of SAC's scores
RANDOM_RETURNS = {
    "Pendulum-v1": -1208.0,
    "HalfCheetah-v5": -282.0,
    "InvertedPendulum-v5": 5.2,
    "Reacher-v5": -43.3,
    "InvertedDoublePendulum-v5": 49.1,
    "Hopper-v5": 16.7,
    "Walker2d-v5": 1.8,
}


class Algorithm(NamedTuple):
    """An algorithm with settings of its own."""

    model: str
    """Its class, a key of ``make_model``"""
    title: str
    colour: str
    hyperparameters: dict[str, Any] = {}  # noqa: RUF012  (never changed)
    """Beside those of the task. ``policy``, where it is given, is a class of variants.py"""


# The colours of Okabe and Ito 2008
BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7"
ALGORITHMS = {
    "sacv": Algorithm("sacv", "SACV", BLUE),
    "sac": Algorithm("sac", "SAC", ORANGE),
    # The temperature of the paper: 1 / reward scale = 0.2
    "sacv-fixed": Algorithm("sacv", "SACV, α = 0.2", GREEN, {"ent_coef": 0.2}),
    "tqc": Algorithm("tqc", "TQC", VERMILION),
    "sacv-mixed": Algorithm("sacv", "SACV, bfloat16 products", SKY, {"execution": "mixed"}),
    # A target with less lag: V̄ behind V, V behind Q
    "sacv-tau-0.01": Algorithm("sacv", "SACV, τ = 0.01", GREEN, {"tau": 0.01}),
    "sacv-vf-1e-3": Algorithm("sacv", "SACV, V's learning rate 1e-3", PURPLE, {"vf_learning_rate": 1e-3}),
    # Less entropy in the first values, which V has to unlearn when α falls
    "sacv-alpha-0.1": Algorithm("sacv", "SACV, α begins at 0.1", SKY, {"ent_coef": "auto_0.1"}),
    "sac-alpha-0.1": Algorithm("sac", "SAC, α begins at 0.1", VERMILION, {"ent_coef": "auto_0.1"}),
    "sacv-alpha-0.01": Algorithm("sacv", "SACV, α begins at 0.01", PURPLE, {"ent_coef": "auto_0.01"}),
    # No constant in the bonus
    "sacv-normalized": Algorithm("sacv", "SACV, normalized prior", GREEN, {"action_prior": "normalized_uniform"}),
    "sac-normalized": Algorithm("sac-normalized", "SAC, normalized prior", VERMILION),
    # The offset decays in fewer steps
    "sacv-n-steps-3": Algorithm("sacv", "SACV, n_steps = 3", SKY, {"n_steps": 3}),
    "sacv-gs-2": Algorithm("sacv", "SACV, gradient_steps = 2", PURPLE, {"gradient_steps": 2}),
    "sacv-normalized-gs-2": Algorithm(
        "sacv",
        "SACV, normalized prior, gradient_steps = 2",
        "black",
        {"action_prior": "normalized_uniform", "gradient_steps": 2},
    ),
    # What V adds to the arm before: SAC with the same constant taken from its bonus, and as many updates
    "sac-normalized-gs-2": Algorithm(
        "sac-normalized", "SAC, normalized prior, gradient_steps = 2", "brown", {"gradient_steps": 2}
    ),
    "sacv-normalized-gs-2-delay-2": Algorithm(
        "sacv",
        "SACV, normalized prior, gradient_steps = 2, policy_delay = 2",
        "olive",
        {"action_prior": "normalized_uniform", "gradient_steps": 2, "policy_delay": 2},
    ),
    "sacv-layer-norm": Algorithm(
        "sacv", "SACV, layer norm in Q and V, τ = 0.01", "grey", {"tau": 0.01, "policy": "LayerNormPolicy"}
    ),
}


def evaluation_steps(steps: int, evaluate_every: int) -> list[int]:
    """:return: the steps after which a run of so many is evaluated"""
    return list(range(evaluate_every, steps + 1, evaluate_every))


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: all that a process needs to know."""

    task: str
    """The name of its results"""
    env: str
    steps: int
    evaluate_every: int
    algorithm: str
    seed: int
    hyperparameters: dict[str, Any]
    device: str = "cpu"
    threads: int = 1
    checkpoints: str = ""
    """Folder for the checkpoints of runs that are not finished; none without a name"""

    @property
    def evaluations(self) -> list[int]:
        """:return: the steps after which it is evaluated"""
        return evaluation_steps(self.steps, self.evaluate_every)

    @property
    def can_resume(self) -> bool:
        """:return: whether it has checkpoints"""
        return bool(self.checkpoints)


def make_model(run: Run) -> Any:
    """:return: the untrained model"""
    options: dict[str, Any] = {"policy": "MlpPolicy"} | run.hyperparameters
    if options["policy"] == "LayerNormPolicy":
        from benchmarks.learning.variants import LayerNormPolicy

        options["policy"] = LayerNormPolicy
    model = ALGORITHMS[run.algorithm].model
    if model == "sac":
        from stable_baselines3 import SAC as algorithm
    elif model == "sac-normalized":
        from benchmarks.learning.variants import SACNormalizedPrior as algorithm
    elif model == "tqc":
        from sb3_contrib import TQC as algorithm
    else:
        from sb3_softvalue import SACV as algorithm
    return algorithm(env=run.env, seed=run.seed, device=run.device, **options)
