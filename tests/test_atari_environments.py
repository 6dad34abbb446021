"""Environments and evaluation of brc_drq_atari.py: real games by envpool and by ale-py, pixel tasks, faults.

What was found when both played the same actions in all 46 games (slow test below): after equally many no-ops, every
frame, reward, number of lives and end of a game is the same, bit for bit, over 400 steps and across new games. Only
the final frame differs where a game ends amid a step's four emulated frames: envpool shows what was drawn last, and
AtariPreprocessing pools with frames of the step before. Nothing is learned from that frame, as the game is over.
Otherwise only their random generators differ, which draw 1 to 30 no-ops at the start of each game.
"""

import sys
import time
from functools import partial
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from copies import local_envs

import brc_drq_atari as brc

GAMES = list(brc.ATARI)
PIXELS = "gym/pixel_tasks:Pixel"
TWO = [f"{PIXELS}Lives7-v0", f"{PIXELS}Truncates3-v0"]


@pytest.fixture
def environments():
    """environments(tasks, num_envs=1, seed=0, backend="auto", workers=None): ParallelEnvs that the end of the test
    closes."""
    opened = []

    def build(tasks: list[str], num_envs: int = 1, seed: int = 0, backend: str = "auto", workers=None):
        opened.append(brc.ParallelEnvs(tasks, num_envs, seed, backend, workers))
        return opened[-1]

    yield build
    for envs in opened:
        envs.close()


def step(envs: brc.ParallelEnvs, actions=0) -> brc.Step:
    envs.send(np.broadcast_to(actions, envs.size))
    return envs.recv()


def first_frames(pool: brc.EnvPoolTask) -> np.ndarray:
    """Those that a reset of all shows."""
    pool.send(None, np.arange(pool.num_envs))
    return pool.recv().observations


def newest(envs: brc.ParallelEnvs, actions=None) -> np.ndarray:
    """The frames [size, 84, 84] that a reset, or a step with these actions, shows."""
    return (envs.reset() if actions is None else step(envs, actions).frames)[:, -1]


# ------------------------------------------------------------------------------------------------------------- games


def test_all_games_have_84_by_84_pixels_and_18_actions(environments):
    envs = environments([f"atari/{game}" for game in GAMES], backend="envpool")
    assert envs.action_dims == [18] * 46 and envs.action_dim == 18 and envs.size == 46
    frames = [newest(envs), newest(envs, 0), newest(envs, 17)]
    for frame in frames:
        assert frame.shape == (46, 84, 84) and frame.dtype == np.uint8
    assert (frames[-1].reshape(46, -1).std(-1) > 5).all(), "a blank screen"
    assert len(np.unique(frames[-1].reshape(46, -1), axis=0)) == 46, "two names, one game"


@pytest.mark.parametrize("game", ["pong", "qbert"])
def test_reference_environment_has_the_same_spaces(game):
    env = brc.make_env(f"atari/{game}")
    assert env.observation_space == gym.spaces.Box(0, 255, (84, 84), np.uint8)
    assert env.action_space == gym.spaces.Discrete(18)


def without_random_starts(game: str, monkeypatch) -> tuple[brc.EnvPoolTask, gym.Env]:
    """Both backends with exactly one no-op at the start of a game, otherwise as the script makes them."""
    import envpool

    make, preprocess = envpool.make, gym.wrappers.AtariPreprocessing
    monkeypatch.setattr(envpool, "make", lambda *args, **kwargs: make(*args, **kwargs | {"noop_max": 1}))
    monkeypatch.setattr(gym.wrappers, "AtariPreprocessing", lambda env, **kw: preprocess(env, **kw | {"noop_max": 1}))
    return brc.EnvPoolTask(f"atari/{game}", 1, 3), brc.make_env(f"atari/{game}")


LONG_ENOUGH_TO_END = "breakout qbert roadrunner asterix mspacman".split()


@pytest.mark.parametrize(
    "game",
    [pytest.param(game, marks=() if game in ("breakout", "qbert", "pong", "alien") else pytest.mark.slow)
     for game in GAMES],
)  # fmt: skip
def test_envpool_and_ale_py_play_the_same_game(game, monkeypatch):
    """Also: no sticky actions, which would make them differ, and neither clips rewards."""
    pool, env = without_random_starts(game, monkeypatch)
    rng, games, rewards = np.random.default_rng(0), 0, []
    np.testing.assert_array_equal(first_frames(pool)[0], env.reset(seed=3)[0])
    done = False
    for t in range(400):
        action = rng.integers(18)
        pool.send(np.array([action]), np.arange(1))
        frame, reward, terminated, truncated, own_lives, _ = pool.recv()
        if done:  # envpool's reset step
            expected, lives, done, games = env.reset()[0], 0, False, games + 1
            assert reward[0] == 0 and not terminated[0] and not truncated[0]
        else:
            expected, expected_reward, done, cut, own_info = env.step(action)
            lives = own_info["lives"]
            assert (reward[0], terminated[0], truncated[0], cut) == (expected_reward, done, False, False), f"step {t}"
            assert own_lives[0] == lives
            rewards.append(expected_reward)
        if not done:  # final frames differ, see above
            np.testing.assert_array_equal(frame[0], expected, err_msg=f"step {t}")
    assert games > 0 or game not in LONG_ENOUGH_TO_END
    if game in ("qbert", "alien"):
        assert max(rewards) > 1, "clipped"
    pool.close()


def test_both_backends_begin_with_1_to_30_no_ops():
    """First frames of boxing, whose clock runs: each is that of some number of no-ops from 1 to 30."""
    env = brc.make_env("atari/boxing")
    preprocessing, known = env.env, []
    draws = preprocessing.unwrapped.np_random
    for count in range(1, 32):
        preprocessing.noop_max, preprocessing.unwrapped.np_random = 30, SimpleNamespace(
            integers=lambda low, high, count=count: count)  # fmt: skip
        known.append(env.reset()[0].tobytes())
    assert len(set(known)) == 31
    preprocessing.unwrapped.np_random = draws
    pool = brc.EnvPoolTask("atari/boxing", 40, 5)
    for found in (first_frames(pool), [env.reset()[0] for _ in range(40)]):
        counts = [1 + known.index(frame.tobytes()) for frame in found]
        assert max(counts) <= 30 and len(set(counts)) > 12
    pool.close()


def test_games_end_after_half_an_hour(monkeypatch):
    """27,000 steps of four frames: as truncation, in both backends. Here after 40 steps, and again after 40 more."""
    assert brc.MAX_GAME_STEPS == 27_000
    monkeypatch.setattr(brc, "MAX_GAME_STEPS", 40)
    envs = brc.ParallelEnvs(["atari/pong", "atari/breakout"], 2, 0, "envpool")
    envs.reset()
    ends = []
    for t in range(90):
        _, _, terminated, truncated, *_ = step(envs)
        assert not terminated.any()
        ends += [t] if truncated.all() else []
        assert truncated.all() or not truncated.any()
    envs.close()
    assert ends == [39, 40 + 40]
    env = brc.make_env("atari/pong")
    env.reset(seed=0)
    results = [env.step(0)[2:4] for _ in range(40)]
    assert results == [(False, False)] * 39 + [(False, True)]


def test_the_emulators_own_limit_is_beyond_ours():
    env = brc.make_env("atari/pong")
    assert env.unwrapped.ale.getInt("max_num_frames_per_episode") >= 4 * 27_000 + 30


@pytest.mark.parametrize("backend", ["envpool", "gymnasium"])
def test_lost_lives_are_told_and_do_not_end_the_game(backend, environments):
    """Breakout: five lives, a game ends with the last one only."""
    envs = environments(["atari/breakout"], backend=backend)
    envs.reset()
    rng, lost, ends, done = np.random.default_rng(0), 0, [], False
    for _ in range(700):
        _, reward, terminated, truncated, life_lost, first, valid = step(envs, rng.integers(18))
        lost += bool(life_lost[0])
        assert valid[0] != done and first[0] == (life_lost[0] or done)
        if done:
            assert reward[0] == 0 and not terminated[0] and not life_lost[0], "a reset step"
        done = bool(terminated[0])
        if done:
            ends, lost = [*ends, lost], 0
    assert len(ends) >= 2 and set(ends) == {5}


@pytest.mark.parametrize("backend", ["envpool", "gymnasium"])
def test_seed_decides_the_game(backend, environments):
    def play(seed: int) -> np.ndarray:
        envs, rng = environments(["atari/boxing"], seed=seed, backend=backend), np.random.default_rng(1)
        return np.concatenate([newest(envs), newest(envs), *(newest(envs, rng.integers(18)) for _ in range(30))])

    one, again, other = play(1), play(1), play(2)
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_rows_belong_to_their_own_copy(environments):
    """Each frame, row by row, is the one that the same game shows alone; between envpool's games is one that it does
    not step, which has a single copy."""
    tasks = ["atari/pong", f"{PIXELS}Terminates5-v0", "atari/boxing"]
    envs = environments(tasks, num_envs=3, seed=4)
    assert envs.task_ids.tolist() == [0, 0, 0, 1, 2, 2, 2] and envs.size == 7
    assert envs.action_dims == [18, 3, 18] and envs.action_dim == 18
    actions = np.array([2, 0, 5, 2, 0, 3, 4])
    seeds = np.random.SeedSequence(4).generate_state(3) % 2**30
    frames = [newest(envs), *(newest(envs, actions) for _ in range(25))]
    for rows, task, seed in ((slice(0, 3), tasks[0], seeds[0]), (slice(4, 7), tasks[2], seeds[2])):
        pool = brc.EnvPoolTask(task, 3, int(seed))
        np.testing.assert_array_equal(frames[0][rows], first_frames(pool))
        for frame in frames[1:]:
            pool.send(actions[rows], np.arange(3))
            np.testing.assert_array_equal(frame[rows], pool.recv().observations)
        assert len(np.unique(frames[-1][rows].reshape(3, -1), axis=0)) == 3, "copies must not play alike"
        pool.close()


# ------------------------------------------------------------------------------------------------------- pixel tasks


def told(frames: np.ndarray) -> list[tuple[int, int, int]]:
    """Episode, step and action that the frames of counting tasks show."""
    return [(int(e), int(t), int(a) - 1) for e, t, a in frames[:, 0, :3]]


def test_step_after_done_shows_the_next_games_first_frame_and_ignores_the_action(environments):
    """Both tasks in one run, with three and five actions."""
    envs = environments([f"{PIXELS}Terminates5-v0", f"{PIXELS}Truncates3-v0"])
    assert envs.action_dims == [3, 5] and envs.action_dim == 5
    assert told(newest(envs)) == [(0, 0, -1)] * 2
    seen = [[], []]
    for _ in range(7):
        frames, rewards, terminated, truncated, life_lost, first, valid = step(envs, [2, 4])
        assert not life_lost.any()
        for task, frame in enumerate(told(frames[:, -1])):
            seen[task].append((*frame, rewards[task], "T" * int(terminated[task]) + "t" * int(truncated[task])))
            assert first[task] == (not valid[task]) == (frame[1] == 0)
    assert seen[0] == [
        (0, 1, 2, 1, ""), (0, 2, 2, 2, ""), (0, 3, 2, 3, ""), (0, 4, 2, 4, ""), (0, 5, 2, 5, "T"), (1, 0, -1, 0, ""),
        (1, 1, 2, 11, ""),
    ]  # fmt: skip
    assert seen[1] == [
        (0, 1, 4, 1, ""), (0, 2, 4, 2, ""), (0, 3, 4, 3, "t"), (1, 0, -1, 0, ""), (1, 1, 4, 11, ""), (1, 2, 4, 12, ""),
        (1, 3, 4, 13, "t"),
    ]  # fmt: skip


def test_lives_of_a_pixel_task(environments):
    """Lives are lost at steps 2, 5 and 7, the last of which ends the game; none is lost at the reset."""
    envs = environments([f"{PIXELS}Lives7-v0"])
    envs.reset()
    flags = [(bool(terminated[0]), bool(life_lost[0])) for _, _, terminated, _, life_lost, *_ in
             (step(envs) for _ in range(16))]  # fmt: skip
    game = [(t == 7, t in (2, 5, 7)) for t in range(1, 8)]
    assert flags == [*game, (False, False), *game, (False, False)]


def test_lives_that_are_not_told_are_unchanged(environments):
    """The same game, whose odd steps alone tell: a loss is known one step later."""
    envs = environments([f"{PIXELS}TellsSomeLives7-v0"])
    envs.reset()
    lost = [bool(step(envs).life_lost[0]) for _ in range(16)]
    game = [t in (3, 5, 7) for t in range(1, 8)]
    assert lost == [*game, False, *game, False]


def test_statistics_of_games(environments):
    """Return and length of each row's game, whole at its end, zero at the reset, then begun anew."""
    envs = environments(TWO)
    envs.reset()
    seen = []
    for _ in range(9):
        done = step(envs).done
        seen.append((*envs.episode_return, *envs.episode_length, *done))
    assert seen == [  # returns, lengths, done: a game of 7 and one of 3 steps, then game 1, which pays 10 more a step
        (1, 1, 1, 1, False, False), (3, 3, 2, 2, False, False), (6, 6, 3, 3, False, True), (10, 0, 4, 0, False, False),
        (15, 11, 5, 1, False, False), (21, 23, 6, 2, False, False), (28, 36, 7, 3, True, True),
        (0, 0, 0, 0, False, False), (11, 21, 1, 1, False, False),
    ]  # fmt: skip
    assert envs.last_returns == {f"train/return/{TWO[0]}": 28, f"train/return/{TWO[1]}": 36}


def test_a_game_without_an_end(monkeypatch):
    """A task that was registered without a time limit has one."""
    monkeypatch.setattr(brc, "MAX_GAME_STEPS", 9)
    env = brc.make_env(f"{PIXELS}Truncates20-v0")
    env.reset()
    assert [env.step(0)[3] for _ in range(9)] == [False] * 8 + [True]


@pytest.mark.parametrize("name", ["OneChannel", "ChannelFirst"])
def test_one_channel_may_have_its_own_axis(name):
    env = brc.make_env(f"{PIXELS}{name}-v0")
    assert env.observation_space.shape == (84, 84)
    frame, _ = env.reset()
    assert frame.shape == (84, 84) and told(frame[None]) == [(0, 0, -1)]


@pytest.mark.parametrize(
    ("name", "message"),
    [("Color", "84 x 84"), ("Small", "84 x 84"), ("Wide", "84 x 84"), ("Flat", "84 x 84"), ("Floats", "uint8"),
     ("ContinuousAction", "discrete actions"), ("TwoActions", "discrete actions"), ("ActionsFromOne", "0 ... n - 1")],
)  # fmt: skip
def test_unsupported_spaces(name, message):
    task = f"{PIXELS}{name}-v0"
    with pytest.raises(brc.UserError, match=message) as error:
        brc.ParallelEnvs([task], 1, 0, "auto")
    assert task in str(error.value) and "\n" not in str(error.value)


def test_hundreds_of_actions_are_fine():
    env = brc.make_env(f"{PIXELS}ManyActions-v0")
    assert env.action_space.n == 300


@pytest.mark.parametrize(
    "task", ["gym/NoSuchTask-v0", f"{PIXELS}NoSuchTask-v0", "gym/no_such_module:Task-v0", "gym/one:two:Task-v0"]
)
def test_unknown_gymnasium_ids(task):
    with pytest.raises(brc.UserError) as error:
        brc.ParallelEnvs([task], 1, 0, "auto")
    assert task.removeprefix("gym/").split("-")[0].split(":")[0] in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("module", ["ale_py", "cv2"])
def test_missing_package_names_the_install_command(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(brc.UserError) as error:
        brc.make_env("atari/pong")
    assert brc.INSTALL["atari"] in str(error.value)


def test_envpool_may_be_missing(environments, monkeypatch):
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(brc.UserError, match="pip install envpool"):
        brc.ParallelEnvs(["atari/pong"], 1, 0, "envpool")
    (pool,) = environments(["atari/pong"]).pools
    assert isinstance(pool, brc.WorkerGroup)


def test_envpool_backend_refuses_other_families():
    with pytest.raises(brc.UserError, match="gym/pixel_tasks:PixelCatch-v0.*--env-backend"):
        brc.ParallelEnvs([f"{PIXELS}Catch-v0"], 1, 0, "envpool")


@pytest.mark.parametrize(
    ("name", "message"),
    [("Raises", "failed: RuntimeError: the joystick broke"), ("Killed", "ended its worker process")],
)
def test_a_task_that_fails_starts_again(name, message, environments):
    """Within seconds, at its 21st step, four resets not counted. One that raises does so alone; with a process that
    dies, all of its tasks start again, at the next step."""
    reports = []
    tasks = [f"{PIXELS}{name}-v0", f"{PIXELS}Lives7-v0"]
    envs = environments(tasks, workers=brc.EnvWorkers(1, report=reports.append))
    envs.reset()
    for _ in range(20 + 4):
        step(envs)
        assert not envs.interrupted
    started = time.monotonic()
    lost = [step(envs)]
    if name == "Killed":
        lost.append(step(envs))
    assert time.monotonic() - started < 20
    assert len(reports) == 1 and reports[0].startswith(f"{tasks[0]} {message}")
    for frames, rewards, terminated, truncated, life_lost, first, valid in lost:
        restarted = [True, name == "Killed"]
        assert valid.tolist() == [not again for again in restarted] and first[restarted].all()
        assert not (terminated | truncated)[restarted].any() and not life_lost[restarted].any()
        assert not rewards[restarted].any() and not frames[restarted, :-1].any()
    assert envs.interrupted and envs.episode_return[0] == envs.episode_length[0] == 0
    assert told(lost[-1].frames[:1, -1]) == [(0, 0, -1)]
    frames, rewards, *_, valid = step(envs)
    assert not envs.interrupted and valid.all() and rewards[0] == 1
    assert told(frames[:, -1]) == [(0, 1, 0), (0, 1, 0) if name == "Killed" else (3, 2, 0)]


# -------------------------------------------------------------------------------------------------------- evaluation


def evaluate(envs, episodes: int, stop=(), act=None):
    """brc.evaluate with a policy that always takes action 1, or `act`."""
    return brc.evaluate(act or (lambda frames, task_ids: np.ones(len(task_ids), int)), envs, episodes, list(stop))


@pytest.mark.parametrize(
    ("copies", "returns"),
    [  # game e of length n pays n (n + 1) / 2 + 10 e n, whatever lives are lost in it
        ((1, 1), [[28, 98, 168], [6, 36, 66]]),
        ((2, 2), [[28, 98, 28, 98], [6, 36, 6, 36]]),  # two games of each copy
        ((3, 3), [[28, 28, 28], [6, 6, 6]]),
        ((1, 3), [[28, 98, 168], [6, 6, 6]]),  # envpool steps the second task only
    ],
)
def test_evaluate_counts_whole_games(copies, returns):
    rows = evaluate(local_envs(brc, TWO, copies), 3)
    assert [row["task"] for row in rows] == TWO
    assert [row["episodes"] for row in rows] == [len(games) for games in returns]
    assert [row["return"] for row in rows] == [round(np.mean(games), 4) for games in returns]
    assert all(row["success"] == row["score"] == "" for row in rows), "games have no success, nor these a human score"


def test_evaluate_ignores_what_the_reset_step_pays():
    def paying(recv):
        results = recv()
        return results._replace(rewards=results.rewards + 1000 * (results.observations[:, 0, 1] == 0))

    envs = local_envs(brc, TWO, (1, 1))
    for pool in envs.pools:
        pool.recv = partial(paying, pool.recv)
    assert [row["return"] for row in evaluate(envs, 3)] == [98, 36]


def test_what_the_agent_sees_in_evaluation():
    """Stacks begin blank with every game and every life, as in training. The second task ends after 7 steps."""
    seen = []

    def act(frames, task_ids):
        assert frames.shape == (len(task_ids), 4, 84, 84) and task_ids.tolist() == ([0, 1] if len(seen) < 7 else [0])
        # the step that every frame of the first task's stack shows, "-" for a blank one
        seen.append("".join("-" if frame.max() == 0 else str(frame[0, 1]) for frame in frames[0]))
        return np.zeros(len(task_ids), int)

    evaluate(local_envs(brc, TWO, (1, 1)), 2, act=act)
    game = "---0 --01 ---2 --23 -234 ---5 --56".split()  # lives are lost at steps 2, 5 and 7
    assert seen == [*game, "---7", *game]


def test_policy_of_evaluation():
    """Exploration is 0.001, and random actions differ from step to step."""
    seen, frames, task_ids = [], np.zeros((2, 4, 84, 84), np.uint8), np.arange(2)

    def act(critic, key, time_step, *arguments):
        assert critic == "critic" and arguments[:2] == (frames, task_ids) and key.tolist() == [0, 7]
        seen.append((time_step, *arguments[2:]))

    policy = brc.evaluation_policy(brc.Agent(*[None] * len(brc.Agent._fields))._replace(act=act), "critic", 7)
    for _ in range(3):
        policy(frames, task_ids)
    assert seen == [(0, 0.001), (1, 0.001), (2, 0.001)]


def test_evaluate_again_starts_new_games():
    envs = local_envs(brc, TWO, (1, 1))
    evaluate(envs, 1)
    first, second = evaluate(envs, 1)
    assert (first["return"], second["return"]) == (28 + 70, 6 + 30), "not those of the whole second games"


def test_evaluate_fails_with_an_environment_and_works_again(environments):
    reports = []
    workers = brc.EnvWorkers(1, report=reports.append)
    envs = environments([f"{PIXELS}Raises-v0", f"{PIXELS}Truncates3-v0"], workers=workers)
    assert evaluate(envs, 5) is None, "it fails at its 21st step, of 25"
    assert reports == [f"{PIXELS}Raises-v0 failed: RuntimeError: the joystick broke"]
    first, second = evaluate(envs, 2)
    assert first["return"] == 65 + 25, "games 1 and 2 of the new environment: its first began with the fault"
    assert first["episodes"] == second["episodes"] == 2 and len(reports) == 1


def test_finished_copies_rest():
    """The policy is asked for no action of theirs, they are not stepped; it sees few different numbers of rows."""
    tasks = [f"{PIXELS}{name}-v0" for name in ("Truncates3", "Terminates5", "Truncates20")]
    copies, lengths, asked = (8, 4, 2), (3, 5, 20), []
    envs = local_envs(brc, tasks, copies)

    def act(frames, task_ids):
        t = len(asked)
        assert len(frames) == len(task_ids) and set(task_ids) == {task for task in range(3) if t < lengths[task]}
        assert all((e, step) == (0, t) for e, step, _ in told(frames[:, -1])), "rows that rest show blank frames"
        asked.append(len(task_ids))
        return np.zeros(len(task_ids), int)

    rows = evaluate(envs, 2, act=act)
    assert [row["episodes"] for row in rows] == list(copies) and [row["return"] for row in rows] == [6, 15, 210]
    assert asked == [14] * 3 + [7] * 2 + [3] * 15
    for pool, length in zip(envs.pools, lengths, strict=True):
        assert [env.env.unwrapped.steps for env in pool.envs] == [length] * pool.num_envs


def test_evaluate_stops_when_asked():
    assert evaluate(local_envs(brc, TWO, (1, 1)), 3, stop=[15]) is None


def test_evaluation_of_a_real_game_counts_games_not_lives(environments):
    """Breakout without launching the ball would last 27,000 steps; random actions end its five lives soon."""
    rng, envs, steps, games = np.random.default_rng(0), environments(["atari/breakout"], num_envs=2), [], []
    recv = envs.recv

    def watched():
        result = recv()
        games.extend(envs.episode_return[result.done])
        return result

    def act(frames, task_ids):
        steps.append(len(steps))
        return rng.integers(18, size=len(task_ids))

    envs.recv = watched
    (row,) = evaluate(envs, 4, act=act)
    assert row["episodes"] == len(games) == 4 and min(games) >= 0 and max(games) < 20
    assert row["return"] == np.mean(games)
    assert row["score"] == pytest.approx((row["return"] - 1.7) / (30.5 - 1.7), abs=1e-5)
    assert len(steps) > 200, "four lives' worth of steps"
