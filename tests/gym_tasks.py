"""Small Gymnasium environments with known rewards, known ends and known faults, as `gym/gym_tasks:<Id>-v0`.

A process that runs them needs this directory in PYTHONPATH; see the fixture `environment`.
"""

import multiprocessing
import os
import signal
import subprocess
import time

import gymnasium as gym
import numpy as np


class Counter(gym.Env):
    """Ends after `length` steps. Step t = 1, 2, ... of episode e = 0, 1, ... pays t + 10 e and shows [e, t, action].

    With success_at, info holds success 1.0 at step success_at of odd episodes and 0.0 at every other step.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, length: int, ends: str, success_at: int = 0, size: int = 3, actions: int = 1, render_mode=None):
        self.length, self.ends, self.success_at, self.render_mode = length, ends, success_at, render_mode
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (actions,), np.float32)
        self.episode, self.t, self.steps = -1, 0, 0

    def observation(self, action: float = 0.0) -> np.ndarray:
        observation = np.full(self.observation_space.shape, 7.0, np.float32)
        observation[:3] = self.episode, self.t, action
        return observation

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self.observation(), {}

    def step(self, action):
        assert action.shape == self.action_space.shape, f"action of shape {action.shape}"
        self.t, self.steps = self.t + 1, self.steps + 1
        over = self.t == self.length
        info = {"success": float(self.episode % 2 == 1 and self.t == self.success_at)} if self.success_at else {}
        terminated, truncated = over and self.ends == "terminated", over and self.ends == "truncated"
        return self.observation(action[0]), float(self.t + 10 * self.episode), terminated, truncated, info

    def render(self) -> np.ndarray:
        """A white bar that grows with t on black."""
        frame = np.zeros((64, 64, 3), np.uint8)
        frame[:, : 64 * self.t // self.length] = 255
        return frame


class Slow(Counter):
    """5 ms a step: long enough for an update to run beside it."""

    def step(self, action):
        time.sleep(0.005)
        return super().step(action)


class Raises(Counter):
    def step(self, action):
        if self.steps == 20:
            raise RuntimeError("the arm fell off")
        return super().step(action)


class Killed(Counter):
    """Its process dies as the kernel's out-of-memory killer would end it."""

    def step(self, action):
        if self.steps == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


class NoFile(Counter):
    """Looks for a file that is not there: an OSError like that of a broken pipe to its process."""

    def step(self, action):
        if self.steps == 20:
            open("/nowhere/arm.stl")
        return super().step(action)


class RaisesAmid(Counter):
    """Fails at the third step of its second episode."""

    def step(self, action):
        if self.steps == self.length + 2:
            raise RuntimeError("the arm fell off")
        return super().step(action)


class Hangs(Counter):
    """Does not come back from its 21st step."""

    def step(self, action):
        if self.steps == 20:
            time.sleep(3600)
        return super().step(action)


class AlwaysRaises(Counter):
    """Fails at every step."""

    def step(self, action):
        raise RuntimeError("no power")


def marks() -> int:
    """How often it was called before, by any process: counted in the file that GYM_TASKS_MARKS names."""
    with open(os.environ.get("GYM_TASKS_MARKS", "marks"), "a") as file:  # a fork server knows its first environment
        file.write("x")
        file.flush()
        return file.tell() - 1


class RaisesOnce(Counter):
    """Fails at its 21st step, and never again, in no process."""

    def step(self, action):
        if self.steps == 20 and marks() == 0:
            raise RuntimeError("a fuse blew")
        return super().step(action)


class KilledWhenRemade(Counter):
    """Its process dies at its 21st step, and the next one while it makes it; the one after that lives."""

    def __init__(self, length: int, ends: str):
        super().__init__(length, ends)
        self.made = marks()
        if self.made == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def step(self, action):
        if self.steps == 20 and self.made == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


class FailsAtReset(Counter):
    """Cannot begin its second episode, nor any after it, as where a simulator's files were deleted."""

    broken = False  # of all that its process makes

    def reset(self, *, seed=None, options=None):
        if self.episode == 0 or FailsAtReset.broken:
            FailsAtReset.broken = True
            raise RuntimeError("no floor")
        return super().reset(seed=seed)


class RaisesInConstructor(Counter):
    """Raises, when it is made, what make_env does not expect."""

    def __init__(self, length: int, ends: str):
        raise RuntimeError("no licence")


class KilledAtStart(Counter):
    """Its process dies before its first observation, as for lack of memory when many start."""

    def __init__(self, length: int, ends: str):
        super().__init__(length, ends)
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)


class BadReward(Counter):
    """Pays `bad` at its 161st step; evaluation's copies never get that far."""

    def __init__(self, bad: float, render_mode=None):
        super().__init__(10, "truncated")
        self.bad = bad

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, self.bad if self.steps == 161 else reward, terminated, truncated, info


class Loose(Counter):
    """Pays arrays of one number, ends with arrays, and does not know whether it succeeded."""

    def step(self, action):
        observation, reward, terminated, truncated, _ = super().step(action)
        info = {"success": [None, "maybe", []][self.t % 3]}
        return list(observation), np.array([[reward]]), np.array([terminated]), np.array(truncated), info


class Short(Counter):
    """Forgets a number of its observation."""

    def step(self, action):
        observation, *rest = super().step(action)
        return observation[:-1], *rest


class Prints(Counter):
    """Says so at every step."""

    def step(self, action):
        print("step", self.t, flush=True)
        return super().step(action)


class Exits(Counter):
    """Leaves at its 21st step, as a client does whose server refuses it."""

    def step(self, action):
        if self.steps == 20:
            raise SystemExit("licence server lost")
        return super().step(action)


class NotFinite(Counter):
    """A simulation that blew up at its 21st step, and of which nobody said so."""

    def step(self, action):
        observation, *rest = super().step(action)
        return observation * (np.nan if self.steps == 21 else 1), *rest


def echo(connection) -> None:
    while True:
        connection.send(connection.recv())


class OwnProcess(Counter):
    """Its simulator is a process of its own, as Unity's."""

    def __init__(self, length: int, ends: str):
        super().__init__(length, ends)
        self.connection, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self.simulator = context.Process(target=echo, args=(theirs,), daemon=True)
        self.simulator.start()

    def step(self, action):
        self.connection.send(self.t)
        assert self.connection.recv() == self.t
        return super().step(action)


class OwnProgram(Counter):
    """Its simulator is a program and a process, which it ends and starts again at every reset, and ends when it is
    closed. It tells the program's number as its observation's last."""

    program = None

    def reset(self, *, seed=None, options=None):
        self.close()
        self.program = subprocess.Popen(["sleep", "1000"])
        context, (connection, theirs) = multiprocessing.get_context("fork"), multiprocessing.Pipe()
        self.simulator = context.Process(target=echo, args=(theirs,))
        self.simulator.start()
        connection.send("ready?")
        connection.recv()
        return super().reset(seed=seed)

    def observation(self, action=0.0):
        observation = super().observation(action)
        observation[-1] = self.program.pid
        return observation

    def step(self, action):
        if self.steps == 20:
            raise RuntimeError("the program is lost")
        return super().step(action)

    def close(self):
        if self.program:
            self.program.terminate()
            self.program.wait()
            self.simulator.terminate()
            self.simulator.join()


class TooLarge(Counter):
    """A simulation in double precision that blows up at its 21st step, to what single precision cannot hold."""

    def __init__(self, length: int, ends: str):
        super().__init__(length, ends)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)

    def step(self, action):
        observation, *rest = super().step(action)
        return observation.astype(np.float64) * (1e300 if self.steps == 21 else 1), *rest


class TellsSuccessOnly(Counter):
    """Says nothing at the ends of even episodes, and success at those of odd ones."""

    def step(self, action):
        *result, truncated, info = super().step(action)
        return *result, truncated, {"is_success": True} if truncated and self.episode % 2 else {}


class PaysLittle(Counter):
    """Rewards of a few millionths."""

    def step(self, action):
        observation, reward, *rest = super().step(action)
        return observation, reward * 1e-6, *rest


class HardToFilm(Counter):
    """Draws on one canvas, holds a robot, as others than HumanoidBench do, and works in a directory of its own."""

    robot, canvas = "arm", np.zeros((64, 64, 3), np.uint8)

    def __init__(self, length: int, ends: str, render_mode=None):
        super().__init__(length, ends, render_mode=render_mode)
        os.chdir("/")

    def render(self) -> np.ndarray:
        self.canvas[:] = super().render()
        return self.canvas


class LeavesWhenFilmed(Counter):
    def render(self) -> np.ndarray:
        raise SystemExit("no display")


class GlobalRandom(gym.Env):
    """Draws from NumPy's global generator, as some of HumanoidBench do: a number when it is made and at a reset, two at
    a step. draw: a function of np.random; of Gaussians, it keeps the second half of a pair for the next draw.
    """

    def __init__(self, draw: str, render_mode=None):
        self.draw = getattr(np.random, draw)  # of np.random's own state, which set_state and such change
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.made = self.draw()

    def observation(self) -> np.ndarray:
        return np.float32([self.made, self.draw(), self.t])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observation(), {}

    def step(self, action):
        self.t += 1
        return self.observation(), float(self.draw()), False, self.t == 7, {}


class Unstable(Counter):
    """A MuJoCo simulation that diverges at once, of which MuJoCo warns."""

    def __init__(self, length: int, ends: str):
        import mujoco

        super().__init__(length, ends)
        xml = '<mujoco><worldbody><body><freejoint/><geom size="1"/></body></worldbody></mujoco>'
        self.model, self.simulate = mujoco.MjModel.from_xml_string(xml), mujoco.mj_step
        self.data = mujoco.MjData(self.model)

    def step(self, action):
        self.data.qfrc_applied[0] = 1e30
        self.simulate(self.model, self.data)
        assert self.data.warning.number.any(), "it did not diverge"
        return super().step(np.asarray(action))


class Point(gym.Env):
    """A point in [-1, 1]^2 that a velocity moves for 25 steps; the goal is not observed, only the task tells it.

    Reward 1 at the goal and less with the distance, exp(-3 |x - goal|), so an episode's return is at most 25.
    """

    def __init__(self, goal: tuple[float, float], render_mode=None):
        self.goal = np.array(goal)
        self.observation_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = self.np_random.uniform(-0.2, 0.2, 2), 0
        return self.x.astype(np.float32), {}

    def step(self, action):
        self.x, self.t = np.clip(self.x + 0.25 * np.clip(action, -1, 1), -1, 1), self.t + 1
        reward = float(np.exp(-3 * np.linalg.norm(self.x - self.goal)))
        return self.x.astype(np.float32), reward, False, self.t == 25, {}


class Spaces(gym.Env):
    """Any spaces; shows samples, and as `last_action` what reached it."""

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, render_mode=None):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        self.last_action = action
        return self.observation_space.sample(), 0.0, False, False, {}


def box(*shape: int) -> gym.spaces.Box:
    return gym.spaces.Box(-1.0, 1.0, shape, np.float32)


class Plain(Spaces):
    """Knows nothing of render modes, as Gymnasium allows."""

    def __init__(self):
        super().__init__(box(2), box(1))


class Ordered(Spaces):
    """A Dict observation whose parts are told apart by their values: b is 1, 2, 3, 4 and a is 5, 6."""

    def __init__(self, render_mode=None):
        super().__init__(gym.spaces.Dict({"b": box(2, 2), "a": box(2)}), box(1))

    def reset(self, *, seed=None, options=None):
        return {"b": np.float32([[1, 2], [3, 4]]), "a": np.float32([5, 6])}, {}


class Goal(Spaces):
    """The observation of Gymnasium-Robotics' goal environments: 1, 2, 3, desired goal 4, 5, achieved goal 6, 7; and
    more than that, where it is asked for."""

    def __init__(self, render_mode=None, **more: float):
        self.parts = {"achieved_goal": [6, 7], "desired_goal": [4, 5], "observation": [1, 2, 3]}
        self.parts |= {key: [value] for key, value in more.items()}
        super().__init__(gym.spaces.Dict({key: box(len(value)) for key, value in self.parts.items()}), box(1))

    def reset(self, *, seed=None, options=None):
        return {key: np.float32(value) for key, value in self.parts.items()}, {}


REGISTERED = {
    "Terminates5": (Counter, {"length": 5, "ends": "terminated"}),
    "Truncates3": (Counter, {"length": 3, "ends": "truncated", "success_at": 2, "size": 6, "actions": 2}),
    "Truncates20": (Counter, {"length": 20, "ends": "truncated"}),
    "Slow": (Slow, {"length": 20, "ends": "truncated"}),
    "Raises": (Raises, {"length": 5, "ends": "terminated"}),
    "Killed": (Killed, {"length": 5, "ends": "terminated"}),
    "NoFile": (NoFile, {"length": 5, "ends": "terminated"}),
    "RaisesAmid": (RaisesAmid, {"length": 7, "ends": "terminated", "success_at": 2}),
    "Hangs": (Hangs, {"length": 5, "ends": "terminated"}),
    "AlwaysRaises": (AlwaysRaises, {"length": 5, "ends": "terminated"}),
    "RaisesOnce": (RaisesOnce, {"length": 5, "ends": "terminated"}),
    "KilledWhenRemade": (KilledWhenRemade, {"length": 5, "ends": "terminated"}),
    "FailsAtReset": (FailsAtReset, {"length": 5, "ends": "terminated"}),
    "RaisesInConstructor": (RaisesInConstructor, {"length": 5, "ends": "terminated"}),
    "KilledAtStart": (KilledAtStart, {"length": 5, "ends": "terminated"}),
    "Loose": (Loose, {"length": 5, "ends": "terminated"}),
    "Short": (Short, {"length": 5, "ends": "terminated"}),
    "Prints": (Prints, {"length": 5, "ends": "terminated"}),
    "Exits": (Exits, {"length": 5, "ends": "terminated"}),
    "NotFinite": (NotFinite, {"length": 5, "ends": "terminated"}),
    "OwnProgram": (OwnProgram, {"length": 5, "ends": "terminated", "size": 4}),
    "TooLarge": (TooLarge, {"length": 5, "ends": "terminated"}),
    "TellsSuccessOnly": (TellsSuccessOnly, {"length": 3, "ends": "truncated"}),
    "PaysLittle": (PaysLittle, {"length": 3, "ends": "truncated"}),
    "HardToFilm": (HardToFilm, {"length": 20, "ends": "truncated"}),
    "LeavesWhenFilmed": (LeavesWhenFilmed, {"length": 20, "ends": "truncated"}),
    "OwnProcess": (OwnProcess, {"length": 5, "ends": "terminated"}),
    "Uniform": (GlobalRandom, {"draw": "uniform"}),
    "Gaussian": (GlobalRandom, {"draw": "normal"}),
    "Unstable": (Unstable, {"length": 5, "ends": "truncated"}),
    "Endless": (Counter, {"length": 5, "ends": "never"}),
    "InfReward": (BadReward, {"bad": np.inf}),
    "NaNReward": (BadReward, {"bad": np.nan}),
    "PointRight": (Point, {"goal": (0.7, 0.4)}),
    "PointLeft": (Point, {"goal": (-0.7, -0.4)}),
    "Wide": (Counter, {"length": 5, "ends": "truncated", "size": 2000}),
    "Plain": (Plain, {}),
    "Ordered": (Ordered, {}),
    "Goal": (Goal, {}),
    "GoalAndWind": (Goal, {"wind": 9}),
    "DiscreteAction": (Spaces, {"observation_space": box(2), "action_space": gym.spaces.Discrete(3)}),
    "DiscreteObservation": (Spaces, {"observation_space": gym.spaces.Discrete(3), "action_space": box(1)}),
    "Image": (Spaces, {"observation_space": box(8, 8, 3), "action_space": box(1)}),
    "UnboundedAction": (
        Spaces,
        {"observation_space": box(2), "action_space": gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)},
    ),
    "ScaledAction": (
        Spaces,
        {
            "observation_space": box(2),
            "action_space": gym.spaces.Box(np.array([-3.0, 0.0]), np.array([5.0, 10.0]), dtype=np.float64),
        },
    ),
}
for degrees in (*range(0, 360, 45), *range(22, 360, 90)):  # eight goals on a circle, and four between them
    goal = (0.7 * np.cos(np.deg2rad(degrees)), 0.7 * np.sin(np.deg2rad(degrees)))
    REGISTERED[f"PointAt{degrees}"] = (Point, {"goal": goal})
for name, (entry_point, kwargs) in REGISTERED.items():
    gym.register(f"{name}-v0", entry_point, kwargs=kwargs, disable_env_checker=True)
