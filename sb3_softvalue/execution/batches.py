"""Batches for several gradient steps: few large samples from SB3's replay buffers, few copies to the GPU."""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_softvalue.objective import Batch, map_tensors

# Buffers that draw transitions independently, so that one large sample is equivalent to several small ones
_CHUNKED_BUFFERS = (ReplayBuffer, DictReplayBuffer, NStepReplayBuffer, HerReplayBuffer)
# Size of the largest sample
CHUNK_BYTES = 32 * 1024**2
# Number of batches per copy to the GPU, which meanwhile computes the previous ones
_SENT_TOGETHER = 8


def sample_batches(
    buffer: ReplayBuffer,
    n_batches: int,
    batch_size: int,
    gamma: float,
    reward_scale: float,
    device: th.device,
    env: VecNormalize | None = None,
) -> Iterator[Batch]:
    """
    Sample the batches of several gradient steps.

    :param buffer: buffer to sample from, with its own random numbers
    :param n_batches: number of batches
    :param batch_size: transitions per batch
    :param gamma: discount factor if the buffer has no discounts
    :param reward_scale: factor of the rewards
    :param device: device of the batches
    :param env: normalizes observations and rewards
    :return: batches that share no memory, each equivalent to a sample of the buffer
    """
    chunk = 1
    if type(buffer) in _CHUNKED_BUFFERS and n_batches > 1:
        chunk = max(1, CHUNK_BYTES // (batch_size * _transition_bytes(buffer.observation_space)))
    while n_batches > 0:
        size = min(chunk, n_batches)
        if device.type == "cuda":
            batches = split(_sample_on_cpu(buffer, size * batch_size, gamma, reward_scale, env), size)
            while sending := list(itertools.islice(batches, _SENT_TOGETHER)):
                yield from copy_to_device(sending, device)
        else:
            yield from split(_sample(buffer, size * batch_size, gamma, reward_scale, env), size)
        n_batches -= size


def _sample(buffer: ReplayBuffer, size: int, gamma: float, reward_scale: float, env: VecNormalize | None) -> Batch:
    """:return: one sample of the buffer, with discounts"""
    samples = buffer.sample(size, env=env)
    # By name: a custom buffer may have another order, or no discounts
    discounts = getattr(samples, "discounts", None)
    return Batch(
        observations=samples.observations,
        actions=samples.actions,
        next_observations=samples.next_observations,
        dones=samples.dones,
        rewards=samples.rewards if reward_scale == 1.0 else samples.rewards * reward_scale,
        discounts=th.full_like(samples.rewards, gamma) if discounts is None else discounts,
    )


def _sample_on_cpu(buffer: ReplayBuffer, size: int, gamma: float, reward_scale: float, env: VecNormalize | None) -> Batch:
    """:return: one sample on the CPU: the buffer itself would copy each tensor to the GPU separately"""
    device, buffer.device = buffer.device, th.device("cpu")
    try:
        return _sample(buffer, size, gamma, reward_scale, env)
    finally:
        buffer.device = device


def split(batch: Batch, n_batches: int) -> Iterator[Batch]:
    """
    Split a large sample into equivalent batches. Strided, because ``HerReplayBuffer`` returns real transitions before
    virtual ones.

    :param batch: n_batches * batch_size transitions
    :param n_batches: number of batches
    :return: batches of batch_size transitions, contiguous in memory
    """
    if n_batches == 1:
        yield batch
        return

    def part(index: int) -> Batch:
        return map_tensors(lambda tensor: tensor[index::n_batches].contiguous(), batch)

    yield from map(part, range(n_batches))


def copy_to_device(batches: Sequence[Batch], device: th.device) -> list[Batch]:
    """
    Copy batches to a GPU with one asynchronous copy per dtype, from pinned memory. Copying each small tensor separately would
    cost a launch and a synchronization each.

    :param batches: batches on the CPU, or on the device where a custom buffer has put them
    :param device: target device
    :return: the same batches on the device
    """
    by_type: dict[th.dtype, list[th.Tensor]] = {}

    def collect(tensor: th.Tensor) -> None:
        if tensor.device.type == "cpu":
            by_type.setdefault(tensor.dtype, []).append(tensor)

    for batch in batches:
        map_tensors(collect, batch)
    sent: dict[th.dtype, Iterator[th.Tensor]] = {}
    for dtype, tensors in by_type.items():
        sizes = [tensor.numel() for tensor in tensors]
        packed = th.empty(sum(sizes), dtype=dtype, pin_memory=device.type == "cuda")
        th.cat([tensor.reshape(-1) for tensor in tensors], out=packed)
        sent[dtype] = iter(packed.to(device, non_blocking=True).split(sizes))

    def on_device(tensor: th.Tensor) -> th.Tensor:
        return next(sent[tensor.dtype]).view(tensor.shape) if tensor.device.type == "cpu" else tensor.to(device)

    return [map_tensors(on_device, batch) for batch in batches]


def _transition_bytes(observation_space: spaces.Space) -> int:
    """:return: approximate size in bytes of the two observations of a transition"""
    if isinstance(observation_space, spaces.Dict):
        return sum(_transition_bytes(space) for space in observation_space.values())
    return 2 * 8 * max(1, math.prod(observation_space.shape or ()))
