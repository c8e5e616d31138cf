"""
Several seeds in one process, their networks stacked and their update one graph, against a process for each seed.

    python benchmarks/many_seeds.py --threads 2

Tells the time of one seed's gradients (forward and backward pass of the joint objective), of K stacked seeds divided by K
and of one seed by itself, in interleaved turns. K processes of one thread each on two cores take half of what one seed takes
by itself on one thread.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch as th

from sb3_softvalue import SACV
from sb3_softvalue.execution.compiled import CompiledGradients
from sb3_softvalue.execution.products import FastProducts
from sb3_softvalue.update import Batch, JointObjective, Temperature


def random_batch(env: Any, *shape: int) -> tuple[list[th.Tensor], th.Tensor]:
    """:return: observations, actions, next observations, ends and rewards of random transitions, and noise"""
    observations, actions = env.observation_space.shape[0], env.action_space.shape[0]
    fields = [th.randn(*shape, observations), th.rand(*shape, actions) * 2 - 1, th.randn(*shape, observations)]
    return [*fields, th.zeros(*shape, 1), th.randn(*shape, 1)], th.randn(*shape, actions)


def alone(model: SACV, batch_size: int) -> Callable[[], Any]:
    """:return: gradients of one seed as SACV computes them"""
    gradients = CompiledGradients(JointObjective(model.policy, model.action_prior), False)
    networks = (model.actor, model.critic, model.value)
    params = [param for network in networks for param in network.parameters()]
    fields, noise = random_batch(model, batch_size)
    log_ent_coef = th.zeros(1, requires_grad=True)
    temperature = Temperature(th.ones(1), log_ent_coef, -1.0)
    return lambda: gradients([*params, log_ent_coef], Batch(*fields, 0.99), noise, temperature, 1.0)


def stacked(models: list[SACV], batch_size: int) -> Callable[[], Any]:
    """:return: gradients of all seeds by one graph over their stacked parameters"""
    objectives = [JointObjective(model.policy, model.action_prior) for model in models]
    stack, buffers = th.func.stack_module_state(objectives)
    params = {name: param.detach() for name, param in stack.items()}
    fields, noise = random_batch(models[0], len(models), batch_size)
    log_ent_coefs = th.zeros(len(models), 1)

    def objective(params: Any, log_ent_coef: th.Tensor, buffers: Any, fields: list[th.Tensor], noise: th.Tensor) -> th.Tensor:
        temperature = Temperature(log_ent_coef.detach().exp(), log_ent_coef, -1.0)
        arguments = (Batch(*fields, 0.99), noise, temperature, 1.0)
        return th.func.functional_call(objectives[0], (params, buffers), arguments)[0]

    gradients: Any = th.compile(th.func.vmap(th.func.grad(objective, argnums=(0, 1))))
    return lambda: gradients(params, log_ent_coefs, buffers, fields, noise)


def milliseconds(call: Callable[[], Any], times: int) -> float:
    """:return: of one call"""
    start = time.perf_counter()
    for _ in range(times):
        with FastProducts():
            call()
    return (time.perf_counter() - start) / times * 1000


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description="Several seeds in one process against one.")
    parser.add_argument("--task", default="HalfCheetah-v5")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 4, 8], help="stacked in one process")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    th.set_num_threads(options.threads)
    models = [SACV("MlpPolicy", options.task, seed=seed, buffer_size=1000) for seed in range(max(options.seeds))]
    calls = {1: alone(models[0], options.batch_size)}
    calls |= {k: stacked(models[:k], options.batch_size) for k in options.seeds}
    for k, call in calls.items():
        print(f"{k} seeds prepared in {milliseconds(call, 1) / 1000:.0f} s", flush=True)
    turns = [{k: milliseconds(call, max(4, 30 // k)) / k for k, call in calls.items()} for _ in range(options.turns)]
    for k in calls:
        ratio = statistics.median(turn[1] / turn[k] for turn in turns)
        print(f"{k} seeds: {statistics.median(turn[k] for turn in turns):.2f} ms for each, {ratio:.2f} × one seed's speed")


if __name__ == "__main__":
    main()
