"""
The paper's own settings for ``--conf-file sb3_softvalue.zoo.paper``: fixed temperature, soft target updates.

Settings from tables 1 and 2 of arXiv 1801.01290v2, number of steps from its figure 1, random initial steps from the authors'
code. The rest of table 1 (Adam, buffer, batch, two layers of 256 ReLU, discount) are SACV's defaults. The temperature is the
inverse of the paper's reward scale. To scale rewards instead: ``-params ent_coef:1.0 reward_scale:5.0``.
"""

from typing import Any

_TABLE_1 = {"policy": "MlpPolicy", "learning_rate": 3e-4, "tau": 0.005, "target_update_interval": 1, "gradient_steps": 1}

hyperparams: dict[str, dict[str, Any]] = {
    "Hopper-v5": {**_TABLE_1, "n_timesteps": 1e6, "learning_starts": 1000, "ent_coef": 1 / 5},
    "Walker2d-v5": {**_TABLE_1, "n_timesteps": 3e6, "learning_starts": 1000, "ent_coef": 1 / 5},
    "HalfCheetah-v5": {**_TABLE_1, "n_timesteps": 3e6, "learning_starts": 10000, "ent_coef": 1 / 5},
    "Ant-v5": {**_TABLE_1, "n_timesteps": 3e6, "learning_starts": 10000, "ent_coef": 1 / 5},
    "Humanoid-v5": {**_TABLE_1, "n_timesteps": 1e7, "learning_starts": 1000, "ent_coef": 1 / 20},
}
