"""envpool against the reference implementation (dm_control, Meta-World), for every task that both have.

  python benchmark/compare_backends.py                                          # all 84 tasks, 40 minutes on one core
  python benchmark/compare_backends.py --tasks dmc/walker-walk metaworld/hammer --episodes 50 --output compare.csv
  pip install --no-deps --target new mujoco==3.6.0 dm_control==1.0.38      # envpool's MuJoCo, for the reference as well
  PYTHONPATH=new python benchmark/compare_backends.py --episodes 0 --mend views resets

envpool shows no simulator state, but its resets are a known function of its random generator (C++'s mt19937, one per
copy). `EnvPoolRandom` draws the same numbers for the reference, so both start an episode in the same state. Then:
  1. paired      Both take the same actions, random ones and for Meta-World also its scripted experts'. At every step
                 observation, reward, success and end of the episode are compared. envpool brings its own MuJoCo (3.6),
                 whose contacts are not those of 3.2. `agree_steps` is how far all episodes agree,
                 `reward_error` the largest among steps whose observations agree to rounding since the reset,
                 `rewarded_steps` how many of these have a reward that is not zero.
  2. two-sample  Where a policy's episodes do not agree to their end: independent episodes of each backend, tests of
                 Kolmogorov and Smirnov of return, first and mean observation (smallest p over the dimensions, times
                 their number), or under Meta-World's experts of return and, by Fisher's test, success.
Verdicts: `exact`, all steps agree. `differs`, sizes or lengths do, or a reward is not the same function of the same
state, or a test finds a difference (p below 0.05 over the number of all tests), and which. `same`, neither. `drifts`,
neither, but no tests were asked for.
An error is |difference| / max(1, |reference|), the largest over the dimensions.
"""

import csv
import io
import json
import math
import platform
import sys
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import mujoco
import numpy as np
import tyro
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch import exit_with

import brc_sac_continuous as brc

ALL_TASKS = [f"dmc/{task}" for task in brc.DMC] + [f"metaworld/{task}" for task in brc.METAWORLD]
LENGTH = {"dmc": 1000, "metaworld": 200}
TOLERANCE = 1e-3  # of an error, for two steps to agree
STATE_TOLERANCE = 1e-5  # of all observations so far, for two rewards to be of the same state
TESTS = len(ALL_TASKS) * 5
COPIES = 10  # of envpool; each runs several episodes, as resets that leave something behind show only then


@dataclass
class Args:
    tasks: tuple[str, ...] = tuple(ALL_TASKS)
    """tasks, family/task"""
    paired: int = 12
    """paired episodes per task and policy"""
    episodes: int = 20
    """episodes per backend, task and policy in two-sample tests, in Meta-World 2.5 times as many; 0: none"""
    mend: tuple[Literal["views", "resets"], ...] = ()
    """habits of Meta-World to mend in the paired episodes, to see whether anything else differs. views: `init_left_pad`
    and such are views of the current position; resets: a reset resets twice, settling first in the old, then in the
    new scene (envpool once, in the old one)"""
    seed: int = 0
    """seed of environments and actions"""
    output: Path | None = None
    """CSV file, one line per task, written as the tasks end; versions go to a .json beside it"""


PAIRED = "goal_error agree_steps first_dims rewarded_steps reward_error success_differs error".split()
COLUMNS = """task verdict sizes reference_sizes length reference_length reset_error goal_error agree_steps
first_dims rewarded_steps reward_error success_differs error return reference_return p_return p_first p_mean
mean_difference expert_goal_error expert_agree_steps expert_first_dims expert_rewarded_steps expert_reward_error
expert_success_differs expert_error expert_return expert_reference_return expert_p_return expert_success
expert_reference_success expert_p_success""".split()


class EnvPoolRandom:
    """The random numbers that an envpool environment draws at its resets, with the interface that dm_control asks for.

    As in GNU's C++ library: a uniform number is made of two 32-bit draws, a normal one by Marsaglia's polar method,
    whose second number is thrown away because envpool builds a distribution anew for every draw.
    """

    def __init__(self, seed: int):
        self.generator = np.random.RandomState(seed)

    def canonical(self) -> float:
        low, high = self.generator.randint(0, 2**32, size=2, dtype=np.uint32).astype(np.float64)
        return (low + high * 2.0**32) / 2.0**64

    def uniform(self, low=0.0, high=1.0, size=None):
        low, high = np.broadcast_arrays(np.asarray(low, np.float64), np.asarray(high, np.float64))
        shape = low.shape if size is None else tuple(np.atleast_1d(size))
        canonical = np.array([self.canonical() for _ in range(int(np.prod(shape)))]).reshape(shape)
        result = (high - low) * canonical + low
        return result if shape else float(result)

    def rand(self, *shape):
        return self.uniform(size=shape or None)

    def randn(self, *shape):
        normals = []
        while len(normals) < int(np.prod(shape)):
            x, y = 2 * self.canonical() - 1, 2 * self.canonical() - 1
            square = x * x + y * y
            if 0 < square <= 1:
                normals.append(y * np.sqrt(-2 * np.log(square) / square))
        return np.array(normals).reshape(shape) if shape else float(normals[0])

    def choice(self, options, p):
        """Of dm_control, only manipulator asks for it; envpool tries its second option first."""
        draw = self.canonical()
        return options[1] if draw <= p[1] else options[0] if draw <= p[0] + p[1] else options[2]


class Reference:
    """The reference environment as the script makes it, starting every episode as envpool's first copy does."""

    def __init__(self, task: str, seed: int, mend: tuple[str, ...] = ()):
        self.env, self.random = brc.make_env(task), EnvPoolRandom(seed)
        inner = self.env.unwrapped
        if task.startswith("dmc/"):
            inner.env.task._random = self.random
        else:
            self.replay_metaworld(inner, mend)
        self.reset()  # EnvPoolTask, too, resets once when it is made

    def replay_metaworld(self, env, mend: tuple[str, ...]) -> None:
        space, original = env._random_reset_space, env.reset_model
        fresh = mujoco.MjData(env.model)
        mujoco.mj_forward(env.model, fresh)

        def reset_model():
            self.calls += 1
            if "resets" in mend and self.calls == 1:
                return env._get_obs()
            self.random.generator.set_state(self.start)  # of reset's two calls the second one's numbers count
            observation = original()
            if "views" in mend:
                env.init_left_pad, env.init_right_pad = (fresh.body(name).xpos for name in ("leftpad", "rightpad"))
                env.obj_init_pos = np.array(env.obj_init_pos)
            return observation

        env.reset_model, env._get_state_rand_vec = reset_model, lambda: self.random.uniform(space.low, space.high)

    def reset(self) -> np.ndarray:
        self.start, self.calls = self.random.generator.get_state(), 0
        return self.env.reset()[0]


def random_policy(task: str, size: int, rng: np.random.Generator):
    """A third of the episodes each: uniform actions; uniform ones held for up to 20 steps; a random linear function of
    the observation. The latter two reach states and rewards that the first one never does."""
    kind, gains = rng.integers(3), rng.normal(size=(size, 500))
    if kind == 2:
        return lambda observation: np.tanh(gains[:, : len(observation)] @ observation).astype(np.float32)
    actions = rng.uniform(-1, 1, (1000, size)).astype(np.float32)
    actions = iter(np.repeat(actions, rng.integers(1, 21, 1000), axis=0) if kind else actions)
    return lambda observation: next(actions)


def expert_policy(task: str, size: int, rng: np.random.Generator):
    import metaworld.policies

    name = "".join(part.capitalize() for part in task.split("/")[1].split("-"))
    expert = getattr(metaworld.policies, f"Sawyer{name.replace('PegInsert', 'PegInsertion')}V3Policy")()
    return lambda observation: np.clip(expert.get_action(observation.astype(np.float64)), -1, 1).astype(np.float32)


def reset(pool: brc.EnvPoolTask) -> np.ndarray:
    pool.send(None, np.arange(pool.num_envs))
    return pool.recv().observations


def errors(value, reference) -> np.ndarray:
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    return np.abs(value - reference) / np.maximum(1, np.abs(reference))


def compare_paired(
    task: str, make_policy, episodes: int, seed: int, max_steps: int = 10**6, mend: tuple[str, ...] = ()
) -> dict:
    """Both backends from the same states under the same actions."""
    pool, reference, rng = brc.EnvPoolTask(task, 1, seed), Reference(task, seed, mend), np.random.default_rng(seed)
    sizes, metaworld = (*pool.observation_dims, *pool.action_dims), task.startswith("metaworld/")
    result = {
        "sizes": sizes, "reference_sizes": reference.env.observation_space.shape + reference.env.action_space.shape,
        "length": [], "reference_length": [], "reset_error": 0.0, "goal_error": 0.0, "agree_steps": max_steps,
        "first_dims": "", "rewarded_steps": 0, "reward_error": 0.0, "success_differs": 0, "error": 0.0,
    }  # fmt: skip
    dims = np.arange(sizes[0])
    goal = metaworld & (dims >= 36)
    previous = metaworld & (dims >= 18) & ~goal  # the observation before
    for episode in range(episodes if sizes == result["reference_sizes"] else 0):
        observation, expected = reset(pool)[0], reference.reset()
        result["reset_error"] = max(result["reset_error"], float(errors(observation, expected)[~goal].max()))
        policy, ends, reference_ends = make_policy(task, sizes[1], rng), False, False
        state_error, largest, agreed, steps = 0.0, 0.0, 0, 0
        while not (ends or reference_ends) and steps < max_steps:
            action = policy(observation)
            pool.send(action[None], np.arange(1))
            observations, rewards, terminated, truncated, success, _ = pool.recv()
            observation, ends, steps = observations[0], bool(terminated[0] or truncated[0]), steps + 1
            expected, reward, *reference_ends, info = reference.env.step(action)
            reference_ends, reward_error = any(reference_ends), float(errors(rewards[0], reward))
            difference = errors(observation, expected)
            result["goal_error"] = max(result["goal_error"], float(difference[goal].max(initial=0)))
            difference[goal | (previous & (steps == 1))] = 0  # what reset_error and goal_error say
            if difference.max() > TOLERANCE >= state_error and steps <= result["agree_steps"]:
                apart = [str(dim) for dim in np.flatnonzero(difference > TOLERANCE)]
                result["first_dims"] = " ".join(
                    apart if len(apart) <= 8 else [*apart[:3], f"and {len(apart) - 3} more"]
                )
            state_error = max(state_error, float(difference.max()))
            if state_error <= STATE_TOLERANCE:
                result["reward_error"] = max(result["reward_error"], reward_error)
                result["rewarded_steps"] += bool(reward != 0)
                result["success_differs"] += "success" in info and int(success[0] != info["success"])
            largest = max(largest, state_error, reward_error)
            agreed = steps if largest <= TOLERANCE else agreed
            if state_error > TOLERANCE and episode:
                break  # the first one went on, to see its length
        result["error"], result["agree_steps"] = max(result["error"], largest), min(result["agree_steps"], agreed)
        result["length"] += [steps] * ends
        result["reference_length"] += [steps] * reference_ends
    pool.close()
    return result


class Sample(NamedTuple):
    """What the two-sample tests look at: one row per episode."""

    first: np.ndarray
    mean: np.ndarray
    returns: np.ndarray
    success: np.ndarray


def sample_envpool(task: str, make_policy, episodes: int, seed: int) -> Sample:
    pool, rng = brc.EnvPoolTask(task, COPIES, seed), np.random.default_rng([seed, 1])
    rows, length = [], LENGTH[task.split("/")[0]]
    for _ in range(math.ceil(episodes / COPIES)):
        observations = first = reset(pool)
        policies = [make_policy(task, pool.action_dims[0], rng) for _ in range(COPIES)]
        total, returns, best = 0.0, np.zeros(COPIES), np.zeros(COPIES)
        for _ in range(length):
            actions = np.stack([policy(row) for policy, row in zip(policies, observations, strict=True)])
            pool.send(actions, np.arange(COPIES))
            observations, rewards, _, _, success, _ = pool.recv()
            total, returns, best = total + observations, returns + rewards, np.maximum(best, success)
        rows += zip(first, total / length, returns, best, strict=True)
    pool.close()
    return Sample(*(np.array(column, np.float64) for column in zip(*rows, strict=True)))


def sample_reference(task: str, make_policy, episodes: int, seed: int) -> Sample:
    env, rng = brc.make_env(task, seed=seed), np.random.default_rng([seed, 2])
    rows, length = [], LENGTH[task.split("/")[0]]
    for episode in range(episodes):
        observation = first = env.reset(seed=None if episode else seed)[0]
        policy, total, returns, best = make_policy(task, env.action_space.shape[0], rng), 0.0, 0.0, 0.0
        for _ in range(length):
            observation, reward, _, _, info = env.step(policy(observation))
            total, returns, best = total + observation, returns + reward, max(best, info.get("success", math.nan))
        rows.append((first, total / length, returns, best))
    return Sample(*(np.array(column, np.float64) for column in zip(*rows, strict=True)))


def p_value(values: np.ndarray, references: np.ndarray) -> float:
    """Kolmogorov-Smirnov; of several dimensions, but constant ones, the smallest p times their number (Bonferroni)."""
    values, references = (np.reshape(x, (len(x), -1)) for x in (values, references))
    both = np.concatenate([values, references])
    dims = np.flatnonzero(np.ptp(both, axis=0) > TOLERANCE)
    p = [stats.ks_2samp(values[:, dim], references[:, dim]).pvalue for dim in dims]
    return min(1.0, min(p) * len(p)) if p else 1.0


def compare_task(task: str, args: Args) -> dict:
    length, metaworld = LENGTH[task.split("/")[0]], task.startswith("metaworld/")
    row = dict.fromkeys(COLUMNS, "") | {"task": task}
    policies = {"": random_policy} | ({"expert_": expert_policy} if metaworld else {})
    drifting, wrong = [], []
    for prefix, make_policy in policies.items():
        paired = compare_paired(task, make_policy, args.paired, args.seed, mend=args.mend)
        if not prefix:
            row |= {name: "x".join(map(str, paired[name])) for name in ("sizes", "reference_sizes")}
            row |= {name: " ".join(map(str, sorted(set(paired[name])))) for name in ("length", "reference_length")}
            row["reset_error"] = paired["reset_error"]
        row |= {prefix + name: paired[name] for name in PAIRED}
        found = {
            "sizes": paired["sizes"] != paired["reference_sizes"],
            "length": set(paired["length"] + paired["reference_length"]) != {length},
            "reset": paired["reset_error"] > TOLERANCE, "goal": paired["goal_error"] > TOLERANCE,
            "reward": paired["reward_error"] > TOLERANCE, "success": paired["success_differs"] > 0,
        }  # fmt: skip
        wrong += [prefix + name for name, differs in found.items() if differs]
        drifting += [prefix] * (paired["agree_steps"] < length and bool(paired["length"]))
    for prefix in drifting if args.episodes else []:
        episodes = round(args.episodes * (2.5 if metaworld else 1))
        ours = sample_envpool(task, policies[prefix], episodes, args.seed + 1)
        theirs = sample_reference(task, policies[prefix], episodes, args.seed + 2)
        p = {f"{prefix}p_return": p_value(ours.returns, theirs.returns)}
        row[f"{prefix}return"], row[f"{prefix}reference_return"] = ours.returns.mean(), theirs.returns.mean()
        if prefix:
            row["expert_success"], row["expert_reference_success"] = ours.success.mean(), theirs.success.mean()
            table = [[sum(x.success), len(x.success) - sum(x.success)] for x in (ours, theirs)]
            p["expert_p_success"] = stats.fisher_exact(table).pvalue
        else:
            p |= {"p_first": p_value(ours.first, theirs.first), "p_mean": p_value(ours.mean, theirs.mean)}
            if min(p["p_first"], p["p_mean"]) < 0.05 / TESTS:  # significant, but how much is it?
                row["mean_difference"] = float(np.abs(ours.mean.mean(0) - theirs.mean.mean(0)).max())
        row |= p
        wrong += [name for name, value in p.items() if value < 0.05 / TESTS]
    verdict = "exact" if not drifting else "same" if args.episodes else "drifts"
    row["verdict"] = " ".join(["differs:", *wrong]) if wrong else verdict
    return row


def shorten(value) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    brc.ENVPOOL_BROKEN = set()  # here they are compared, too
    if not hasattr(np, "in1d"):  # NumPy 2.4 removed what dm_control 1.0.21's quadruped calls; mended here only
        np.in1d = np.isin  # noqa: NPY201
    warnings.filterwarnings("ignore", "Constant")  # of the experts: their actions are clipped
    unknown = [task for task in args.tasks if task not in ALL_TASKS or not brc.envpool_id(task)]
    if unknown:
        print(f"error: not in envpool: {' '.join(unknown)}; choose from: {' '.join(ALL_TASKS)}", file=sys.stderr)
        sys.exit(2)
    versions = {name: version(name) for name in ("envpool", "dm_control", "metaworld", "mujoco", "numpy")}
    versions |= {"python": platform.python_version(), "cpu": platform.machine(), "command": sys.argv[1:]}
    print(json.dumps(versions))
    file = args.output.open("w", newline="") if args.output else io.StringIO()
    if args.output:
        args.output.with_suffix(".json").write_text(json.dumps(versions, indent=1) + "\n")
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for task in args.tasks:
        row = {name: shorten(value) for name, value in compare_task(task, args).items()}
        writer.writerow(row)
        file.flush()
        details = ", ".join(f"{name} {row[name]}" for name in COLUMNS[2:] if row[name])
        print(f"{task}: {row['verdict']} ({details})", flush=True)


if __name__ == "__main__":
    exit_with(main)
