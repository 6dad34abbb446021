"""Every task of every family is built and stepped for real; families whose package is missing are skipped with the
line that installs it. The summary at the end says how many of each family ran (conftest.py)."""

import importlib.util
import re
import warnings

import numpy as np
import pytest

import brc_sac_continuous as brc

TASKS = [f"{family}/{task}" for family, tasks in brc.FAMILIES.items() for task in tasks]
PACKAGE = {"dmc": "dm_control", "humanoidbench": "humanoid_bench", "shadowhand": "dex_envs"}


@pytest.mark.parametrize("task", TASKS)
def test_steps(task):
    """Ten random steps in [-1, 1] through envpool where it has the task, else through its Gymnasium environment."""
    family, _, name = task.partition("/")
    rng = np.random.default_rng(0)
    if brc.envpool_id(task):
        pool, row = brc.EnvPoolTask(task, 1, 0), np.arange(1)
        (size,), (action_dim,) = pool.observation_dims, pool.action_dims
        pool.send(None, row)
        observations, rewards = [pool.recv().observations], []
        for _ in range(10):
            pool.send(rng.uniform(-1, 1, (1, action_dim)), row)
            results = pool.recv()
            observations.append(results.observations)
            rewards.append(results.rewards[0])
            assert not results.truncated[0] and not results.restarted[0]
        observations = np.concatenate(observations)
        pool.close()
    else:
        if family in PACKAGE and importlib.util.find_spec(PACKAGE[family]) is None:
            pytest.skip(brc.INSTALL[family])
        try:
            env = brc.make_env(task, seed=0)
        except brc.UserError as error:
            if missing := re.search(r"\S+\.(stl|png)", str(error)):
                pytest.skip(f"this copy of the package lacks {missing.group()}")
            raise
        observations, rewards = [env.reset(seed=0)[0]], []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # HumanoidBench's spaces are float64 by name and float32 by content
            for _ in range(10):
                observation, reward, terminated, truncated, _ = env.step(env.action_space.sample())
                observations.append(observation)
                rewards.append(reward)
                if terminated:
                    observations.append(env.reset()[0])
                assert not truncated
        size = env.observation_space.shape[0]
        env.close()
    assert np.shape(observations)[1:] == (size,)
    assert np.isfinite(observations).all() and np.isfinite(rewards).all()
    assert np.ptp(observations, axis=0).max() > 0, "nothing moves"
    assert np.isfinite(brc.normalized_score(task, 0.0, 0.0))


def test_every_task_of_a_suite_exists():
    for tasks, _ in brc.SUITES.values():
        assert set(tasks) <= set(TASKS)
    assert len(TASKS) == len(set(TASKS))
