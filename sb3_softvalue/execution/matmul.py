"""
Chooses the library that multiplies float32 matrices on a CPU, and detects bfloat16 instructions.

This file uses the value "bf16" of ``torch.backends.mkldnn.matmul.fp32_precision`` in a way that PyTorch does not document: to
route float32 products to oneDNN. It halves the time of the products on AMD processors with AVX-512 (updates are 1.9 times as
fast on an AMD EPYC of family 26). Without it, PyTorch's default library computes them.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch as th
from torch import nn

# Setting for the library and precision of float32 products; missing before PyTorch 2.9
_SETTING: Any = getattr(th.backends.mkldnn, "matmul", None)


class PreferOneDNN:
    """
    Context in which oneDNN multiplies float32 matrices if it is faster and still computes in float32.

    By default PyTorch uses MKL, which only uses half the vector width of AMD processors with AVX-512. Allowing bfloat16
    inside a product routes it to oneDNN, which ignores the permission without AMX; this is verified for each shape. A
    precision set by the user is kept: ``torch.backends.mkldnn.matmul.fp32_precision = "ieee"`` disables this context.

    :param module: module whose layers determine the shapes
    :param batch_size: number of rows of the layers' inputs
    """

    def __init__(self, module: nn.Module, batch_size: int):
        self.wanted = is_candidate() and all(_is_exact(*shape) for shape in _product_shapes(module, batch_size))
        self._before: str | None = None

    def __enter__(self) -> None:
        if self.wanted and _SETTING.fp32_precision == "none":
            self._before = _SETTING.fp32_precision
            _SETTING.fp32_precision = "bf16"

    def __exit__(self, *error: Any) -> None:
        if self._before is not None:
            _SETTING.fp32_precision, self._before = self._before, None


def is_candidate() -> bool:
    """:return: whether oneDNN is known to be faster on this processor, without timing, so that the result is reproducible"""
    processor = _processor()
    is_amd = "AMD" in processor.get("cpu_name", "")
    return bool(_SETTING is not None and is_amd and processor.get("avx512_f") and not processor.get("amx_tile"))


def _product_shapes(module: nn.Module, batch_size: int) -> Iterable[tuple[int, int, int]]:
    """:return: (rows, inner, columns) of all products in forward and backward pass"""
    layers = {tuple(layer.weight.shape) for layer in module.modules() if isinstance(layer, nn.Linear)}
    for n_out, n_in in layers:
        yield from ((batch_size, n_in, n_out), (batch_size, n_out, n_in), (n_out, batch_size, n_in))


def _is_exact(n_rows: int, n_inner: int, n_columns: int) -> bool:
    """:return: whether oneDNN computes a product of this shape in float32"""
    # float32 represents this number exactly, bfloat16 does not
    number = 1.0 + 2.0**-12
    before, _SETTING.fp32_precision = _SETTING.fp32_precision, "bf16"
    try:
        product = th.full((n_rows, n_inner), number) @ th.full((n_inner, n_columns), number)
    finally:
        _SETTING.fp32_precision = before
    return bool((product.double() / (n_inner * number**2) - 1.0).abs().max() < 2e-5)


def multiplies_bfloat16() -> bool:
    """:return: whether the processor has instructions for bfloat16 products; otherwise PyTorch emulates them"""
    processor = _processor()
    return bool(processor.get("avx512_bf16") or processor.get("amx_bf16"))


def _processor() -> Mapping[str, Any]:
    """:return: PyTorch's description of the processor; empty before PyTorch 2.9"""
    return th.cpu.get_capabilities() if hasattr(th.cpu, "get_capabilities") else {}
