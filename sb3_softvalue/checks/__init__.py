"""What SACV refuses before any work starts, in one sentence each."""

from sb3_softvalue.checks.options import check_arguments, check_options, check_whole_number, finite_number, initial_ent_coef
from sb3_softvalue.checks.spaces import check_action_space, check_observation_space, check_wrappers

__all__ = [
    "check_action_space",
    "check_arguments",
    "check_observation_space",
    "check_options",
    "check_whole_number",
    "check_wrappers",
    "finite_number",
    "initial_ent_coef",
]
