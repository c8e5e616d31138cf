"""SACV without the check that all numbers are finite, to measure what the check costs. It overrides private methods."""

from typing import Any

import torch as th

from sb3_softvalue import SACV, update


class UncheckedSACV(SACV):
    """SACV that looks at no number. One for each process: the flag of the compiled update is cut out everywhere."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        update.not_finite = lambda metrics, gradients, params: th.zeros(())
        super().__init__(*args, **kwargs)

    def _remember_statistics(self) -> None:
        pass

    def _check_step(self, *args: object, **kwargs: object) -> None:
        pass

    def _check_parameters(self) -> None:
        pass

    def _gate(self, *args: object) -> None:
        pass
