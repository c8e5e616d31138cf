"""RL Zoo with SACV: importing this module adds ``sacv`` to the zoo's algorithms."""

try:
    import rl_zoo3  # noqa: F401 (is it installed?)
except ModuleNotFoundError as error:
    if error.name != "rl_zoo3":
        raise
    # With this name, `python -m sb3_softvalue.zoo` prints the message without a traceback
    raise ImportError(
        'RL Zoo is not installed: pip install "sb3_softvalue[zoo]" (in a clone: pip install ".[zoo]").', name=__name__
    ) from error

from sb3_softvalue.zoo.registration import register

register()
