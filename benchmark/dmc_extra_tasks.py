"""The 11 tasks of the paper's MW+DMC benchmark that dm_control does not have (E.1), built on dm_control's own domains.

They are TD-MPC2's (Hansen et al., "TD-MPC2: Scalable, Robust World Models for Continuous Control", 2024,
arXiv:2310.16828): same bodies, observations, initial states and rewards as its tasks of the same names, where
ball-in-cup-spin is its cup-spin. An episode has 1,000 steps and ends by truncation. TD-MPC2 repeats every action twice,
and so counts 500; this file, like the paper (E), does not. Rewards lie in [0, 1] and are made of

  ramp(x, b)  = min(1, max(0, x / b))                0 up to x = 0, then linear, 1 from x = b on
  above(x, b) = 0.1^((max(0, b - x) / (b / 2))^2)    Gaussian below b: 0.1 at x = b / 2, 1 from x = b on

v: horizontal velocity of the body's center of mass; h: heights above the ground.

The scripts know these tasks as dmc/NAME and import this file when such a task is asked for. On its own:

  import dmc_extra_tasks, gymnasium
  env = gymnasium.make("brc/cheetah-jump-v0")
"""

import copy
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import gymnasium as gym
import numpy as np
from dm_control.rl import control
from dm_control.suite import ball_in_cup, cheetah, hopper, pendulum, reacher, walker


def ramp(x: float, full: float) -> float:
    return float(np.clip(x / full, 0, 1))


def above(x: float, bound: float) -> float:
    return float(0.1 ** (max(0, bound - x) / (bound / 2)) ** 2)


# --------------------------------------------------------------------------------------------------------- tasks


class CheetahRunBackwards(cheetah.Cheetah):
    """r = ramp(-v, 8)"""

    def get_reward(self, physics):
        return ramp(-physics.speed(), 8)


class CheetahRunOnOneLeg(cheetah.Cheetah):
    """r = (3 above(h_raised foot, 1.2) + 2 above(h_torso, 1.2)) / 5 * (5 ramp(v, 6) + 1) / 6

    run-front raises the back foot, run-back the front foot.
    """

    def __init__(self, raised_foot: str, random=None):
        super().__init__(random)
        self.raised_foot = raised_foot

    def get_reward(self, physics):
        foot, torso = physics.named.data.xpos[[self.raised_foot, "torso"], "z"]
        return (3 * above(foot, 1.2) + 2 * above(torso, 1.2)) / 5 * (5 * ramp(physics.speed(), 6) + 1) / 6


class CheetahJump(cheetah.Cheetah):
    """r = (5 mean over feet of above((h_torso + h_foot) / 2, 1.2) + still) / 6

    still is 1 up to |v| = 0.5 and falls linearly to 0 at |v| = 1.
    """

    def get_reward(self, physics):
        front, back, torso = physics.named.data.xpos[["ffoot", "bfoot", "torso"], "z"]
        high = (above((torso + front) / 2, 1.2) + above((torso + back) / 2, 1.2)) / 2
        return (5 * high + ramp(1 - abs(physics.speed()), 0.5)) / 6


class WalkerBackwards(walker.PlanarWalker):
    """r = (3 above(h_torso, 1.2) + (1 + u) / 2) / 4 * (5 ramp(-v, move_speed) + 1) / 6

    u: cosine of the torso's tilt. dm_control's walk and run, with the velocity's sign changed.
    """

    def get_reward(self, physics):
        stand = (3 * above(physics.torso_height(), 1.2) + (1 + physics.torso_upright()) / 2) / 4
        return float(stand * (5 * ramp(-physics.horizontal_velocity(), self._move_speed) + 1) / 6)


class HopperHopBackwards(hopper.Hopper):
    """r = [0.6 <= h <= 2] ramp(-v, 1),  h: torso above foot. Half the speed that dm_control's hop asks for."""

    def get_reward(self, physics):
        return (0.6 <= physics.height() <= 2) * ramp(-physics.speed(), 1)


class BallInCupSpin(ball_in_cup.BallInCup):
    """r = 0 while the ball is in the cup, else (ramp(d, 0.5) + 2 ramp(|ball's velocity|, 6)) / 3

    d: distance of the ball from the middle of the cup. The ball starts in the cup in 9 of 10 episodes, and wherever
    dm_control's catch would put it in the tenth.
    """

    def initialize_episode(self, physics):
        start_anywhere = self.random.uniform() < 0.1
        super().initialize_episode(physics)
        while not (start_anywhere or physics.in_target()):
            super().initialize_episode(physics)

    def get_reward(self, physics):
        if physics.in_target():
            return 0.0
        distance = np.linalg.norm(physics.ball_to_target())
        speed = np.linalg.norm(physics.named.data.qvel[["ball_x", "ball_z"]])
        return (ramp(distance, 0.5) + 2 * ramp(speed, 6)) / 3


class PendulumSpin(pendulum.SwingUp):
    """r = ramp(|angular velocity|, 9)"""

    def get_reward(self, physics):
        return ramp(np.linalg.norm(physics.angular_velocity()), 9)


def three_link_reacher() -> tuple[str, dict]:
    """dm_control's two-link reacher with one link more, as XML and its assets.

    Joints 0.09 apart, the finger 0.09 from the last; both joints after the shoulder turn by 80 degrees to either side.
    The reward is dm_control's: 1 while the finger touches the target (radius 0.05 in easy, 0.015 in hard), else 0.
    """
    xml, assets = reacher.get_model_and_assets()
    model = ElementTree.fromstring(xml)
    arm = model.find(".//body[@name='arm']")
    hand = arm.find("body")
    arm.remove(hand)
    arm.find("geom").set("fromto", "0 0 0 0.09 0 0")
    hand.find("body").set("pos", ".09 0 0")  # the finger
    forearm = copy.deepcopy(arm)
    for part in (forearm, forearm.find("geom")):
        part.set("name", "forearm")
    forearm.find("joint").set("name", "elbow")
    arm.append(forearm)
    forearm.append(hand)
    for body in (forearm, hand):
        body.set("pos", ".09 0 0")
        body.find("joint").attrib.update(limited="true", range="-80 80")
    model.find("actuator").insert(1, ElementTree.Element("motor", name="elbow", joint="elbow"))
    return ElementTree.tostring(model, encoding="unicode"), assets


# ------------------------------------------------------------------------------------------------- environments


def build(domain, task: control.Task, model: tuple[str, dict] | None = None) -> control.Environment:
    """An environment with the physics and the time limit (1,000 steps) of a module of dm_control.suite.

    model: XML and assets, other than the domain's.
    """
    physics = domain.Physics.from_xml_string(*(model or domain.get_model_and_assets()))
    if domain in (cheetah, walker, hopper):  # the floor that is drawn ends 2 m behind the start; contacts know no end
        physics.model.geom_size[0, 0] *= 2
    return control.Environment(physics, task, domain._DEFAULT_TIME_LIMIT, getattr(domain, "_CONTROL_TIMESTEP", None))


TASKS: dict[str, Callable[[int | None], control.Environment]] = {
    "cheetah-run-backwards": lambda seed: build(cheetah, CheetahRunBackwards(seed)),
    "cheetah-run-front": lambda seed: build(cheetah, CheetahRunOnOneLeg("bfoot", seed)),
    "cheetah-run-back": lambda seed: build(cheetah, CheetahRunOnOneLeg("ffoot", seed)),
    "cheetah-jump": lambda seed: build(cheetah, CheetahJump(seed)),
    "walker-walk-backwards": lambda seed: build(walker, WalkerBackwards(1, seed)),
    "walker-run-backwards": lambda seed: build(walker, WalkerBackwards(8, seed)),
    "hopper-hop-backwards": lambda seed: build(hopper, HopperHopBackwards(True, seed)),
    "reacher-three-easy": lambda seed: build(reacher, reacher.Reacher(0.05, seed), three_link_reacher()),
    "reacher-three-hard": lambda seed: build(reacher, reacher.Reacher(0.015, seed), three_link_reacher()),
    "ball-in-cup-spin": lambda seed: build(ball_in_cup, BallInCupSpin(seed)),
    "pendulum-spin": lambda seed: build(pendulum, PendulumSpin(seed)),
}


# Copied from brc_sac_continuous.py
class DMControlEnv(gym.Env):
    """A dm_control task as a Gymnasium environment: flat float32 observation, actions rescaled by dm_control's own
    wrapper to [-1, 1], truncation at dm_control's time limit (1,000 steps).

    load: makes the dm_control environment from a seed or None.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, load: Callable[[int | None], Any], render_mode: str | None = None):
        from dm_control.suite.wrappers import action_scale

        self.load = lambda seed: action_scale.Wrapper(load(seed), minimum=-1, maximum=1)
        self.env, self.render_mode = self.load(None), render_mode
        size = sum(int(np.prod(spec.shape)) for spec in self.env.observation_spec().values())
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, self.env.action_spec().shape, np.float32)

    def flatten(self, observation: dict) -> np.ndarray:
        return np.concatenate([np.ravel(value) for value in observation.values()]).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        if seed is not None:
            self.env = self.load(seed)
        return self.flatten(self.env.reset().observation), {}

    def step(self, action: np.ndarray):
        step = self.env.step(action.astype(np.float64))
        terminated = step.last() and step.discount == 0
        return self.flatten(step.observation), step.reward, terminated, step.last() and not terminated, {}

    def render(self) -> np.ndarray:
        return self.env.physics.render(height=240, width=320, camera_id=0)


for name, load in TASKS.items():
    gym.register(f"brc/{name}-v0", entry_point=DMControlEnv, kwargs={"load": load})
