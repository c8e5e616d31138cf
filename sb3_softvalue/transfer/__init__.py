"""Models move: from SB3's SAC and back, and out of PyTorch as ONNX."""

from sb3_softvalue.transfer.onnx import export_onnx
from sb3_softvalue.transfer.sac import from_sac, to_sac

__all__ = ["export_onnx", "from_sac", "to_sac"]
