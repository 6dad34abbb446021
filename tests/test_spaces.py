"""Spaces that users' tasks have: every action is reached, every part of an observation arrives, in its order."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, Tuple

import brc_offline_bc as offline
import brc_sac_continuous as brc

f32 = np.float32


class Echo(gym.Env):
    """Keeps the actions that it is given."""

    def __init__(self, observation_space=None, action_space=None):
        self.observation_space = observation_space or Box(-1, 1, (2,), f32)
        self.action_space, self.taken = action_space or Box(-1, 1, (1,), f32), []

    def reset(self, *, seed=None, options=None):
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.taken.append(action)
        return self.observation_space.sample(), 0.0, False, False, {}


@pytest.fixture
def made():
    """made(observation_space, action_space): the script's environment of a task with these spaces."""
    name = "BrcEcho-v0"

    def made(observation_space=None, action_space=None) -> gym.Env:
        spaces = {"observation_space": observation_space, "action_space": action_space}
        gym.register(name, Echo, kwargs=spaces, disable_env_checker=True, order_enforce=False)
        return brc.make_env(f"gym/{name}")

    yield made
    gym.registry.pop(name, None)


# --------------------------------------------------------------------------------------------------------- actions


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [(0, 10, np.int64), (-3, 3, np.int32), (0, 1, np.int8), (0, 255, np.uint8), (5, 5, np.int64), (0, 1, np.bool_)],
)
def test_whole_numbers_are_reached_evenly(low, high, dtype, made):
    env = made(action_space=Box(low, high, (1,), dtype))
    assert env.action_space == Box(-1, 1, (1,), f32)
    env.reset()
    count = int(high) - int(low) + 1
    for action in np.linspace(-1, 1, 40 * count + 1):
        env.step(np.array([action], f32))
    values, counts = np.unique(np.array(env.unwrapped.taken, np.int64), return_counts=True)
    assert values.tolist() == list(range(int(low), int(high) + 1))
    assert counts.min() >= 39 and counts.max() <= 42


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_bounds_and_fixed_joints(dtype, made):
    """The second dimension has one value only; the first is rescaled, and what lies beyond [-1, 1] is cut."""
    env = made(action_space=Box(np.array([-2, 0.5], dtype), np.array([6, 0.5], dtype), dtype=dtype))
    env.reset()
    for action in (-1, 0, 0.5, 1, 1.5):
        env.step(np.array([action, 0.9], f32))
    assert np.array(env.unwrapped.taken).tolist() == [[-2, 0.5], [2, 0.5], [4, 0.5], [6, 0.5], [6, 0.5]]
    assert all(action.dtype == dtype for action in env.unwrapped.taken)


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (Box(-np.inf, np.inf, (2,), f32), "finite bounds"),
        (Box(0, np.inf, (2,), f32), "finite bounds"),
        (Box(-(2**62), 2**62, (1,), np.int64), "finite bounds"),
        (Box(-1, 1, (0,), f32), "action space"),
        (Box(-1, 1, (), f32), "action space"),
        (Box(-1, 1, (2, 2), f32), "action space"),
        (Discrete(3), "action space"),
        (gym.spaces.MultiDiscrete([3, 3]), "action space"),
        (Dict(a=Box(-1, 1, (1,), f32)), "action space"),
    ],
)
def test_actions_that_rescaling_cannot_serve_are_refused(space, words, made):
    with pytest.raises(brc.UserError, match=words) as error:
        made(action_space=space)
    assert "BrcEcho-v0" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "space", [Box(0, 10, (1,), np.int64), Box(-2, 6, (1,), f32), Box(3, 3, (1,), f32), Box(0, 1, (1,), np.bool_)]
)
def test_recorded_actions_are_the_policys(space):
    """unit_actions is own_action's inverse, on which cloning rests."""
    actions = np.array([space.sample() for _ in range(50)])
    units = offline.unit_actions(actions, space)
    assert np.abs(units).max() <= 1
    back = np.array([brc.own_action(space, unit) for unit in units.astype(f32)])
    np.testing.assert_allclose(back.astype(float), actions.astype(float), atol=1e-5)


# ---------------------------------------------------------------------------------------------------- observations

GOAL = Dict(b=Box(-1, 1, (2,), f32), a=Box(-1, 1, (1,), f32))


@pytest.mark.parametrize(
    ("space", "size"),
    [
        (Dict(observation=Box(-1, 1, (3,), f32), desired_goal=GOAL, achieved_goal=GOAL), 9),
        (Dict(z=Box(-1, 1, (2,), np.float64), a=Box(-1, 1, (2, 2), f32)), 6),
        (Dict(x=Tuple([Box(-1, 1, (2,), f32), Discrete(3)]), y=gym.spaces.MultiBinary(2)), 7),
    ],
)
def test_nested_observations_are_one_vector(space, size, made):
    env = made(observation_space=space)
    observation, _ = env.reset(seed=1)
    assert observation.shape == env.observation_space.shape == (size,) and observation.dtype == f32
    assert np.isfinite(env.step(np.zeros(1, f32))[0]).all()


def test_parts_stand_in_the_spaces_own_order(made):
    space = Dict(zpos=Box(0, 1, (2,), f32), agoal=Box(5, 6, (2,), f32))
    observation, _ = made(observation_space=space).reset()
    order = list(space)  # whatever Gymnasium makes of it
    expected = np.concatenate([np.full(2, {"zpos": 0.5, "agoal": 5.5}[key]) for key in order])
    assert np.abs(observation - expected).max() <= 0.5


@pytest.mark.parametrize(
    "space", [Dict(a=gym.spaces.Sequence(Box(-1, 1, (1,), f32))), Dict(a=gym.spaces.Graph(Discrete(2), None))]
)
def test_observations_that_are_no_vector_are_refused(space, made):
    with pytest.raises(brc.UserError, match="no vector") as error:
        made(observation_space=space)
    assert "\n" not in str(error.value)


def test_recorded_parts_are_joined_in_the_environments_order():
    space = {"zpos": Box(-1, 1, (2,), f32), "agoal": GOAL}
    recorded = {  # Minari sorts keys
        "agoal": {"a": np.full((3, 1), 1.0), "b": np.full((3, 2), 2.0)}, "zpos": np.full((3, 2), 3.0),
        "achieved_goal": np.zeros((3, 9)),
    }  # fmt: skip
    joined = offline.joined(recorded, space)
    own = {"zpos": np.full(2, 3.0), "agoal": {"a": np.full(1, 1.0), "b": np.full(2, 2.0)}}
    np.testing.assert_array_equal(joined, np.tile(brc.flat_observation(space, own), (3, 1)))


@pytest.mark.parametrize("keys", [["zpos"], ["zpos", "agoal", "extra"], ["zpos", "bgoal"]])
def test_recorded_parts_that_differ_are_refused(keys):
    space = dict.fromkeys(["zpos", "agoal"], Box(-1, 1, (2,), f32))
    with pytest.raises(ValueError, match="it observes"):
        offline.joined({key: np.zeros((3, 2)) for key in keys}, space)
