"""brc_embedding_transfer.py: what each protocol starts from and may change, and a family where embeddings are all."""

import csv
import json
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_files import assert_same, curve, error_line, played, started, wait_for_checkpoint

import brc_embedding_transfer as brc
import brc_sac_continuous as online

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gym_tasks  # noqa: F401 (registers the environments)

SCRIPT = Path(brc.__file__)
COUNTERS = ["gym/gym_tasks:Truncates3-v0", "gym/gym_tasks:Terminates5-v0"]  # 6 observations and 2 actions; 3 and 1
SMALLER, LARGER = "gym/gym_tasks:Truncates20-v0", "gym/gym_tasks:Wide-v0"
GOALS = [f"gym/gym_tasks:PointAt{degrees}-v0" for degrees in range(0, 360, 45)]
NEW_GOALS = [f"gym/gym_tasks:PointAt{degrees}-v0" for degrees in range(22, 360, 90)]
SMALL = "--critic-width 16 --critic-depth 1 --actor-width 16 --batch-size 16 --eval-episodes 1 --learning-starts 20"
LEARN = "--batch-size 16 --eval-episodes 1 --learning-starts 20 --total-timesteps 40 --eval-every 20".split()


@pytest.fixture(autouse=True)
def worker_path(monkeypatch, own_signal_handlers):
    """Worker processes find gym_tasks."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parent))


def pretrain(run_root: Path, name: str, *arguments) -> Path:
    argv = [*map(str, arguments), "--run-root", str(run_root), "--run-name", name]
    online.main(online.parse_args(argv))
    return run_root / name


def transfer(run_root: Path, name: str, *arguments) -> Path:
    argv = [*map(str, arguments), "--run-root", str(run_root), "--run-name", name]
    brc.main(brc.parse_args(argv))
    return run_root / name


@pytest.fixture(scope="module")
def counters(tmp_path_factory) -> Path:
    """A pretrained run of two tasks of different sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).resolve().parent))
        root = tmp_path_factory.mktemp("counters")
        return pretrain(root, "many", "--env-ids", *COUNTERS, *SMALL.split(), "--total-timesteps", 60, "--seed", 3)


@pytest.fixture(scope="module")
def tuned(counters) -> Path:
    """A finished run of --protocol embedding on two new tasks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).resolve().parent))
        how = ["--protocol", "embedding", "--heatmap", "--adaptation-transitions", 20, "--embedding-updates", 2]
        tasks = ["--env-ids", SMALLER, COUNTERS[1], "--eval-episodes", 1]
        return transfer(counters.parent, "tuned", "--pretrained", counters, *tasks, *how)


@pytest.fixture(scope="module")
def points(tmp_path_factory) -> Path:
    """A pretrained run of eight goals on a circle, each of which it reaches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).resolve().parent))
        run_dir = pretrain(
            tmp_path_factory.mktemp("points"), "many", "--env-ids", *GOALS, "--critic-width", 64, "--critic-depth", 1,
            "--actor-width", 64, "--batch-size", 256, "--discount", 0.95, "--learning-starts", 300, "--eval-episodes",
            2, "--total-timesteps", 3000, "--eval-every", 3000,
        )  # fmt: skip
    last = [float(row["return"]) for row in curve(run_dir) if row["step"] == "3000"]
    assert min(last) > 15, "pretraining failed: whatever follows says nothing"
    return run_dir


def loaded(run_dir: Path, **arguments) -> brc.Pretrained:
    return load(brc.Args(pretrained=str(run_dir), **arguments))


def load(args: brc.Args) -> brc.Pretrained:
    return brc.load_pretrained(args, brc.read_arguments(args))


def agent_of(pretrained: brc.Pretrained, *action_dims: int, use_embedding: bool = True) -> brc.Agent:
    """As `learn` makes it: of the new task and, after it, prior ones, with these numbers of actions."""
    return brc.make_agent(pretrained.settings, len(action_dims), 6, 2, action_dims, use_embedding)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# -------------------------------------------------------------------------------------------------- the pretrained


def test_defaults_are_the_papers():
    args = brc.Args()
    table = {"batch_size": None, "utd": 2, "polyak_tau": 5e-3, "actor_lr": 3e-4, "critic_lr": 3e-4,
             "temperature_lr": 3e-4, "buffer_size": 1_000_000}  # fmt: skip
    assert {name: getattr(args, name) for name in table} == table
    assert args.adaptation_transitions == 300 and args.prior_fraction == 0.5 and args.total_timesteps == 500_000


def test_loads_what_pretraining_saved(counters):
    """Bit for bit what brc_sac_continuous.py itself resumes from, embeddings of norm 1, its G_i."""
    pretrained = loaded(counters)
    args = online.parse_args(["--resume", str(counters)])
    blank = online.make_agent(args, 2, 6, 2, [2, 1]).init(0)
    state, saved = online.load_checkpoint(counters, blank, online.Replay(2, 1060, 6, 2))
    assert_same(tuple(pretrained.state), tuple(state))
    np.testing.assert_allclose(np.abs(pretrained.embeddings).sum(axis=1), 1, rtol=1e-6)
    assert pretrained.max_return.tolist() == saved["max_return"] and pretrained.step == 60


def test_data_is_pretrainings_replay(counters):
    pretrained = loaded(counters, protocol="data")
    original = online.Replay(2, 1060, 6, 2)
    args = online.parse_args(["--resume", str(counters)])
    online.load_checkpoint(counters, online.make_agent(args, 2, 6, 2, [2, 1]).init(0), original)
    assert_same(pretrained.replay, original)
    assert original.slots["valid"].sum() == 45 + 50  # 60 steps: one in 4 resets, or one in 6


# ------------------------------------------------------------------------------------------------ model transfer


@pytest.mark.parametrize("init", ["mean", "random"])
@pytest.mark.parametrize("load_optimizer", [False, True])
def test_model_starts_with_the_pretrained_weights(counters, init, load_optimizer):
    pretrained = loaded(counters)
    args = brc.Args(pretrained=str(counters), load_optimizer=load_optimizer, discount=0.99)
    fresh = agent_of(pretrained, 1).init(7)
    embedding = pretrained.embeddings.mean(0) if init == "mean" else pretrained.embeddings[1]
    state, old = brc.start_from_pretrained(args, pretrained, fresh, embedding), pretrained.state
    for name in ("actor", "log_temperature"):
        assert_same(getattr(state, name), getattr(old, name))
    for name in ("critic", "target_critic"):
        assert_same(getattr(state, name)["ensemble"], getattr(old, name)["ensemble"])
        np.testing.assert_array_equal(getattr(state, name)["embedding"]["params"]["embedding"][0], embedding)
    expected = old if load_optimizer else fresh
    for name in ("actor_optimizer", "temperature_optimizer"):
        assert_same(getattr(state, name), getattr(expected, name))
    assert_same(state.critic_optimizer[0].mu["ensemble"], expected.critic_optimizer[0].mu["ensemble"])
    assert state.critic_optimizer[0].count == (2 * 40 if load_optimizer else 0)
    for name in ("mu", "nu"):  # of the embedding: the pretrained tasks' mean, or nothing yet
        moments = [getattr(s.critic_optimizer[0], name)["embedding"]["params"]["embedding"] for s in (state, old)]
        np.testing.assert_allclose(moments[0][0], moments[1].mean(0) if load_optimizer else 0, rtol=1e-5)


def test_pretrained_policy_acts_the_same_in_both_scripts(counters):
    """With a pretrained task's embedding, and that task: the actions and values of brc_sac_continuous.py."""
    pretrained = loaded(counters)
    observations = np.random.default_rng(0).normal(size=(1, 6)).astype(np.float32)
    for task, action_dim in enumerate((2, 1)):
        agent = agent_of(pretrained, action_dim)
        state, max_return = brc.candidates(pretrained)[task]
        other = online.make_agent(online.parse_args(["--resume", str(counters)]), 2, 6, 2, [2, 1])
        ours = agent.act_deterministic(state.actor, state.critic, observations, np.zeros(1, np.int32))
        theirs = other.act_deterministic(
            pretrained.state.actor, pretrained.state.critic, observations, np.array([task], np.int32)
        )
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
        value = other.value(pretrained.state, np.repeat(observations, 2, axis=0), pretrained.max_return)[task]
        np.testing.assert_allclose(agent.value(state, observations, max_return)[0], value, rtol=1e-4)


@pytest.mark.slow
def test_model_learns_from_the_new_task_alone(counters, tmp_path):
    run_dir = transfer(tmp_path, "run", "--pretrained", counters, "--env-ids", SMALLER, *LEARN)
    assert [row["step"] for row in curve(run_dir)] == ["0", "20", "40"]
    args = brc.parse_args(["--resume", str(run_dir)])
    pretrained = load(args)
    replay = brc.Replay(1, 1040, 6, 2)
    blank = agent_of(pretrained, 1).init(0)
    state, saved = brc.load_checkpoint(run_dir, blank, replay)
    assert saved["updates"] == 40 and replay.inserted == 40
    assert state.critic["embedding"]["params"]["embedding"].shape == (1, 32)
    moved = [not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state.actor),
             jax.tree.leaves(pretrained.state.actor), strict=True)]  # fmt: skip
    assert all(moved), "an actor weight did not learn"


def test_best_embedding_counts_its_transitions(counters, tmp_path, capsys):
    run_dir = transfer(
        tmp_path, "run", "--pretrained", counters, "--env-ids", SMALLER, *LEARN, "--learning-starts", 30,
        "--embedding-init", "best", "--adaptation-transitions", 30,
    )  # fmt: skip
    assert "best embedding after 30 transitions: gym/gym_tasks:" in capsys.readouterr().out
    assert [row["step"] for row in curve(run_dir)] == ["30", "40"]
    assert len(played(brc, run_dir, "--eval-episodes", 1)[1]) == 1


def test_exploring_embeddings_normalizes_by_whole_returns(counters):
    """Not by the largest reward alone: SMALLER pays t + 10 e at step t of episode e, each of 20 steps."""
    args = brc.parse_args(["--pretrained", str(counters), "--protocol", "embedding", "--env-ids", SMALLER])
    pretrained, normalizer = load(args), brc.ReturnNormalizer(1, 0.99)
    envs = brc.target_envs(args, SMALLER, pretrained.info, 1, 0, brc.EnvWorkers(1))
    replay, run = brc.Replay(1, 400, 6, 2), SimpleNamespace(advance=lambda updates: None, stop=[])
    brc.explore_embeddings(args, agent_of(pretrained, 1), pretrained, envs, replay, run, normalizer)
    envs.close()
    slots = replay.slots[0, : replay.inserted]
    assert normalizer.max_return[0] > 5 * slots["reward"].max()


def test_gbar_grows_with_the_horizon(counters):
    """Of old tasks, whose returns are not computed again."""
    same, longer, shorter = (loaded(counters, protocol="data", discount=g).max_return for g in (0.99, 0.999, 0.9))
    np.testing.assert_allclose(longer, 10 * same, rtol=1e-5)
    np.testing.assert_array_equal(shorter, same)


def test_number_format_is_the_pretrained_runs(counters, tmp_path):
    copy = edited(counters, tmp_path, dtype="bfloat16")
    assert loaded(copy).settings.dtype == "bfloat16" and loaded(copy, dtype="float32").settings.dtype == "float32"


def test_scratch_is_the_online_script(counters, tmp_path):
    """The same seed and sizes: the same network, without embedding, as a single-task run of brc_sac_continuous.py."""
    pretrained = loaded(counters)
    ours = agent_of(pretrained, 1, use_embedding=False).init(5)
    args = online.Args(critic_width=16, critic_depth=1, actor_width=16)
    assert_same(tuple(ours), tuple(online.make_agent(args, 1, 6, 2, [1]).init(5)))


@pytest.mark.parametrize(
    "action_dims",
    [pytest.param((1,), marks=pytest.mark.slow, id="one task"), pytest.param((1, 2, 1), id="three tasks")],
)
def test_updates_are_the_online_scripts(counters, action_dims):
    """Two updates, those of brc_sac_continuous.py made with the pretrained run's arguments: every bit is the same."""
    pretrained, num_tasks = loaded(counters), len(action_dims)
    ours = agent_of(pretrained, *action_dims, use_embedding=num_tasks > 1)
    theirs = online.make_agent(online.parse_args(["--resume", str(counters)]), num_tasks, 6, 2, action_dims)
    rng = np.random.default_rng(0)
    observations, actions, next_observations = (rng.normal(size=(2, 16, n)).astype(np.float32) for n in (6, 2, 6))
    rewards, terminated = rng.normal(size=(2, 16)).astype(np.float32), rng.random((2, 16)) < 0.2
    task_ids = rng.integers(num_tasks, size=(2, 16), dtype=np.int32)
    batches = (observations, actions, rewards, terminated, next_observations, task_ids)
    max_return = np.linspace(1, 3, num_tasks, dtype=np.float32)
    state, metrics = ours.update(ours.init(5), brc.Batch(*batches), max_return)
    other, others = theirs.update(theirs.init(5), online.Batch(*batches), max_return)
    assert_same(tuple(state), tuple(other))
    assert_same(metrics, others)
    assert not np.array_equal(state.entropy, np.zeros(num_tasks)), "nothing was learned"


@pytest.mark.parametrize(
    ("arch", "loss", "protocol"),
    [
        pytest.param("simba", "mse", "model", marks=pytest.mark.slow),
        ("mlp", "mse", "data"),
        pytest.param("simba", "ce", "embedding", marks=pytest.mark.slow),
    ],
)
def test_other_critics(tmp_path, arch, loss, protocol):
    """What Figures 3 and 4 compare with transfers, too: other networks, a scalar critic, rewards as they are."""
    source = pretrain(tmp_path, "many", "--env-ids", *COUNTERS, *SMALL.split(), "--total-timesteps", 30,
                      "--critic-arch", arch, "--critic-loss", loss, "--no-normalize-returns")  # fmt: skip
    pretrained = loaded(source)
    if arch == "simba":  # the critic goes on with the statistics that it was trained with
        assert pretrained.state.statistics.count == 2 * 10 * 16
        fresh, args = agent_of(pretrained, 1).init(0), brc.Args(pretrained=str(source))
        state = brc.start_from_pretrained(args, pretrained, fresh, pretrained.embeddings[0])
        assert_same(state.statistics, pretrained.state.statistics)
    length = ["--adaptation-transitions", 20, "--embedding-updates", 2] if protocol == "embedding" else LEARN
    run_dir = transfer(tmp_path, "run", "--pretrained", source, "--env-ids", SMALLER, "--protocol", protocol,
                       "--eval-episodes", 1, *length)  # fmt: skip
    assert [row["step"] for row in curve(run_dir)] == (["20"] if protocol == "embedding" else ["0", "20", "40"])


# --------------------------------------------------------------------------------------------------- data transfer


def test_half_of_a_batch_is_prior_data(counters):
    pretrained = loaded(counters, protocol="data")
    new = brc.Replay(1, 50, 6, 2)
    new.start(np.full((1, 6), 100.0))
    for step in range(30):
        new.insert(np.zeros((1, 2)), [step], [False], [True], np.full((1, 6), 100.0))
    batch = brc.sample(np.random.default_rng(0), new, pretrained.replay, 8, 2, 16, one_task=False)
    same = brc.sample(np.random.default_rng(0), new, pretrained.replay, 8, 2, 16, one_task=True)
    assert not same.task_ids.any() and same.task_ids.dtype == batch.task_ids.dtype
    assert_same(same._replace(task_ids=batch.task_ids), batch)
    assert batch.observations.shape == (2, 16, 6)
    for update in range(2):
        is_new = batch.task_ids[update] == 0
        assert is_new.sum() == 8 and set(batch.task_ids[update][~is_new]) <= {1, 2}
        assert (batch.observations[update][is_new] == 100).all()
        rows = {tuple(row) for row in pretrained.replay.slots["observation"].reshape(-1, 6).tolist()}
        assert {tuple(row) for row in batch.observations[update][~is_new].tolist()} <= rows
        for row, task in zip(batch.observations[update][~is_new], batch.task_ids[update][~is_new], strict=True):
            assert (row[3:] == (7 if task == 1 else 0)).all(), "a transition of the other task"


def test_rows_of_prior_data():
    """A fixed share; or, with None, as often as all transitions drawn alike would give one, also where the new task has
    less than half a row of a batch: a rounded share would never learn it."""
    rng, alike = np.random.default_rng(0), brc.Args(prior_fraction=None, batch_size=1024)
    assert brc.prior_rows(brc.Args(prior_fraction=0.25, batch_size=16), rng, 10**6, 1) == 4
    rows = np.array([brc.prior_rows(alike, rng, 50_000_000, 5_000) for _ in range(20_000)])
    share = 5_000 / 50_005_000
    assert (1024 - rows).mean() == pytest.approx(1024 * share, rel=0.1) and rows.max() == 1024


def test_each_task_keeps_its_own_scale_and_embedding(counters, tmp_path):
    """--prior-learner multi-task: G_i of pretraining for its tasks, the new task's own; three embeddings in one fresh
    critic."""
    run_dir = transfer(tmp_path, "run", "--pretrained", counters, "--env-ids", SMALLER, *LEARN, "--protocol", "data",
                       "--prior-learner", "multi-task")  # fmt: skip
    args = brc.parse_args(["--resume", str(run_dir)])
    pretrained = load(args)
    blank = agent_of(pretrained, 1, 2, 1).init(0)
    state, saved = brc.load_checkpoint(run_dir, blank, brc.Replay(1, 1040, 6, 2))
    assert state.critic["embedding"]["params"]["embedding"].shape == (3, 32)
    assert len(saved["max_return"]) == 1 and saved["max_return"][0] != pretrained.max_return[0]
    agent = agent_of(pretrained, 1, 2, 1)
    assert (np.asarray(state.entropy) != 0).all(), "a task had no row in any batch"
    assert agent.value(state, np.zeros((1, 6), np.float32), np.array([1.0], np.float32)).shape == (1,)


def test_data_transfer_of_the_paper_has_one_task(counters, tmp_path):
    """A fresh single-task learner, whose buffer is initialized: no embedding, one entropy, and one G that covers the
    returns of pretraining from the start."""
    run_dir = transfer(tmp_path, "run", "--pretrained", counters, "--env-ids", SMALLER, *LEARN, "--protocol", "data")
    args = brc.parse_args(["--resume", str(run_dir)])
    pretrained = load(args)
    blank = agent_of(pretrained, 1, use_embedding=False).init(0)
    state, saved = brc.load_checkpoint(run_dir, blank, brc.Replay(1, 1040, 6, 2))
    assert set(state.critic) == {"ensemble"} and state.entropy.shape == (1,)
    assert saved["max_return"] == [max(pretrained.max_return)] or saved["max_return"][0] > max(pretrained.max_return)
    assert json.loads((run_dir / "args.json").read_text())["batch_size"] == 16  # LEARN's; 256 by default
    assert brc.BATCH_SIZES[brc.Args.prior_learner] == 256


@pytest.mark.parametrize("learner", ["single-task", "multi-task"])
def test_play_of_data_transfer_needs_no_pretraining_data(counters, tmp_path, learner, capsys, monkeypatch):
    how = [*LEARN, "--protocol", "data", "--prior-learner", learner]
    run_dir = transfer(tmp_path, "run", "--pretrained", counters, "--env-ids", SMALLER, *how)
    filled, load_checkpoint = [], brc.load_checkpoint
    monkeypatch.setattr(
        brc, "load_checkpoint", lambda *a, **k: filled.append(a[2:]) or load_checkpoint(*a, **k)
    )  # the pretrained run's replay may be tens of GB
    brc.main(brc.parse_args(["--play", str(run_dir)]))
    assert f"playing {run_dir}, step 40" in capsys.readouterr().out
    assert [replay for replay, *_ in filled] == [None, None]


def test_a_target_of_pretraining_is_a_warning(counters, tmp_path, capsys):
    transfer(tmp_path, "run", "--pretrained", counters, "--env-ids", COUNTERS[0], "--total-timesteps", 0)
    assert f"warning: {COUNTERS[0]} is no new task" in capsys.readouterr().err
    transfer(tmp_path, "other", "--pretrained", counters, "--env-ids", SMALLER, "--total-timesteps", 0)
    assert "warning" not in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- embedding, all frozen


def adapted(run_dir: Path, *arguments):
    """Explores and tunes on the first new task as the script does; returns (before, after, transitions used)."""
    args = brc.parse_args(["--pretrained", str(run_dir), "--protocol", "embedding", *map(str, arguments)])
    pretrained = load(args)
    before = jax.tree.map(np.array, pretrained.state)
    envs, counted = brc.target_envs(args, args.env_ids[0], pretrained.info, 1, 0, brc.EnvWorkers(1)), []
    try:
        agent = agent_of(pretrained, envs.action_dims[0])
        replay = brc.Replay(1, 2 * args.adaptation_transitions + 100, 6, 2)
        run = SimpleNamespace(advance=counted.append, stop=[])
        order = brc.explore_embeddings(args, agent, pretrained, envs, replay, run, brc.ReturnNormalizer(1, 0.99))
    finally:
        envs.close()
    assert counted == [0] * args.adaptation_transitions, "a step of the run is a transition"
    state, max_return = brc.candidates(pretrained)[order[0]]
    batch, count = brc.all_transitions(replay)
    assert count == args.adaptation_transitions
    tuned, *td = brc.tuned_embedding(args, agent, state, max_return, batch, [])
    return before, pretrained.state, state, tuned, batch, td


def test_frozen_means_frozen(counters):
    """Bit for bit: no weight of actor, critic or target changes; the tuned agent has another embedding only."""
    before, after, selected, tuned, _, (td_before, td_after) = adapted(counters, "--env-ids", SMALLER)
    assert_same(tuple(before), tuple(after))
    assert_same(tuned.actor, before.actor)
    for name in ("critic", "target_critic"):
        assert_same(getattr(tuned, name)["ensemble"], getattr(before, name)["ensemble"])
    old, new = (s.critic["embedding"]["params"]["embedding"] for s in (selected, tuned))
    assert not np.array_equal(old, new) and td_after < td_before
    np.testing.assert_array_equal(new, tuned.target_critic["embedding"]["params"]["embedding"])


@pytest.mark.parametrize("limit", [1, 24, 60, 300])
def test_no_more_transitions_than_stated(counters, limit):
    batch = adapted(counters, "--env-ids", SMALLER, "--adaptation-transitions", limit, "--embedding-updates", 1)[4]
    assert len(batch.rewards) == limit
    assert (batch.observations[:, 3:] == 0).all() and (batch.actions[:, 1] == 0).all()  # padding


def test_td_divergence_against_float64(counters):
    """TD(e) of four transitions with num_atoms-wide loops: expected cross-entropy of both critics less y's entropy."""
    pretrained = loaded(counters)
    state, max_return = brc.candidates(pretrained)[0]
    agent = agent_of(pretrained, 2)
    rng = np.random.default_rng(0)
    observations, actions, next_observations = (rng.normal(size=(4, n)).astype(np.float32) for n in (6, 2, 6))
    rewards, terminated = np.float32([1, -2, 0.5, 3]), np.float32([0, 1, 0, 0])
    batch = brc.Batch(observations, actions, rewards, terminated, next_observations, np.zeros(4, np.int32))
    e = np.repeat(pretrained.embeddings[:1], 4, axis=0)
    actor = brc.Actor(16, 1, 2, 1)
    policy = actor.apply(state.actor, np.concatenate([batch.next_observations, e], 1), batch.task_ids)
    keys = jax.random.split(jax.random.PRNGKey(0), 4)  # one a transition
    sampled = [brc.sample_action(key, *(x[row : row + 1] for x in policy)) for row, key in enumerate(keys)]
    next_actions, log_probs = (np.concatenate(x) for x in zip(*sampled, strict=True))

    def distributions(critic, observations, actions):
        network = brc.Critic(brc.BroNet, 16, 1, 101, 1)
        inputs = np.concatenate([observations, actions, e], 1)
        members = [jax.tree.map(lambda x: x[k], critic["ensemble"]) for k in range(2)]  # noqa: B023
        logits = [np.asarray(network.apply(m, inputs, batch.task_ids), np.float64) for m in members]
        exp = [np.exp(x - x.max(-1, keepdims=True)) for x in logits]
        return [x / x.sum(-1, keepdims=True) for x in exp]

    z, alpha = np.linspace(-10, 10, 101), float(np.exp(state.log_temperature))
    scale = 10 / (max_return[0] + alpha * abs(float(state.entropy[0])) / (1 - pretrained.settings.discount))
    target = np.mean(distributions(state.target_critic, batch.next_observations, next_actions), axis=0)
    predicted, expected = distributions(state.critic, batch.observations, batch.actions), 0.0
    for row in range(4):
        y = np.zeros(101)
        for j in range(101):
            value = batch.rewards[row] * scale + 0.99 * (1 - batch.terminated[row]) * (z[j] - alpha * log_probs[row])
            place = (np.clip(value, -10, 10) + 10) / 0.2
            low = min(int(place), 99)
            y[low] += target[row, j] * (low + 1 - place)
            y[low + 1] += target[row, j] * (place - low)
        entropy = -sum(p * np.log(p) for p in y if p > 0)
        expected += sum(-(y * np.log(p[row])).sum() - entropy for p in predicted) / 4
    td = float(brc.td_divergence(agent, state, batch, 4, jnp.asarray(max_return)))
    assert td == pytest.approx(expected, rel=2e-3)


def test_td_divergence_is_compiled_once(counters):
    """Whatever the number of transitions: rows beyond it count for nothing."""
    pretrained = loaded(counters)
    state, max_return = brc.candidates(pretrained)[0]
    agent, replay = agent_of(pretrained, 2), brc.Replay(1, 50, 6, 2)
    rng, compiled = np.random.default_rng(0), brc.td_divergence._cache_size()
    replay.start(rng.normal(size=(1, 6)))
    for step in range(1, 21):
        values = rng.normal(size=(1, 2)), rng.normal(size=1), [False], [step % 5 != 0], rng.normal(size=(1, 6))
        replay.insert(*values)
        batch, count = brc.all_transitions(replay, 20)
        assert count == step - step // 5 and len(batch.rewards) == 20
        td = brc.td_divergence(agent, state, batch, count, max_return)
        garbage = jax.tree.map(lambda x: np.concatenate([x[:count], np.flip(x[count:], 0)]), batch)  # noqa: B023
        assert td == brc.td_divergence(agent, state, garbage, count, max_return)
    assert brc.td_divergence._cache_size() == compiled + 1


class Segments:
    """A new task whose reward and success in each segment, from one reset to the next, are given."""

    def __init__(self, rewards, successes):
        self.rewards, self.successes, self.segment = rewards, successes, -1

    def reset(self):
        self.segment += 1
        return np.zeros((1, 6), np.float32)

    def send(self, actions):
        pass

    def recv(self):
        step = np.zeros((1, 6), np.float32), self.rewards[self.segment], 0.0, 0.0, True, self.successes[self.segment]
        return online.Step(step[0], *map(np.atleast_1d, step[1:]))


@pytest.mark.parametrize(
    ("rewards", "successes"),
    [
        ([0, 0], [0.0, 0.0]),
        ([5, 1], [np.nan, np.nan]),
        ([5, 1], [0.0, 1.0]),
        ([1, 5], [1.0, 0.0]),
        ([1, 5], [1.0, 1.0]),
    ],
)
def test_selection_ranks_success_then_td(counters, rewards, successes):
    """Every pretrained embedding, also those that never acted: 85 of them and 300 transitions leave 73 that cannot."""
    args = brc.Args(pretrained=str(counters), env_ids=(SMALLER,), protocol="embedding", adaptation_transitions=50)
    pretrained = load(args)
    more = np.concatenate([pretrained.embeddings, np.eye(32, dtype=np.float32)[:3]])  # five, of which two will act
    entropy = jnp.resize(pretrained.state.entropy, 5)
    pretrained = pretrained._replace(
        embeddings=more, max_return=np.resize(pretrained.max_return, 5),
        state=pretrained.state._replace(entropy=entropy),
    )  # fmt: skip
    acted, agent, states = [], agent_of(pretrained, 2), brc.candidates(pretrained)
    table = lambda critic: tuple(np.ravel(critic["embedding"]["params"]["embedding"]).round(5))  # noqa: E731
    spy = lambda actor, critic, *rest: acted.append(table(critic)) or agent.act(actor, critic, *rest)  # noqa: E731
    replay, run = brc.Replay(1, 150, 6, 2), SimpleNamespace(advance=lambda updates: None, stop=[])
    envs = Segments(np.float32(rewards), np.float32(successes))
    normalizer = brc.ReturnNormalizer(1, 0.99)
    order = brc.explore_embeddings(args, agent._replace(act=spy), pretrained, envs, replay, run, normalizer)
    tables = [tuple(e.round(5)) for e in more]
    who_acted = list(dict.fromkeys(tables.index(table) for table in acted))
    assert len(who_acted) == 2
    seen = brc.all_transitions(replay)
    by_td = sorted(range(5), key=lambda i: float(brc.td_divergence(agent, states[i][0], *seen, states[i][1])))
    succeeded = [index for index, success in zip(who_acted, successes, strict=True) if success == 1]
    assert order == sorted(by_td, key=lambda i: i not in succeeded)


@pytest.mark.slow
def test_right_embedding_is_everything(points, tmp_path):
    """Goals between the pretrained ones, which no observation shows: tuned beats random by a wide margin."""
    assert_tuning_wins(points, tmp_path, 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_right_embedding_is_everything_on_other_seeds(points, tmp_path, seed):
    assert_tuning_wins(points, tmp_path, seed)


def assert_tuning_wins(points: Path, tmp_path: Path, seed: int) -> None:
    run_dir = transfer(tmp_path, "run", "--pretrained", points, "--env-ids", *NEW_GOALS, "--protocol", "embedding",
                       "--eval-episodes", 3, "--heatmap", "--seed", seed)  # fmt: skip
    rows = rows_of(run_dir / "embedding.csv")
    assert [(row["target"], row["method"]) for row in rows] == [
        (goal, method) for goal in NEW_GOALS for method in ("selected", "tuned", "random", "mean", "oracle")
    ]
    used = {row["method"]: row["transitions"] for row in rows}
    assert used["selected"] == used["tuned"] == "300" and {used[m] for m in set(used) - {"selected", "tuned"}} == {"0"}
    returns = {method: np.mean([float(row["return"]) for row in rows if row["method"] == method])
               for method in ("selected", "tuned", "random", "mean")}  # fmt: skip
    assert returns["tuned"] > 14, returns  # 25 would be to start at the goal; pretrained goals give about 22
    assert returns["tuned"] > 1.8 * returns["random"] and returns["tuned"] > 2 * returns["mean"], returns
    assert returns["selected"] > returns["mean"], returns
    for row in rows:
        if row["method"] == "selected":  # one of the two neighbours on the circle
            names = row["target"], row["embedding"]
            goal, chosen = (int(name.removeprefix("gym/gym_tasks:PointAt").removesuffix("-v0")) for name in names)
            assert min((goal - chosen) % 360, (chosen - goal) % 360) < 45, row
    heatmap = rows_of(run_dir / "heatmap.csv")
    for goal in NEW_GOALS:
        best = max((row for row in heatmap if row["target"] == goal), key=lambda row: float(row["return"]))
        assert {**best, "method": "oracle"} in rows
    assert {(row["target"], row["embedding"]) for row in heatmap} == {(t, s) for t in NEW_GOALS for s in GOALS}
    assert (run_dir / "heatmap.png").stat().st_size > 10_000
    assert len(curve(run_dir)) == 4
    for goal in NEW_GOALS:
        embedding = np.load(run_dir / "embeddings" / f"{brc.file_name(goal)}.npy", allow_pickle=False)
        assert embedding.shape == (32,) and np.abs(embedding).sum() == pytest.approx(1, rel=1e-5)


def test_heatmap_shows_scores_of_zero(tmp_path, monkeypatch):
    """A task never solved has score 0, which is not "no score": its return must not stand in its place."""
    rows = [{"embedding": "a", "target": "t", "score": 0.0, "return": 810.0},
            {"embedding": "b", "target": "t", "score": "0.5", "return": "900"},
            {"embedding": "c", "target": "t", "score": "", "return": 0.25}]  # fmt: skip
    shown = []
    monkeypatch.setattr("matplotlib.axes.Axes.imshow", lambda self, matrix, **_: shown.append(matrix))
    monkeypatch.setattr("matplotlib.figure.Figure.colorbar", lambda *_, **__: None)
    brc.draw_heatmap(rows, ["a", "b", "c"], ["t"], tmp_path / "heatmap.png")
    assert shown[0].tolist() == [[0.0], [0.5], [0.25]]


@pytest.mark.parametrize("protocol", ["scratch", "embedding"])
def test_zero_steps_build_everything(counters, tmp_path, protocol):
    """And the run's name says the protocol, which args.json keeps apart from the name of the experiment."""
    brc.main(brc.parse_args(["--pretrained", str(counters), "--env-ids", SMALLER, "--protocol", protocol,
                             "--total-timesteps", "0", "--run-root", str(tmp_path), "--seed", "4"]))  # fmt: skip
    (run_dir,) = tmp_path.iterdir()
    assert run_dir.name.startswith(f"gym-gym_tasks-Truncates20-v0__brc_embedding_transfer-{protocol}__4__")
    saved = json.loads((run_dir / "args.json").read_text())
    assert saved["exp_name"] == "brc_embedding_transfer" and saved["run_name"] is None
    assert saved["pretrained_tasks"] == COUNTERS and saved["pretrained_step"] == 60 and saved["discount"] == 0.99
    sizes = {"observation_dim": 6, "action_dim": 2, "observation_dims": [3], "action_dims": [1]}  # padded, its own
    assert saved["env_info"] == {"num_tasks": 1, "task_names": [SMALLER], **sizes}
    assert [path.name for path in run_dir.iterdir()] == ["args.json"]


# ------------------------------------------------------------------------------------------------ kill and resume


@pytest.mark.parametrize(
    "protocol", ["model", *(pytest.param(name, marks=pytest.mark.slow) for name in ("data", "scratch"))]
)
def test_resume_continues_after_kill(counters, tmp_path, environment, run, protocol):
    """kill -9 in mid-run: step counts, curve and updates go on as if nothing had been."""
    slow = [
        "--env-ids",
        "gym/gym_tasks:Slow-v0",
        "--protocol",
        protocol,
        "--batch-size",
        16,
        "--eval-episodes",
        1,
        "--learning-starts",
        20,
        "--total-timesteps",
        300,
        "--eval-every",
        100,
        "--checkpoint-every",
        50,
    ]
    process = started(SCRIPT, ["--pretrained", counters, *slow, "--run-root", tmp_path, "--run-name", "run"],
                      environment, tmp_path / "log")  # fmt: skip
    wait_for_checkpoint(tmp_path / "run", 100, process, tmp_path / "log")
    process.kill()
    assert process.wait() == -signal.SIGKILL
    result = run("--resume", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert [int(row["step"]) for row in curve(tmp_path / "run")] == list(range(0, 301, 100))
    saved = json.loads((tmp_path / "run/checkpoints/300/checkpoint.json").read_text())
    assert saved["updates"] == 2 * 280 and saved["replay_inserted"] >= 300


def test_embedding_resumes_with_the_next_task(counters, tmp_path):
    run_dir = transfer(tmp_path, "run", "--pretrained", counters, "--env-ids", SMALLER, COUNTERS[1], "--protocol",
                       "embedding", "--eval-episodes", 1, "--embedding-updates", 3)  # fmt: skip
    whole = (run_dir / "embedding.csv").read_text()
    for name, rows in (("embedding.csv", 4), ("eval.csv", 1)):  # as if it had been killed in the second task
        lines = (run_dir / name).read_text().splitlines(keepends=True)
        (run_dir / name).write_text("".join(lines[: 1 + rows]))
    assert len(rows_of(run_dir / "embedding.csv")) == 4
    brc.main(brc.parse_args(["--resume", str(run_dir)]))
    assert (run_dir / "embedding.csv").read_text() == whole
    saved = json.loads((run_dir / "args.json").read_text())
    (run_dir / "args.json").write_text(json.dumps({**saved, "pretrained_step": 30}))
    with pytest.raises(brc.UserError, match="has gone on from step 30 to 60: its agent is no longer"):
        brc.main(brc.parse_args(["--resume", str(run_dir)]))
    other = edited(counters, tmp_path, task_names=COUNTERS[::-1])
    with pytest.raises(brc.UserError, match="not the run from which"):
        brc.main(brc.parse_args(["--resume", str(run_dir), "--pretrained", str(other)]))


def killed_in_the_second_task(run_dir: Path, tmp_path: Path) -> Path:
    copy = shutil.copytree(run_dir, tmp_path / "killed")
    for name, column in (("embedding.csv", "target"), ("heatmap.csv", "target"), ("eval.csv", "task")):
        rows = [row for row in rows_of(run_dir / name) if row[column] == SMALLER]
        lines = [",".join(values) for values in (rows[0], *(row.values() for row in rows))]
        (copy / name).write_text("\n".join(lines) + "\n")
    return copy


def saved_by_a_spreadsheet(text: str) -> str:
    return "\ufeff" + text.replace(",", ";").replace(".0", ",0")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("embedding.csv", lambda path: path.write_text(saved_by_a_spreadsheet(path.read_text()))),
        ("eval.csv", lambda path: path.write_text(saved_by_a_spreadsheet(path.read_text()))),
        ("heatmap.csv", lambda path: path.unlink()),
    ],
)
def test_tables_that_a_spreadsheet_saved(tuned, tmp_path, name, change, own_signal_handlers):
    """Or that were deleted: the run goes on with the next task, whose work it lost before it could write a row."""
    run_dir = killed_in_the_second_task(tuned, tmp_path)
    change(run_dir / name)
    brc.main(brc.parse_args(["--resume", str(run_dir)]))
    assert rows_of(run_dir / "embedding.csv") == rows_of(tuned / "embedding.csv")
    assert [row["task"] for row in curve(run_dir)] == [SMALLER, COUNTERS[1]]
    assert len(rows_of(run_dir / "heatmap.csv")) == (2 if name == "heatmap.csv" else 4)
    assert (run_dir / "heatmap.png").exists()


def test_resume_from_another_pretrained_agent_is_refused(counters, tuned, tmp_path):
    """Of the same tasks and step, such as another seed's; a copy is the same agent."""
    agent = brc.embedding_checksum(loaded(counters).state)
    saved = json.loads((tuned / "args.json").read_text())
    assert saved["pretrained_crc32"] == agent
    run_dir = shutil.copytree(tuned, tmp_path / "copy")
    (run_dir / "args.json").write_text(json.dumps({**saved, "pretrained_crc32": agent ^ 1}))
    args = brc.parse_args(["--resume", str(run_dir), "--pretrained", str(counters)])
    with pytest.raises(brc.UserError, match="not the run from which .* started; it has other weights"):
        load(args)
    del saved["pretrained_crc32"]  # an older run
    (run_dir / "args.json").write_text(json.dumps(saved))
    load(args)


def test_a_resumed_run_must_adapt_something(tuned):
    """--total-timesteps 0 was saved, and from then on nothing ran."""
    before = (tuned / "args.json").read_bytes()
    with pytest.raises(brc.UserError, match="--total-timesteps 0 adapts nothing"):
        brc.main(brc.parse_args(["--resume", str(tuned), "--total-timesteps", "0"]))
    assert (tuned / "args.json").read_bytes() == before


def test_exploring_ends_when_the_run_is_stopped(counters):
    """Not after all of its transitions, of which nothing is kept. Those of a model run count as its steps."""
    args = brc.parse_args(["--pretrained", str(counters), "--protocol", "embedding", "--env-ids", SMALLER])
    pretrained, stop, steps = load(args), [], []
    agent, envs = agent_of(pretrained, 1), Segments(np.zeros(2, np.float32), np.zeros(2, np.float32))
    run = SimpleNamespace(advance=lambda updates: steps.append(1) or stop.append(signal.SIGINT), stop=stop)
    rng = np.random.default_rng(0)
    envs.observation_dim, envs.action_dim, envs.tasks = 6, 2, [SMALLER]
    assert brc.infer_embeddings(args, agent, pretrained, envs, rng, run) == {} and len(steps) == 1


@pytest.mark.parametrize(("column", "value"), [("target", "task"), ("return", "much")])
def test_tables_that_cannot_be_read(tuned, tmp_path, column, value):
    """A header that was changed, a number that is none."""
    run_dir = killed_in_the_second_task(tuned, tmp_path)
    path = run_dir / "embedding.csv"
    changed = column if column == "target" else rows_of(path)[0]["return"]
    path.write_text(path.read_text().replace(changed, value, 1))
    before = path.read_text()
    with pytest.raises(brc.UserError, match="embedding.csv was changed and cannot be read .*; restore it, or move it"):
        brc.main(brc.parse_args(["--resume", str(run_dir)]))
    assert path.read_text() == before


# ----------------------------------------------------------------------------------------------------------- play


def test_play_of_a_transferred_model(counters, tmp_path, capsys):
    run_dir = transfer(tmp_path, "run", "--pretrained", counters, "--env-ids", SMALLER, *LEARN)
    (policy,), (row,) = played(brc, run_dir, "--eval-episodes", 2)
    assert (row["task"], row["episodes"]) == (SMALLER, 2) and f"playing {run_dir}, step 40" in capsys.readouterr().out
    args = brc.parse_args(["--resume", str(run_dir)])
    agent = agent_of(brc.load_pretrained(args, brc.read_arguments(args)), 1)
    state, _ = brc.load_checkpoint(run_dir, agent.init(0))
    observations, task_ids = np.random.default_rng(0).normal(size=(1, 6)).astype(np.float32), np.zeros(1, np.int32)
    expected = agent.act_deterministic(state.actor, state.critic, observations, task_ids)
    np.testing.assert_array_equal(policy(observations, task_ids), expected)


def test_play_of_tuned_embeddings(counters, tmp_path, capsys):
    """Of the finished tasks, without a step of adaptation."""
    tasks = [SMALLER, COUNTERS[1]]
    run_dir = transfer(tmp_path, "run", "--pretrained", counters, "--env-ids", *tasks, "--protocol", "embedding",
                       "--eval-episodes", 1, "--embedding-updates", 3, "--heatmap")  # fmt: skip
    policies, rows = played(brc, run_dir, "--eval-episodes", 2)
    assert [(row["task"], row["episodes"]) for row in rows] == [(task, 2) for task in tasks]
    printed = capsys.readouterr().out
    observations, task_ids = np.random.default_rng(0).normal(size=(1, 6)).astype(np.float32), np.zeros(1, np.int32)
    for task, action_dim, policy, row in zip(tasks, (1, 1), policies, rows, strict=True):
        assert re.search(rf"^{task} +tuned +{row['return']:.1f} ", printed, re.MULTILINE)
        pretrained, tuned = loaded(counters), np.load(run_dir / "embeddings" / f"{brc.file_name(task)}.npy")
        state = brc.with_embedding(pretrained.state, brc.embedding_table(tuned))
        expected = agent_of(pretrained, action_dim).act_deterministic(state.actor, state.critic, observations, task_ids)
        np.testing.assert_array_equal(policy(observations, task_ids), expected)
    (run_dir / "embedding.csv").unlink()
    with pytest.raises(brc.UserError, match="no embedding is tuned"):
        brc.main(brc.parse_args(["--play", str(run_dir)]))


DAMAGED_EMBEDDINGS = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:60]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "shape": lambda path: np.save(path, np.zeros((1, 32), np.float32)),
    "text": lambda path: np.save(path, np.array(["a"] * 32)),
    "not finite": lambda path: np.save(path, np.full(32, np.nan)),
}


@pytest.mark.parametrize("name", DAMAGED_EMBEDDINGS)
def test_a_tuned_embedding_that_is_damaged(name, tmp_path):
    path = tmp_path / "gym-A.npy"
    np.save(path, np.arange(32, dtype=np.float32))
    assert brc.load_embedding(path, (32,)).tolist() == list(range(32))
    DAMAGED_EMBEDDINGS[name](path)
    with pytest.raises(brc.UserError, match="is damaged .*; restore it, or") as error:
        brc.load_embedding(path, (32,))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_play_reads_tuned_embeddings_with_care(tuned, tmp_path):
    run_dir = shutil.copytree(tuned, tmp_path / "copy")
    (run_dir / "embeddings" / f"{brc.file_name(SMALLER)}.npy").write_bytes(b"")
    with pytest.raises(brc.UserError, match="is damaged"):
        brc.main(brc.parse_args(["--play", str(run_dir)]))


# --------------------------------------------------------------------------------------------------------- errors


def edited(counters: Path, tmp_path: Path, **arguments) -> Path:
    """A copy of the pretrained run whose args.json says something else."""
    copy = tmp_path / "edited"
    shutil.copytree(counters, copy)
    saved = json.loads((copy / "args.json").read_text())
    for name, value in arguments.items():
        (saved["env_info"] if name in saved["env_info"] else saved)[name] = value
    (copy / "args.json").write_text(json.dumps(saved))
    return copy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"script": "brc_offline_bc"}, "that run was made by brc_offline_bc, not by brc_sac_continuous"),
        ({"script": "brc_drq_atari", "env_info": {}}, "that run was made by brc_drq_atari, not by brc_sac_continuous"),
        ({"task_names": [COUNTERS[0]]}, f"that run has one task, {COUNTERS[0]}; transfer needs several"),
        (
            {"task_conditioning": "heads"},
            "that run has --task-conditioning heads; --protocol model needs --task-conditioning embedding",
        ),
    ],
)
def test_refuses_other_runs(counters, tmp_path, command_line, arguments, message):
    """Before any network is made: this one would not fit in memory."""
    run_dir = edited(counters, tmp_path, **arguments, critic_width=1 << 20)
    status, stderr = command_line("--pretrained", run_dir, "--env-ids", SMALLER)
    assert status == 2 and message in error_line(stderr)


@pytest.mark.parametrize("protocol", [["embedding"], ["model", "--embedding-init", "best"]])
def test_refuses_td_without_a_distribution(counters, tmp_path, command_line, protocol):
    run_dir = edited(counters, tmp_path, critic_loss="mse")
    status, stderr = command_line("--pretrained", run_dir, "--env-ids", SMALLER, "--protocol", *protocol)
    message = f"that run has --critic-loss mse; --protocol {' '.join(protocol)} needs --critic-loss ce"
    assert status == 2 and message in error_line(stderr)


def test_refuses_damaged_runs(counters, tmp_path, command_line):
    copy = edited(counters, tmp_path)
    before = sorted((copy / "checkpoints").iterdir())
    broken = [path / "checkpoint.json" for path in reversed(before)]
    for path in broken:
        path.write_text(path.read_text()[:-9])
    status, stderr = command_line("--pretrained", copy, "--env-ids", SMALLER)
    assert status == 2 and "none of its checkpoints can be used" in error_line(stderr)
    assert sorted((copy / "checkpoints").iterdir()) == before  # another run's: nothing is renamed there
    shutil.rmtree(copy / "checkpoints")
    status, stderr = command_line("--pretrained", copy, "--env-ids", SMALLER)
    assert status == 2 and "that run has no checkpoint yet" in error_line(stderr)
    (copy / "args.json").write_text("{")
    status, stderr = command_line("--pretrained", copy, "--env-ids", SMALLER)
    assert status == 2 and "no run of brc_sac_continuous.py there" in error_line(stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env-ids", LARGER], "has 2000 observations, the pretrained agent of "),
        (["--env-ids", "gym/gym_tasks:Nothing-v0"], "Nothing"),
        (["--env-ids", "metaworld/nothing"], "unknown task 'metaworld/nothing'; metaworld/ has: assembly, "),
        (["--suite", "nothing"], "unknown suite 'nothing'; suites: dmc-dogs, "),
        (["--env-ids", SMALLER, COUNTERS[0]], "--protocol model learns one task a run, not 2"),
        (["--env-ids", SMALLER, LARGER, "--protocol", "embedding"], "Wide-v0 has 2000 observations"),
        (["--env-ids", SMALLER, "--track", "--protocol", "embedding"], "--track goes with --protocol model, data"),
        (["--env-ids", SMALLER, "--embedding-init", "best", "--total-timesteps", "200"], "--total-timesteps 200"),
        (["--env-ids", SMALLER, "--heatmap"], "--heatmap goes with --protocol embedding, not model"),
        (["--env-ids", SMALLER, "--prior-fraction", "1.5"], "--prior-fraction 1.5: must be in [0, 1)"),
        (["--env-ids", SMALLER, "--adaptation-transitions", "0"], "--adaptation-transitions 0: must be in [1, inf)"),
        ([], "no tasks: give --env-ids"),
        *(
            (["--env-ids", SMALLER, "--protocol", protocol, *flags], f"{flags[0]} goes with --protocol {others}")
            for protocol, flags, others in (
                ("scratch", ("--embedding-init", "best"), "model, not scratch"),
                ("data", ("--load-optimizer",), "model, not data"),
                ("model", ("--prior-fraction", "None"), "data, not model"),
                ("model", ("--embedding-lr", "0.1"), "embedding, not model"),
                ("data", ("--adaptation-transitions", "50"), "embedding or model, not data"),
                ("embedding", ("--batch-size", "64"), "model, data or scratch, not embedding"),
                ("embedding", ("--total-timesteps", "50"), "model, data or scratch, not embedding"),
            )
        ),
        (
            ["--env-ids", SMALLER, "--adaptation-transitions", "50"],
            "goes with --protocol embedding or --embedding-init",
        ),
        (
            ["--env-ids", SMALLER, "--protocol", "data", "--prior-fraction", "0.0015"],
            "none or all of --batch-size 256",
        ),
        (["--env-ids", SMALLER, "--protocol", "data", "--batch-size", "1"], "none or all of --batch-size 1 rows"),
        (["--env-ids", SMALLER, "--run-root", SCRIPT], "choose another --run-root"),
    ],
)
def test_bad_input_is_one_line(counters, command_line, tmp_path, arguments, message):
    """Before anything is loaded: the pretrained run's checkpoints are damaged, which would be another line."""
    run_dir, root = edited(counters, tmp_path), tmp_path / "runs"
    for path in (run_dir / "checkpoints").glob("*/checkpoint.json"):
        path.write_text("{")
    status, stderr = command_line("--run-root", root, "--pretrained", run_dir, *arguments)
    assert status == 2 and message in error_line(stderr)
    assert not root.exists()


def test_no_pretrained_run(command_line, tmp_path):
    status, stderr = command_line("--env-ids", SMALLER)
    assert status == 2 and "no pretrained agent: give --pretrained" in error_line(stderr)
    for path in ("runs/nowhere", tmp_path, SCRIPT):  # an empty directory, a file
        status, stderr = command_line("--pretrained", path, "--env-ids", SMALLER)
        assert status == 2 and f"--pretrained {path}: no run of brc_sac_continuous.py there" in error_line(stderr)


def test_resume_refuses_what_is_finished_or_changed(counters, tmp_path, command_line):
    run_dir = transfer(tmp_path, "run", "--pretrained", counters, "--env-ids", SMALLER, *LEARN, "--protocol", "scratch")
    before = (run_dir / "args.json").read_bytes()
    status, stderr = command_line("--resume", run_dir, "--total-timesteps", "30")
    assert status == 2 and "is finished (step 40)" in error_line(stderr)
    assert (run_dir / "args.json").read_bytes() == before, "a refused resume changed the run"
    status, stderr = command_line("--resume", run_dir)
    assert status == 2 and "is finished (step 40); to go on, give a larger --total-timesteps" in error_line(stderr)
    status, stderr = command_line("--resume", run_dir, "--protocol", "model")
    assert status == 2 and "a resumed run cannot change --protocol" in error_line(stderr)
