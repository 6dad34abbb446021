"""The agent learns: two tasks with opposite goals that only the task's identity tells apart."""

import csv
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "brc_sac_continuous.py"
TASKS = ["gym_tasks:PointRight-v0", "gym_tasks:PointLeft-v0"]


def mean_return(task: str, policy) -> float:
    """Of 20 episodes; policy(environment, observation) is an action."""
    env, returns = gym.make(task).unwrapped, []
    for seed in range(20):
        observation, _ = env.reset(seed=seed)
        done, total = False, 0.0
        while not done:
            observation, reward, _, done, _ = env.step(policy(env, observation))
            total += reward
        returns.append(total)
    return float(np.mean(returns))


@pytest.fixture(scope="module")
def references() -> dict[str, tuple[float, float]]:
    """Mean returns of uniformly random actions and of the straight way to the goal."""
    rng = np.random.default_rng(0)
    policies = lambda env, _: rng.uniform(-1, 1, 2), lambda env, x: (env.goal - x) / 0.25
    return {task: tuple(mean_return(task, policy) for policy in policies) for task in TASKS}


@pytest.mark.parametrize("conditioning", ["embedding", pytest.param("heads", marks=pytest.mark.slow)])
@pytest.mark.parametrize("seed", [7, pytest.param(8, marks=pytest.mark.slow)])
def test_one_agent_learns_two_opposite_tasks(conditioning, seed, references, tmp_path, learn):
    """Whoever ignores the task gets at most 25 in both together: that point's own 25, and next to nothing elsewhere."""
    arguments = f"""--task-conditioning {conditioning} --seed {seed} --run-root {tmp_path} --run-name run
        --critic-width 64 --critic-depth 1 --actor-width 64 --batch-size 64 --discount 0.95 --learning-starts 300
        --total-timesteps 3000 --eval-every 3000 --eval-episodes 10 --checkpoint-every 3000"""
    learn("--env-ids", *(f"gym/{task}" for task in TASKS), *arguments.split())
    with (tmp_path / "run" / "eval.csv").open() as file:
        returns = {
            (row["step"], row["task"].removeprefix("gym/")): float(row["return"]) for row in csv.DictReader(file)
        }
    for task, (random, best) in references.items():
        assert random < 0.2 * best, "too easy to prove anything"
        assert returns["0", task] < 0.5 * best, "solved before learning"
        assert returns["3000", task] > 0.8 * best
    assert sum(returns["3000", task] for task in TASKS) > 30
