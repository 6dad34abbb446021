"""envpool and the reference implementations, step by step from the same states. For all tasks: compare_backends.py"""

import compare_backends as compare
import numpy as np
import pytest

import brc_sac_continuous as brc


@pytest.mark.dm_control  # and the MuJoCo that goes with it
@pytest.mark.parametrize(
    ("task", "steps"),
    [  # a whole episode where MuJoCo 3.2 (reference) and 3.6 (envpool) agree, elsewhere some steps before contacts
        ("dmc/cartpole-swingup", 1000), ("dmc/pendulum-swingup", 1000), ("dmc/fish-swim", 1000),
        ("dmc/finger-spin", 20), ("dmc/humanoid-run", 20), ("dmc/quadruped-run", 10),
        ("metaworld/button-press", 20), ("metaworld/drawer-open", 20), ("metaworld/plate-slide-back", 20),
    ],
)  # fmt: skip
def test_same_state_same_actions_same_observations_and_rewards(task, steps, monkeypatch):
    if "quadruped" in task:  # dm_control 1.0.21 calls what NumPy 2.4 removed
        monkeypatch.setattr(np, "in1d", np.isin, raising=False)
    result = compare.compare_paired(task, compare.random_policy, episodes=2, seed=3, max_steps=steps)
    assert result["sizes"] == result["reference_sizes"]
    assert result["reset_error"] < 1e-4, "the episodes do not start in the same state"
    assert result["agree_steps"] == steps and result["error"] < 1e-3
    assert result["reward_error"] < 1e-3 and not result["success_differs"]
    length = compare.LENGTH[task.split("/")[0]]
    assert result["length"] == result["reference_length"] == ([length] * 2 if steps == length else [])


@pytest.mark.dm_control
def test_a_wrong_order_of_observations_is_seen(monkeypatch):
    order = brc.ENVPOOL_KEYS["dmc/fish-swim"].split()
    monkeypatch.setitem(brc.ENVPOOL_KEYS, "dmc/fish-swim", " ".join(order[:2] + order[:1:-1]))  # same size, other order
    result = compare.compare_paired("dmc/fish-swim", compare.random_policy, episodes=1, seed=3, max_steps=20)
    assert result["sizes"] == result["reference_sizes"] and result["reset_error"] > 0.01 and result["agree_steps"] == 0


@pytest.mark.dm_control
def test_a_wrong_range_of_actions_is_seen(monkeypatch):
    send, scaled = brc.EnvPoolTask.send, lambda actions: None if actions is None else 0.9 * actions
    monkeypatch.setattr(brc.EnvPoolTask, "send", lambda self, actions, rows: send(self, scaled(actions), rows))
    result = compare.compare_paired("dmc/cartpole-swingup", compare.random_policy, episodes=1, seed=3, max_steps=20)
    assert result["reset_error"] < 1e-4 and result["agree_steps"] < 20


def test_the_goal_that_moves_on_is_seen(monkeypatch):
    """metaworld/hammer, which is why it is in ENVPOOL_BROKEN: once it agrees, take it out there."""
    monkeypatch.setattr(brc, "ENVPOOL_BROKEN", set())
    result = compare.compare_paired("metaworld/hammer", compare.random_policy, episodes=2, seed=3, max_steps=5)
    assert result["goal_error"] > 0.1


@pytest.mark.dm_control
def test_a_ball_that_counts_as_caught_too_early_is_seen(monkeypatch):
    """dmc/ball-in-cup-catch: envpool takes the size of another geom for the ball's."""
    monkeypatch.setattr(brc, "ENVPOOL_BROKEN", set())
    result = compare.compare_paired("dmc/ball-in-cup-catch", compare.random_policy, episodes=1, seed=8, max_steps=20)
    assert result["reset_error"] < 1e-4 and result["reward_error"] == 1


def test_two_sample_test_tells_distributions_apart():
    rng = np.random.default_rng(0)
    sample = rng.normal(size=(40, 3))
    assert compare.p_value(sample, rng.normal(size=(40, 3))) > 0.01
    assert compare.p_value(sample, rng.normal(size=(40, 3)) + [0, 0, 2]) < 1e-4
    assert compare.p_value(sample * 0, sample * 0 + 1e-6) == 1, "rounding is no difference"
    assert compare.p_value(sample * 0, sample * 0 + 1e-2) < 1e-4
