"""Soft Actor-Critic with its state-value network (Haarnoja et al. 2018) for Stable-Baselines3."""

from sb3_softvalue.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_softvalue.sacv import SACV

__version__ = "0.2.0"

__all__ = ["SACV", "CnnPolicy", "MlpPolicy", "MultiInputPolicy", "__version__"]
