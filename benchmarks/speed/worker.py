"""One contender in a process of its own: does a piece of work each time it is asked to, and reports how long it took.

It needs nothing but what its algorithm needs, so that each contender can live in its own Python environment.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

# Before torch or jax are imported, which read them
THREADS = sys.argv[sys.argv.index("--threads") + 1]
os.environ.setdefault("OMP_NUM_THREADS", THREADS)
os.environ.setdefault("MKL_NUM_THREADS", THREADS)
if THREADS == "1":
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import gymnasium as gym  # noqa: E402  (after the thread settings)
import numpy as np  # noqa: E402  (after the thread settings)
import torch as th  # noqa: E402  (after the thread settings)
from stable_baselines3.common.callbacks import BaseCallback  # noqa: E402  (after the thread settings)
from stable_baselines3.common.env_util import make_vec_env  # noqa: E402  (after the thread settings)
from stable_baselines3.common.logger import configure  # noqa: E402  (after the thread settings)
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv  # noqa: E402  (after the thread settings)


def report(**message: Any) -> None:
    """Answer the driver with one line of JSON."""
    print("@" + json.dumps(message), flush=True)


def next_command() -> str:
    """:return: the next command; the process ends with the driver"""
    line = sys.stdin.readline()
    if not line:
        sys.exit()
    return line.strip()


class Slices(BaseCallback):
    """
    Stops after every slice of ``learn()`` until the driver's next command, so that contenders take turns.

    :param n_slices: number of slices
    :param total_timesteps: of the whole ``learn()``
    """

    def __init__(self, n_slices: int, total_timesteps: int):
        super().__init__()
        self.length = total_timesteps // n_slices
        self.start = 0.0, 0.0

    def _on_training_start(self) -> None:
        self.start = time.perf_counter(), time.process_time()

    def _on_step(self) -> bool:
        if self.num_timesteps % self.length < self.training_env.num_envs:
            report(seconds=time.perf_counter() - self.start[0], cpu_seconds=time.process_time() - self.start[1])
            next_command()
            self.start = time.perf_counter(), time.process_time()
        return True


def make_model(args: argparse.Namespace) -> Any:
    """:return: the contender's model, with default hyper-parameters where the command line has none"""
    kwargs: dict[str, Any] = {}
    if args.algo == "sac":
        from stable_baselines3 import SAC as algorithm
    elif args.algo == "tqc":
        from sb3_contrib import TQC as algorithm
    elif args.algo == "sbx":
        from sbx import SAC as algorithm
    else:
        from sb3_softvalue import SACV as algorithm

        kwargs["check_finite"] = args.addition != "unchecked"
        kwargs["execution"] = args.algo.removeprefix("sacv-")
    return algorithm(
        "MlpPolicy",
        make_vec_env(args.env, args.n_envs, seed=0, vec_env_cls=SubprocVecEnv if args.vec_env == "subproc" else DummyVecEnv),
        buffer_size=args.buffer_size,
        batch_size=args.batch_size,
        train_freq=args.train_freq,
        gradient_steps=args.gradient_steps,
        learning_starts=args.learning_starts,
        policy_kwargs=dict(net_arch=[args.width, args.width]),
        seed=0,
        device=args.device,
        **kwargs,
    )


def fill_buffer(model: Any) -> None:
    """Random transitions, so that ``train()`` can be called without an environment."""
    rng = np.random.default_rng(0)
    buffer = model.replay_buffer
    for array in (buffer.observations, buffer.next_observations, buffer.rewards):
        array[:] = rng.normal(size=array.shape)
    buffer.actions[:] = rng.uniform(-1, 1, size=buffer.actions.shape)
    buffer.full = True


def synchronize(device: str) -> None:
    """Wait for the GPU, which is still at work when the call that started it returns."""
    if device == "cuda":
        th.cuda.synchronize()


def updates(args: argparse.Namespace) -> None:
    """``train()`` on random transitions, as many gradient steps as each command asks for."""
    model = make_model(args)
    fill_buffer(model)
    model.set_logger(configure(None, []))
    # The first calls compile, capture and allocate
    start = time.perf_counter()
    model.train(gradient_steps=args.gradient_steps, batch_size=args.batch_size)
    synchronize(args.device)
    report(first_call=time.perf_counter() - start)
    while (command := next_command()) != "memory":
        n_calls = max(1, int(command) // args.gradient_steps)
        start = time.perf_counter()
        for _ in range(n_calls):
            model.train(gradient_steps=args.gradient_steps, batch_size=args.batch_size)
        synchronize(args.device)
        report(seconds=time.perf_counter() - start, times=n_calls * args.gradient_steps)
    report(peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def learn(args: argparse.Namespace) -> None:
    """One whole ``learn()``, in slices."""
    model = make_model(args)
    if args.fill:
        fill_buffer(model)
    with tempfile.TemporaryDirectory() as folder:
        callbacks: list[BaseCallback] = [Slices(args.slices, args.timesteps)]
        if args.addition == "checkpoints":
            from sb3_softvalue.checkpoint import ResumableCheckpoint

            callbacks.insert(0, ResumableCheckpoint(folder, args.save_freq))
        elif args.addition == "diagnostics":
            from sb3_softvalue.diagnostics import SoftValueDiagnostics

            callbacks.insert(0, SoftValueDiagnostics(folder))
        report(ready=True)
        next_command()
        model.learn(args.timesteps, callback=callbacks)
    synchronize(args.device)
    report(peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def products(args: argparse.Namespace) -> None:
    """Square float32 products by the faster of PyTorch's libraries, the unit of the floor, as often as each command asks."""
    from sb3_softvalue.execution.matmul import PreferOneDNN

    left = th.randn(args.batch_size, args.width, device=args.device)
    right = th.randn(args.width, args.width, device=args.device)
    multiply = captured_products(left, right) if args.device == "cuda" else partial(multiply_often, left, right)
    faster = PreferOneDNN(th.nn.Linear(args.width, args.width), args.batch_size)
    report(first_call=0.0)
    space = gym.make(args.env)
    while (command := next_command()) != "end":
        if command == "dimensions":
            spaces = space.observation_space, space.action_space
            report(**{name: int(np.prod(space.shape)) for name, space in zip(("obs_dim", "action_dim"), spaces, strict=True)})
            continue
        start = time.perf_counter()
        with faster:
            times = multiply(int(command))
        synchronize(args.device)
        report(seconds=time.perf_counter() - start, times=times)


def multiply_often(left: th.Tensor, right: th.Tensor, times: int) -> int:
    """:return: how often, as it was asked"""
    for _ in range(times):
        left @ right
    return times


def captured_products(left: th.Tensor, right: th.Tensor) -> Callable[[int], int]:
    """:return: the same in a CUDA graph, or some more of them: launched one by one, it is launches that one would measure"""
    length, product = 20, th.empty(len(left), right.shape[1], device=left.device)
    th.mm(left, right, out=product)
    graph = th.cuda.CUDAGraph()
    with th.cuda.graph(graph):
        for _ in range(length):
            th.mm(left, right, out=product)

    def multiply(times: int) -> int:
        n_replays = -(-times // length)
        for _ in range(n_replays):
            graph.replay()
        return n_replays * length

    return multiply


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=["updates", "learn", "products"])
    parser.add_argument("--algo", default="")
    parser.add_argument("--env", default="HalfCheetah-v5")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vec-env", default="dummy")
    parser.add_argument("--addition", default="none")
    parser.add_argument("--save-freq", type=int, default=10_000)
    parser.add_argument("--learning-starts", type=int, default=100)
    parser.add_argument("--buffer-size", type=int, default=20_000)
    parser.add_argument("--fill", type=int, default=0, help="1: random transitions fill the buffer before learn()")
    for name in ("threads", "batch-size", "width", "n-envs", "train-freq", "gradient-steps", "timesteps", "slices"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    th.set_num_threads(args.threads)
    {"updates": updates, "learn": learn, "products": products}[args.work](args)


if __name__ == "__main__":
    main()
