"""The numbers that may follow the progress of a training: learning rates and the reward scale."""

import math

from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule


class Schedules(dict[str, FloatSchedule]):
    """
    Functions of the remaining progress, from 1 to 0, by the name of what they give.

    :param learning_rate: number, also NumPy's, or function of the remaining progress
    :param others: likewise; None takes ``learning_rate``
    :raises ValueError: if one of them does not work at the start
    """

    def __init__(self, learning_rate: float | Schedule, **others: float | Schedule | None):
        default = _schedule(learning_rate)
        super().__init__(learning_rate=default)
        self.update({name: default if value is None else _schedule(value) for name, value in others.items()})
        for name in self:
            self.at(name, 1.0)

    def at(self, name: str, progress: float) -> float:
        """
        :param name: of the number
        :param progress: the remaining progress
        :return: the number at that progress
        :raises ValueError: if the schedule gives no number, a negative or an infinite one
        """
        try:
            value = self[name](progress)
        except (TypeError, ValueError):
            value = math.nan
        if not 0.0 <= value < math.inf:
            raise ValueError(
                f"The {name} schedule gave {value} at progress remaining {progress:.3f}: make it return finite numbers that "
                "are not negative."
            )
        return value


def _schedule(value: float | Schedule) -> FloatSchedule:
    """:return: a function that returns a Python float"""
    return FloatSchedule(value if callable(value) else float(value))
