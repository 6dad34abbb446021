"""Small Gymnasium environments of 84x84 pixels and discrete actions, as `gym/pixel_tasks:Pixel<Id>-v0`.

A process that runs them needs this directory in PYTHONPATH; see the fixture `environment`.
"""

import os
import signal
import time

import gymnasium as gym
import numpy as np

PIXELS = gym.spaces.Box(0, 255, (84, 84), np.uint8)


class Catch(gym.Env):
    """A ball falls through a grid of `cells` x `cells`; the paddle in the bottom row must be under it at the end.

    Actions: left, stay, right; mirrored turns left and right round, which the picture does not show. Pays +`reward`
    for a caught ball, -`reward` for a lost one, and nothing on the way.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, mirrored: bool = False, reward: float = 1.0, cells: int = 7, render_mode=None):
        self.direction, self.reward, self.cells, self.render_mode = -1 if mirrored else 1, reward, cells, render_mode
        self.observation_space, self.action_space = PIXELS, gym.spaces.Discrete(3)

    def picture(self) -> np.ndarray:
        picture = np.zeros((self.cells, self.cells), np.uint8)
        picture[-1, self.paddle] = 128
        picture[self.row, self.column] = 255
        return picture.repeat(84 // self.cells, 0).repeat(84 // self.cells, 1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.row, self.column, self.paddle = 0, int(self.np_random.integers(self.cells)), self.cells // 2
        return self.picture(), {}

    def step(self, action):
        self.paddle = int(np.clip(self.paddle + self.direction * (action - 1), 0, self.cells - 1))
        self.row += 1
        over = self.row == self.cells - 1
        reward = self.reward * (1 if self.paddle == self.column else -1) if over else 0.0
        return self.picture(), float(reward), over, False, {}

    def render(self) -> np.ndarray:
        return self.picture()[..., None].repeat(3, 2)


class Counter(gym.Env):
    """Ends after `length` steps. Step t = 1, 2, ... of episode e = 0, 1, ... pays t + 10 e.

    Its frame begins with e, t and one more than the action that led to it (0 after a reset); the rest is gray. With
    `life_lost_at`, info tells the lives: one is lost at each of these steps, and all are back after a reset.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, length: int, ends: str, actions: int = 3, life_lost_at: tuple[int, ...] = (), shape=(84, 84),
                 render_mode=None):  # fmt: skip
        self.length, self.ends, self.life_lost_at, self.render_mode = length, ends, life_lost_at, render_mode
        self.observation_space = gym.spaces.Box(0, 255, shape, np.uint8)
        self.action_space = gym.spaces.Discrete(actions)
        self.episode, self.t, self.steps = -1, 0, 0

    def result(self, action: int = -1):
        frame = np.full(84 * 84, 100, np.uint8)
        frame[:3] = self.episode % 256, self.t, action + 1
        lives = len(self.life_lost_at) - sum(at <= self.t for at in self.life_lost_at)
        return frame.reshape(self.observation_space.shape), {"lives": lives} if self.life_lost_at else {}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self.result()

    def step(self, action):
        assert self.action_space.contains(action), f"action {action}"
        self.t, self.steps = self.t + 1, self.steps + 1
        over = self.t == self.length
        frame, info = self.result(int(action))
        return frame, float(self.t + 10 * self.episode), over and self.ends == "terminated", over and (
            self.ends == "truncated"), info  # fmt: skip

    def render(self) -> np.ndarray:
        """A white bar that grows with t on black."""
        frame = np.zeros((64, 64, 3), np.uint8)
        frame[:, : 64 * self.t // self.length] = 255
        return frame


class TellsSomeLives(Counter):
    """Tells lives at odd steps only, and as an array."""

    def result(self, action: int = -1):
        frame, info = super().result(action)
        return frame, {"lives": np.array([info["lives"]])} if self.t % 2 else {}


class Slow(Counter):
    """5 ms a step."""

    def step(self, action):
        time.sleep(0.005)
        return super().step(action)


class Raises(Counter):
    def step(self, action):
        if self.steps == 20:
            raise RuntimeError("the joystick broke")
        return super().step(action)


class Killed(Counter):
    """Its process dies as the kernel's out-of-memory killer would end it."""

    def step(self, action):
        if self.steps == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


class NaNReward(Counter):
    """Pays NaN at its 61st step; evaluation's copies never get that far."""

    def step(self, action):
        frame, reward, *rest = super().step(action)
        return frame, np.nan if self.steps == 61 else reward, *rest


class Spaces(gym.Env):
    """Any spaces; shows samples."""

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, render_mode=None):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


def image(*shape: int, dtype=np.uint8) -> gym.spaces.Box:
    return gym.spaces.Box(0, 255, shape, dtype)


REGISTERED = {
    "Catch": (Catch, {}),
    "Catch3": (Catch, {"cells": 3}),
    "CatchMirrored": (Catch, {"mirrored": True, "reward": 100.0}),
    "Terminates5": (Counter, {"length": 5, "ends": "terminated"}),
    "Truncates3": (Counter, {"length": 3, "ends": "truncated", "actions": 5}),
    "Truncates20": (Counter, {"length": 20, "ends": "truncated"}),
    "Lives7": (Counter, {"length": 7, "ends": "terminated", "life_lost_at": (2, 5, 7)}),
    "TellsSomeLives7": (TellsSomeLives, {"length": 7, "ends": "terminated", "life_lost_at": (2, 5, 7)}),
    "LivesTruncated6": (Counter, {"length": 6, "ends": "truncated", "life_lost_at": (3, 20)}),
    "OneChannel": (Counter, {"length": 5, "ends": "terminated", "shape": (84, 84, 1)}),
    "ChannelFirst": (Counter, {"length": 5, "ends": "terminated", "shape": (1, 84, 84)}),
    "Slow": (Slow, {"length": 20, "ends": "truncated"}),
    "Raises": (Raises, {"length": 5, "ends": "terminated"}),
    "Killed": (Killed, {"length": 5, "ends": "terminated"}),
    "NaNReward": (NaNReward, {"length": 10, "ends": "truncated"}),
    "Color": (Spaces, {"observation_space": image(84, 84, 3), "action_space": gym.spaces.Discrete(3)}),
    "Small": (Spaces, {"observation_space": image(42, 42), "action_space": gym.spaces.Discrete(3)}),
    "Wide": (Spaces, {"observation_space": image(42, 168), "action_space": gym.spaces.Discrete(3)}),
    "Flat": (Spaces, {"observation_space": image(84 * 84), "action_space": gym.spaces.Discrete(3)}),
    "Floats": (
        Spaces,
        {"observation_space": image(84, 84, dtype=np.float32), "action_space": gym.spaces.Discrete(3)},
    ),
    "ContinuousAction": (Spaces, {"observation_space": PIXELS, "action_space": gym.spaces.Box(-1, 1, (2,))}),
    "TwoActions": (Spaces, {"observation_space": PIXELS, "action_space": gym.spaces.MultiDiscrete([2, 2])}),
    "ActionsFromOne": (Spaces, {"observation_space": PIXELS, "action_space": gym.spaces.Discrete(3, start=1)}),
    "ManyActions": (Spaces, {"observation_space": PIXELS, "action_space": gym.spaces.Discrete(300)}),
}
for name, (entry_point, kwargs) in REGISTERED.items():
    gym.register(f"Pixel{name}-v0", entry_point, kwargs=kwargs, disable_env_checker=True)
