"""Figures of a run that ``SoftValueDiagnostics`` recorded. No other part of the package needs matplotlib."""

from sb3_softvalue.figures.film import save_gif
from sb3_softvalue.figures.page import main, numbers, report
from sb3_softvalue.figures.style import BLUE, GREEN, GREY, ORANGE, VERMILION, draw_curves, new_figure, rolling_mean
from sb3_softvalue.figures.training import action_usage, entropy, learning_curve, temperature
from sb3_softvalue.figures.values import calibration, value_along_episode, value_landscape

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "ORANGE",
    "VERMILION",
    "action_usage",
    "calibration",
    "draw_curves",
    "entropy",
    "learning_curve",
    "main",
    "new_figure",
    "numbers",
    "report",
    "rolling_mean",
    "save_gif",
    "temperature",
    "value_along_episode",
    "value_landscape",
]
