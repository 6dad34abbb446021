"""The 11 tasks of benchmark/dmc_extra_tasks.py: sizes, episodes, seeds, and rewards against TD-MPC2's definitions.

Expected rewards are computed here from joint angles, velocities and positions of bodies, with the bounds and margins
that TD-MPC2 gives to dm_control's `tolerance`, which is written out again below.
"""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import pytest

import brc_sac_continuous as brc

os.environ.setdefault("MUJOCO_GL", "disable")  # as `main` does: stepping needs no graphics library

ROOT = Path(__file__).resolve().parents[1]
INF = float("inf")
SIZES = {
    "cheetah-run-backwards": (17, 6), "cheetah-run-front": (17, 6), "cheetah-run-back": (17, 6),
    "cheetah-jump": (17, 6), "walker-walk-backwards": (24, 6), "walker-run-backwards": (24, 6),
    "hopper-hop-backwards": (15, 4), "reacher-three-easy": (8, 3), "reacher-three-hard": (8, 3),
    "ball-in-cup-spin": (8, 2), "pendulum-spin": (3, 1),
}  # fmt: skip
pytestmark = pytest.mark.dm_control
every_task = pytest.mark.parametrize("name", SIZES)


# ------------------------------------------------------------------------------------------------ expected rewards


def tolerance(x: float, lower: float, upper: float, margin: float = 0, at_margin: float | None = None) -> float:
    """1 within [lower, upper]; outside, at a distance of d margins: 1 - (1 - at_margin) d, but never below 0, or, for
    at_margin None, the Gaussian that is 0.1 at d = 1. For margin 0 it is 0."""
    distance = max(lower - x, x - upper, 0)
    if distance == 0 or margin == 0:
        return float(distance == 0)
    d = distance / margin
    return float(np.exp(np.log(0.1) * d**2)) if at_margin is None else max(0.0, 1 - (1 - at_margin) * d)


def velocity(physics) -> float:
    """Horizontal velocity of the center of mass of all bodies: total momentum / total mass, from Jacobians."""
    model, data = physics.model.ptr, physics.data.ptr
    jacobian, momentum = np.zeros((3, model.nv)), 0.0
    for body in range(1, model.nbody):
        mujoco.mj_jacBodyCom(model, data, jacobian, None, body)
        momentum += model.body_mass[body] * (jacobian[0] @ data.qvel)
    return momentum / model.body_mass[1:].sum()


def place(physics, body: str, of_mass: bool = False) -> np.ndarray:
    index = mujoco.mj_name2id(physics.model.ptr, mujoco.mjtObj.mjOBJ_BODY, body)
    return (physics.data.xipos if of_mass else physics.data.xpos)[index].copy()


def cheetah_run_backwards(physics) -> float:
    return tolerance(velocity(physics), -INF, -8, 8, 0)


def cheetah_run_on_one_leg(physics, raised: str) -> float:
    foot = tolerance(place(physics, raised)[2], 1.2, INF, 0.6)
    torso = tolerance(place(physics, "torso")[2], 1.2, INF, 0.6)
    return (3 * foot + 2 * torso) / 5 * (5 * tolerance(velocity(physics), 6, INF, 6, 0) + 1) / 6


def cheetah_jump(physics) -> float:
    still = tolerance(velocity(physics), -0.5, 0.5, 0.5, 0)
    feet = []
    for foot in ("ffoot", "bfoot"):
        height = (place(physics, "torso")[2] + place(physics, foot)[2]) / 2
        feet.append((5 * tolerance(height, 1.2, INF, 0.6) + still) / 6)
    return sum(feet) / 2


def walker_backwards(physics, speed: float) -> float:
    standing = tolerance(place(physics, "torso")[2], 1.2, INF, 0.6)
    upright = (1 + np.cos(physics.named.data.qpos["rooty"].item())) / 2
    moving = tolerance(velocity(physics), -INF, -speed, speed / 2, 0.5)
    return (3 * standing + upright) / 4 * (5 * moving + 1) / 6


def hopper_hop_backwards(physics) -> float:
    height = place(physics, "torso", of_mass=True)[2] - place(physics, "foot", of_mass=True)[2]
    return tolerance(height, 0.6, 2) * tolerance(velocity(physics), -INF, -1, 0.5, 0.5)


def fingertip(physics) -> np.ndarray:
    """Three links of 0.09, each turned by its joint from the one before."""
    angles = np.cumsum(physics.data.qpos)
    return 0.09 * np.array([np.cos(angles).sum(), np.sin(angles).sum()])


def target(physics) -> np.ndarray:
    return physics.named.model.geom_pos["target"][:2].copy()


def reacher_three(physics, radius: float) -> float:
    return tolerance(np.linalg.norm(target(physics) - fingertip(physics)), 0, radius + 0.01)


def ball_offset(physics) -> np.ndarray:
    """Middle of the cup (0.55 high at the cup's zero position) minus the ball's position (0.2 high at its own)."""
    cup_x, cup_z, ball_x, ball_z = physics.data.qpos
    return np.array([cup_x - ball_x, 0.55 + cup_z - 0.2 - ball_z])


def in_cup(physics) -> bool:
    return bool((np.abs(ball_offset(physics)) < 0.05 - 0.025).all())


def ball_in_cup_spin(physics) -> float:
    far = tolerance(np.hypot(*ball_offset(physics)), 0.5, INF, 0.25, 0.5)
    fast = tolerance(np.hypot(*physics.data.qvel[2:]), 6, INF, 3, 0.5)
    return (1 - in_cup(physics)) * (far + 2 * fast) / 3


def pendulum_spin(physics) -> float:
    return tolerance(abs(physics.data.qvel[0]), 9, INF, 4.5, 0.5)


EXPECTED = {
    "cheetah-run-backwards": cheetah_run_backwards,
    "cheetah-run-front": lambda physics: cheetah_run_on_one_leg(physics, "bfoot"),
    "cheetah-run-back": lambda physics: cheetah_run_on_one_leg(physics, "ffoot"),
    "cheetah-jump": cheetah_jump,
    "walker-walk-backwards": lambda physics: walker_backwards(physics, 1),
    "walker-run-backwards": lambda physics: walker_backwards(physics, 8),
    "hopper-hop-backwards": hopper_hop_backwards,
    "reacher-three-easy": lambda physics: reacher_three(physics, 0.05),
    "reacher-three-hard": lambda physics: reacher_three(physics, 0.015),
    "ball-in-cup-spin": ball_in_cup_spin,
    "pendulum-spin": pendulum_spin,
}


# --------------------------------------------------------------------------------------------------------- states

# Ranges of positions and velocities, by joint, that cover the rewards' slopes and both of their ends; the other
# joints are anywhere within their limits, at rest.
RANGES = {
    "cheetah": ({"rootz": (-0.2, 1.0), "rooty": (-np.pi, np.pi)}, {"rootx": (-12, 9)}),
    "cheetah-jump": ({"rootz": (-0.2, 1.0), "rooty": (-np.pi, np.pi)}, {"rootx": (-1.5, 1.5)}),
    "walker-walk": ({"rootz": (-1.0, 0.3), "rooty": (-np.pi, np.pi)}, {"rootx": (-1.5, 0.5)}),
    "walker-run": ({"rootz": (-1.0, 0.3), "rooty": (-np.pi, np.pi)}, {"rootx": (-12, 4)}),
    "hopper": ({"rootz": (0, 0.5), "rooty": (-0.6, 0.6)}, {"rootx": (-1.5, 0.5)}),
    "reacher": ({"shoulder": (-np.pi, np.pi)}, {}),
    "ball": ({"ball_x": (-0.06, 0.06), "ball_z": (0.28, 0.42)}, {"ball_x": (-6, 6), "ball_z": (-6, 6)}),
    "pendulum": ({"hinge": (-np.pi, np.pi)}, {"hinge": (-12, 12)}),
}


def put(name: str, physics, rng: np.random.Generator, wide: bool) -> None:
    """Puts the body into a random state, in the air, within the ranges above; `wide` moves the ball far from its cup,
    the string taut or not."""
    key = max((key for key in RANGES if name.startswith(key)), key=len)
    positions, velocities = (dict(ranges) for ranges in RANGES[key])
    if key == "ball" and wide:
        positions = {"ball_x": (-0.3, 0.3), "ball_z": (0, 0.6)}
    with physics.reset_context():
        for joint in range(physics.model.njnt):
            if physics.model.jnt_limited[joint]:
                physics.data.qpos[joint] = rng.uniform(*physics.model.jnt_range[joint])
        for joint, bounds in positions.items():
            physics.named.data.qpos[joint] = rng.uniform(*bounds)
        for joint, bounds in velocities.items():
            physics.named.data.qvel[joint] = rng.uniform(*bounds)
        if key == "reacher":  # the target as far from the fingertip as its edge, give or take a tenth
            radius = {"easy": 0.05, "hard": 0.015}[name.rpartition("-")[2]] + 0.01
            angle, distance = rng.uniform(-np.pi, np.pi), radius * rng.uniform(0.9, 1.1)
            offset = distance * np.array([np.cos(angle), np.sin(angle)])
            physics.named.model.geom_pos["target", :2] = fingertip(physics) + offset


@every_task
def test_reward_in_chosen_states(name):
    env = brc.make_env(f"dmc/{name}").unwrapped
    env.reset(seed=0)
    physics, task = env.env.physics, env.env.task
    rng, rewards = np.random.default_rng(0), []
    for i in range(400):
        put(name, physics, rng, wide=i % 2 == 0)
        rewards.append(task.get_reward(physics))
        assert rewards[-1] == pytest.approx(EXPECTED[name](physics), abs=1e-9)
    assert min(rewards) < 0.05 and max(rewards) > 0.9, "states that reach neither end would prove little"
    sparse = name.startswith("reacher")
    assert sparse or np.mean((np.array(rewards) > 0.05) & (np.array(rewards) < 0.95)) > 0.1


@every_task
def test_episode(name):
    """1,000 random steps from a state in motion: size, range and value of every reward, and the end by truncation."""
    env = brc.make_env(f"dmc/{name}")
    assert env.observation_space.shape + env.action_space.shape == SIZES[name]
    observation, _ = env.reset(seed=1)
    assert observation.shape == SIZES[name][:1] and observation.dtype == np.float32
    physics = env.unwrapped.env.physics
    rng = np.random.default_rng(1)
    put(name, physics, rng, wide=True)
    for t in range(1, 1001):
        action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        observation, reward, terminated, truncated, _ = env.step(action)
        assert 0 <= reward <= 1
        assert reward == pytest.approx(EXPECTED[name](physics), abs=1e-9)
        assert not terminated and truncated == (t == 1000)
    assert env.observation_space.contains(observation)


@every_task
def test_seeds(name):
    def trajectory(env: gym.Env, seed: int | None) -> np.ndarray:
        rows = [env.reset(seed=seed)[0]]
        rows += [env.step(np.full(env.action_space.shape, 0.5, np.float32))[0] for _ in range(20)]
        return np.stack(rows)

    env, again = brc.make_env(f"dmc/{name}"), brc.make_env(f"dmc/{name}")
    first = trajectory(env, 3)
    assert np.array_equal(first, trajectory(again, 3)) and np.array_equal(first, trajectory(again, 3))
    assert not np.array_equal(first[0], trajectory(env, 4)[0])
    assert not np.array_equal(first[0], trajectory(again, None)[0]), "a reset must go on in the random stream"


# --------------------------------------------------------------------------------------------------------- bodies


def test_three_link_arm():
    """Observation, joint limits and, from capsules of water's density, the masses: 0.09, 0.09 and 0.1 long."""
    env = brc.make_env("dmc/reacher-three-hard").unwrapped
    rng = np.random.default_rng(0)
    env.reset(seed=0)
    physics = env.env.physics
    assert physics.model.jnt_limited.tolist() == [0, 1, 1]
    np.testing.assert_allclose(np.rad2deg(physics.model.jnt_range[1:]), [[-80, 80]] * 2)
    np.testing.assert_allclose(physics.model.dof_damping, 0.01)
    np.testing.assert_allclose(physics.model.actuator_gear[:, 0], 0.05)
    assert physics.model.actuator_trnid[:, 0].tolist() == [0, 1, 2], "actions go to the joints from the shoulder on"
    ends = 4 / 3 * np.pi * 0.01**3
    mass = 1000 * (np.pi * 0.01**2 * np.array([0.09, 0.09, 0.1, 0]) + ends)  # the finger is a ball
    np.testing.assert_allclose(physics.model.body_mass[1:], mass)
    for _ in range(20):
        observation, *_ = env.step(rng.uniform(-1, 1, 3))
        to_target = target(physics) - fingertip(physics)
        expected = np.concatenate([physics.data.qpos, to_target, physics.data.qvel])
        np.testing.assert_allclose(observation, expected, atol=1e-6)


def test_targets_of_the_reachers():
    for name, radius in (("easy", 0.05), ("hard", 0.015)):
        env = brc.make_env(f"dmc/reacher-three-{name}").unwrapped
        env.reset(seed=0)
        distances = []
        for _ in range(100):
            env.reset()
            distances.append(np.linalg.norm(target(env.env.physics)))
        assert env.env.physics.named.model.geom_size["target", 0] == radius
        assert 0.05 <= min(distances) < 0.06 and 0.19 < max(distances) <= 0.2


def test_ball_starts_in_the_cup_in_nine_of_ten_episodes():
    """And anywhere in the tenth, where it is in the cup once in 50 times."""
    env = brc.make_env("dmc/ball-in-cup-spin").unwrapped
    env.reset(seed=0)
    starts = []
    for _ in range(300):
        env.reset()
        starts.append(in_cup(env.env.physics))
        assert env.env.physics.data.ncon == 0
    assert abs(np.mean(starts) - 0.902) < 0.05  # three standard deviations


@pytest.mark.parametrize(("name", "floor"), [("cheetah-jump", "ground"), ("walker-run-backwards", "floor"),
                                             ("hopper-hop-backwards", "floor")])  # fmt: skip
def test_floor_is_drawn_where_backward_runs_lead(name, floor):
    model = brc.make_env(f"dmc/{name}").unwrapped.env.physics.named.model
    assert model.geom_pos[floor, "x"] - model.geom_size[floor, "x"] <= -50


# ------------------------------------------------------------------------------------------------- how it is found


def test_names_are_the_scripts():
    assert list(SIZES) == brc.DMC_EXTRA
    brc.make_env("dmc/pendulum-spin")
    assert {f"brc/{name}-v0" for name in SIZES} <= set(gym.registry)


def test_imported_only_when_asked_for(monkeypatch):
    for name in SIZES:
        monkeypatch.delitem(gym.registry, f"brc/{name}-v0", raising=False)
    brc.make_env("dmc/cheetah-run")
    assert not [gym_id for gym_id in gym.registry if gym_id.startswith("brc/")]
    brc.make_env("dmc/cheetah-jump")
    assert len([gym_id for gym_id in gym.registry if gym_id.startswith("brc/")]) == len(SIZES)


def test_script_copied_alone_says_what_is_missing(monkeypatch, tmp_path):
    for name in SIZES:
        monkeypatch.delitem(gym.registry, f"brc/{name}-v0", raising=False)
    script = runpy.run_path(shutil.copy(ROOT / "brc_sac_continuous.py", tmp_path))
    script["make_env"]("dmc/cheetah-run")
    with pytest.raises(script["UserError"]) as error:
        script["make_env"]("dmc/cheetah-jump")
    assert "dmc/cheetah-jump" in str(error.value) and "\n" not in str(error.value)
    assert str(tmp_path / "benchmark" / "dmc_extra_tasks.py") in str(error.value)


def test_worker_processes_find_it_from_any_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = ["reacher-three-easy", "walker-run-backwards"]
    envs = brc.ParallelEnvs([f"dmc/{name}" for name in names], 1, 0, "auto")
    try:
        assert list(zip(envs.observation_dims, envs.action_dims, strict=True)) == [SIZES[name] for name in names]
        first = envs.reset()
        envs.send(np.ones((2, 6), np.float32))
        assert np.abs(envs.recv()[0] - first).max() > 0
    finally:
        envs.close()


DRAW = """
import sys, gymnasium, numpy as np, dmc_extra_tasks
for name in dmc_extra_tasks.TASKS:
    env = gymnasium.make(f"brc/{name}-v0", render_mode="rgb_array")
    env.reset(seed=0)
    first = env.render()
    for _ in range(15):
        env.step(np.ones(env.action_space.shape, np.float32))
    assert first.shape == (240, 320, 3) and first.std() > 10, f"{name}: an empty frame"
    assert np.abs(first.astype(int) - env.render()).max() > 50, f"{name}: nothing moved"
"""


def test_frames_are_drawn_without_a_display():
    variables = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
    variables |= {"MUJOCO_GL": "egl", "PYTHONPATH": str(ROOT / "benchmark")}
    process = subprocess.run([sys.executable, "-c", DRAW], env=variables, capture_output=True, text=True)
    if process.returncode and "OpenGL" in process.stderr:
        pytest.skip(f"no headless OpenGL here: {process.stderr.strip().splitlines()[-1]}")
    assert process.returncode == 0, process.stderr
