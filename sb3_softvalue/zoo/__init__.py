"""RL Zoo with SACV: importing this module makes ``sacv`` one of the zoo's algorithms."""

try:
    import rl_zoo3  # noqa: F401 (whether it is there)
except ModuleNotFoundError as error:
    if error.name != "rl_zoo3":
        raise
    # With this name, `python -m sb3_softvalue.zoo` prints the sentence without a traceback
    raise ImportError('RL Zoo is not installed: pip install "sb3_softvalue[zoo]".', name=__name__) from error

from sb3_softvalue.zoo.registration import register

register()
