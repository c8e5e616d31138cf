"""What is left in a replay buffer of episodes that will not go on."""

import warnings

import numpy as np
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer


def cut_open_episodes(buffer: ReplayBuffer) -> None:
    """
    Let the episodes that were going on end at the last row of the buffer, as by a time limit: what follows is another one.

    :param buffer: after a restart in the middle of episodes; nothing is done where it is empty
    """
    if not buffer.pos and not buffer.full:
        return
    last = (buffer.pos - 1) % buffer.buffer_size
    if isinstance(buffer, HerReplayBuffer):
        with warnings.catch_warnings():
            # That it cuts is what it is called for
            warnings.simplefilter("ignore")
            buffer.truncate_last_trajectory()
    elif isinstance(buffer, NStepReplayBuffer):
        buffer.timeouts[last] = np.maximum(buffer.timeouts[last], 1.0 - buffer.dones[last])
    elif buffer.optimize_memory_usage:
        # As SB3 does where learn() begins anew (its issue 46): the next row's observation will be of another episode
        buffer.dones[last] = 1.0
