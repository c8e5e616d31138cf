"""
Several seeds in one process, their networks stacked and their update one graph, against a process for each seed.

    python benchmarks/many_seeds.py --threads 2
    python benchmarks/many_seeds.py --device cuda --threads 1 --seeds 2 4 8 16

Tells the time of one seed's gradients (forward and backward pass of the joint objective), of K stacked seeds divided by K
and of one seed by itself, in interleaved turns; then how many whole updates K processes of one thread each do together.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch as th
import torch.multiprocessing as mp

from sb3_softvalue import SACV
from sb3_softvalue.execution.compiled import CompiledGradients
from sb3_softvalue.execution.cuda_graph import CudaGraphGradients, capture
from sb3_softvalue.execution.products import FastProducts
from sb3_softvalue.update import Batch, JointObjective, Temperature

# Of one measurement of processes
SECONDS = 4.0
# Random transitions in the buffer of a process, and updates before it is measured: what is captured, is captured then
TRANSITIONS, WARM_UP = 2_000, 300


def random_batch(model: SACV, *shape: int) -> tuple[list[th.Tensor], th.Tensor]:
    """:return: observations, actions, next observations, ends and rewards of random transitions, and noise"""
    assert model.observation_space.shape and model.action_space.shape
    observations, actions, device = model.observation_space.shape[0], model.action_space.shape[0], model.device
    ends, rewards = th.zeros(*shape, 1, device=device), th.randn(*shape, 1, device=device)
    before, after = (th.randn(*shape, observations, device=device) for _ in range(2))
    noise = th.randn(*shape, actions, device=device)
    return [before, th.rand(*shape, actions, device=device) * 2 - 1, after, ends, rewards], noise


def alone(model: SACV, batch_size: int) -> Callable[[], Any]:
    """:return: gradients of one seed as SACV computes them"""
    objective = JointObjective(model.policy, model.action_prior)
    gradients: Any = CompiledGradients(objective, False)
    if model.device.type == "cuda":
        gradients = CudaGraphGradients(objective, gradients)
    networks = (model.actor, model.critic, model.value)
    params = [param for network in networks for param in network.parameters()]
    fields, noise = random_batch(model, batch_size)
    log_ent_coef = th.zeros(1, device=model.device, requires_grad=True)
    temperature = Temperature(th.ones(1, device=model.device), log_ent_coef, -1.0)
    return lambda: gradients([*params, log_ent_coef], Batch(*fields, 0.99), noise, temperature, 1.0)


def stacked(models: list[SACV], batch_size: int) -> Callable[[], Any]:
    """:return: gradients of all seeds by one graph over their stacked parameters"""
    objectives = [JointObjective(model.policy, model.action_prior) for model in models]
    stack, buffers = th.func.stack_module_state(objectives)
    params = {name: param.detach() for name, param in stack.items()}
    device = models[0].device
    fields, noise = random_batch(models[0], len(models), batch_size)
    log_ent_coefs = th.zeros(len(models), 1, device=device)

    def objective(params: Any, log_ent_coef: th.Tensor, buffers: Any, fields: list[th.Tensor], noise: th.Tensor) -> th.Tensor:
        temperature = Temperature(log_ent_coef.detach().exp(), log_ent_coef, -1.0)
        arguments = (Batch(*fields, 0.99), noise, temperature, 1.0)
        return th.func.functional_call(objectives[0], (params, buffers), arguments)[0]

    gradients: Any = th.compile(th.func.vmap(th.func.grad(objective, argnums=(0, 1))))
    inputs = (params, log_ent_coefs, buffers, fields, noise)
    if device.type == "cpu":
        return lambda: gradients(*inputs)
    captured = capture(lambda: gradients(*inputs), device)

    def replay() -> None:
        assert inputs  # which the graph reads where they lie, and does not keep
        captured[0].replay()

    return replay


def milliseconds(call: Callable[[], Any], times: int, device: th.device) -> float:
    """:return: of one call"""
    start = time.perf_counter()
    for _ in range(times):
        with FastProducts():
            call()
    if device.type == "cuda":
        th.cuda.synchronize()
    return (time.perf_counter() - start) / times * 1000


def gradients_of_a_stack(options: argparse.Namespace) -> None:
    """Print the time of gradients."""
    models = [
        SACV("MlpPolicy", options.task, seed=seed, buffer_size=1000, device=options.device)
        for seed in range(max(options.seeds))
    ]
    device = models[0].device
    calls = {1: alone(models[0], options.batch_size)}
    calls |= {k: stacked(models[:k], options.batch_size) for k in options.seeds}
    for k, call in calls.items():
        print(f"{k} seeds prepared in {milliseconds(call, 1, device) / 1000:.0f} s", flush=True)
    times = 30 if device.type == "cpu" else 1000
    turns = [
        {k: milliseconds(call, max(4, times // k), device) / k for k, call in calls.items()} for _ in range(options.turns)
    ]
    for k in calls:
        ratio = statistics.median(turn[1] / turn[k] for turn in turns)
        print(f"{k} seeds: {statistics.median(turn[k] for turn in turns):.3f} ms for each, {ratio:.2f} × one seed's speed")


def update(index: int, options: argparse.Namespace, counts: Sequence[int], barrier: Any, results: Any) -> None:
    """
    Be one of the processes: update whenever at least as many are measured.

    :param index: of this process
    :param options: of the command line
    :param counts: how many processes update at the same time, one measurement after the other
    :param barrier: where all of them wait for the next measurement
    :param results: takes updates per second
    """
    th.set_num_threads(1)
    execution = "cuda_graph" if options.device == "cuda" else "compiled"
    model = SACV(
        "MlpPolicy", options.task, seed=index, device=options.device, execution=execution, learning_starts=TRANSITIONS
    )
    model.learn(TRANSITIONS)
    for _ in range(WARM_UP):
        model.train(1, options.batch_size)
    for count in counts:
        barrier.wait()
        if index < count:
            start, n_updates = time.perf_counter(), 0
            while (seconds := time.perf_counter() - start) < SECONDS:
                model.train(1, options.batch_size)
                n_updates += 1
            results.put(n_updates / seconds)
        barrier.wait()


def updates_of_processes(options: argparse.Namespace) -> None:
    """Print how many updates processes do together."""
    counts = [1, *options.seeds]
    context = mp.get_context("spawn")
    barrier, results = context.Barrier(max(counts) + 1), context.Queue()
    arguments = (options, counts, barrier, results)
    processes = [context.Process(target=update, args=(index, *arguments), daemon=True) for index in range(max(counts))]
    for process in processes:
        process.start()
    speeds = []
    for count in counts:
        barrier.wait()
        barrier.wait()
        speeds.append(sum(results.get() for _ in range(count)))
        print(f"{count} processes: {speeds[-1] / speeds[0]:.2f} × the updates of one", flush=True)
    print(f"{1000 / speeds[0]:.3f} ms for a whole update of one process")


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description="Several seeds in one process against one.")
    parser.add_argument("--task", default="HalfCheetah-v5")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 4, 8], help="stacked in one process, and processes")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2, help="of the stack")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    th.set_num_threads(options.threads)
    gradients_of_a_stack(options)
    updates_of_processes(options)


if __name__ == "__main__":
    main()
