"""
Where the time goes with many environments in one VecEnv, and how soon the task is solved: SACV, SB3's SAC and SBX's.

    python -m benchmarks.studies.many_envs --sbx-python PYTHON_WITH_SBX_RL      # some twenty minutes

Each run trains on examples/many_environments.py (a vectorised Pendulum-v1) in a process of its own, on one thread and with an
empty cache of compiled code, until the mean return of 100 evaluation episodes reaches -200. Contenders take turns, seed by
seed. Times are the processor's, of compilers too and without the evaluations. Speeds and shares are those after the first
WARM_UP calls of train(), which compile. Writes benchmarks/results/studies/many_envs.csv after each run, and many_envs.md.
"""

import argparse
import importlib.metadata
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pandas as pd

from benchmarks.common.command_line import Help
from benchmarks.common.machine import processor

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "studies" / "many_envs.csv"
# The settings were chosen with others (0 and 1)
SEEDS = (10, 11, 12)
WARM_UP = 3

COMMON: dict[str, Any] = {"learning_rate": 2e-3, "tau": 0.02, "policy_kwargs": {"net_arch": [64, 64]}}
# By number of environments; evaluated after so many transitions as learning starts at
SETTINGS: dict[int, dict[str, Any]] = {
    1: {"gradient_steps": 1, "batch_size": 256, "learning_starts": 1_000},
    16: {"gradient_steps": 8, "batch_size": 256, "learning_starts": 1_024},
    256: {"gradient_steps": 16, "batch_size": 512, "learning_starts": 5_120},
    1_024: {"gradient_steps": 32, "batch_size": 512, "learning_starts": 10_240},
}
SOLVED = -200.0  # mean return
# A run that has not solved the task after so many evaluations is over
EVALUATIONS = 30
CONTENDERS = {"sac": "SB3 `SAC`", "sbx": "SBX `SAC`", "eager": '`SACV`, `"eager"`', "compiled": '`SACV`, `"compiled"`'}
# What else was tried: environments, contender, settings instead of those above
LAYER_NORM = {"layer_norm": True}
VARIATIONS: tuple[tuple[int, str, dict[str, Any]], ...] = (
    (256, "eager", {"policy_delay": 2}),
    (256, "eager", LAYER_NORM),
    (256, "eager", {"policy_delay": 2} | LAYER_NORM),
    (256, "sbx", {"policy_delay": 2} | LAYER_NORM),
    (1_024, "eager", {"policy_delay": 2} | LAYER_NORM),
    (1_024, "eager", {"gradient_steps": 16, "batch_size": 2048}),
    (4_096, "eager", {"gradient_steps": 64, "batch_size": 512, "learning_starts": 40_960}),
)


class Case(NamedTuple):
    """A run."""

    n_envs: int
    contender: str
    changes: dict[str, Any]
    """Settings instead of those of this number of environments"""
    seed: int

    def key(self) -> dict[str, Any]:
        """:return: the first columns of its row"""
        return {"environments": self.n_envs, "contender": self.contender, "changes": name(self.changes), "seed": self.seed}


def name(changes: dict[str, Any]) -> str:
    """:return: of a variation"""
    return ", ".join("layer norm" if key == "layer_norm" else f"{key}={value:g}" for key, value in changes.items())


def make_model(case: Case) -> Any:
    """:return: the contender's model"""
    from examples.many_environments import Pendulums

    options = COMMON | SETTINGS.get(case.n_envs, {}) | case.changes
    has_layer_norm = options.pop("layer_norm", False)
    policy: Any = "MlpPolicy"
    if case.contender == "sac":
        from stable_baselines3 import SAC as algorithm
    elif case.contender == "sbx":
        from sbx import SAC as algorithm

        options["policy_kwargs"] = options["policy_kwargs"] | {"layer_norm": has_layer_norm}
    else:
        from sb3_softvalue import SACV as algorithm

        options["execution"] = case.contender
        if has_layer_norm:
            from benchmarks.learning.variants import LayerNormPolicy as policy
    return algorithm(policy, Pendulums(case.n_envs), seed=case.seed, device="cpu", **options)


class Clock:
    """
    The processor's time of parts of a training, each without the parts inside it.

    :param model: to be trained
    """

    def __init__(self, model: Any):
        self.seconds: dict[str, float] = {}
        self._stack = [0.0]
        self.watch(model.env, "step", "environment")
        self.watch(model, "_sample_action", "acting")
        self.watch(model, "_store_transition", "replay buffer")
        self.watch(model.replay_buffer, "sample", "replay buffer")
        self.watch(model, "train", "gradient steps")
        check = getattr(model, "_finite_check", None)
        for name in ("remember_statistics", "check_action", "check_transition") if check is not None else ():
            self.watch(check, name, "finite check")

    def watch(self, owner: Any, name: str, part: str) -> None:
        """
        :param owner: of the method
        :param name: of the method
        :param part: that its time belongs to
        """
        method = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            self._stack.append(0.0)
            try:
                return method(*args, **kwargs)
            finally:
                seconds = time.process_time() - start
                self.seconds[part] = self.seconds.get(part, 0.0) + seconds - self._stack.pop()
                self._stack[-1] += seconds

        setattr(owner, name, watched)


def run(case: Case, largest: int = EVALUATIONS) -> dict[str, Any]:
    """
    Train until the task is solved.

    :param case: what to train
    :param largest: number of evaluations
    :return: what its row says of the run
    """
    import torch as th

    from benchmarks.learning.run import processor_seconds

    th.set_num_threads(1)
    model = make_model(case)
    import many_environments

    clock = Clock(model)
    clock.watch(many_environments, "evaluate", "evaluation")
    every, n_calls, returns = model.learning_starts, 0, [-math.inf]
    marks: list[dict[str, float]] = []

    def mark() -> None:
        counts = {"transitions": model.num_timesteps, "updates": model._n_updates}
        marks.append({"seconds": processor_seconds(), "of this process": time.process_time()} | counts | clock.seconds)

    def on_step(*_: Any) -> bool:
        nonlocal n_calls
        n_calls += model._n_updates > 0
        if n_calls == WARM_UP:
            mark()
        if model._n_updates and model.num_timesteps % every < case.n_envs:
            returns.append(many_environments.evaluate(model))
        return returns[-1] < SOLVED

    mark()
    model.learn(largest * every, callback=on_step, log_interval=10 * case.n_envs)
    mark()
    begin, warm, end = marks
    spent = {name: value - warm.get(name, 0.0) for name, value in end.items() if name != "seconds"}
    busy = spent.pop("of this process") - spent.pop("evaluation")
    transitions, updates = spent.pop("transitions"), spent.pop("updates")
    shares = {name: seconds / busy for name, seconds in spent.items()}
    return {
        "return": returns[-1],
        "transitions": model.num_timesteps,
        "updates": model._n_updates,
        "seconds": end["seconds"] - begin["seconds"] - end["evaluation"],
        "start-up, s": warm["seconds"] - begin["seconds"] - warm.get("evaluation", 0.0),
        "transitions/s": transitions / busy,
        "updates/s": updates / busy,
        **{f"share, {name}": share for name, share in shares.items()},
        "share, rest": 1.0 - sum(shares.values()),
        **{name: importlib.metadata.version(name) for name in ("stable_baselines3", "torch")},
        "sbx-rl": importlib.metadata.version("sbx-rl") if case.contender == "sbx" else "",
    }


def run_apart(case: Case, python: str) -> dict[str, Any]:
    """
    :param case: what to train
    :param python: that has what the contender needs
    :return: its row
    """
    with tempfile.TemporaryDirectory() as cache:
        one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": cache}
        one_thread["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [python, "-m", "benchmarks.studies.many_envs", "--run", json.dumps(case)]
        environment = os.environ | one_thread | {"PYTHONPATH": path}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return case.key() | json.loads(done.stdout.splitlines()[-1])


def cases(contenders: Sequence[str], seeds: Sequence[int]) -> Iterator[Case]:
    """:return: all runs, those that are compared next to each other"""
    for n_envs in SETTINGS:
        yield from (Case(n_envs, contender, {}, seed) for seed in seeds for contender in contenders)
    for seed in seeds:
        yield from (Case(*variation, seed) for variation in VARIATIONS if variation[1] in contenders)


def cells(mine: pd.DataFrame) -> list[str]:
    """:return: what a table says of the seeds of a kind of run: medians, and the range of what differs between seeds"""
    if mine.empty:
        return ["not run", *[""] * 5]
    solved = mine[mine["return"] >= SOLVED]
    minutes = f"{solved['seconds'].min() / 60:.2f} to {solved['seconds'].max() / 60:.2f}" if len(solved) else ""
    unsolved = len(mine) - len(solved)
    return [
        f"{mine['transitions/s'].median():,.0f}",
        f"{mine['updates/s'].median():,.0f}",
        f"{mine['start-up, s'].median():.1f}",
        f"{mine['transitions'].median():,.0f}",
        f"**{mine['seconds'].median() / 60:.2f}**" if not unsolved else f"{unsolved} of {len(mine)} not solved",
        minutes,
    ]


def markdown(rows: pd.DataFrame) -> str:
    """:return: the tables of the documentation"""
    header = ["transitions/s", "updates/s", "start-up, s", "transitions", "minutes until solved", "of the seeds"]
    parts = [column for column in rows if column.startswith("share, ")]
    speeds, shares = [["environments", "", *header]], [["environments", "", *(part[len("share, ") :] for part in parts)]]
    for n_envs in SETTINGS:
        for contender, title in CONTENDERS.items():
            mine = select(rows, n_envs, contender, {})
            speeds.append([f"{n_envs:,}", title, *cells(mine)])
            if len(mine):
                medians = mine[parts].median()
                shares.append(
                    [f"{n_envs:,}", title, *("–" if math.isnan(x) else f"{x:.0%}".replace("%", " %") for x in medians)]
                )
    variations = [["environments", "", "instead of the above", *header]]
    for n_envs, contender, changes in VARIATIONS:
        variations.append(
            [f"{n_envs:,}", CONTENDERS[contender], f"`{name(changes)}`", *cells(select(rows, n_envs, contender, changes))]
        )
    seeds = sorted(rows["seed"].unique())
    measured = f"{rows['processor'].iloc[-1]}, one thread; medians of seeds {', '.join(map(str, seeds))}.\n"
    return "\n".join([measured, *map(table, (speeds, shares, variations))])


def select(rows: pd.DataFrame, n_envs: int, contender: str, changes: dict[str, Any]) -> pd.DataFrame:
    """:return: the rows of a kind of run"""
    return rows[(rows["environments"] == n_envs) & (rows["contender"] == contender) & (rows["changes"] == name(changes))]


def table(lines: Sequence[Sequence[str]]) -> str:
    """:return: in Markdown, from a header and lines"""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (lines[0], ["---"] * len(lines[0]), *lines[1:])) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.studies.many_envs", description=__doc__, formatter_class=Help)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of the runs")
    parser.add_argument("--sbx-python", help="Python of an environment with sbx-rl; without it SBX is left out")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS, help="CSV, replaced; the tables are written beside it")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one case, as JSON
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run(Case(*json.loads(options.run)))))
        return
    contenders = [contender for contender in CONTENDERS if contender != "sbx" or options.sbx_python]
    rows: list[dict[str, Any]] = []
    for case in cases(contenders, options.seeds):
        rows.append(run_apart(case, options.sbx_python if case.contender == "sbx" else sys.executable))
        print(
            ", ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in rows[-1].items()
            )
        )
        frame = pd.DataFrame(rows).assign(processor=processor("cpu"))
        frame.to_csv(options.output, index=False, float_format="%.4g")
        options.output.with_suffix(".md").write_text(markdown(frame), encoding="utf-8")


if __name__ == "__main__":
    main()
