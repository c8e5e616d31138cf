"""
Closed-loop insulin infusion for a patient with type 1 diabetes: a day with three unannounced meals, simulated with the
minimal model of Bergman, by a learned controller and, beside it, by a PID controller.

    python examples/drug_dosing.py

A simulation for people who study control, not for dosing anybody.
"""

import argparse
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env

from sb3_softvalue import SACV
from sb3_softvalue.diagnostics import SoftValueDiagnostics, evaluate_values
from sb3_softvalue.figures import BLUE, GREY, ORANGE, new_figure, report

# Minimal model (Bergman et al. 1981, J. Clin. Invest. 68:1456) with the parameters for a diabetic without insulin
# secretion of Fisher 1991, IEEE Trans. Biomed. Eng. 38:57 (from Furler et al. 1985, Diabetes Care 8:553)
P1 = 0.0  # 1/min, glucose effectiveness: without insulin, glucose does not come back by itself
P2 = 0.025  # 1/min, decay of the insulin action
P3 = 0.000013  # L/(mU min²), rise of the insulin action with plasma insulin
N = 5.0 / 54.0  # 1/min, clearance of plasma insulin
V1 = 12.0  # L, distribution volume of insulin
GB = 81.0  # mg/dL, basal glucose (4.5 mmol/L)
IB = 15.0  # mU/L, basal plasma insulin
BASAL = N * V1 * IB  # mU/min, infusion that holds both, 16.7
# A meal's glucose appears at B·exp(-0.05 t) per minute (Fisher 1991)
MEAL_DECAY = 0.05  # 1/min
MEALS = ((7.0, 4.0), (12.5, 5.0), (19.0, 4.5))  # hour of the day, B in mg/dL/min; varied by ±1 h and ±30 %

MAX_INFUSION = 100.0  # mU/min, 6 U/h
STEP = 5  # min between two readings of the glucose sensor
DAY = 24 * 60  # min
TARGET = 112.5  # mg/dL, where the risk below is zero


def risk(glucose: float) -> float:
    """
    Clinical risk of a glucose concentration in mg/dL (Kovatchev et al. 1997, Diabetes Care 20:1655): 0 at 112.5, 7.7 at 70
    and at 180, 100 at 20 and at 600.
    """
    return float(10.0 * (1.509 * (np.log(glucose) ** 1.084 - 5.381)) ** 2)


class Patient(gym.Env):
    """
    One day of a patient. Action: insulin infusion (mU/min). Observation: glucose (100 mg/dL), its change since the last
    reading (10 mg/dL), and, computed from the doses given, plasma insulin (100 mU/L) and insulin action (0.01/min).

    Reward: minus a tenth of the risk, at each reading. A day that leads below 40 mg/dL ends with a reward of -100.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

    def __init__(self) -> None:
        self.observation_space = spaces.Box(np.float32([0, -20, 0, -1]), np.float32([20, 20, 10, 20]))
        self.action_space = spaces.Box(0.0, MAX_INFUSION, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.minute = 0
        # Glucose (mg/dL), insulin action X (1/min), plasma insulin I (mU/L), appearance of meal glucose (mg/dL/min)
        self.state = np.array([self.np_random.uniform(80.0, 160.0), 0.0, IB, 0.0])
        self.meals = {
            int(60 * (hour + self.np_random.uniform(-1.0, 1.0))): size * self.np_random.uniform(0.7, 1.3)
            for hour, size in MEALS
        }
        return self._observation(self.state[0]), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        before = self.state[0]
        for _ in range(STEP):
            self.state[3] += self.meals.get(self.minute, 0.0)
            self.state = _runge_kutta(self.state, float(action[0]))
            self.minute += 1
        glucose = self.state[0]
        died = bool(glucose < 40.0)
        reward = -100.0 if died else -0.1 * risk(glucose)
        info = {"glucose": glucose, "infusion": float(action[0])}
        return self._observation(before), reward, died, self.minute >= DAY, info

    def _observation(self, before: float) -> np.ndarray:
        glucose, insulin_action, insulin, _ = self.state
        return np.array([glucose / 100, (glucose - before) / 10, insulin / 100, insulin_action / 0.01], dtype=np.float32)


def _derivative(state: np.ndarray, infusion: float) -> np.ndarray:
    """Change per minute of (G, X, I, meal) under an infusion in mU/min: the minimal model."""
    glucose, insulin_action, insulin, meal = state
    return np.array(
        [
            -P1 * (glucose - GB) - insulin_action * glucose + meal,
            -P2 * insulin_action + P3 * (insulin - IB),
            -N * insulin + infusion / V1,
            -MEAL_DECAY * meal,
        ]
    )


def _runge_kutta(state: np.ndarray, infusion: float) -> np.ndarray:
    """The state one minute later (classical Runge-Kutta)."""
    k1 = _derivative(state, infusion)
    k2 = _derivative(state + k1 / 2, infusion)
    k3 = _derivative(state + k2 / 2, infusion)
    k4 = _derivative(state + k3, infusion)
    return state + (k1 + 2 * k2 + 2 * k3 + k4) / 6


class PID:
    """Baseline: infusion = basal + Kp·(e + ∫e/Ti + Td·de/dt), e = glucose - target, with limited integral."""

    kp, ti, td = 0.8, 400.0, 60.0  # mU/min per mg/dL, min, min; found by a coarse grid search on this patient

    def __init__(self) -> None:
        self.integral = 0.0  # mg/dL min

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        """Infusion (mU/min) for an observation of ``Patient``."""
        error = 100 * observation[0] - TARGET
        slope = 10 * observation[1] / STEP  # mg/dL/min
        infusion = BASAL + self.kp * (error + self.integral / self.ti + self.td * slope)
        if 0.0 < infusion < MAX_INFUSION:
            self.integral += error * STEP
        return np.array([np.clip(infusion, 0.0, MAX_INFUSION)], dtype=np.float32)


def make_env() -> gym.Env:
    """The patient, with an ideal sensor."""
    return Patient()


def simulate(make_controller: Callable[[], Callable[[np.ndarray], np.ndarray]], days: int) -> dict[str, np.ndarray]:
    """Glucose (mg/dL) and infusion (mU/min) at each reading of the same days for any controller, each (days, readings)."""
    traces: dict[str, np.ndarray] = {name: np.full((days, DAY // STEP), np.nan) for name in ("glucose", "infusion")}
    for day in range(days):
        env, controller = Patient(), make_controller()
        observation, _ = env.reset(seed=1000 + day)
        for reading in range(DAY // STEP):
            observation, _, terminated, _, info = env.step(controller(observation))
            for name, trace in traces.items():
                trace[day, reading] = info[name]
            if terminated:
                break
    return traces


def describe(name: str, glucose: np.ndarray) -> str:
    """One line on a controller; 70 to 180 mg/dL is the range that guidelines aim at."""
    seen = glucose[np.isfinite(glucose)]
    in_range, below = np.mean((seen >= 70) & (seen <= 180)), np.mean(seen < 70)
    ended = int(np.isnan(glucose[:, -1]).sum())
    mean_risk = np.mean([risk(value) for value in seen])
    return (
        f"{name}: {in_range:.1%} of the time in 70-180 mg/dL, {below:.1%} below 70, mean risk {mean_risk:.2f}, "
        f"days that ended below 40: {ended}"
    )


def draw(traces: dict[str, dict[str, np.ndarray]], picture: pathlib.Path) -> None:
    """Median and range over the days of glucose and infusion, for each controller."""
    figure, grid = new_figure("Glucose of a simulated patient with three unannounced meals a day", 2, 1, height=6)
    hours = np.arange(1, DAY // STEP + 1) * STEP / 60
    for (name, trace), color in zip(traces.items(), (BLUE, ORANGE), strict=True):
        for axes, quantity in zip(grid[:, 0], ("glucose", "infusion"), strict=True):
            reached = np.isfinite(trace[quantity]).any(axis=0)
            low, median, high = np.nanquantile(trace[quantity][:, reached], [0.1, 0.5, 0.9], axis=0)
            axes.fill_between(hours[reached], low, high, color=color, alpha=0.2, linewidth=0)
            axes.plot(hours[reached], median, color=color, linewidth=2, label=f"{name}: median, 10 to 90 % of the days")
    for bound in (70, 180):
        grid[0, 0].axhline(bound, color=GREY, linestyle="--", linewidth=1)
    grid[0, 0].set(ylabel="plasma glucose (mg/dL)", xlim=(0, 24), xticks=range(0, 25, 4))
    grid[1, 0].set(xlabel="time of day (h)", ylabel="insulin infusion (mU/min)", xlim=(0, 24), xticks=range(0, 25, 4))
    grid[0, 0].legend(frameon=False, fontsize=9)
    figure.savefig(picture)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, np.ndarray]]:
    """Train, compare with the PID controller, draw."""
    parser = argparse.ArgumentParser(description="Learn to dose insulin, and compare with a PID controller.")
    parser.add_argument("--timesteps", type=int, default=20_000, help="5 min each (default: %(default)s, 70 days)")
    parser.add_argument("--days", type=int, default=20, help="of the comparison (default: %(default)s)")
    parser.add_argument(
        "--folder",
        type=pathlib.Path,
        default=pathlib.Path("runs/drug_dosing"),
        help="(default: %(default)s)",
    )
    options = parser.parse_args(argv)

    model = SACV(
        "MlpPolicy",
        make_vec_env(make_env, seed=0),
        learning_rate=1e-3,
        learning_starts=DAY // STEP,
        policy_kwargs={"net_arch": [64, 64]},
        seed=0,
    )
    model.learn(options.timesteps, callback=SoftValueDiagnostics(options.folder), progress_bar=True)
    model.save(options.folder / "model")
    calibration = evaluate_values(model, Patient(), n_episodes=5)
    calibration.save(options.folder)
    print(calibration)

    traces = {
        "learned": simulate(lambda: lambda observation: model.predict(observation, deterministic=True)[0], options.days),
        "PID": simulate(PID, options.days),
    }
    for name, trace in traces.items():
        print(describe(name, trace["glucose"]))
    draw(traces, options.folder / "glucose.png")
    if DAY // STEP <= options.timesteps:
        report(options.folder)
    print(f"Look at {options.folder}")
    return traces


if __name__ == "__main__":
    main()
