"""
The paper's variant with hard target updates for ``--conf-file sb3_softvalue.zoo.paper_hard``.

V is copied into its target every 1000 environment steps, with 4 gradient steps per environment step, 1 for Humanoid (table 1
of arXiv 1801.01290v2). ``target_update_interval`` counts gradient steps.
"""

from typing import Any

from sb3_softvalue.zoo import paper


def _hard(gradient_steps: int) -> dict[str, Any]:
    return {"tau": 1.0, "gradient_steps": gradient_steps, "target_update_interval": 1000 * gradient_steps}


hyperparams: dict[str, dict[str, Any]] = {
    task: {**settings, **_hard(1 if task == "Humanoid-v5" else 4)} for task, settings in paper.hyperparams.items()
}
