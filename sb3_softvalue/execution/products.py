"""How a CPU multiplies matrices: by the library that uses all of its vectors, and whether it can in bfloat16."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch as th

# Which library multiplies float32 matrices, and how exactly; not there before PyTorch 2.9
_SETTING: Any = getattr(th.backends.mkldnn, "matmul", None)


class FastProducts:
    """
    A context in which float32 matrices are multiplied by the faster of PyTorch's libraries, in float32.

    PyTorch takes MKL, which uses half of the vector width of an AMD processor with AVX-512. There oneDNN, which PyTorch has as
    well, is twice as fast (docs/guide/speed.md). A precision that the user has set by ``torch.set_float32_matmul_precision``
    stays.
    """

    def __init__(self) -> None:
        self._wanted = onednn_is_faster()
        self._before: str | None = None

    def __enter__(self) -> None:
        if self._wanted and _SETTING.fp32_precision in ("none", "ieee"):
            self._before = _SETTING.fp32_precision
            # Permits oneDNN to use bfloat16 inside a product, and thereby oneDNN; without AMX it does not, see below
            _SETTING.fp32_precision = "bf16"

    def __exit__(self, *error: Any) -> None:
        if self._before is not None:
            _SETTING.fp32_precision, self._before = self._before, None


@cache
def onednn_is_faster() -> bool:
    """
    Nothing is timed, so that a machine decides the same each time.

    :return: whether oneDNN is to be preferred on this machine, and computes in float32 there
    """
    processor = _processor()
    is_known = _SETTING is not None and "AMD" in processor.get("cpu_name", "")
    if not is_known or not processor.get("avx512_f") or processor.get("amx_tile"):
        return False
    # Numbers that float32 holds and bfloat16 does not, in a product that is large enough for oneDNN
    number = 1.0 + 2.0**-12
    before, _SETTING.fp32_precision = _SETTING.fp32_precision, "bf16"
    try:
        product = th.full((64, 64), number) @ th.full((64, 64), number)
    finally:
        _SETTING.fp32_precision = before
    return bool((product.double() / (64.0 * number**2) - 1.0).abs().max() < 1e-6)


def multiplies_bfloat16() -> bool:
    """:return: whether the processor has an instruction for products of bfloat16, which PyTorch emulates elsewhere"""
    processor = _processor()
    return bool(processor.get("avx512_bf16") or processor.get("amx_bf16"))


def _processor() -> Mapping[str, Any]:
    """:return: what PyTorch knows about the processor, nothing before its 2.9"""
    return th.cpu.get_capabilities() if hasattr(th.cpu, "get_capabilities") else {}
