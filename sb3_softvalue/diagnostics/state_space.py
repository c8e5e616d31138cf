"""V over a two- or three-dimensional state space."""

from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from sb3_softvalue.sacv import SACV


class Landscape(NamedTuple):
    """V and the policy's deterministic action over two coordinates of the state space."""

    x: np.ndarray
    """First coordinate, shape (n_x,)"""
    y: np.ndarray
    """Second coordinate, shape (n_y,)"""
    values: np.ndarray
    """V, shape (n_y, n_x)"""
    actions: np.ndarray
    """Deterministic actions in the environment's units, shape (n_y, n_x, action_dim)"""
    is_angle: np.ndarray
    """Whether the first coordinate is an angle in rad, whose cosine and sine are the first two observations"""
    fixed: np.ndarray
    """Fixed value of a third coordinate, shape (1,); (0,) if there is none"""


def landscape(model: SACV, observations: np.ndarray, n_points: int = 61) -> Landscape | None:
    """
    V over a two- or three-dimensional state space. If the first two of three observations are cosine and sine of an angle
    (Pendulum), the coordinates are the angle and the third. Otherwise the third is fixed at the median of the visited states.

    :param model: a trained or loaded model
    :param observations: visited, unnormalized observations, shape (n, 2) or (n, 3); they determine the range if the space has
        no bounds
    :param n_points: grid points per coordinate
    :return: the landscape; None if the observations are not vectors of two or three numbers
    """
    space = model.observation_space
    if not isinstance(space, spaces.Box) or space.shape not in ((2,), (3,)):
        return None
    observations = np.asarray(observations, dtype=np.float64)
    low = np.where(np.isfinite(space.low), space.low, observations.min(axis=0))
    high = np.where(np.isfinite(space.high), space.high, observations.max(axis=0))
    is_angle = len(low) == 3 and bool(np.allclose(np.sum(observations[:, :2] ** 2, axis=1), 1.0, atol=1e-3))
    last = 2 if is_angle else 1
    x = np.linspace(-np.pi, np.pi, n_points) if is_angle else np.linspace(low[0], high[0], n_points)
    y = np.linspace(low[last], high[last], n_points)
    grid_x, grid_y = (grid.ravel() for grid in np.meshgrid(x, y))
    fixed = np.empty(0) if is_angle else np.median(observations[:, 2:], axis=0)
    first = [np.cos(grid_x), np.sin(grid_x)] if is_angle else [grid_x]
    columns = np.broadcast_arrays(*first, grid_y, *fixed)
    grid: Any = np.stack(columns, axis=1).astype(space.dtype)
    vec_normalize = model.get_vec_normalize_env()
    if vec_normalize is not None:
        grid = vec_normalize.normalize_obs(grid)
    actions, _ = model.predict(grid, deterministic=True)
    shape = (n_points, n_points)
    values = model.predict_values(grid).reshape(shape)
    return Landscape(x, y, values, actions.reshape(*shape, -1), np.array(is_angle), fixed)
