"""brc_offline_bc.py: data sets in and out, the actor's loss against float64, errors, resume, learning from data."""

import errno
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_files import assert_same, played
from scipy.integrate import quad

import brc_offline_bc as brc
import brc_sac_continuous as online

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gym_tasks  # noqa: F401 (registers the environments that data are made of)

SCRIPT = Path(brc.__file__)
POINTS = ["gym/gym_tasks:PointRight-v0", "gym/gym_tasks:PointLeft-v0"]
SMALL = """--critic-width 32 --critic-depth 1 --actor-width 32 --batch-size 32 --eval-episodes 1""".split()


@pytest.fixture(autouse=True)
def worker_path(monkeypatch):
    """Worker processes find gym_tasks."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parent))


def write(folder: Path, task: str, episodes: list[dict], observation_dim: int = 2, action_dim: int = 2) -> Path:
    """A data file: each episode has observations [T + 1], actions [T], rewards [T] and terminated."""
    length = sum(len(episode["rewards"]) + 1 for episode in episodes)
    records, first = np.zeros(length, brc.record_type(observation_dim, action_dim)), 0
    for episode in episodes:
        rows = records[first : first + len(episode["rewards"]) + 1]
        rows["observation"], rows["action"][:-1] = episode["observations"], episode["actions"]
        rows["reward"][:-1], rows["valid"][:-1] = episode["rewards"], True
        rows["terminated"][-2] = episode["terminated"]
        first += len(rows)
    folder.mkdir(exist_ok=True)
    np.save(folder / f"{brc.file_name(task)}.npy", records)
    return folder / f"{brc.file_name(task)}.npy"


def random_episodes(rng, count: int, observation_dim: int = 2, action_dim: int = 2, length: int = 12) -> list[dict]:
    return [
        {
            "observations": rng.normal(size=(n + 1, observation_dim)),
            "actions": rng.uniform(-1, 1, (n, action_dim)),
            "rewards": rng.normal(size=n),
            "terminated": rng.random() < 0.5,
        }
        for n in rng.integers(1, length, count)
    ]  # fmt: skip


def point_episodes(task: str, count: int, skill: float, seed: int) -> list[dict]:
    """Real episodes of a point task: with probability `skill` a noisy step to the goal, else a random one."""
    env, rng, episodes = gym.make(task.removeprefix("gym/")).unwrapped, np.random.default_rng(seed), []
    for index in range(count):
        observations, actions, rewards, done = [env.reset(seed=seed * 1000 + index)[0]], [], [], False
        while not done:
            straight = np.clip((env.goal - observations[-1]) / 0.25 + 0.3 * rng.normal(size=2), -1, 1)
            actions.append(straight if rng.random() < skill else rng.uniform(-1, 1, 2))
            observation, reward, _, done, _ = env.step(actions[-1])
            observations.append(observation)
            rewards.append(reward)
        episodes.append({"observations": observations, "actions": actions, "rewards": rewards, "terminated": False})
    return episodes


class Sizes:
    """What Dataset asks of ParallelEnvs."""

    def __init__(self, *sizes: tuple[int, int]):
        self.observation_dims, self.action_dims = [s for s, _ in sizes], [a for _, a in sizes]
        self.observation_dim, self.action_dim = max(self.observation_dims), max(self.action_dims)


def train(*arguments) -> None:
    brc.main(brc.parse_args([str(argument) for argument in arguments]))


@pytest.mark.parametrize(
    ("argument", "value"),
    [("batch_size", 1024), ("discount", 0.99), ("polyak_tau", 5e-3), ("num_atoms", 101), ("critic_width", 4096),
     ("critic_depth", 2), ("actor_lr", 3e-4), ("critic_lr", 3e-4), ("embedding_size", 32), ("embedding_norm", "l1")],
)  # fmt: skip
def test_defaults_are_table_3s(argument, value):
    assert getattr(brc.Args(), argument) == value


# ---------------------------------------------------------------------------------------------------------- data


def test_samples_are_the_files_transitions(tmp_path):
    """Of both tasks, padded with zeros, each task equally often though one has ten times the data."""
    rng, expected = np.random.default_rng(0), [set(), set()]
    paths = []
    for task, (count, sizes) in enumerate(((4, (2, 1)), (40, (3, 2)))):
        episodes = random_episodes(rng, count, *sizes)
        paths.append(write(tmp_path, f"gym/Task{task}", episodes, *sizes))
        for episode in episodes:
            last = len(episode["rewards"]) - 1
            for t in range(last + 1):
                row = np.zeros(3 + 2 + 2 + 3, np.float32)
                row[: sizes[0]], row[3 : 3 + sizes[1]] = episode["observations"][t], episode["actions"][t]
                row[5], row[6] = episode["rewards"][t], episode["terminated"] and t == last
                row[7 : 7 + sizes[0]] = episode["observations"][t + 1]
                expected[task].add(tuple(row.tolist()))
    data = brc.Dataset(["gym/Task0", "gym/Task1"], paths, Sizes((2, 1), (3, 2)), None, 0.99)
    batch = data.sample(np.random.default_rng(1), 20_000)
    rows = np.column_stack(
        [batch.observations, batch.actions, batch.rewards, batch.terminated, batch.next_observations]
    )
    for task in range(2):
        assert {tuple(row) for row in rows[batch.task_ids == task].tolist()} == expected[task]
    assert abs((batch.task_ids == 0).mean() - 0.5) < 0.02


def test_last_transitions(tmp_path):
    rng = np.random.default_rng(0)
    path = write(tmp_path, "gym/A", random_episodes(rng, 30))
    records = np.load(path)
    newest = records["reward"][np.flatnonzero(records["valid"])[-17:]]
    data = brc.Dataset(["gym/A"], [path], Sizes((2, 2)), 17, 0.99)
    batch = data.sample(rng, 2000)
    assert set(batch.rewards.tolist()) == set(newest.tolist())


def test_largest_return_by_hand(tmp_path):
    """Terminated: nothing after the end. Truncated, as long as the longest episode or the horizon of 2: its mean reward
    for ever."""

    def largest(*episodes, discount=0.5, is_cut=False, **options):
        made = [
            {"observations": np.zeros((len(rewards) + 1, 2)), "actions": np.zeros((len(rewards), 2)),
             "rewards": rewards, "terminated": terminated} for rewards, terminated in episodes
        ]  # fmt: skip
        return brc.returns_of(np.load(write(tmp_path, "gym/A", made)), discount, is_cut, **options)

    assert largest(([1, 2, 4], True)) == (4.0, 7.0)  # 1 + 1 + 1 = 3, 2 + 2 = 4, 4
    assert largest(([2, 4], False))[0] == pytest.approx(4 + 0.5 * 6)  # mean 3, tail 6: 2 + 2 + 1.5, 4 + 3
    assert largest(([1, 1, 1], True), ([-8], False)) == (8.0, 3.0)  # the piece gets no tail, and does not count
    assert largest(([0, 0], True)) == (0.0, 0.0)
    assert largest(*[([1] * 50, False)] * 2, discount=0.99)[0] == pytest.approx(100)  # shorter than the horizon of 100
    episodes = ([1] * 30, False), ([1] * 40, False), ([1] * 7, True), ([1] * 20, False)
    assert largest(*episodes)[1] == (40 + 7) / 2
    assert largest(*episodes[2:], is_cut=True)[1] == 20  # of the 7 the beginning is missing
    assert largest(*episodes[2:3], is_cut=True)[1] == 7  # nothing is whole: whatever there is
    assert largest(([1] * 3, True), ([1] * 7, False))[1] == 3  # the 7 may have been going on
    lengths = (10, 20, 30, 25, 12)  # of a data set whose episodes all ended by themselves
    assert largest(*[([1] * n, False) for n in lengths], discount=0.99, all_whole=True) == (
        pytest.approx(100), pytest.approx(19.4)
    )  # fmt: skip


def test_an_episode_that_terminated_needs_no_final_observation(tmp_path):
    """Whoever writes data without it: the next episode is not part of this one."""
    records = np.zeros(40, brc.record_type(2, 1))
    records["reward"], records["valid"] = 1, True
    records["terminated"][[9, 19, 29, 38]] = True
    assert brc.returns_of(records, 0.5, False) == (pytest.approx(2, abs=2e-3), 39 / 4)


def test_returns_of_random_data_against_a_loop(tmp_path):
    rng, discount = np.random.default_rng(3), 0.9
    episodes, totals, best = random_episodes(rng, 50, length=40), [], 0.0
    longest = max(len(episode["rewards"]) for episode in episodes)
    for episode in episodes:
        rewards = np.float32(episode["rewards"]).astype(float)
        value = 0.0 if episode["terminated"] or len(rewards) < 10 else rewards.mean() / (1 - discount)
        for reward in rewards[::-1]:
            value = reward + discount * value
            best = max(best, abs(value), abs(reward))
        if episode["terminated"] or len(rewards) == longest:
            totals.append(rewards.sum())
    assert len(rewards) < longest, "the last may have been going on"
    found = brc.returns_of(np.load(write(tmp_path, "gym/A", episodes)), discount, False)
    assert found == pytest.approx((best, np.mean(totals)))


def test_replay_of_an_online_run_is_a_data_set(tmp_path, monkeypatch):
    """--save-replay of brc_sac_continuous.py, straight in: tasks by args.json, every valid transition."""
    arguments = [*SMALL, "--learning-starts", 10**6, "--total-timesteps", 100, "--eval-every", 100, "--save-replay"]
    arguments += ["--env-ids", *POINTS, "--run-root", tmp_path, "--run-name", "online"]
    online.main(online.parse_args([str(argument) for argument in arguments]))
    args = brc.Args(dataset=(str(tmp_path / "online" / "replay"),))
    tasks = brc.dataset_tasks(args)
    assert tasks == POINTS
    paths = [tmp_path / "online" / "replay" / f"{brc.file_name(task)}.npy" for task in tasks]
    data = brc.Dataset(tasks, paths, Sizes((2, 2), (2, 2)), None, 0.99)
    assert [len(starts) for starts in data.starts] == [97, 97]  # 25 steps, one that resets, ...
    batch = data.sample(np.random.default_rng(0), 500)
    step = batch.next_observations - np.clip(batch.observations + 0.25 * batch.actions, -1, 1)
    assert np.abs(step).max() < 1e-6, "the next observation is not where the action led"
    assert brc.dataset_tasks(brc.Args(dataset=args.dataset, env_ids=(POINTS[1],))) == [POINTS[1]]
    written = [np.load(path) for path in paths]
    shutil.rmtree(paths[0].parent)  # or the run was made without: a finished one still writes it
    curve = (tmp_path / "online" / "eval.csv").read_bytes()
    online.main(online.parse_args(["--resume", str(tmp_path / "online"), "--save-replay"]))
    for path, before in zip(paths, written, strict=True):
        assert (np.load(path)[: len(before)] == before).all() and not np.load(path)["valid"][len(before) :].any()
    assert (tmp_path / "online" / "eval.csv").read_bytes() == curve


DAMAGE = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-40]), "damaged"),
    "empty file": (lambda path: path.write_bytes(b""), "damaged"),
    "text": (lambda path: path.write_text("hello"), "damaged"),
    "pickled objects": (lambda path: np.save(path, np.array([{"a": 1}], object), allow_pickle=True), "damaged"),
    "a plain array": (lambda path: np.save(path, np.zeros((5, 3))), "not a data set"),
    "npz": (lambda path: [np.savez(path.with_suffix(".npz"), a=1), path.with_suffix(".npz").replace(path)], "damaged"),
    "header": (lambda path: path.write_bytes(path.read_bytes().replace(b"{'descr'", b"{'de(cr'", 1)), "damaged"),
    "no transition": (lambda path: np.save(path, np.zeros(9, brc.record_type(2, 2))), "no transition"),
    "no record": (lambda path: np.save(path, np.zeros(0, brc.record_type(2, 2))), "no transition"),
    "other sizes": (lambda path: write(path.parent, "gym/A", random_episodes(np.random.default_rng(0), 3, 5, 1), 5, 1),
                    "does not fit"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_data(name, tmp_path):
    path = write(tmp_path, "gym/A", random_episodes(np.random.default_rng(0), 3))
    damage, words = DAMAGE[name]
    damage(path)
    with pytest.raises(brc.UserError, match=words) as error:
        brc.Dataset(["gym/A"], [path], Sizes((2, 2)), None, 0.99)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("observation", np.nan, "not finite"), ("action", np.inf, "not finite"), ("reward", np.nan, "not finite"),
     ("action", 1.5, "in \\[-1, 1\\]")],
)  # fmt: skip
def test_bad_values_in_data(name, value, words, tmp_path):
    path = write(tmp_path, "gym/A", random_episodes(np.random.default_rng(0), 9))
    records = np.load(path)
    records[name][np.flatnonzero(records["valid"])[-2]] = value
    np.save(path, records)
    with pytest.raises(brc.UserError, match=words):
        brc.Dataset(["gym/A"], [path], Sizes((2, 2)), None, 0.99)


def test_actions_beyond_the_bounds_are_clipped_when_asked(tmp_path):
    path = write(tmp_path, "gym/A", random_episodes(np.random.default_rng(0), 9))
    records = np.load(path)
    records["action"][np.flatnonzero(records["valid"])] *= 3
    np.save(path, records)
    with pytest.raises(brc.UserError, match="--clip-actions"):
        brc.Dataset(["gym/A"], [path], Sizes((2, 2)), None, 0.99)
    data = brc.Dataset(["gym/A"], [path], Sizes((2, 2)), None, 0.99, clip_actions=True)
    batch = data.sample(np.random.default_rng(0), 500)
    expected = {tuple(np.clip(action, -1, 1)) for action in records["action"][records["valid"]]}
    assert {tuple(action) for action in batch.actions} == expected and np.abs(batch.actions).max() == 1


@pytest.mark.parametrize(
    ("about", "words"),
    [({"action_repeat": 0}, "action_repeat"), ({"action_repeat": "2"}, "action_repeat"),
     ({"pieces_per_episode": {POINTS[0]: 2.5}}, "pieces_per_episode"), ({"pieces_per_episode": 5}, "damaged"),
     ([], "damaged")],
)  # fmt: skip
def test_a_converters_description_that_makes_no_sense(about, words, tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps(about))
    write(tmp_path, POINTS[0], random_episodes(np.random.default_rng(0), 3))
    with pytest.raises(brc.UserError, match=words):
        brc.how_collected(brc.Args(dataset=(str(tmp_path),)), POINTS[:1])


def test_evaluation_repeats_actions_as_the_data_did(mixed_data, tmp_path, monkeypatch, capsys):
    """With dataset.json's action_repeat, and --play of that run without the data; a return is of whole episodes."""
    data, held = tmp_path / "data", []
    shutil.copytree(mixed_data, data)
    about = json.loads((data / "dataset.json").read_text())
    about |= {"action_repeat": 3, "pieces_per_episode": {POINTS[0]: 5}}
    (data / "dataset.json").write_text(json.dumps(about))
    evaluate = brc.evaluate
    monkeypatch.setattr(
        brc, "evaluate", lambda act, envs, *rest: held.append(envs.action_repeat) or evaluate(act, envs, *rest)
    )
    train("--dataset", data, *SMALL, "--total-updates", 10, "--run-root", tmp_path, "--run-name", "run")
    information = json.loads((tmp_path / "run" / "args.json").read_text())
    pieces = [brc.returns_of(np.load(data / f"{brc.file_name(task)}.npy"), 0.99, False)[1] for task in POINTS]
    assert list(information["data_mean_return"].values()) == [5 * pieces[0], pieces[1]]
    assert "episodes in 5 pieces" in capsys.readouterr().out
    shutil.rmtree(data)
    train("--play", tmp_path / "run")
    assert held == [3] * len(held) and len(held) == 3


def test_user_errors(tmp_path, monkeypatch, capfd):
    write(tmp_path / "data", POINTS[0], random_episodes(np.random.default_rng(0), 3))
    data = tmp_path / "data"
    for arguments, words in (
        ([], "--dataset"),
        (["--dataset", data], "--env-ids"),  # nothing says which tasks these are
        (["--dataset", data, "--env-ids", "dmc/walker-wlak"], "dmc/walker-wlak"),
        (["--dataset", data, "--env-ids", POINTS[1]], "has no data of"),
        (["--dataset", tmp_path / "nowhere"], "--env-ids"),
        (["--dataset", data, data, "--env-ids", *POINTS], "is enough, and beside them the action_repeat"),
        (
            ["--dataset", tmp_path / "nowhere", "--env-ids", POINTS[0]],
            f"--dataset {tmp_path}/nowhere: no folder with .npy",
        ),
        (["--dataset", data, "--bc-coef", "-1"], "--bc-coef"),
        (["--resume", tmp_path / "nowhere"], "no run of this script"),
    ):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments), "--run-root", str(tmp_path / "runs")])
        with pytest.raises(SystemExit) as status:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert status.value.code == 2 and len(lines) == 1 and words in lines[0], (arguments, lines)


@pytest.mark.parametrize("num_tasks", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_the_critics_update_is_the_online_scripts(num_tasks):
    """Critic, its optimizer and target critic after one update from the same parameters: every bit is the same."""
    sizes = {"critic_width": 16, "critic_depth": 1, "actor_width": 16, "batch_size": 16}
    ours = brc.make_agent(brc.Args(**sizes), num_tasks, 6, 2)
    theirs = online.make_agent(online.Args(**sizes, utd=1), num_tasks, 6, 2)
    rng = np.random.default_rng(0)
    observations, actions, next_observations = (rng.normal(size=(16, n)).astype(np.float32) for n in (6, 2, 6))
    rewards, terminated = rng.normal(size=16).astype(np.float32), rng.random(16) < 0.2
    batch = brc.Batch(
        observations, actions, rewards, terminated, next_observations, rng.integers(num_tasks, size=16, dtype=np.int32)
    )
    max_return = np.linspace(1, 3, num_tasks, dtype=np.float32)
    state, metrics = ours.update(ours.init(5), batch, max_return)
    other, others = theirs.update(theirs.init(5), online.Batch(*(leaf[None] for leaf in batch)), max_return)
    for name in ("critic", "critic_optimizer", "target_critic", "key"):
        assert_same(getattr(state, name), getattr(other, name))
    for name in ("losses/critic", "gradient_norms/critic", "q/target_mean", "rewards/normalized_mean"):
        assert float(metrics[name]) == float(others[name]), name


# ----------------------------------------------------------------------------------------------- the actor's loss


def test_log_density_is_that_of_the_tanh_gaussian():
    """It integrates to 1 over (-1, 1), and agrees with what sample_action says of its own samples."""
    mean, log_std = jnp.array([[0.3]]), jnp.array([[-0.4]])
    density = lambda a: math.exp(brc.action_log_density(mean, log_std, jnp.ones((1, 1)), jnp.array([[a]]))[0])  # noqa: E731
    assert quad(density, -0.998, 0.998, epsabs=1e-4)[0] == pytest.approx(1, abs=5e-3)
    mean, log_std = jnp.linspace(-1, 1, 12).reshape(4, 3), jnp.linspace(-2, 0, 12).reshape(4, 3)
    mask = jnp.array([[1.0, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
    actions, log_probs = brc.sample_action(jax.random.PRNGKey(0), mean, log_std, mask)
    np.testing.assert_allclose(brc.action_log_density(mean, log_std, mask, actions), log_probs, rtol=1e-4)


def test_log_density_of_saturated_actions_is_finite():
    value = brc.action_log_density(jnp.zeros((1, 2)), jnp.zeros((1, 2)), jnp.ones((1, 2)), jnp.array([[1.0, -1.0]]))
    assert np.isfinite(value).all()


def one_update(action_dims=(2, 1), **changes):
    """Metrics and states of one update of a small two-task agent, with the batch that it learned from."""
    args = brc.Args(critic_width=16, critic_depth=1, actor_width=16, batch_size=8, **changes)
    agent = brc.make_agent(args, 2, 3, 2, list(action_dims))
    rng, task_ids = np.random.default_rng(0), np.array([0, 0, 0, 0, 1, 1, 1, 1], np.int32)
    actions = rng.uniform(-0.9, 0.9, (8, 2)).astype(np.float32) * (task_ids[:, None] < np.array([2, 1]))
    floats = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    batch = brc.Batch(floats(8, 3), actions, floats(8), np.zeros(8, np.float32), floats(8, 3), task_ids)
    before = agent.init(0)
    state = jax.tree.map(jnp.copy, before)
    after, metrics = agent.update(state, batch, np.array([5.0, 2.0], np.float32))
    return args, agent, batch, before, after, {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize("bc_loss", ["nll", "mse"])
def test_cloning_loss_against_float64(bc_loss):
    """Per dimension that the task has, so that a task of one action dimension counts as much as one of two."""
    args, _, batch, before, after, metrics = one_update(bc_loss=bc_loss)
    # The critic, and with it the embedding, is updated before the actor.
    embedding = np.asarray(after.critic["embedding"]["params"]["embedding"], np.float64)
    embedding /= np.abs(embedding).sum(axis=1, keepdims=True)
    inputs = np.concatenate([batch.observations, embedding[batch.task_ids]], axis=1).astype(np.float32)
    actor = brc.Actor(args.actor_width, args.actor_depth, 2, 1)
    mean, log_std = (np.asarray(x, np.float64) for x in actor.apply(before.actor, inputs, batch.task_ids))
    terms = []
    for row, dims in enumerate(np.array([2, 1])[batch.task_ids]):
        per_dimension = []
        for d in range(dims):
            a, m, s = float(batch.actions[row, d]), mean[row, d], max(math.exp(log_std[row, d]), math.exp(-2))
            if bc_loss == "nll":
                log_density = -0.5 * ((math.atanh(a) - m) / s) ** 2 - math.log(s) - 0.5 * math.log(2 * math.pi)
                per_dimension.append(math.log(1 - a**2) - log_density)
            else:
                per_dimension.append((math.tanh(m) - a) ** 2)
        terms.append(np.mean(per_dimension))
    assert metrics["losses/cloning"] == pytest.approx(np.mean(terms), rel=1e-3)
    assert metrics["losses/actor"] == pytest.approx(
        metrics["losses/improvement"] + args.bc_coef * np.mean(terms), rel=1e-3
    )


def test_improvement_is_divided_by_mean_absolute_q():
    """alpha log pi - Q over |Q|: at temperature ~ 0 and Q of one sign it is -1 or 1 whatever Q's scale."""
    *_, metrics = one_update(initial_temperature=1e-9)
    assert abs(metrics["losses/improvement"]) <= 1 + 1e-5
    assert metrics["losses/improvement"] * metrics["q/policy"] <= 0


def test_bc_only_ignores_the_critic_and_coefficient_0_the_data():
    *_, after, metrics = one_update(bc_only=True)
    assert metrics["losses/actor"] == metrics["losses/cloning"]
    *_, metrics = one_update(bc_coef=0.0)
    assert metrics["losses/actor"] == metrics["losses/improvement"]


def test_bc_only_has_no_temperature_that_could_run_away():
    """Nothing makes the policy's entropy reach its target there: targets and scales are those without entropy."""
    args, agent, batch, _, state, metrics = one_update(bc_only=True)
    for _ in range(3):
        state, metrics = agent.update(state, batch, np.array([5.0, 2.0], np.float32))
    assert metrics["policy/temperature"] == 0 and metrics["losses/temperature"] == 0
    assert np.isfinite([float(value) for value in metrics.values()]).all()
    scale = args.v_max / np.array([5.0, 2.0])[batch.task_ids]
    assert metrics["rewards/normalized_mean"] == pytest.approx((batch.rewards * scale).mean(), rel=1e-4)


def test_cloning_by_likelihood_keeps_targets_where_rewards_put_them(tmp_path):
    """Actions at their bounds make its policy far sharper than the entropy target, whatever the temperature, which then
    rose from update to update: targets were at -5.7 in the mean after 1,000 and on their way to V_min. Rewards are
    noise around zero here, and so are values."""
    episodes = random_episodes(np.random.default_rng(0), 200)
    for episode in episodes:
        episode["actions"] = np.sign(episode["observations"][:-1])
    path = write(tmp_path, "gym/A", episodes)
    data = brc.Dataset(["gym/A"], [path], Sizes((2, 2)), None, 0.99)
    size = {"critic_width": 32, "critic_depth": 1, "actor_width": 32, "batch_size": 64}
    agent = brc.make_agent(brc.Args(**size, bc_loss="nll", bc_coef=1.0), 1, 2, 2)
    state, rng = agent.init(0), np.random.default_rng(0)
    for _ in range(1000):
        state, metrics = agent.update(state, data.sample(rng, 64), data.max_return)
    assert metrics["policy/temperature"] == 0 and metrics["policy/entropy"] < -5
    assert -2 < metrics["q/target_min"] and abs(metrics["q/target_mean"]) < 0.5


def test_average_actor_against_a_loop():
    """The plain mean of all actors until there are 1 / rate of them, a moving average after that."""
    _, agent, batch, _, state, _ = one_update(actor_average_rate=0.25)
    actors = [state.actor]
    for _ in range(6):
        state, _ = agent.update(jax.tree.map(jnp.copy, state), batch, np.array([5.0, 2.0], np.float32))
        actors.append(state.actor)
    average = jax.tree.map(lambda *leaves: np.mean(np.float64(leaves), axis=0), *actors[:4])
    for actor in actors[4:]:
        average = jax.tree.map(lambda mean, leaf: 0.75 * mean + 0.25 * np.float64(leaf), average, actor)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), average, state.average_actor)


def test_critic_learns_like_the_online_one():
    """The same batch, the same seed: one update of brc_sac_continuous.py gives the same critic and target."""
    args, _, batch, before, after, metrics = one_update()
    same = {name: getattr(args, name) for name in ("critic_width", "critic_depth", "actor_width", "batch_size")}
    agent = online.make_agent(online.Args(**same, utd=1), 2, 3, 2, [2, 1])
    state = agent.init(0)
    jax.tree.map(np.testing.assert_array_equal, (before.actor, before.critic), (state.actor, state.critic))
    state, other = agent.update(state, jax.tree.map(lambda x: x[None], batch), np.array([5.0, 2.0], np.float32))
    for name in ("losses/critic", "q/target_mean", "rewards/normalized_mean"):
        assert metrics[name] == pytest.approx(float(other[name]), rel=1e-5)
    mine, theirs = (after.critic, after.target_critic), (state.critic, state.target_critic)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), mine, theirs)


# -------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def mixed_data(tmp_path_factory) -> Path:
    """Of two opposite point tasks, half straight to the goal and half at random."""
    folder = tmp_path_factory.mktemp("mixed") / "data"
    for seed, task in enumerate(POINTS):
        write(folder, task, [e for skill in (0.0, 0.6) for e in point_episodes(task, 60, skill, seed)])
    (folder / "dataset.json").write_text(json.dumps({"env_info": {"task_names": POINTS}}))
    return folder


def curve(run_dir: Path) -> dict[tuple[int, str], float]:
    rows = [line.split(",") for line in (run_dir / "eval.csv").read_text().splitlines()[1:]]
    return {(int(row[0]), row[3]): float(row[5]) for row in rows}


def test_learns_more_than_the_data_show(mixed_data, tmp_path, learn):
    arguments = """--critic-width 64 --critic-depth 1 --actor-width 64 --batch-size 64 --discount 0.95 --bc-loss mse
        --bc-coef 1 --total-updates 4000 --eval-every 4000""".split()
    learn("--dataset", mixed_data, *arguments, "--run-root", tmp_path, "--run-name", "run")
    information = json.loads((tmp_path / "run" / "args.json").read_text())
    returns = curve(tmp_path / "run")
    for task, mean in information["data_mean_return"].items():
        assert returns[4000, task] > 1.3 * mean, "no better than the data"
        assert returns[0, task] < mean, "solved before learning"


def test_resume_continues_exactly(mixed_data, tmp_path):
    """30 updates and 30 after a resume are 60 updates, bit for bit: parameters, optimizers, batches. Also where only
    the data were moved and not what describes them."""
    common = ["--dataset", mixed_data, *SMALL, "--eval-every", 30, "--run-root", tmp_path]
    train(*common, "--total-updates", 60, "--run-name", "whole")
    train(*common, "--total-updates", 30, "--run-name", "parts")
    moved = shutil.copytree(mixed_data, tmp_path / "moved")
    (moved / "dataset.json").unlink()
    train("--resume", tmp_path / "parts", "--dataset", moved, "--total-updates", 60)
    args = brc.parse_args(["--resume", str(tmp_path / "parts")])
    blank = brc.make_agent(args, 2, 2, 2, [2, 2]).init(0)
    states = [brc.load_checkpoint(tmp_path / name, blank)[0] for name in ("whole", "parts")]
    for whole, parts in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(whole, parts)
    assert [step for step, _ in curve(tmp_path / "parts")] == [0, 0, 30, 30, 60, 60]


def test_play_needs_no_data(mixed_data, tmp_path, capsys):
    folder = shutil.copytree(mixed_data, tmp_path / "data")
    train("--dataset", folder, *SMALL, "--total-updates", 20, "--run-root", tmp_path, "--run-name", "run")
    shutil.rmtree(folder)
    (policy,), rows = played(brc, tmp_path / "run", "--eval-episodes", 2)
    assert [(row["task"], row["episodes"]) for row in rows] == [(task, 2) for task in POINTS]
    printed = capsys.readouterr().out
    assert re.search(rf"^{POINTS[1]} +{rows[1]['return']:.1f} ", printed, re.MULTILINE)
    agent = brc.make_agent(brc.parse_args(["--resume", str(tmp_path / "run")]), 2, 2, 2, [2, 2])
    state, _ = brc.load_checkpoint(tmp_path / "run", agent.init(0))
    observations, task_ids = np.random.default_rng(0).normal(size=(2, 2)).astype(np.float32), np.arange(2)
    expected = agent.act_deterministic(state.average_actor, state.critic, observations, task_ids)
    np.testing.assert_array_equal(policy(observations, task_ids), expected)


@pytest.mark.parametrize("change", ["rewards", "length", "tasks"])
def test_resume_with_other_data_is_refused(change, tmp_path):
    """Rewards times 50 went on without a word; another task blamed the checkpoints."""
    task = "gym/Pendulum-v1"
    (tmp_path / "args.json").write_text(json.dumps({"data_transitions": {task: 30}, "data_mean_return": {task: 1.5}}))
    same = {"data_transitions": {task: 30}, "data_mean_return": {task: 1.5 + 1e-9}}
    brc.check_same_data(tmp_path, **same)
    other = {
        "rewards": {"data_transitions": {task: 30}, "data_mean_return": {task: 75.0}},
        "length": {"data_transitions": {task: 31}, "data_mean_return": {task: 1.5}},
        "tasks": {"data_transitions": {"gym/A": 30}, "data_mean_return": {"gym/A": 1.5}},
    }[change]
    with pytest.raises(brc.UserError, match="not the data that this run learns from"):
        brc.check_same_data(tmp_path, **other)


def test_resume_with_data_of_other_tasks_says_so(mixed_data, tmp_path):
    """And not that the checkpoints are damaged, into which other tasks do not fit."""
    train("--dataset", mixed_data, *SMALL, "--total-updates", 5, "--run-root", tmp_path, "--run-name", "run")
    write(tmp_path / "other", POINTS[0], random_episodes(np.random.default_rng(0), 9))
    (tmp_path / "other" / "dataset.json").write_text(json.dumps({"env_info": {"task_names": POINTS[:1]}}))
    with pytest.raises(brc.UserError, match=f"other has no data of {POINTS[1]}; it has: "):
        train("--resume", tmp_path / "run", "--dataset", tmp_path / "other", "--total-updates", 9)


def test_a_resumed_run_knows_how_its_data_were_collected(tmp_path):
    """Its tasks in the order of its embeddings, and action_repeat: those of its args.json, whatever lies beside the
    data where they were moved to."""
    run_dir, moved = tmp_path / "run", tmp_path / "moved"
    for task in POINTS:
        write(moved, task, random_episodes(np.random.default_rng(0), 3))
    run_dir.mkdir()
    pieces = {POINTS[0]: 5, POINTS[1]: 1}
    about = {"env_info": {"task_names": POINTS}, "action_repeat": 3, "pieces_per_episode": pieces}
    (run_dir / "args.json").write_text(json.dumps(about))
    args = brc.Args(dataset=(str(moved),), resume=str(run_dir))
    assert brc.dataset_tasks(args) == POINTS and brc.how_collected(args, POINTS) == (3, pieces)
    (moved / "dataset.json").write_text(json.dumps({"env_info": {"task_names": POINTS[::-1]}, "action_repeat": 2}))
    assert brc.dataset_tasks(args) == POINTS and brc.how_collected(args, POINTS) == (3, pieces)
    (run_dir / "args.json").write_text(json.dumps({"env_info": {"task_names": POINTS}}))  # an older run
    assert brc.how_collected(args, POINTS) == (2, dict.fromkeys(POINTS, 1))


@pytest.mark.parametrize("resumed", [False, True])
def test_refused_conversions_are_removed(resumed, tmp_path, monkeypatch):
    """Each try has another run directory. A resumed run's data stay."""
    data = random_episodes(np.random.default_rng(0), 3)
    data[0]["actions"] *= 9
    monkeypatch.setattr(brc, "convert_minari", lambda name, task, path: write(path.parent, task, data))
    (tmp_path / "args.json").write_text(json.dumps({"dataset": ["some/data-v0"]}))
    args = brc.Args(dataset=("some/data-v0",), env_ids=("gym/A",), resume=str(tmp_path) if resumed else None)
    with pytest.raises(brc.UserError, match="--clip-actions"):
        brc.load_data(args, ["gym/A"], tmp_path, Sizes((2, 2)))
    assert (tmp_path / "data").exists() == resumed


def test_joined_takes_tuples_inside_dicts_part_by_part():
    """Also where there are as many parts as times."""
    unit = gym.spaces.Box(-1, 1, (1,))
    space = gym.spaces.Dict({"b": gym.spaces.Tuple((unit, gym.spaces.Discrete(3))), "a": unit})
    for times in (1, 2, 5):
        first, second, third = np.arange(times) / 10, np.arange(times) % 3, -np.arange(times) / 10
        recorded = {"b": (first[:, None], second), "a": third[:, None]}
        expected = np.column_stack([third, first, np.eye(3)[second]])  # a Dict space sorts its keys
        np.testing.assert_allclose(brc.joined(recorded, space), expected)


def test_minari_round_trip(tmp_path, monkeypatch):
    """Made with Minari from real Pendulum steps, read by the script: the same transitions, actions in [-1, 1]."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    import h5py
    import minari
    from minari.serialization import serialize_space

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = minari.DataCollector(gym.make("Pendulum-v1"))
        env.action_space.seed(0)
        steps = []
        for seed in range(3):
            observation, _ = env.reset(seed=seed)
            done = False
            while not done:
                action = env.action_space.sample()
                following, reward, terminated, truncated, _ = env.step(action)
                steps.append((*observation, *(action / 2), reward, *following))
                observation, done = following, terminated or truncated
        env.create_dataset(dataset_id="pendulum/random-v0", num_episodes_average_score=1)
        env.close()
    train("--dataset", "pendulum/random-v0", "--env-ids", "gym/Pendulum-v1", *SMALL, "--total-updates", 20,
          "--eval-every", 20, "--run-root", tmp_path, "--run-name", "run")  # fmt: skip
    data = brc.Dataset(["gym/Pendulum-v1"], [tmp_path / "run/data/gym-Pendulum-v1.npy"], Sizes((3, 1)), None, 0.99)
    batch = data.sample(np.random.default_rng(0), 5000)
    found = np.column_stack([batch.observations, batch.actions, batch.rewards, batch.next_observations])
    expected = np.array(steps, np.float32)
    assert len(data.starts[0]) == len(expected) == 600
    unique = np.unique(found.round(5), axis=0)
    np.testing.assert_allclose(unique, np.unique(expected.round(5), axis=0), atol=2e-5)
    assert not batch.terminated.any()
    with pytest.raises(brc.UserError, match="leave --dataset out"):  # or it would say that it learned from the other
        train("--resume", tmp_path / "run", "--dataset", "pendulum/other-v0", "--total-updates", 30)

    def refused(words: str) -> None:
        with pytest.raises(brc.UserError, match=words):
            brc.convert_minari("pendulum/random-v0", "gym/Pendulum-v1", tmp_path / "converted" / "pendulum.npy")
        assert not list((tmp_path / "converted").glob("*")), "what was begun is left"

    (tmp_path / "converted").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(brc.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        refused("No space left on device")
    with monkeypatch.context() as patch:  # filled since, or a quota

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(brc.os, "posix_fallocate", full)
        refused("No space left on device")
    with pytest.raises(brc.UserError, match="one vector, the environment's are .*'desired_goal', 'observation'"):
        brc.convert_minari("pendulum/random-v0", "gym/gym_tasks:Goal-v0", tmp_path / "converted" / "goal.npy")
    with h5py.File(tmp_path / "minari/pendulum/random-v0/data/main_data.hdf5", "r+") as file:
        del file["episode_1/rewards"]
        file["episode_1/rewards"] = [0.0]
    refused(r"episode 1 has \[200, 200, 1, 200\] steps")
    path = tmp_path / "minari/pendulum/random-v0/data/metadata.json"
    metadata = json.loads(path.read_text())
    box = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    path.write_text(json.dumps({**metadata, "action_space": serialize_space(box)}))
    refused("no bounded Box")
    spec = json.loads(metadata["env_spec"]) | {"id": "Any-v0", "entry_point": "os:mkdir", "max_episode_steps": None}
    spec["kwargs"] = {"path": str(tmp_path / "executed")}
    del metadata["action_space"]
    path.write_text(json.dumps({**metadata, "env_spec": json.dumps(spec)}))
    refused("lacks the spaces")
    assert not (tmp_path / "executed").exists()


def test_convert_tdmpc2(tmp_path):
    """A file in the layout of TD-MPC2's mt80 chunks: NaN in the first action and reward, zero padding, task numbers."""
    torch = pytest.importorskip("torch", reason="pip install torch tensordict")
    tensordict = pytest.importorskip("tensordict", reason="pip install torch tensordict")
    torch.manual_seed(0)
    numbers, length = [0, 30, 14, 30], 101  # walker-stand, assembly, finger-turn-easy, assembly
    obs, action, reward = torch.zeros(4, length, 39), torch.zeros(4, length, 6), torch.randn(4, length)
    sizes = [(24, 6), (39, 4), (12, 2), (39, 4)]
    for episode, (s, a) in enumerate(sizes):
        obs[episode, :, :s], action[episode, :, :a] = torch.randn(length, s), torch.rand(length, a) * 2 - 1
    action[:, 0], reward[:, 0] = torch.nan, torch.nan
    action[2, 0], reward[2, 0] = 0.5, 0.25  # a later piece of an episode of DMC, which mt80 cuts into five
    task = torch.tensor(numbers)[:, None].expand(4, length)
    chunk = {"obs": obs, "action": action, "reward": reward, "task": task}
    torch.save(tensordict.TensorDict(chunk, batch_size=[4, length]), tmp_path / "chunk_0.pt")
    script = SCRIPT.parent / "benchmark" / "convert_tdmpc2.py"
    command = [sys.executable, script, "--chunks", tmp_path / "chunk_0.pt", "--out", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    tasks = brc.dataset_tasks(brc.Args(dataset=(str(tmp_path / "out"),)))
    assert tasks == ["dmc/walker-stand", "dmc/finger-turn-easy", "metaworld/assembly"]
    paths = [tmp_path / "out" / f"{brc.file_name(name)}.npy" for name in tasks]
    data = brc.Dataset(tasks, paths, Sizes((24, 6), (12, 2), (39, 4)), None, 0.99)
    assert [len(starts) for starts in data.starts] == [100, 100, 200]
    for records, episode in zip(data.records, (0, 2, 1), strict=True):
        s, a = sizes[episode]
        for t in (0, 57, 99):  # what step t + 1 says led to it
            np.testing.assert_array_equal(records[t]["observation"], obs[episode, t, :s])
            np.testing.assert_array_equal(records[t]["action"], action[episode, t + 1, :a])
            assert records[t]["reward"] == reward[episode, t + 1] and records[t]["valid"]
        np.testing.assert_array_equal(records[100]["observation"], obs[episode, 100, :s])
        assert not records[100]["valid"]
    assert brc.how_collected(brc.Args(dataset=(str(tmp_path / "out"),)), tasks) == (
        2, {"dmc/walker-stand": 5, "dmc/finger-turn-easy": 5, "metaworld/assembly": 1},
    )  # fmt: skip
    narrow = {**chunk, "obs": obs[[0, 2], :, :24], "action": action[[0, 2]], "reward": reward[[0, 2]],
              "task": task[[0, 2]]}  # fmt: skip
    torch.save(tensordict.TensorDict(narrow, batch_size=[2, length]), tmp_path / "mt30.pt")  # |S| = 24 at most there
    mt30 = [sys.executable, script, "--chunks", tmp_path / "mt30.pt", "--out", tmp_path / "out30", "--tasks", "mt30"]
    result = subprocess.run(mt30, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    result = subprocess.run([*mt30[:-1], "mt80", "--out", tmp_path / "x"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    wide = {**narrow, "task": torch.full((2, length), 30)}  # assembly has 39
    torch.save(tensordict.TensorDict(wide, batch_size=[2, length]), tmp_path / "wide.pt")
    result = subprocess.run(
        [*command[:3], tmp_path / "wide.pt", "--out", tmp_path / "y"], capture_output=True, text=True
    )
    assert result.returncode == 2 and "too narrow for metaworld/assembly" in result.stderr
    short = {name: value[:, :51] for name, value in chunk.items()}
    torch.save(tensordict.TensorDict(short, batch_size=[4, 51]), tmp_path / "short.pt")
    both = [*command[:3], tmp_path / "chunk_0.pt", tmp_path / "short.pt", "--out", tmp_path / "z"]
    result = subprocess.run(both, capture_output=True, text=True)
    assert result.returncode == 2 and "episodes of 51 and 101 records" in result.stderr
    (tmp_path / "chunk_1.pt").write_bytes((tmp_path / "chunk_0.pt").read_bytes()[:-2000])
    command[3] = tmp_path / "chunk_1.pt"
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "is not a chunk" in result.stderr and "Traceback" not in result.stderr
    command[3], command[5] = tmp_path / "chunk_0.pt", tmp_path / "chunk_0.pt" / "below a file"
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "cannot write" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts anonymous memory on Linux only")
def test_data_four_times_the_memory_limit(tmp_path):
    """A sparse file of 16 GB under a limit of 4 GB for everything that is not a mapped file."""
    limit, dtype = 4 * 2**30, brc.record_type(2000, 1)
    path = tmp_path / "data" / "gym-Wide.npy"
    path.parent.mkdir()
    records = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(4 * limit // dtype.itemsize,))
    records["valid"][::50] = True
    records["reward"][::50] = 1.0
    records.flush()
    del records
    assert path.stat().st_size > 3.99 * limit
    code = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, ({limit}, {limit}))
sys.path[:0] = [{str(SCRIPT.parent)!r}, {str(Path(__file__).parent)!r}]
import gymnasium as gym, brc_offline_bc as brc
brc.main(brc.parse_args("--dataset {path.parent} --env-ids gym/gym_tasks:Wide-v0 --critic-width 32 --batch-size 64 "
    "--total-updates 50 --eval-every 50 --eval-episodes 1 --run-root {tmp_path} --run-name run".split()))
"""
    path.rename(path.with_name("gym-gym_tasks-Wide-v0.npy"))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert result.returncode == 0, result.stderr
    assert len((tmp_path / "run" / "eval.csv").read_text().splitlines()) == 3
