"""
How a CPU multiplies float32 matrices: by the library that uses all of its vectors, and whether it can in bfloat16.

PyTorch's private interface in this file: the value "bf16" of ``torch.backends.mkldnn.matmul.fp32_precision``, used to route
float32 products to oneDNN. It halves the time of the products on AMD processors with AVX-512 (an update is 1.9 times as fast
on an AMD EPYC of family 26); without it, PyTorch's default library computes them.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch as th
from torch import nn

# Which library multiplies float32 matrices, and how exactly; not there before PyTorch 2.9
_SETTING: Any = getattr(th.backends.mkldnn, "matmul", None)


class PreferOneDNN:
    """
    A context in which float32 matrices are multiplied by oneDNN where that is faster and still computes in float32.

    PyTorch takes MKL, which uses half of the vector width of an AMD processor with AVX-512. The permission to round inside a
    product routes it to oneDNN, which does not make use of it without AMX: that is checked for each shape at hand. A precision
    that the user has set stays: ``torch.backends.mkldnn.matmul.fp32_precision = "ieee"`` switches this off.

    :param module: its layers give the shapes
    :param batch_size: rows of the layers' inputs
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
    """:return: whether oneDNN is known to be faster on this processor; nothing is timed, so that a machine always decides
    alike"""
    processor = _processor()
    is_amd = "AMD" in processor.get("cpu_name", "")
    return bool(_SETTING is not None and is_amd and processor.get("avx512_f") and not processor.get("amx_tile"))


def _product_shapes(module: nn.Module, batch_size: int) -> Iterable[tuple[int, int, int]]:
    """:return: (rows, inner, columns) of the products that forward and backward pass compute"""
    layers = {tuple(layer.weight.shape) for layer in module.modules() if isinstance(layer, nn.Linear)}
    for n_out, n_in in layers:
        yield from ((batch_size, n_in, n_out), (batch_size, n_out, n_in), (n_out, batch_size, n_in))


def _is_exact(n_rows: int, n_inner: int, n_columns: int) -> bool:
    """:return: whether oneDNN computes a product of this shape in float32"""
    # float32 holds this number and bfloat16 does not
    number = 1.0 + 2.0**-12
    before, _SETTING.fp32_precision = _SETTING.fp32_precision, "bf16"
    try:
        product = th.full((n_rows, n_inner), number) @ th.full((n_inner, n_columns), number)
    finally:
        _SETTING.fp32_precision = before
    return bool((product.double() / (n_inner * number**2) - 1.0).abs().max() < 2e-5)


def multiplies_bfloat16() -> bool:
    """:return: whether the processor has an instruction for products of bfloat16, which PyTorch emulates elsewhere"""
    processor = _processor()
    return bool(processor.get("avx512_bf16") or processor.get("amx_bf16"))


def _processor() -> Mapping[str, Any]:
    """:return: what PyTorch knows about the processor, nothing before its 2.9"""
    return th.cpu.get_capabilities() if hasattr(th.cpu, "get_capabilities") else {}
