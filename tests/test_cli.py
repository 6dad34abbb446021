"""The command line: files of a run, user errors, kill and resume, damaged checkpoints, full disk, reproducibility.

Runs are processes of their own where a signal, an exit status or a hang is what counts. Elsewhere `command_line` and
`train` call the script in this process, which saves the 10 s of importing JAX.
"""

import ctypes
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_files import assert_same, counters, curve, error_line, played, started, tensorboard, wait_for_checkpoint

import brc_sac_continuous as brc

TESTS = Path(__file__).resolve().parent
SCRIPT = TESTS.parent / "brc_sac_continuous.py"
SMALL = """--critic-width 32 --critic-depth 1 --actor-width 32 --batch-size 32 --eval-episodes 1""".split()
NO_UPDATES = ["--learning-starts", "1000000"]  # nothing to compile but the policy
REACH, PUSH = "metaworld/reach", "metaworld/push"
pytestmark = pytest.mark.usefixtures("own_signal_handlers")


def train(*arguments) -> None:
    """The script in this process, on this module's import of it; UserError comes through."""
    brc.main(brc.parse_args([str(argument) for argument in arguments]))


def zero_state(args: brc.Args, num_tasks: int, observation_dim: int, action_dim: int) -> brc.AgentState:
    """An agent's state in shape and type only, which needs no compilation."""
    agent = brc.make_agent(args, num_tasks, observation_dim, action_dim)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(lambda: agent.init(0)))


def restored(run_dir: Path) -> tuple[brc.AgentState, brc.Replay, dict]:
    """Newest good checkpoint of a run."""
    saved = json.loads((run_dir / "args.json").read_text())
    args = brc.Args(**{name: saved[name] for name in asdict(brc.Args())})
    sizes = [saved["env_info"][name] for name in ("num_tasks", "observation_dim", "action_dim")]
    replay = brc.Replay(sizes[0], min(args.buffer_size, max(args.total_timesteps, 1) + 1000), *sizes[1:])
    state, loaded = brc.load_checkpoint(run_dir, zero_state(args, *sizes), replay)
    return state, replay, loaded


# ------------------------------------------------------------------------------------------- --total-timesteps 0


def test_zero_timesteps_builds_everything_and_exits(run, tmp_path):
    result = run(
        *("--env-ids", "dmc/cartpole-swingup", REACH, "--total-timesteps", 0, "--critic-width", 48, "--seed", 5),
        *("--run-root", tmp_path, "--exp-name", "zero"),
    )
    assert result.returncode == 0, result.stderr
    (run_dir,) = tmp_path.iterdir()
    assert re.fullmatch(r"dmc-cartpole-swingup__zero__5__\d{10}", run_dir.name)
    assert [path.name for path in run_dir.iterdir()] == ["args.json"]

    saved = json.loads((run_dir / "args.json").read_text())
    args = brc.Args(
        env_ids=("dmc/cartpole-swingup", REACH), total_timesteps=0, critic_width=48, seed=5, run_root=str(tmp_path),
        exp_name="zero", batch_size=1024,
    )  # fmt: skip
    assert {name: saved[name] for name in asdict(args)} == {**asdict(args), "env_ids": list(args.env_ids)}
    info = {"num_tasks": 2, "task_names": list(args.env_ids), "observation_dim": 39, "action_dim": 4}
    assert {name: saved["env_info"][name] for name in info} == info
    assert saved["device"] == jax.devices("cpu")[0].device_kind and "git_commit" in saved
    for package in ("jax", "envpool", "mujoco", "python"):
        assert re.match(r"\d+\.\d+", saved["versions"][package]), package
    assert saved["versions"]["jax"] == jax.__version__

    state = zero_state(args, 2, 39, 4)
    for part in ([state.critic, state.target_critic], state.actor):
        assert f"{brc.parameter_count(part):,}" in result.stdout


@pytest.mark.parametrize(
    ("tasks", "given", "expected"),
    [([REACH], [], 256), ([REACH, "dmc/cartpole-swingup"], [], 1024), ([REACH], ["--batch-size", "32"], 32)],
)
def test_batch_size_follows_the_number_of_tasks(tasks, given, expected, tmp_path):
    """Section 4: the backbone's 256 times 4 for several tasks."""
    train("--env-ids", *tasks, *given, "--total-timesteps", 0, "--critic-width", 8, "--run-root", tmp_path,
          "--run-name", "run")  # fmt: skip
    assert json.loads((tmp_path / "run/args.json").read_text())["batch_size"] == expected


def test_one_switch_for_the_released_code():
    """--variant sets three choices; one given by hand wins, also where it names the paper's."""
    choices = lambda *flags: [  # noqa: E731
        getattr(brc.parse_args(["--env-ids", REACH, *flags]), name)
        for name in ("variant", "embedding_norm", "truncation_bootstrap", "entropy_correction")
    ]
    assert choices() == choices("--variant", "paper") == ["paper", "l1", "critic", "empirical"]
    assert choices("--variant", "released-code") == ["released-code", "l2", "mean-reward", "constant"]
    assert choices("--embedding-norm", "l1", "--variant", "released-code")[1:] == ["l1", "mean-reward", "constant"]
    assert choices("--embedding-norm", "l2")[1:] == ["l2", "critic", "empirical"]


# --------------------------------------------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """A run with everything on: its process and its directory. 600 steps of two tasks, updates from step 100."""
    root = tmp_path_factory.mktemp("runs")
    result = run(
        *("--env-ids", "dmc/cartpole-swingup", REACH, *SMALL, "--eval-episodes", 2, "--total-timesteps", 600),
        *("--learning-starts", 100, "--eval-every", 400, "--checkpoint-every", 150, "--keep-checkpoints", 2),
        *("--save-replay", "--log-task-statistics", "--track", "--run-root", root, "--run-name", "whole", "--utd", 1),
    )
    assert result.returncode == 0, result.stderr
    return result, root / "whole"


def test_eval_csv(finished):
    _, run_dir = finished
    header = (run_dir / "eval.csv").read_text().splitlines()[0]
    assert header == "step,updates,wall_time,task,episodes,return,success,score"
    rows = curve(run_dir)
    steps = [(row["step"], row["updates"], row["task"]) for row in rows]
    assert steps == [
        (step, updates, task)
        for step, updates in (("0", "0"), ("400", "300"), ("600", "500"))  # utd 1 from step 100
        for task in ("dmc/cartpole-swingup", REACH)
    ]
    times = [float(row["wall_time"]) for row in rows]
    assert times == sorted(times) and times[-1] > 0
    for row in rows:
        assert row["episodes"] == "2"
        if row["task"] == REACH:
            assert row["success"] in ("0.0", "0.5", "1.0") and row["score"] == row["success"]
        else:
            assert row["success"] == ""
            assert 0 <= float(row["return"]) <= 1000
            assert float(row["score"]) == pytest.approx(float(row["return"]) / 1000, abs=1e-5)


def test_tensorboard_points(finished):
    _, run_dir = finished
    values = tensorboard(run_dir)
    expected = """losses/critic losses/actor losses/temperature gradient_norms/critic gradient_norms/actor
        policy/entropy policy/temperature train/return/metaworld/reach normalizer/metaworld/reach
        normalizer/dmc/cartpole-swingup speed/steps_per_second eval/mean_return eval/mean_score
        tasks/td_loss/metaworld/reach
        tasks/gradient_norm/dmc/cartpole-swingup tasks/entropy/metaworld/reach relative_variance/td_loss
        gradient_conflict_rate""".split()
    assert [tag for tag in expected if tag not in values] == []
    assert all(math.isfinite(value) for points in values.values() for _, value in points)
    assert [step for step, _ in values["eval/mean_return"]] == [0, 400, 600]
    mean = np.mean([float(row["return"]) for row in curve(run_dir)[-2:]])
    assert values["eval/mean_return"][-1][1] == pytest.approx(mean, rel=1e-4)


def test_checkpoints_are_kept_and_complete(finished):
    _, run_dir = finished
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["450", "600"]
    newest = counters(run_dir, 600)
    assert (newest["step"], newest["updates"], newest["replay_inserted"]) == (600, 500, 600)
    _, replay, loaded = restored(run_dir)
    assert loaded["step"] == 600 and replay.size == 600


def test_saved_replay_is_what_happened(finished):
    """One record a step; a valid record's next observation is in the next record; resets are marked invalid."""
    _, run_dir = finished
    _, replay, _ = restored(run_dir)
    assert sorted(path.name for path in (run_dir / "replay").iterdir()) == [
        "dmc-cartpole-swingup.npy", "metaworld-reach.npy",
    ]  # fmt: skip
    for task, (name, observation_dim, action_dim) in enumerate(
        [("dmc-cartpole-swingup", 5, 1), ("metaworld-reach", 39, 4)]
    ):
        records = np.load(run_dir / "replay" / f"{name}.npy", allow_pickle=False)
        assert records.shape == (601,)  # the last record holds the observation that step 600 led to
        assert records["observation"].shape[1:] == (observation_dim,) and records["action"].shape[1:] == (action_dim,)
        resets = [200, 401] if name == "metaworld-reach" else []  # after the final observations of 200-step episodes
        assert np.flatnonzero(~records["valid"]).tolist() == [*resets, 600]
        assert not records["terminated"].any()
        assert (np.abs(records["action"]) <= 1).all() and records["action"][:600].std(axis=0).min() > 0.1
        assert np.array_equal(records["observation"], replay.slots["observation"][task, :601, :observation_dim])
        assert np.array_equal(records["reward"][:600], replay.slots["reward"][task, :600])
        assert (records["reward"][records["valid"]] != 0).any()
    hand = records["observation"][:, :3]  # moves by little in a step, but jumps at a reset
    jumps = np.abs(np.diff(hand, axis=0)).max(axis=1)
    assert jumps[records["valid"][:-1]].max() < 0.05


def test_task_statistics(finished):
    _, run_dir = finished
    paths = sorted(path.name for path in (run_dir / "statistics").iterdir())
    assert paths == ["400.npz", "600.npz"]  # none at step 0, before learning
    with np.load(run_dir / "statistics" / "600.npz", allow_pickle=False) as arrays:
        assert arrays["task"].tolist() == ["dmc/cartpole-swingup", REACH]
        for name in ("td_loss", "gradient_norm", "entropy"):
            assert arrays[name].shape == (2,) and np.isfinite(arrays[name]).all()
        assert (arrays["td_loss"] > 0).all() and (arrays["gradient_norm"] > 0).all()
        np.testing.assert_allclose(np.diagonal(arrays["gradient_cosine"]), 1, atol=1e-3)
        assert abs(arrays["gradient_cosine"][0, 1]) <= 1
        np.testing.assert_allclose(np.abs(arrays["embedding"]).sum(axis=1), 1, rtol=1e-5)


def test_final_table(finished):
    result, run_dir = finished
    rows = curve(run_dir)[-2:]
    for row in rows:
        (line,) = (line for line in result.stdout.splitlines() if line.startswith(row["task"]))
        assert f"{float(row['return']):.1f}" in line and row["score"] in line
    mean = np.mean([float(row["score"]) for row in rows])
    assert any(line.startswith("mean") and f"{mean:.3f}" in line for line in result.stdout.splitlines())


def test_weights_and_biases_offline(finished):
    _, run_dir = finished
    (path,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    content = path.read_bytes()
    for name in ("losses/critic", "eval/mean_score", "speed/steps_per_second", "critic_width"):
        assert name.encode() in content, "the scalars of TensorBoard, and the arguments"


@pytest.mark.parametrize("task", ["Truncates20", "HardToFilm"])
def test_video(task, tmp_path, monkeypatch):
    """Evaluation episodes as films: as many frames as promised, and what they show changes. The run's paths are those
    of where it began."""
    imageio = pytest.importorskip("imageio.v3")
    monkeypatch.chdir(tmp_path)
    train(
        *("--env-ids", f"gym/gym_tasks:{task}-v0", *SMALL, *NO_UPDATES, "--total-timesteps", 1, "--capture-video"),
        *("--run-root", ".", "--run-name", "video"),
    )
    assert brc.checkpoint_steps(tmp_path / "video") == [1]
    videos = sorted((tmp_path / "video" / "videos").iterdir())
    assert [path.name for path in videos] == [f"gym-gym_tasks-{task}-v0-{step}.mp4" for step in (0, 1)]
    frames = imageio.imread(videos[0])
    assert frames.shape in ((10, 64, 64, 3), (11, 64, 64, 3))  # every second of 20, or of 21 with the reset's
    brightness = frames.mean(axis=(1, 2, 3))
    assert (np.diff(brightness) > 5).all(), "the bar must grow from frame to frame"


@pytest.mark.parametrize("task", ["PointLeft", "LeavesWhenFilmed"])
def test_video_that_cannot_be_drawn_does_not_end_the_run(task, tmp_path, capfd):
    train(
        *("--env-ids", f"gym/gym_tasks:{task}-v0", *SMALL, *NO_UPDATES, "--total-timesteps", 1, "--capture-video"),
        *("--run-root", tmp_path, "--run-name", "video"),
    )
    assert f"warning: no video of gym/gym_tasks:{task}-v0" in capfd.readouterr().err
    assert not list((tmp_path / "video/videos").iterdir())
    before = tmp_path / f"video/videos/gym-gym_tasks-{task}-v0-1.mp4"  # of a machine that could
    before.write_bytes(b"film")
    played(brc, tmp_path / "video", "--capture-video", "--eval-episodes", 1)
    assert before.read_bytes() == b"film" and list(before.parent.iterdir()) == [before]
    assert [row["step"] for row in curve(tmp_path / "video")] == ["0", "1"]


DRAW = """
import sys, numpy as np, brc_sac_continuous as brc
env = brc.make_env(sys.argv[2], render_mode="rgb_array")
env.reset(seed=0)
render = brc.frame_renderer(env)
first = render()
for _ in range(15):
    env.step(np.ones(env.action_space.shape, np.float32))
np.save(sys.argv[1], np.stack([first, render()]))
"""


@pytest.mark.parametrize("task", [pytest.param("dmc/cartpole-swingup", marks=pytest.mark.dm_control), REACH])
def test_frames_are_drawn_without_a_display(task, environment, tmp_path):
    variables = {name: value for name, value in environment.items() if name != "DISPLAY"}
    variables |= {"MUJOCO_GL": "egl", "PYTHONPATH": str(SCRIPT.parent)}
    path = tmp_path / "frames.npy"
    process = subprocess.run([sys.executable, "-c", DRAW, path, task], env=variables, capture_output=True, text=True)
    if process.returncode and re.search(r"\bE?GL\b|OpenGL", process.stderr):
        pytest.skip(f"no headless OpenGL here: {process.stderr.strip().splitlines()[-1]}")
    assert process.returncode == 0, process.stderr
    first, last = np.load(path)
    assert first.dtype == np.uint8 and first.shape[2] == 3
    assert first.std() > 10, "an empty frame"
    assert np.abs(first.astype(int) - last).max() > 50, "nothing moved"


# ----------------------------------------------------------------------------------------------------------- play


def test_play_evaluates_the_newest_good_checkpoint(finished, tmp_path, capsys):
    """Of a run that still goes on and whose last checkpoint is damaged: its policy, its table, and no trace of it."""
    run_dir = tmp_path / "copy"
    shutil.copytree(finished[1], run_dir, ignore=shutil.ignore_patterns("wandb"))
    (run_dir / "checkpoints/600/checkpoint.json").write_text("{}")
    (policy,), rows = played(brc, run_dir, "--eval-episodes", 3)
    printed = capsys.readouterr().out
    assert f"playing {run_dir}, step 450" in printed
    assert [(row["task"], row["episodes"]) for row in rows] == [("dmc/cartpole-swingup", 3), (REACH, 3)]
    for row in rows:
        assert re.search(rf"^{row['task']} +{row['return']:.1f} .*{row['score']}$", printed, re.MULTILINE)
    assert not (run_dir / "videos").exists()

    state, _, counters = restored(run_dir)  # which puts the damaged one aside
    assert counters["step"] == 450
    agent = brc.make_agent(brc.parse_args(["--resume", str(run_dir)]), 2, 39, 4, [1, 4])
    observations, task_ids = np.random.default_rng(0).normal(size=(2, 39)).astype(np.float32), np.arange(2)
    expected = agent.act_deterministic(state.actor, state.critic, observations, task_ids)
    np.testing.assert_array_equal(policy(observations, task_ids), expected)


def test_play_needs_no_memory_for_replay(tmp_path):
    """A run of a large machine is played on a small one."""
    train("--env-ids", "gym/gym_tasks:Truncates20-v0", *SMALL, *NO_UPDATES, "--total-timesteps", 3, "--run-root",
          tmp_path, "--run-name", "run")  # fmt: skip
    about = json.loads((tmp_path / "run/args.json").read_text()) | {"buffer_size": 10**13, "total_timesteps": 10**13}
    (tmp_path / "run/args.json").write_text(json.dumps(about))
    assert [row["episodes"] for row in played(brc, tmp_path / "run", "--eval-episodes", 2)[1]] == [2]


def test_play_films(tmp_path):
    pytest.importorskip("imageio")
    train("--env-ids", "gym/gym_tasks:Truncates20-v0", *SMALL, *NO_UPDATES, "--total-timesteps", 3, "--run-root",
          tmp_path, "--run-name", "run")  # fmt: skip
    played(brc, tmp_path / "run", "--capture-video")
    assert [path.name for path in (tmp_path / "run/videos").iterdir()] == ["gym-gym_tasks-Truncates20-v0-3.mp4"]


PLAY_ERRORS = {  # what is played, and what the line must name
    "nothing": (["--play", "/nowhere/run"], "--play /nowhere/run: no run of this script there"),
    "and resumed": (["--play", "RUN", "--resume", "RUN"], "exclude each other"),
    "an unset variable": (["--play", "", "--env-ids", REACH], "need a run directory, not an empty name"),
    "resumed by an unset variable": (["--resume", "", "--env-ids", REACH], "need a run directory, not an empty name"),
    "other arguments": (["--play", "RUN", "--critic-width", "8", "--track"], "not --track, --critic-width;"),
    "another script's": (["--play", "OTHER"], "made by brc_offline_bc"),
    "no checkpoint yet": (["--play", "RUN"], "no undamaged checkpoint in", "wait for one"),
}


@pytest.mark.parametrize("name", PLAY_ERRORS)
def test_play_errors(name, tmp_path, command_line):
    train(*TASK, *SMALL, "--total-timesteps", 0, "--run-root", tmp_path, "--run-name", "RUN")
    before, other = (tmp_path / "RUN/args.json").read_bytes(), {"script": "brc_offline_bc"}
    (tmp_path / "OTHER").mkdir()
    (tmp_path / "OTHER/args.json").write_text(json.dumps(other))
    words, *expected = PLAY_ERRORS[name]
    status, stderr = command_line(*(tmp_path / word if word in ("RUN", "OTHER") else word for word in words))
    assert status == 2
    assert [text for text in expected if text not in error_line(stderr)] == []
    assert (tmp_path / "RUN/args.json").read_bytes() == before
    assert [path.name for path in (tmp_path / "RUN").iterdir()] == ["args.json"]


# ---------------------------------------------------------------------------------------------------- user errors

TASK = ["--env-ids", REACH]
USER_ERRORS = {  # arguments, and what the line must name
    "unknown task": (["--env-ids", "dmc/walker-fly"], "dmc/walker-fly", "walker-walk"),
    "unknown family": (["--env-ids", "mujoco/Ant-v5"], "mujoco/Ant-v5", "metaworld", "gym"),
    "no family": (["--env-ids", "walker-walk"], "walker-walk", "dmc"),
    "family alone": (["--env-ids", "gym/"], "gym/", "metaworld"),
    "unknown suite": (["--suite", "atari100k"], "atari100k", "dmc-dogs", "mw-dmc"),
    "task twice": (["--env-ids", REACH, PUSH, REACH], "twice"),
    "suite and tasks": (["--env-ids", REACH, "--suite", "dmc-dogs"], "--suite", "--env-ids"),
    "no tasks": ([], "--env-ids", "--suite", "dmc-dogs"),
    "missing package": (["--env-ids", "humanoidbench/h1-walk", "--total-timesteps", "0"], brc.INSTALL["humanoidbench"]),
    "unknown gym id": (["--env-ids", "gym/NoSuchTask-v0"], "NoSuchTask"),
    "backend": (["--env-ids", "gym/Pendulum-v1", "--env-backend", "envpool"], "gym/Pendulum-v1", "--env-backend"),
    "resume nothing": (["--resume", "/nowhere/run"], "/nowhere/run"),
}  # fmt: skip
BAD_NUMBERS = """--total-timesteps -1; --learning-starts -5; --eval-every 0; --eval-episodes 0; --checkpoint-every 0;
--keep-checkpoints 0; --discount 1; --discount 1.5; --discount -0.1; --discount nan; --batch-size 0; --batch-size -32;
--utd 0; --buffer-size 0; --polyak-tau 1.5; --polyak-tau -0.1; --actor-lr -1; --actor-lr nan; --critic-lr inf;
--temperature-lr nan; --weight-decay -1; --initial-temperature 0; --initial-temperature nan; --num-atoms 1; --v-max nan;
--v-max -20; --v-min 10; --v-min -inf; --critic-width 0; --critic-depth -1; --num-critics 0; --actor-width -1;
--embedding-size 0; --seed -1; --seed 4294967296; --target-entropy nan; --target-entropy inf"""


@pytest.mark.parametrize("name", USER_ERRORS)
def test_user_errors(name, command_line, tmp_path, monkeypatch):
    arguments, *expected = USER_ERRORS[name]
    if name == "missing package" and "humanoid_bench" in sys.modules:
        pytest.skip("humanoid_bench is installed")
    monkeypatch.chdir(tmp_path)
    status, stderr = command_line(*arguments)
    assert status == 2
    line = error_line(stderr)
    assert [text for text in expected if text not in line] == []
    assert list(tmp_path.iterdir()) == [], "an error must leave nothing behind"


@pytest.mark.parametrize("flag", [flag.strip() for flag in BAD_NUMBERS.split(";")])
def test_numbers_out_of_range(flag, command_line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, value = flag.split()
    unless = ["--total-timesteps=0", "--critic-width=16"]  # quick, should the number be accepted
    status, stderr = command_line(*TASK, f"{name}={value}", *(other for other in unless if name not in other))
    assert status == 2
    assert name in error_line(stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flag",
    ["--batch-size abc", "--batch-size 1.5", "--discount high", "--critic-arch resnet", "--env-backend brax",
     "--no-such-flag 1", "--total-timesteps 1e6"],
)  # fmt: skip
def test_wrong_types_and_flags(flag, command_line):
    status, stderr = command_line(*TASK, *flag.split())
    assert status == 2
    assert "Traceback" not in stderr
    assert flag.split()[0] in stderr


def test_replay_larger_than_memory(command_line, tmp_path):
    status, stderr = command_line(
        *(*TASK, "--total-timesteps", 10**12, "--buffer-size", 10**12, "--critic-width", 16, "--run-root", tmp_path)
    )
    assert status == 2
    assert "memory" in error_line(stderr) and "--buffer-size" in stderr


def test_errors_of_a_real_process(run, tmp_path):
    result = run("--env-ids", "dmc/walker-fly", "--run-root", tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.strip().startswith("error: ") and "\n" not in result.stderr.strip()


def test_run_root_that_is_a_file(command_line, tmp_path):
    (tmp_path / "file").touch()
    status, stderr = command_line(
        *(*TASK, "--total-timesteps", 0, "--critic-width", 16, "--run-root", tmp_path / "file")
    )
    assert status == 2
    assert str(tmp_path / "file") in error_line(stderr)


@pytest.fixture(scope="module", params=["Raises", "Killed", "NoFile", "KilledAtStart"])
def failed(request, run, tmp_path_factory) -> tuple[str, subprocess.CompletedProcess, Path]:
    """A run whose environment fails at every 21st of its steps, or before its first; and its directory."""
    task, root = f"gym/gym_tasks:{request.param}-v0", tmp_path_factory.mktemp("failed")
    arguments = ["--env-ids", task, *SMALL, *NO_UPDATES, "--total-timesteps", 1000]
    return task, run(*arguments, "--run-root", root, "--run-name", "run"), root / "run"


def warnings_of(stderr: str) -> list[str]:
    return [line for line in re.split(r"[\r\n]", stderr) if line.startswith("warning: ")]


def test_failing_environment_ends_the_run(failed):
    task, result, _ = failed
    assert result.returncode == 2
    (line,) = (line for line in re.split(r"[\r\n]", result.stderr) if line.startswith("error: "))
    assert task in line


def test_failing_environment_is_one_line(failed):
    task, result, _ = failed
    line, died = error_line(result.stderr), "ended its worker process, perhaps for lack of memory"
    expected = {"Raises": "RuntimeError: the arm fell off", "NoFile": "/nowhere/arm.stl", "Killed": died,
                "KilledAtStart": died}  # fmt: skip
    reason = expected[task.removeprefix("gym/gym_tasks:").removesuffix("-v0")]
    assert reason in line
    warned = warnings_of(result.stderr)
    assert len(warned) == (0 if "KilledAtStart" in task else brc.Worker.max_failures)
    assert all(task in warning and reason in warning for warning in warned)


def test_failing_environment_leaves_a_checkpoint(failed):
    """Written right after the last failure, and named."""
    task, result, run_dir = failed
    if "KilledAtStart" in task:
        assert not run_dir.exists()
        return
    last = re.search(r"the last good checkpoint is (\S+)$", error_line(result.stderr))[1]
    newest = brc.checkpoint_steps(run_dir)[0]
    assert last == str(run_dir / "checkpoints" / str(newest)) and Path(last).is_dir()
    failed_at = int(re.match(r"warning: step (\d+): ", warnings_of(result.stderr)[-1])[1])
    assert newest == failed_at + 1


@pytest.mark.parametrize("failed", ["Raises"], indirect=True)
def test_run_that_failing_environments_ended_can_be_resumed(failed, tmp_path):
    run_dir = shutil.copytree(failed[2], tmp_path / "run")
    total = brc.checkpoint_steps(run_dir)[0] + 3
    train("--resume", run_dir, "--total-timesteps", total)
    assert brc.checkpoint_steps(run_dir)[0] == total and curve(run_dir)[-1]["step"] == str(total)


def test_environment_that_fails_once_costs_an_episode(run, tmp_path):
    """A line that says so and a checkpoint right after it; the run goes on to its end."""
    tasks = ["gym/gym_tasks:RaisesOnce-v0", "gym/gym_tasks:Truncates3-v0"]
    arguments = ["--env-ids", *tasks, *SMALL, *NO_UPDATES, "--total-timesteps", 60, "--run-root", tmp_path]
    result = run(*arguments, "--run-name", "run", GYM_TASKS_MARKS=str(tmp_path / "marks"))
    assert result.returncode == 0, result.stderr
    (line,) = warnings_of(result.stderr)
    assert line.startswith(f"warning: step 24: {tasks[0]} failed: RuntimeError: a fuse blew; ")
    assert brc.checkpoint_steps(tmp_path / "run") == [60, 25]
    assert [(row["step"], row["task"]) for row in curve(tmp_path / "run")] == [
        (step, task) for step in ("0", "60") for task in tasks
    ]
    valid = restored(tmp_path / "run")[1].slots["valid"][:, :60]
    assert np.flatnonzero(~valid[0]).tolist() == [5, 11, 17, 23, 24, 30, 36, 42, 48, 54]
    assert np.flatnonzero(~valid[1]).tolist() == list(range(3, 60, 4)), "the other task's episodes are as ever"


def test_a_task_that_prints_outlives_its_reader(environment, tmp_path):
    """Its worker process writes to the run's own output."""
    arguments = ["--env-ids", "gym/gym_tasks:Prints-v0", *SMALL, *NO_UPDATES, "--total-timesteps", 60]
    command = [sys.executable, SCRIPT, *map(str, arguments), "--run-root", str(tmp_path), "--run-name", "run"]
    process = subprocess.Popen(
        command, cwd=TESTS.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    error = process.stderr.read().decode()
    assert process.wait(timeout=60) == 0 and warnings_of(error) == [], error
    assert curve(tmp_path / "run")[-1]["step"] == "60"
    process.stderr.close()


@pytest.mark.parametrize("missing", [True, False])
def test_weights_and_biases_that_cannot_start(missing, tmp_path, monkeypatch):
    """Not installed, or not logged in: the reason and the way out."""
    if missing:
        monkeypatch.setitem(sys.modules, "wandb", None)
    else:
        wandb = pytest.importorskip("wandb")
        monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(wandb.errors.UsageError("No API key")))
    with pytest.raises(brc.UserError, match="--track: .*(wandb|No API key).*; pip install wandb, wandb login, or"):
        train(*TASK, *SMALL, "--total-timesteps", 1, "--track", "--run-root", tmp_path)


def test_evaluation_that_no_checkpoint_counts_is_dropped(tmp_path):
    """A run stopped in an evaluation, resumed, and killed after it: the next resume evaluates again, once."""
    row = {"task": "gym/A", "episodes": 1, "return": 1.0, "success": "", "score": ""}
    args = brc.Args(run_root=str(tmp_path), run_name="run")
    with brc.Run(args, "task", 100) as run:
        run.start()
        for run.step in (0, 10, 20):
            run.log_evaluation([row])
    args.resume = str(tmp_path / "run")
    with brc.Run(args, "task", 100) as run:
        run.step, run.last_evaluation = 20, 10  # the checkpoint of step 20 knows the evaluation of step 10
        run.start()
    assert [row["step"] for row in curve(tmp_path / "run")] == ["0", "10"]


def test_two_processes_cannot_own_one_run(finished, tmp_path, command_line):
    shutil.copytree(finished[1], tmp_path / "run")
    args = brc.Args(run_root=str(tmp_path), resume=str(tmp_path / "run"))
    with brc.Run(args, "task", 1000):
        status, stderr = command_line("--resume", tmp_path / "run", "--total-timesteps", 601)
        assert status == 2 and "in use by another process" in error_line(stderr)
    brc.Run(args, "task", 1000).__exit__(None, None, None)  # free again


def test_a_renamed_copy_is_its_own_experiment(environment, tmp_path):
    shutil.copy(SCRIPT, tmp_path / "my_variant.py")
    arguments = ["--env-ids", "dmc/cartpole-swingup", *SMALL, "--total-timesteps", 0, "--run-root", tmp_path / "runs"]
    command = [sys.executable, str(tmp_path / "my_variant.py"), *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith("dmc-cartpole-swingup__my_variant__1__")


def test_run_name_that_is_taken(finished, command_line):
    _, run_dir = finished
    before = (run_dir / "eval.csv").read_bytes()
    status, stderr = command_line(*TASK, "--run-root", run_dir.parent, "--run-name", run_dir.name)
    assert status == 2
    assert f"--resume {run_dir}" in error_line(stderr) and "--run-name" in stderr
    assert (run_dir / "eval.csv").read_bytes() == before


def test_run_name_of_a_run_that_died_before_its_first_checkpoint(tmp_path):
    """Either an error, or a new run whose curve holds no row of the old one."""
    arguments = ["--env-ids", "gym/gym_tasks:Truncates20-v0", *SMALL, *NO_UPDATES, "--total-timesteps", 3]
    train(*arguments, "--run-root", tmp_path, "--run-name", "taken")
    shutil.rmtree(tmp_path / "taken" / "checkpoints")
    try:
        train(*arguments, "--run-root", tmp_path, "--run-name", "taken")
    except brc.UserError as error:
        assert "taken" in str(error)
    assert [row["step"] for row in curve(tmp_path / "taken")] == ["0", "3"]


# --------------------------------------------------------------------------------------------------------- resume


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of the finished run that a test may change."""
    shutil.copytree(finished[1], tmp_path / "copy", ignore=shutil.ignore_patterns("wandb", "replay.npy"))
    return tmp_path / "copy"


@pytest.mark.parametrize(
    "change",
    ["--seed 9", "--critic-width 64", "--env-ids dmc/walker-walk", "--discount 0.9", "--suite dmc-dogs",
     "--learning-starts 7", "--run-root elsewhere", "--critic-loss mse", "--no-normalize-returns"],
)  # fmt: skip
def test_resume_refuses_other_arguments(change, copied, command_line):
    before = (copied / "args.json").read_bytes()
    status, stderr = command_line("--resume", copied, *change.split())
    assert status == 2
    assert change.split()[0].replace("--no-", "--") in error_line(stderr)
    assert (copied / "args.json").read_bytes() == before


def test_resume_of_another_scripts_run(copied, command_line):
    saved = json.loads((copied / "args.json").read_text())
    (copied / "args.json").write_text(json.dumps({**saved, "script": "brc_offline_bc"}))
    status, stderr = command_line("--resume", copied)
    assert status == 2
    assert "brc_offline_bc" in error_line(stderr)


def test_resume_of_another_scripts_run_with_arguments_of_its_own(copied, command_line):
    saved = {"script": "brc_drq_atari", "suite": "atari", "seed": 1}
    (copied / "args.json").write_text(json.dumps(saved))
    status, stderr = command_line("--resume", copied)
    assert status == 2
    assert "brc_drq_atari" in error_line(stderr)


@pytest.mark.parametrize("content", ["", '{"seed": 1', "[]", "null", '{"env_ids": 3}'])
def test_resume_of_damaged_arguments(content, copied, command_line):
    (copied / "args.json").write_text(content)
    status, stderr = command_line("--resume", copied)
    assert status == 2
    assert str(copied) in error_line(stderr)


def test_resume_without_any_good_checkpoint(copied, command_line):
    for path in (copied / "checkpoints").glob("*/checkpoint.json"):
        path.unlink()
    before = (copied / "eval.csv").read_bytes()
    status, stderr = command_line("--resume", copied)
    assert status == 2
    assert "no undamaged checkpoint" in error_line(stderr)
    assert (copied / "eval.csv").read_bytes() == before, "the curve of the run must survive"


def test_resume_to_fewer_steps_than_done(copied):
    """Must not train on past the end for ever."""

    def too_long(signum, frame):
        raise TimeoutError("still training past --total-timesteps")

    previous = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    try:
        train("--resume", copied, "--total-timesteps", 500)
    except brc.UserError as error:
        assert "--total-timesteps" in str(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    assert brc.checkpoint_steps(copied)[0] == 600


def test_resume_of_a_finished_run_says_so(copied):
    before = (copied / "eval.csv").read_bytes()
    with pytest.raises(brc.UserError, match="finished.*--total-timesteps"):
        train("--resume", copied)
    assert (copied / "eval.csv").read_bytes() == before
    assert brc.checkpoint_steps(copied) == [600, 450]


def test_statistics_that_cannot_be_written_are_a_warning(copied, capsys):
    (copied / "statistics" / "620.npz").mkdir()
    train("--resume", copied, "--total-timesteps", 620, "--no-track")
    assert "warning: cannot write statistics: Is a directory; the run goes on without" in capsys.readouterr().err
    assert brc.checkpoint_steps(copied)[0] == 620


def test_resume_continues_normalizer_replay_and_counters(tmp_path):
    """The environment pays 10 e more in episode e, and starts again with e = 0 in a new process."""
    arguments = ["--env-ids", "gym/gym_tasks:Truncates20-v0", *SMALL, *NO_UPDATES, "--eval-every", 1000]
    train(*arguments, "--total-timesteps", 150, "--run-root", tmp_path, "--run-name", "run")
    run_dir = tmp_path / "run"
    before, (_, replay_before, _) = counters(run_dir, 150), restored(run_dir)
    assert before["max_return"][0] > 20 + 10 * 5, "the sixth episode's rewards must count"
    train("--resume", run_dir, "--total-timesteps", 170)
    after, (_, replay_after, _) = counters(run_dir, 170), restored(run_dir)
    assert after["step"] == 170 and after["wall_time"] > before["wall_time"]
    assert after["max_return"] == before["max_return"], "20 low-paid steps must not have lowered or forgotten G"
    assert after["rng"] != before["rng"]
    assert replay_after.inserted == 150 + 1 + 20, "one slot ends the interrupted episode"
    np.testing.assert_array_equal(replay_after.slots["reward"][0, :150], replay_before.slots["reward"][0, :150])
    assert replay_after.slots["valid"][0, 149:152].tolist() == [True, False, True]
    assert replay_after.slots["observation"][0, 151, :2].tolist() == [0, 0], "a first observation follows"


def test_batches_are_drawn_a_step_ahead_and_again_after_resume(tmp_path, monkeypatch):
    """The batches of step t + 1 are drawn before the transition of step t is there, and from the saved generator."""
    draws, updates, sample, make_agent = [], [], brc.Replay.sample, brc.make_agent

    def recording(replay, rng, utd, batch_size):
        draws.append((replay.inserted, rng.bit_generator.state, sample(replay, rng, utd, batch_size)))
        return draws[-1][2]

    def make_recording_agent(*args):
        agent = make_agent(*args)

        def update(state, batches, max_return):
            updates.append(jax.tree.map(np.asarray, batches))
            return agent.update(state, batches, max_return)

        return agent._replace(update=update)

    monkeypatch.setattr(brc.Replay, "sample", recording)
    monkeypatch.setattr(brc, "make_agent", make_recording_agent)
    arguments = ["--env-ids", "gym/gym_tasks:Truncates20-v0", *SMALL, "--learning-starts", 30, "--eval-every", 1000]
    train(*arguments, "--total-timesteps", 40, "--run-root", tmp_path, "--run-name", "run")
    assert [inserted for inserted, *_ in draws] == [30, *range(30, 40)], "the first twice: now, and for the next step"
    for used, (_, _, drawn) in zip(updates, draws[:-1], strict=True):
        assert_same(used, drawn)
    saved = counters(tmp_path / "run", 40)["rng"]
    assert saved == draws[-1][1]
    draws.clear()
    train("--resume", tmp_path / "run", "--total-timesteps", 42)
    assert draws[0][1] == saved, "the batch that no update has seen is drawn again"


def test_kill_then_terminate_then_finish(environment, run, tmp_path):
    """kill -9 after a checkpoint, resume; SIGTERM, resume; the run ends as if nothing had happened."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    arguments = [
        *("--env-ids", REACH, PUSH, *SMALL, "--total-timesteps", 1000, "--learning-starts", 100, "--eval-every", 250),
        *("--checkpoint-every", 100, "--run-root", tmp_path, "--run-name", "run"),
    ]
    process = started(SCRIPT, arguments, environment, log)
    wait_for_checkpoint(run_dir, 200, process, log)
    process.kill()
    process.wait()
    killed_at = brc.checkpoint_steps(run_dir)[0]
    assert killed_at < 1000, "finished before it could be killed"
    args_before = json.loads((run_dir / "args.json").read_text())

    process = started(SCRIPT, ["--resume", run_dir], environment, log)
    wait_for_checkpoint(run_dir, killed_at + 200, process, log)
    process.terminate()
    assert process.wait(timeout=120) == 0, log.read_text()
    stopped_at = brc.checkpoint_steps(run_dir)[0]
    assert killed_at < stopped_at < 1000
    assert f"resumed {run_dir} at step {killed_at:,}" in log.read_text()
    assert re.search(rf"^stopped at step {stopped_at:,}.*--resume {run_dir}$", log.read_text(), re.MULTILINE)
    assert "Traceback" not in log.read_text()
    stopped = counters(run_dir, stopped_at)
    assert (stopped["step"], stopped["updates"]) == (stopped_at, 2 * (stopped_at - 100))

    result = run("--resume", run_dir)
    assert result.returncode == 0, result.stderr
    rows = curve(run_dir)
    assert [(row["step"], row["task"]) for row in rows] == [
        (str(step), task) for step in range(0, 1001, 250) for task in (REACH, PUSH)
    ]
    assert [int(row["updates"]) for row in rows] == [2 * max(int(row["step"]) - 100, 0) for row in rows]
    times = [float(row["wall_time"]) for row in rows]
    assert times == sorted(times)
    assert counters(run_dir, 1000)["wall_time"] >= times[-1] - 0.01  # rounded
    args_after = json.loads((run_dir / "args.json").read_text())
    assert {**args_after, "resume": None} == {**args_before, "resume": None}


def started_with_worker(environment, tmp_path: Path) -> tuple[Path, Path, subprocess.Popen]:
    """Run directory, log and process of a long run on a task with a worker process, after its first checkpoint."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    arguments = ["--env-ids", "gym/gym_tasks:Slow-v0", *SMALL, *NO_UPDATES, "--total-timesteps", 100_000]
    arguments += ["--checkpoint-every", 50, "--run-root", tmp_path, "--run-name", "run"]
    process = started(SCRIPT, arguments, environment, log)
    wait_for_checkpoint(run_dir, 50, process, log)
    return run_dir, log, process


def test_ctrl_c_reaches_worker_processes_too(environment, tmp_path):
    """A terminal sends SIGINT to the whole process group, as SLURM does with SIGTERM."""
    run_dir, log, process = started_with_worker(environment, tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    try:
        status = process.wait(timeout=60)
    finally:
        process.kill()
    assert status == 0, log.read_text()
    assert "Traceback" not in log.read_text()
    stopped_at = brc.checkpoint_steps(run_dir)[0]
    assert re.search(rf"^stopped at step {stopped_at:,}.*--resume {run_dir}$", log.read_text(), re.MULTILINE)


def processes_of(group: int) -> list[str]:
    """Command lines of a process group, without those that ended and wait for their parent."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, _, group_of_path = (path / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(group_of_path) == group and state != "Z":
                found.append((path / "cmdline").read_text().replace("\0", " "))
        except OSError:  # ended meanwhile
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads Linux's /proc")
def test_workers_end_with_a_killed_run(environment, tmp_path):
    """kill -9 of the main process must not leave environments behind, which ignore the gentler signals."""
    run_dir, log, process = started_with_worker(environment, tmp_path)
    assert len(processes_of(process.pid)) >= 3, "main, fork server and a worker at least"
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while (left := processes_of(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    if left:
        os.killpg(process.pid, signal.SIGKILL)
    assert left == []


def test_stopped_before_the_first_step(tmp_path, monkeypatch, capsys):
    """The line that says how to continue must be true."""
    evaluate = brc.evaluate

    def evaluate_and_terminate(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    monkeypatch.setattr(brc, "evaluate", evaluate_and_terminate)
    arguments = ["--env-ids", "gym/gym_tasks:Truncates20-v0", *SMALL, *NO_UPDATES, "--total-timesteps", 100]
    train(*arguments, "--run-root", tmp_path, "--run-name", "run")
    if "--resume" in capsys.readouterr().out:
        assert brc.checkpoint_steps(tmp_path / "run") == [0], "nothing to resume from"


# ---------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def blank() -> brc.AgentState:
    """State of a small agent for two tasks of 3 observations and 2 actions."""
    return zero_state(brc.Args(critic_width=8, critic_depth=1, actor_width=8), 2, 3, 2)


def random_state(blank: brc.AgentState, seed: int) -> brc.AgentState:
    """Other values in every leaf, none of them what `init` gives."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if np.issubdtype(leaf.dtype, np.integer):
            return jax.numpy.asarray(rng.integers(1, 2**31, leaf.shape).astype(leaf.dtype))
        return jax.numpy.asarray(rng.normal(size=leaf.shape).astype(leaf.dtype))

    return jax.tree.map(draw, blank)


def extend(replay: brc.Replay, steps: int, seed: int) -> None:
    """Random transitions with resets among them."""
    rng = np.random.default_rng(seed)
    if not replay.inserted:
        replay.start(rng.normal(size=(2, 3)).astype(np.float32))
    for _ in range(steps):
        replay.insert(
            rng.normal(size=(2, 2)), rng.normal(size=2), rng.random(2) < 0.1, rng.random(2) < 0.8,
            rng.normal(size=(2, 3)),
        )  # fmt: skip


def save(run_dir: Path, step: int, state: brc.AgentState, replay: brc.Replay, keep: int = 2, **more) -> None:
    brc.save_checkpoint(run_dir, step, state, replay, {"step": step, "updates": 2 * step, **more}, keep)


@pytest.mark.parametrize("steps", [(30,), (30, 7), (30, 25, 9), (30, 200), (100, 1, 2, 3, 170, 4)])
def test_checkpoint_round_trip(steps, blank, tmp_path):
    """Every leaf, the replay in one or many pieces before and after the ring of 50 wraps, RNG and normalizer."""
    replay, rng = brc.Replay(2, 50, 3, 2), np.random.default_rng(11)
    for number, count in enumerate(steps):
        extend(replay, count, seed=number)
        state = random_state(blank, seed=number)
        rng.random(number + 3)
        normalizer = np.float32([0.1 + number, 1e-8])
        save(tmp_path, sum(steps[: number + 1]), state, replay, rng=rng.bit_generator.state,
             max_return=normalizer.tolist())  # fmt: skip
    newest = [sum(steps[: number + 1]) for number in range(len(steps))][::-1][:2]
    assert brc.checkpoint_steps(tmp_path) == newest
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if not path.name.isdigit()] == []

    other = brc.Replay(2, 50, 3, 2)
    loaded, found = brc.load_checkpoint(tmp_path, blank, other)
    assert_same(state, loaded)
    assert_same(replay, other)
    assert found["step"] == sum(steps) and found["updates"] == 2 * sum(steps)
    again = np.random.default_rng()
    again.bit_generator.state = found["rng"]
    assert_same(replay.sample(rng, 2, 16), other.sample(again, 2, 16))
    assert np.float32(found["max_return"]).tobytes() == normalizer.tobytes()


def test_checkpoint_into_a_longer_replay(blank, tmp_path):
    """--resume with more --total-timesteps makes a larger ring."""
    replay, other = brc.Replay(2, 50, 3, 2), brc.Replay(2, 80, 3, 2)
    extend(replay, 45, seed=0)
    save(tmp_path, 45, blank, replay)
    brc.load_checkpoint(tmp_path, blank, other)
    assert np.array_equal(replay.slots[:, :46], other.slots[:, :46])


def test_each_transition_is_written_once(blank, tmp_path):
    replay = brc.Replay(2, 1000, 3, 2)
    for step in (100, 200, 300):
        extend(replay, 100, seed=step)
        save(tmp_path, step, blank, replay)
    pieces = sorted((tmp_path / "checkpoints" / "300" / "replay").iterdir())
    assert sum(np.load(piece, allow_pickle=False).shape[1] for piece in pieces) <= 300 + len(pieces)
    assert [piece.stat().st_nlink for piece in pieces] == [2, 2, 1]  # shared with checkpoint 200


def test_damage_of_a_shared_piece_is_not_hidden_by_a_later_checkpoint(blank, tmp_path, capsys):
    """The newer one shares the piece by a hard link: both are damaged, and the newer one says so."""
    replay = brc.Replay(2, 1000, 3, 2)
    extend(replay, 100, seed=0)
    save(tmp_path, 100, blank, replay)
    with (tmp_path / "checkpoints/100/replay/000000000000-000000000100.npy").open("r+b") as piece:
        piece.seek(500)
        piece.write(b"damage")
    extend(replay, 100, seed=1)
    save(tmp_path, 200, blank, replay)
    with pytest.raises(brc.UserError, match="no undamaged checkpoint"):
        brc.load_checkpoint(tmp_path, blank, brc.Replay(2, 1000, 3, 2))
    warnings = capsys.readouterr().err.splitlines()
    assert all("replay/000000000000-000000000100.npy does not match its checksum" in line for line in warnings)
    assert len(warnings) == 2


def test_damaged_counters_of_the_checkpoint_before(blank, tmp_path):
    """The next checkpoint builds on nothing of it, and leaves no half-written directory behind."""
    replay = brc.Replay(2, 1000, 3, 2)
    extend(replay, 100, seed=0)
    save(tmp_path, 100, blank, replay)
    (tmp_path / "checkpoints/100/checkpoint.json").write_text("{")
    (tmp_path / "checkpoints/.partial-77/state").mkdir(parents=True)
    extend(replay, 100, seed=1)
    save(tmp_path, 200, blank, replay)
    other = brc.Replay(2, 1000, 3, 2)
    _, found = brc.load_checkpoint(tmp_path, blank, other)
    assert found["step"] == 200
    assert_same(replay, other)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["100", "200"]


@pytest.fixture
def two_checkpoints(blank, tmp_path):
    """Checkpoints 20 and 40, with the state and replay of the first."""
    replay, state = brc.Replay(2, 100, 3, 2), random_state(blank, 1)
    extend(replay, 20, seed=1)
    save(tmp_path, 20, state, replay)
    at_20 = brc.Replay(2, 100, 3, 2)
    vars(at_20).update({name: np.copy(x) if isinstance(x, np.ndarray) else x for name, x in vars(replay).items()})
    extend(replay, 20, seed=2)
    save(tmp_path, 40, random_state(blank, 2), replay)
    return tmp_path, state, at_20


def flip(path: Path, position: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1
    path.unlink()  # older replay pieces are shared with the checkpoint before: damage this one only
    path.write_bytes(content)


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])


DAMAGES = {
    "byte of the state": lambda path: flip(max((path / "state").rglob("d/*"), key=lambda file: file.stat().st_size)),
    "byte of the new replay": lambda path: flip(path / "replay" / "000000000020-000000000040.npy"),
    "byte of the old replay": lambda path: flip(path / "replay" / "000000000000-000000000020.npy"),
    "truncated state": lambda path: truncate(max((path / "state").rglob("d/*"), key=lambda file: file.stat().st_size)),
    "truncated replay": lambda path: truncate(path / "replay" / "000000000020-000000000040.npy"),
    "truncated counters": lambda path: truncate(path / "checkpoint.json"),
    "empty counters": lambda path: (path / "checkpoint.json").write_bytes(b""),
    "counters that are none": lambda path: (path / "checkpoint.json").write_text("null"),
    "no counters": lambda path: (path / "checkpoint.json").unlink(),
    "no replay piece": lambda path: (path / "replay" / "000000000020-000000000040.npy").unlink(),
    "no replay": lambda path: shutil.rmtree(path / "replay"),
    "no state": lambda path: shutil.rmtree(path / "state"),
    "nothing": lambda path: [shutil.rmtree(path), path.mkdir()],
    "digit of the counters": lambda path: (path / "checkpoint.json").write_text(
        (path / "checkpoint.json").read_text().replace('"updates": 80', '"updates": 90')
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_falls_back(damage, two_checkpoints, blank, capsys):
    run_dir, state, replay = two_checkpoints
    DAMAGES[damage](run_dir / "checkpoints" / "40")
    other = brc.Replay(2, 100, 3, 2)
    loaded, found = brc.load_checkpoint(run_dir, blank, other)
    assert found["step"] == 20
    assert_same(state, loaded)
    assert other.inserted == replay.inserted
    assert np.array_equal(replay.slots[:, :21], other.slots[:, :21])
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and str(run_dir / "checkpoints" / "40") in warning
    assert warning.count("\n") == 1


def test_checkpoints_after_a_fallback_hold_the_new_history(two_checkpoints, blank):
    """The damaged checkpoint 40 belongs to an abandoned history: checkpoint 50 must take nothing from it."""
    run_dir, *_ = two_checkpoints
    flip(run_dir / "checkpoints" / "40" / "replay" / "000000000020-000000000040.npy")
    replay, expected = brc.Replay(2, 100, 3, 2), random_state(blank, 3)
    brc.load_checkpoint(run_dir, blank, replay)
    extend(replay, 30, seed=5)
    save(run_dir, 50, expected, replay)
    other = brc.Replay(2, 100, 3, 2)
    loaded, found = brc.load_checkpoint(run_dir, blank, other)
    assert found["step"] == 50
    assert_same(expected, loaded)
    assert_same(replay, other)


def test_fallback_keeps_the_newest_good_checkpoint(two_checkpoints, blank):
    """A damaged newer checkpoint must not push the good ones out of --keep-checkpoints."""
    run_dir, *_ = two_checkpoints
    flip(run_dir / "checkpoints" / "40" / "replay" / "000000000020-000000000040.npy")
    replay = brc.Replay(2, 100, 3, 2)
    brc.load_checkpoint(run_dir, blank, replay)
    extend(replay, 10, seed=5)
    save(run_dir, 30, blank, replay, keep=1)
    _, found = brc.load_checkpoint(run_dir, blank, brc.Replay(2, 100, 3, 2))
    assert found["step"] == 30


def test_nothing_in_a_checkpoint_is_executed(two_checkpoints, blank):
    """A pickled object in place of a replay piece is refused, not loaded."""
    run_dir, *_ = two_checkpoints
    path = run_dir / "checkpoints" / "40"
    piece = path / "replay" / "000000000020-000000000040.npy"
    np.save(piece, np.array([{"an": "object"}]), allow_pickle=True)
    content = json.loads((path / "checkpoint.json").read_text())
    content["files"][f"replay/{piece.name}"] = brc.checksum(piece)
    (path / "checkpoint.json").write_text(json.dumps(content))
    _, found = brc.load_checkpoint(run_dir, blank, brc.Replay(2, 100, 3, 2))
    assert found["step"] == 20


# ------------------------------------------------------------------------------------- full disk, non-finite loss


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """An empty file system of 16 MB."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a file system")
    disk = tmp_path_factory.mktemp("disk")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", str(disk).encode(), b"tmpfs", 0, b"size=16m"):
        pytest.skip(f"cannot mount a tmpfs: {os.strerror(ctypes.get_errno())}")
    yield disk
    libc.umount2(str(disk).encode(), 2)  # MNT_DETACH: also when a writer thread still holds a file


def fill(disk: Path, leave: int) -> Path:
    """A file that leaves `leave` bytes free."""
    usage, ballast = shutil.disk_usage(disk), disk / "ballast"
    with ballast.open("wb") as file:
        for _ in range((usage.free - leave) // 4096):
            file.write(bytes(4096))
    return ballast


@pytest.fixture(scope="module")
def full_disk(small_disk, run):
    """A finished run of 100 steps that is resumed with 40 kB left: enough for a log, too little for a checkpoint."""
    train("--env-ids", REACH, *SMALL, *NO_UPDATES, "--total-timesteps", 100, "--checkpoint-every", 100,
          "--run-root", small_disk, "--run-name", "run")  # fmt: skip
    fill(small_disk, leave=40_000)
    return run("--resume", small_disk / "run", "--total-timesteps", 300, seconds=240), small_disk / "run"


def test_full_disk_is_tried_again_and_told_at_the_end(full_disk):
    result, run_dir = full_disk
    assert result.returncode == 2, result.stderr
    assert re.search(r"warning: cannot write the checkpoint of step 200;.*another try", result.stderr)
    assert re.search(
        r"^error: cannot write the checkpoint of step 300;.*disk full.*--resume", result.stderr, re.MULTILINE
    )
    assert brc.checkpoint_steps(run_dir) == [100]
    assert restored(run_dir)[2]["step"] == 100


def test_full_disk_is_one_line(full_disk):
    assert "disk full" in error_line(full_disk[0].stderr)


def test_full_disk_costs_nothing_but_time(full_disk, command_line):
    """Not a byte left: resuming fails, and neither the arguments nor the curve are lost. With space again it works."""
    _, run_dir = full_disk
    (run_dir.parent / "ballast").unlink()
    shutil.rmtree(run_dir / "checkpoints" / ".partial-200", ignore_errors=True)
    ballast = fill(run_dir.parent, leave=0)
    status, stderr = command_line("--resume", run_dir, "--total-timesteps", 300)
    ballast.unlink()
    assert status == 2
    assert "disk full" in stderr
    assert (run_dir / "args.json").stat().st_size > 0, "the arguments are lost, the run cannot be resumed"
    assert curve(run_dir)[0]["step"] == "0", "the curve is lost"
    train("--resume", run_dir, "--total-timesteps", 300)
    assert brc.checkpoint_steps(run_dir) == [300, 200]
    assert [row["step"] for row in curve(run_dir)] == ["0", "100", "300"]
    ballast = fill(run_dir.parent, leave=20_000)
    status, stderr = command_line("--resume", run_dir, "--save-replay")
    ballast.unlink()
    assert status == 2 and "disk full" in error_line(stderr)
    train("--resume", run_dir, "--save-replay")
    [replay] = (run_dir / "replay").iterdir()
    assert len(np.load(replay)) > 300
    with pytest.raises(brc.UserError, match="finished"):
        train("--resume", run_dir, "--save-replay")


# The environment's 161st step, after 16 episodes of 10 steps and as many resets, is step 177 of the run.
@pytest.mark.parametrize("name", ["InfReward", "NaNReward"])
def test_non_finite_loss_stops_the_run(name, tmp_path):
    run_dir = tmp_path / "run"
    with pytest.raises(brc.UserError, match="not finite") as error:
        train("--env-ids", f"gym/gym_tasks:{name}-v0", *SMALL, "--total-timesteps", 2000, "--learning-starts", 40,
              "--checkpoint-every", 50, "--run-root", tmp_path, "--run-name", "run")  # fmt: skip
    assert f"{run_dir}/checkpoints/150" in str(error.value)
    assert brc.checkpoint_steps(run_dir) == [150, 100]
    assert json.loads((run_dir / "args.json").read_text())["diverged_at"] == 176
    state, replay, found = restored(run_dir)
    assert np.isfinite(found["max_return"]).all() and np.isfinite(replay.slots["reward"]).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_a_reward_that_is_not_finite_never_reaches_a_checkpoint(tmp_path):
    """Also when the checkpoint comes right after it, before any loss has seen it."""
    with pytest.raises(brc.UserError, match="finite"):
        train("--env-ids", "gym/gym_tasks:InfReward-v0", *SMALL, "--total-timesteps", 2000, "--learning-starts", 40,
              "--checkpoint-every", 59, "--run-root", tmp_path, "--run-name", "run")  # fmt: skip
    _, replay, found = restored(tmp_path / "run")
    assert np.isfinite(replay.slots["reward"]).all() and np.isfinite(found["max_return"]).all()


# ------------------------------------------------------------------------------------------------ reproducibility


@pytest.fixture(scope="module")
def seeded(tmp_path_factory):
    """Three short runs, the first two with the same seed."""
    root = tmp_path_factory.mktemp("seeds")
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        train("--env-ids", REACH, "gym/gym_tasks:PointLeft-v0", *SMALL, "--total-timesteps", 120, "--learning-starts",
              60, "--eval-every", 60, "--seed", seed, "--run-root", root, "--run-name", name)  # fmt: skip
    return root


def returns(run_dir: Path) -> list[tuple[str, ...]]:
    return [(row["step"], row["task"], row["return"], row["success"], row["score"]) for row in curve(run_dir)]


def test_same_seed_same_curve(seeded):
    assert returns(seeded / "one") == returns(seeded / "again")
    for one, other in zip(restored(seeded / "one")[:2], restored(seeded / "again")[:2], strict=True):
        assert_same(one, other)


def test_other_seed_other_curve(seeded):
    one, other = returns(seeded / "one"), returns(seeded / "other")
    assert len(one) == len(other) == 6
    assert all(a[2] != b[2] for a, b in zip(one, other, strict=True))


def test_overlap_does_not_change_what_is_learned(tmp_path, monkeypatch):
    """Updates that run while the environments step give the same bits as updates that are waited for."""
    arguments = ["--env-ids", "gym/gym_tasks:Slow-v0", PUSH, *SMALL, "--total-timesteps", 150, "--learning-starts", 50]
    arguments += ["--eval-every", 1000, "--run-root", tmp_path]
    train(*arguments, "--run-name", "overlapping")

    make_agent, waited = brc.make_agent, []

    def make_waiting_agent(*arguments):
        agent = make_agent(*arguments)

        def update(*arguments):
            result = jax.block_until_ready(agent.update(*arguments))
            waited.append(threading.get_ident())
            return result

        return agent._replace(update=update)

    monkeypatch.setattr(brc, "make_agent", make_waiting_agent)
    train(*arguments, "--run-name", "waiting")
    monkeypatch.undo()
    assert len(waited) == 100
    overlapping, waiting = restored(tmp_path / "overlapping"), restored(tmp_path / "waiting")
    assert_same(overlapping[0], waiting[0])
    assert_same(overlapping[1], waiting[1])
    assert overlapping[2]["max_return"] == waiting[2]["max_return"]
