"""Records and evaluates a run: entropy, actions and V(s), and V(s) compared with collected soft returns."""

from sb3_softvalue.diagnostics.calibration import CALIBRATION_FILE, Calibration, evaluate_values
from sb3_softvalue.diagnostics.callback import SoftValueDiagnostics
from sb3_softvalue.diagnostics.recording import RECORDING_FILE, Recording
from sb3_softvalue.diagnostics.returns import calibration_line, soft_returns
from sb3_softvalue.diagnostics.state_space import Landscape, landscape
from sb3_softvalue.diagnostics.state_statistics import StateStatistics, check_has_value, read_states, reward_scale, temperature

__all__ = [
    "CALIBRATION_FILE",
    "RECORDING_FILE",
    "Calibration",
    "Landscape",
    "Recording",
    "SoftValueDiagnostics",
    "StateStatistics",
    "calibration_line",
    "check_has_value",
    "evaluate_values",
    "landscape",
    "read_states",
    "reward_scale",
    "soft_returns",
    "temperature",
]
