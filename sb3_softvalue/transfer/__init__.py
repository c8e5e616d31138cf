"""Conversion from and to SB3's SAC, and export to ONNX."""

from sb3_softvalue.transfer.onnx import export_onnx
from sb3_softvalue.transfer.sac import from_sac, to_sac

__all__ = ["export_onnx", "from_sac", "to_sac"]
