"""V over the state space of a task with two or three dimensions."""

from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from sb3_softvalue.sacv import SACV


class Landscape(NamedTuple):
    """V and the policy's mean action over two coordinates of the state space."""

    x: np.ndarray
    """First coordinate, shape (n_x,)"""
    y: np.ndarray
    """Second coordinate, shape (n_y,)"""
    values: np.ndarray
    """V, shape (n_y, n_x)"""
    actions: np.ndarray
    """Deterministic actions in the environment's units, shape (n_y, n_x, action_dim)"""
    is_angle: np.ndarray
    """Whether the first coordinate is the angle, in rad, of which the first two observations are cosine and sine"""
    fixed: np.ndarray
    """Value at which a third coordinate is held, shape (1,), or (0,)"""


def landscape(model: SACV, observations: np.ndarray, n_points: int = 61) -> Landscape | None:
    """
    V over the state space of a task with two or three dimensions. Three dimensions of which the first two are cosine and
    sine of an angle (Pendulum) are angle and rest; else the third is held at the median of those visited.

    :param model: trained or loaded
    :param observations: visited ones, not normalized, shape (n, 2) or (n, 3); they give the range where the space has no
        bounds
    :param n_points: along each coordinate
    :return: None if the observations are not a vector of two or three numbers
    """
    space = model.observation_space
    if not is_small_box(space):
        return None
    assert isinstance(space, spaces.Box)
    observations = np.asarray(observations, dtype=np.float64)
    low = np.where(np.isfinite(space.low), space.low, observations.min(axis=0))
    high = np.where(np.isfinite(space.high), space.high, observations.max(axis=0))
    is_angle = len(low) == 3 and bool(np.allclose(np.sum(observations[:, :2] ** 2, axis=1), 1.0, atol=1e-3))
    last = 2 if is_angle else 1
    x = np.linspace(-np.pi, np.pi, n_points) if is_angle else np.linspace(low[0], high[0], n_points)
    y = np.linspace(low[last], high[last], n_points)
    grid_x, grid_y = (grid.ravel() for grid in np.meshgrid(x, y))
    fixed = np.median(observations[:, 2:], axis=0) if not is_angle else np.empty(0)
    columns = (
        [np.cos(grid_x), np.sin(grid_x), grid_y] if is_angle else [grid_x, grid_y, *(np.full(len(grid_x), v) for v in fixed)]
    )
    grid: Any = np.stack(columns, axis=1).astype(space.dtype)
    vec_normalize = model.get_vec_normalize_env()
    if vec_normalize is not None:
        grid = vec_normalize.normalize_obs(grid)
    actions, _ = model.predict(grid, deterministic=True)
    shape = (n_points, n_points)
    values = model.predict_values(grid).reshape(shape)
    return Landscape(x, y, values, actions.reshape(*shape, -1), np.array(is_angle), fixed)


def is_small_box(space: spaces.Space) -> bool:
    """
    :return: whether the observations are vectors of two or three numbers
    """
    return isinstance(space, spaces.Box) and space.shape in ((2,), (3,))
