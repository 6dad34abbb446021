"""The command line of brc_drq_atari.py: files of a run, user errors, kill and resume, reproducibility.

What brc_sac_continuous.py shares with this script as copied blocks (checkpoints, damage, full disks, logging) is tested
in test_cli.py.
"""

import json
import re
import shutil
import signal
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_files import assert_same, counters, curve, error_line, played, started, tensorboard, wait_for_checkpoint

import brc_drq_atari as brc

TESTS = Path(__file__).resolve().parent
SCRIPT = TESTS.parent / "brc_drq_atari.py"
SMALL = """--encoder-channels 1 2 --critic-width 8 --critic-depth 1 --num-atoms 11 --batch-size 4 --utd 1
--embedding-size 4 --eval-episodes 1 --no-augmentation""".split()
CATCH, MIRRORED, LIVES = (f"gym/pixel_tasks:Pixel{name}-v0" for name in ("Catch", "CatchMirrored", "Lives7"))
NO_UPDATES = ["--learning-starts", "1000000"]
pytestmark = pytest.mark.usefixtures("own_signal_handlers")


def train(*arguments) -> None:
    """The script in this process; UserError comes through."""
    brc.main(brc.parse_args([str(argument) for argument in arguments]))


def restored(run_dir: Path) -> tuple[brc.AgentState, brc.Replay, dict]:
    """Newest good checkpoint of a run."""
    saved = json.loads((run_dir / "args.json").read_text())
    values = {name: saved[name] for name in asdict(brc.Args())}
    args = brc.Args(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
    info = saved["env_info"]
    agent = brc.make_agent(args, info["num_tasks"], info["action_dim"], info["action_dims"])
    shapes = jax.eval_shape(lambda: agent.init(0))
    replay = brc.Replay(info["num_tasks"], min(args.buffer_size, args.total_timesteps + 1000), args.n_step, 0.99)
    state, loaded = brc.load_checkpoint(
        run_dir, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), replay
    )
    return state, replay, loaded


def test_one_switch_for_the_released_code():
    choices = lambda *flags: [  # noqa: E731
        getattr(brc.parse_args([*flags]), name) for name in ("embedding_norm", "truncation_bootstrap")
    ]
    assert choices() == ["l1", "critic"]
    assert choices("--variant", "released-code") == ["l2", "mean-reward"]
    assert choices("--variant", "released-code", "--embedding-norm", "l1") == ["l1", "mean-reward"]


# ------------------------------------------------------------------------------------------- --total-timesteps 0


@pytest.mark.slow  # 2 GB of learner
def test_the_papers_experiment_is_built_and_described(run, tmp_path):
    """All defaults: 26 games, the paper's network, and how much memory the run would take."""
    result = run("--total-timesteps", 0, "--run-root", tmp_path)
    assert result.returncode == 0, result.stderr
    (run_dir,) = tmp_path.iterdir()
    assert re.fullmatch(r"atari__brc_drq_atari__1__\d{10}", run_dir.name)
    assert [path.name for path in run_dir.iterdir()] == ["args.json"]
    saved = json.loads((run_dir / "args.json").read_text())
    assert {name: saved[name] for name in asdict(brc.Args())} == {
        **asdict(brc.Args()), "env_ids": [], "encoder_channels": [128, 256, 256], "total_timesteps": 0,
        "run_root": str(tmp_path),
    }  # fmt: skip
    info = saved["env_info"]
    assert info["task_names"] == brc.SUITES["atari"][0] and info["action_dims"] == [18] * 26
    assert info["num_tasks"] == 26 and info["observation_dim"] == [84, 84, 4] and info["action_dim"] == 18
    for package in ("jax", "envpool", "ale_py", "python"):
        assert re.match(r"\d+\.\d+", saved["versions"][package]), package
    assert "tasks: 26" in result.stdout and "|A| = 18" in result.stdout
    assert "23,335,642" in result.stdout, "see test_parameter_count"
    memory = float(re.search(r"([\d.]+) GB replay", result.stdout).group(1))
    assert 26 * 100_000 * 84 * 84 / 1e9 < memory < 20
    learner = float(re.search(r"([\d.]+) GB learner", result.stdout).group(1))
    assert learner == pytest.approx(4 * 4 * 23_335_642 / 1e9, abs=0.01), "critic, its target and Adam's two moments"


# --------------------------------------------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with everything on, and what it printed: 300 steps of a real game, cut to 90 steps a game, and of a pixel
    task; updates from step 100."""
    root, patch = tmp_path_factory.mktemp("runs"), pytest.MonkeyPatch()
    patch.setattr(brc, "MAX_GAME_STEPS", 90)
    patch.setattr(brc, "LOG_EVERY", 100)
    printed = []
    patch.setattr("builtins.print", lambda *args, **kwargs: printed.append(" ".join(map(str, args))))
    try:
        train(
            *("--env-ids", "atari/breakout", LIVES, *SMALL, "--eval-episodes", 2, "--final-eval-episodes", 2),
            *("--total-timesteps", 300),
            *("--learning-starts", 100, "--eval-every", 200, "--checkpoint-every", 150, "--keep-checkpoints", 2),
            *("--save-replay", "--capture-video", "--run-root", root, "--run-name", "whole", "--buffer-size", 250),
        )
    finally:
        patch.undo()
    return printed, root / "whole"


def test_files_of_a_run(finished):
    _, run_dir = finished
    names = sorted(path.name for path in run_dir.iterdir())
    assert len([name for name in names if name.startswith("events.out.tfevents.")]) == 1
    assert [name for name in names if not name.startswith("events")] == [
        "args.json", "checkpoints", "eval.csv", "replay", "videos",
    ]  # fmt: skip
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["150", "300"]


def test_eval_csv(finished):
    _, run_dir = finished
    header = (run_dir / "eval.csv").read_text().splitlines()[0]
    assert header == "step,updates,wall_time,task,episodes,return,success,score"
    rows = curve(run_dir)
    assert [(row["step"], row["updates"], row["task"]) for row in rows] == [
        (step, updates, task)
        for step, updates in (("0", "0"), ("200", "100"), ("300", "200"))  # utd 1 from step 100
        for task in ("atari/breakout", LIVES)
    ]
    for number, row in enumerate(rows):
        assert (row["episodes"], row["success"]) == ("2", "")
        if row["task"] == LIVES:  # whole games; each evaluation plays two, and its reset begins a third unseen
            first = 2 * (number // 2)
            assert row["score"] == "" and (float(row["return"]) - 28) % 35 == 0
            assert float(row["return"]) >= 28 + 70 * first + 35
        else:
            score = (float(row["return"]) - 1.7) / (30.5 - 1.7)
            assert float(row["score"]) == pytest.approx(score, abs=1e-4)


def test_tensorboard_points(finished):
    _, run_dir = finished
    values = tensorboard(run_dir)
    expected = f"""losses/critic gradient_norms/critic q/target_mean q/target_min q/target_max returns/normalized_mean
        returns/normalized_max_abs policy/epsilon updates speed/steps_per_second train/return/atari/breakout
        train/return/{LIVES} normalizer/atari/breakout normalizer/{LIVES} eval/return/atari/breakout
        eval/return/{LIVES} eval/score/atari/breakout eval/mean_score eval/median_score eval/iqm_score""".split()
    found = {tag.replace("_", "-").replace(":", "-") for tag in values}
    assert [tag for tag in expected if tag.replace("_", "-").replace(":", "-") not in found] == []
    assert all(np.isfinite(value) for points in values.values() for _, value in points)
    assert [step for step, _ in values["eval/iqm_score"]] == [0, 200, 300]
    assert [step for step, _ in values["losses/critic"]] == [200, 300]


def test_final_table(finished):
    printed, run_dir = finished
    rows = curve(run_dir)[-2:]
    for row in rows:
        (line,) = (line for line in printed if line.startswith(row["task"]))
        assert f"{float(row['return']):.1f}" in line and row["score"] in line
    for name in ("mean", "median", "iqm"):  # of the only game that has a score
        (line,) = (line for line in printed if line.split()[0] == name)
        assert f"{float(rows[0]['score']):.3f}" in line


def test_saved_replay_is_what_happened(finished):
    """A pixel task whose game of seven steps loses lives at 2, 5 and 7; the ring holds the last 250 of 300 steps."""
    _, run_dir = finished
    assert sorted(path.name for path in (run_dir / "replay").iterdir()) == [
        "atari-breakout.npy", "gym-pixel_tasks-PixelLives7-v0.npy",
    ]  # fmt: skip
    records = np.load(run_dir / "replay" / "gym-pixel_tasks-PixelLives7-v0.npy", allow_pickle=False)
    assert records.shape == (251,)  # the last record holds the frame that step 300 led to
    for record, number in zip(records, range(50, 301), strict=True):
        game, t = divmod(number, 8)  # frames 0 to 7 of each game; the action of the last one resets
        assert record["frame"][0, :2].tolist() == [game, t] and record["frame"].shape == (84, 84)
        assert record["first"] == (t in (0, 2, 5, 7)), number
        if number == 300:
            assert not record["valid"]
            continue
        assert record["valid"] == (t < 7)
        if record["valid"]:
            assert record["reward"] == t + 1 + 10 * game
            assert record["terminated"] == (t + 1 in (2, 5, 7)), "a lost life ends the episode for learning"
    following = records["frame"][1:, 0, 2].astype(int) - 1
    valid = records["valid"][:-1]
    assert np.array_equal(following[valid], records["action"][:-1][valid]), "actions belong to the frames they led to"
    assert set(records["action"][:-1].tolist()) == {0, 1, 2}, "of this task's own three"

    records = np.load(run_dir / "replay" / "atari-breakout.npy", allow_pickle=False)
    assert records["frame"].std() > 10 and records["action"].max() > 10
    resets = np.flatnonzero(~records["valid"][:-1]) + 50
    assert (np.diff(resets) <= 91).all() and len(resets) >= 2, "games of at most 90 steps"


def test_return_normalizer_counts_lives(finished):
    """Eq. 2 ends where the critic's episodes end: of a game's lives of 2, 3 and 2 steps the second has the largest
    return, in game 36, since game 37 had played four of its seven steps and not ended its second life."""
    _, run_dir = finished
    largest = counters(run_dir, 300)["max_return"][1]
    lives = {game: sum(0.99**k * (k + 3 + 10 * game) for k in range(3)) for game in (36, 37)}
    assert largest == pytest.approx(lives[36], rel=1e-6)


def test_clipped_rewards_are_learned_from_and_true_ones_are_scored(tmp_path):
    """Rewards of 1 to 7 are learned as 1, in the replay and in G (lives of 2, 3 and 2 steps); evaluation counts them
    all."""
    train("--env-ids", LIVES, *SMALL, *NO_UPDATES, "--total-timesteps", 50, "--clip-rewards", "--save-replay",
          "--run-root", tmp_path, "--run-name", "run")  # fmt: skip
    (records,) = (np.load(path) for path in (tmp_path / "run/replay").iterdir())
    assert set(records["reward"][records["valid"]]) == {1.0}
    assert counters(tmp_path / "run", 50)["max_return"] == pytest.approx([1 + 0.99 + 0.99**2], rel=1e-6)
    assert float(curve(tmp_path / "run")[-1]["return"]) >= sum(range(1, 8))


def test_checkpoint_holds_replay_and_counters(finished):
    _, run_dir = finished
    state, replay, loaded = restored(run_dir)
    assert (loaded["step"], loaded["updates"], replay.inserted, replay.size) == (300, 200, 300, 250)
    records = np.load(run_dir / "replay" / "atari-breakout.npy", allow_pickle=False)
    slots = np.arange(50, 301) % replay.slots.shape[1]
    np.testing.assert_array_equal(replay.slots["frame"][0, slots], records["frame"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_play_evaluates_the_newest_checkpoint(finished, monkeypatch, capsys):
    _, run_dir = finished
    monkeypatch.setattr(brc, "MAX_GAME_STEPS", 90)
    (policy,), rows = played(brc, run_dir, "--eval-episodes", 1)
    assert [(row["task"], row["episodes"]) for row in rows] == [("atari/breakout", 1), (LIVES, 1)]
    printed = capsys.readouterr().out
    assert f"playing {run_dir}, step 300" in printed
    for row in rows:
        assert re.search(rf"^{row['task']} +{row['return']:.1f} ", printed, re.MULTILINE)
    agent = brc.make_agent(brc.parse_args(["--resume", str(run_dir)]), 2, 18, [18, 3])
    frames, task_ids = np.random.default_rng(0).integers(256, size=(64, 4, 84, 84), dtype=np.uint8), np.arange(64) % 2
    greedy = agent.act(restored(run_dir)[0].critic, jax.random.PRNGKey(0), 0, frames, task_ids, 0.0)
    assert (np.asarray(policy(frames, task_ids)) == greedy).mean() > 0.9, "greedy but for EVAL_EPSILON"


def test_videos_show_the_game(finished):
    imageio = pytest.importorskip("imageio.v3")
    _, run_dir = finished
    videos = sorted(path.name for path in (run_dir / "videos").iterdir())
    assert videos == sorted(
        f"{task}-{step}.mp4" for task in ("atari-breakout", "gym-pixel_tasks-PixelLives7-v0") for step in (0, 200, 300)
    )
    frames = imageio.imread(run_dir / "videos" / "atari-breakout-300.mp4").astype(int)
    assert frames.shape[1:] == (210, 160, 3) and 20 < len(frames) <= 91
    assert (frames.std(axis=(1, 2, 3)) > 20).all() and frames.max() > 150, "black frames"
    red, green, blue = frames[:, 60:90, 20:140].mean(axis=(0, 1, 2))  # the wall, red and orange on top
    assert red > 1.3 * blue and red > 1.1 * green
    assert np.abs(np.diff(frames, axis=0)).max() > 60, "nothing moves"
    bar = imageio.imread(run_dir / "videos" / "gym-pixel_tasks-PixelLives7-v0-0.mp4")
    assert len(bar) == 8 and (np.diff(bar.mean(axis=(1, 2, 3))) > 5).all(), "one frame a step, from the first"


# ---------------------------------------------------------------------------------------------------- user errors

USER_ERRORS = {  # arguments, and what the line must name
    "unknown game": (["--env-ids", "atari/tetris"], "atari/tetris", "mspacman", "yarsrevenge"),
    "unknown family": (["--env-ids", "dmc/walker-run"], "dmc/walker-run", "atari/", "gym/"),
    "unknown suite": (["--suite", "atari57"], "atari57", "atari-transfer"),
    "game twice": (["--env-ids", "atari/pong", "atari/alien", "atari/pong"], "twice"),
    "suite and games": (["--env-ids", "atari/pong", "--suite", "atari"], "--suite", "--env-ids"),
    "continuous actions": (["--env-ids", "gym/pixel_tasks:PixelContinuousAction-v0"], "discrete", "ContinuousAction"),
    "color": (["--env-ids", "gym/pixel_tasks:PixelColor-v0"], "84 x 84", "Color"),
    "backend": (["--env-ids", CATCH, "--env-backend", "envpool"], CATCH, "--env-backend"),
    "resume nothing": (["--resume", "/nowhere/run"], "/nowhere/run"),
}  # fmt: skip
BAD_NUMBERS = """--total-timesteps -1; --learning-starts 0; --discount 1; --discount nan; --batch-size 0; --utd 0;
--buffer-size 11; --polyak-tau 1.5; --learning-rate inf; --weight-decay -1; --num-atoms 1; --v-max -20; --n-step 0;
--start-epsilon 1.1; --end-epsilon -0.1; --epsilon-decay-steps 0; --encoder-channels 0; --seed 2147483648"""


@pytest.mark.parametrize("name", USER_ERRORS)
def test_user_errors(name, command_line, tmp_path, monkeypatch):
    arguments, *expected = USER_ERRORS[name]
    monkeypatch.chdir(tmp_path)
    status, stderr = command_line(*arguments)
    assert status == 2
    line = error_line(stderr)
    assert [text for text in expected if text not in line] == []
    assert list(tmp_path.iterdir()) == [], "an error must leave nothing behind"


@pytest.mark.parametrize("flag", [flag.strip() for flag in BAD_NUMBERS.split(";")])
def test_numbers_out_of_range(flag):
    name, value = flag.split()
    with pytest.raises(brc.UserError, match=name):
        brc.parse_args([f"{name}={value}"])


def test_encoder_without_sections():
    with pytest.raises(brc.UserError, match="--encoder-channels"):
        brc.check_ranges(brc.Args(encoder_channels=()))


def test_reward_that_is_not_a_number(tmp_path):
    with pytest.raises(brc.UserError, match="not finite at step 6.*pixel_tasks:PixelNaNReward"):
        train("--env-ids", "gym/pixel_tasks:PixelNaNReward-v0", *SMALL, *NO_UPDATES, "--run-root", tmp_path)


# --------------------------------------------------------------------------------------------------------- resume


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two tasks: 120 steps with updates from step 60 on."""
    root = tmp_path_factory.mktemp("trained")
    arguments = ["--env-ids", CATCH, MIRRORED, *SMALL, "--total-timesteps", 120, "--learning-starts", 60]
    arguments += ["--eval-every", 60, "--checkpoint-every", 60, "--eval-episodes", 3]
    train(*arguments, "--run-root", root, "--run-name", "one")
    return arguments, root / "one"


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    """A copy of it that a test may change."""
    shutil.copytree(trained[1], tmp_path / "copy")
    return tmp_path / "copy"


def test_the_last_evaluation_plays_more_games(trained):
    rows = curve(trained[1])
    assert [(row["step"], row["episodes"]) for row in rows] == [
        (step, episodes) for step, episodes in (("0", "3"), ("60", "3"), ("120", "30")) for _ in range(2)
    ]


def test_same_seed_same_run(trained, tmp_path):
    """Every row of the curve, every frame in replay, every weight, bit for bit."""
    arguments, one = trained
    train(*arguments, "--run-root", tmp_path, "--run-name", "again")
    rows = [[{**row, "wall_time": ""} for row in curve(run)] for run in (one, tmp_path / "again")]
    assert rows[0] == rows[1] and len(rows[0]) == 6
    (state, replay, loaded), (other, other_replay, other_loaded) = restored(one), restored(tmp_path / "again")
    assert_same(state, other)
    assert_same(replay, other_replay)
    assert loaded["rng"] == other_loaded["rng"] and loaded["max_return"] == other_loaded["max_return"]


def test_resume_goes_on_from_the_saved_state(copied, monkeypatch):
    """The first update starts with the very parameters, moments and random key that were saved; replay, normalizer and
    counters go on, and one slot ends the interrupted games."""
    saved_state, saved_replay, saved = restored(copied)
    make_agent, states = brc.make_agent, []

    def watched(*args):
        agent = make_agent(*args)

        def update(state, batches, max_return):
            states.append((jax.tree.map(np.array, state), np.array(max_return)))
            return agent.update(state, batches, max_return)

        return agent._replace(update=update)

    monkeypatch.setattr(brc, "make_agent", watched)
    train("--resume", copied, "--total-timesteps", 140)
    assert len(states) == 20, "updates go on at once"
    assert_same(states[0][0], saved_state)
    assert states[0][1].tolist() == saved["max_return"] and min(saved["max_return"]) > 0
    state, replay, loaded = restored(copied)
    assert (loaded["step"], loaded["updates"], replay.inserted) == (140, 80, 141)
    slots, saved_slots = replay.slots, saved_replay.slots
    np.testing.assert_array_equal(slots["frame"][:, :121], saved_slots["frame"][:, :121])
    np.testing.assert_array_equal(slots["valid"][:, :120], saved_slots["valid"][:, :120])
    assert not slots["valid"][:, 120].any() and slots["first"][:, 121].all() and slots["valid"][:, 121].all()
    assert [row["step"] for row in curve(copied)] == ["0", "0", "60", "60", "120", "120", "140", "140"]
    assert [row["updates"] for row in curve(copied)][::2] == ["0", "0", "60", "80"]
    args = json.loads((copied / "args.json").read_text())
    assert args["encoder_channels"] == [1, 2] and args["total_timesteps"] == 140


@pytest.mark.parametrize(
    "change",
    ["--seed 9", "--encoder-channels 2 2", "--n-step 1", f"--env-ids {CATCH}", "--augmentation", "--dtype bfloat16",
     "--end-epsilon 0.5", "--suite atari"],
)  # fmt: skip
def test_resume_refuses_other_arguments(change, copied):
    before = (copied / "args.json").read_bytes()
    with pytest.raises(brc.UserError, match=change.split()[0]):
        train("--resume", copied, *change.split())
    assert (copied / "args.json").read_bytes() == before


def test_resume_with_the_same_arguments_is_no_change(copied):
    """Tuples come back from JSON as lists."""
    arguments = ["--resume", str(copied), "--encoder-channels", "1", "2", "--env-ids", CATCH, MIRRORED]
    args = brc.parse_args(arguments)
    assert args.encoder_channels == (1, 2) and args.env_ids == (CATCH, MIRRORED)


def test_resume_of_a_finished_run_says_so(copied):
    with pytest.raises(brc.UserError, match="finished.*--total-timesteps"):
        train("--resume", copied)


@pytest.mark.slow  # as in test_cli.py, with the same part 3
def test_kill_then_terminate_then_finish(environment, tmp_path):
    """kill -9 after a checkpoint, resume; SIGTERM, resume; the run ends as if nothing had happened."""
    run_dir, log, slow = tmp_path / "run", tmp_path / "killed.log", "gym/pixel_tasks:PixelSlow-v0"
    arguments = ["--env-ids", slow, *SMALL, "--total-timesteps", 20_000, "--learning-starts", 100, "--eval-every", 100]
    arguments += ["--checkpoint-every", 50, "--run-root", tmp_path, "--run-name", "run"]
    process = started(SCRIPT, arguments, environment, log)
    wait_for_checkpoint(run_dir, 150, process, log)
    process.kill()
    process.wait()
    killed_at = brc.checkpoint_steps(run_dir)[0]

    log = tmp_path / "terminated.log"  # the killed run's worker may still write to the first
    process = started(SCRIPT, ["--resume", run_dir], environment, log)
    wait_for_checkpoint(run_dir, killed_at + 50, process, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=240) == 0, log.read_text()
    stopped_at = brc.checkpoint_steps(run_dir)[0]
    assert f"resumed {run_dir} at step {killed_at:,}" in log.read_text()
    assert re.search(rf"^stopped at step {stopped_at:,}.*--resume {run_dir}$", log.read_text(), re.MULTILINE)
    assert "Traceback" not in log.read_text()

    end = (stopped_at // 100 + 1) * 100
    train("--resume", run_dir, "--total-timesteps", end)
    rows = curve(run_dir)
    assert [int(row["step"]) for row in rows] == list(range(0, end + 1, 100))
    assert [int(row["updates"]) for row in rows] == [max(int(row["step"]) - 100, 0) for row in rows]
    times = [float(row["wall_time"]) for row in rows]
    assert times == sorted(times)
    newest = counters(run_dir, end)
    assert (newest["step"], newest["updates"], newest["replay_inserted"]) == (end, end - 100, end + 2)
