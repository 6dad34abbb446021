"""benchmark/: experiments, the launcher with real runs, statistics against hand computation, and plots of finished,
unfinished, empty and damaged run directories."""

import contextlib
import csv
import errno
import fcntl
import gzip
import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path
from types import SimpleNamespace

import jax
import matplotlib
import numpy as np
import pandas as pd
import pytest
from run_files import checkpoint_steps, curve

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("rliable", reason="pip install rliable==1.2.0")
import claims  # noqa: E402
import experiments  # noqa: E402
import keep  # noqa: E402
import launch  # noqa: E402
import plot  # noqa: E402
import readme_tables  # noqa: E402
import released_code  # noqa: E402
import scores  # noqa: E402
import speed  # noqa: E402
from experiments import DRQ, EXPERIMENTS, OFFLINE, SAC, SCALES, TRANSFER, Run  # noqa: E402

import brc_drq_atari as drq  # noqa: E402
import brc_embedding_transfer  # noqa: E402
import brc_offline_bc  # noqa: E402
import brc_sac_continuous as sac  # noqa: E402

MODULES = {SAC: sac, DRQ: drq, OFFLINE: brc_offline_bc, TRANSFER: brc_embedding_transfer}
PAPER = SCALES["paper"]
# two seeds are as good here as five, and drawn in half the time
LAPTOP = SCALES["laptop"] = replace(SCALES["laptop"], seeds=2, transfer_seeds=2)


# --------------------------------------------------------------------------------------------------- experiments


@pytest.mark.parametrize("scale", SCALES)
def test_every_command_parses_with_its_script(scale):
    """Every run of every experiment: its own script's parser takes the command line, and so do its checks."""
    runs = experiments.unique_runs(list(EXPERIMENTS), SCALES[scale])
    parsed = {}
    for run in runs:
        script, *argv = run.command("some/root", "some/data")
        module, key = MODULES[script], (script, run.argv)
        if key not in parsed:  # the seeds of one command line differ in nothing that a parser could refuse
            args = module.parse_args(argv)
            if script != OFFLINE:
                tasks, steps = module.resolve_tasks(args.suite, args.env_ids)
                assert tuple(tasks) == run.tasks(SCALES[scale])
            if script in (SAC, DRQ):
                assert run.length == (steps if args.total_timesteps is None else args.total_timesteps)
            if script == TRANSFER:
                module.check_together(args, tasks)
            parsed[key] = args
            assert (args.seed, args.run_root, args.run_name) == (run.seed, "some/root", run.name)
            assert "{" not in " ".join(argv)
    assert len({run.name for run in runs}) == len(runs)
    names = {run.name for run in runs}
    assert all(name in names for run in runs for name in run.after)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_dry_run_prints_every_command(name, capsys, tmp_path):
    for scale in SCALES.values():
        assert launch.main(launch.Args((name,), scale=scale.name, dry_run=True, run_root=str(tmp_path))) == 0
        out = capsys.readouterr().out
        runs = experiments.unique_runs([name], scale)
        commands = [line for line in out.splitlines() if line.startswith("python brc_")]
        assert len(commands) == len(runs) > 0
        assert f"at {scale.name} scale" in out and f"# {len(runs)} runs, 0 finished" in out
    assert not list(tmp_path.iterdir())


def test_paper_sizes():
    """Runs counted by hand from Section 4, D.1 and Table 1."""
    count = {name: len(experiments.unique_runs([name], PAPER)) for name in EXPERIMENTS}
    assert count["figure4"] == 6 * 4 * (9 + 1) * 5  # widths, architectures, 9 single-task and one multi-task, seeds
    assert count["figure6"] == 8 * 5
    assert count["figure9"] == (20 + 1) * 5
    assert count["figure22"] == count["figure7"] == 5
    assert count["table5"] == (26 + 1) * 5
    assert count["figure2"] == 3 * (4 + (5 + 3 + 7 + 29) * 2)  # pretrained, from scratch and by model transfer
    full = next(run for run in EXPERIMENTS["figure6"].runs(PAPER) if run.label == "SQ + CE + TE")
    none = next(run for run in EXPERIMENTS["figure6"].runs(PAPER) if run.label == "none")
    args = [sac.parse_args(run.command()[1:]) for run in (full, none)]
    assert [(a.critic_width, a.critic_loss, a.normalize_returns, a.task_conditioning) for a in args] == [
        (4096, "ce", True, "embedding"), (512, "mse", False, "heads"),
    ]  # fmt: skip


def test_runs_that_figures_share_are_one():
    figure1, figure4 = (
        {run.name for run in EXPERIMENTS[name].runs(LAPTOP) if run.label in ("BRC*", "BroNet (CE)") and len(
            run.tasks(LAPTOP)) > 1 and run.flag("--critic-width") == "128"}
        for name in ("figure1", "figure4")
    )  # fmt: skip
    assert figure1 == figure4 and len(figure1) == LAPTOP.seeds


# ------------------------------------------------------------------------------------------------------ launcher

TINY = ("--critic-width", "8", "--critic-depth", "0", "--actor-width", "8", "--actor-depth", "0", "--batch-size", "8",
        "--eval-episodes", "1", "--checkpoint-every", "50")  # fmt: skip


def tiny(task: str, steps: int, tag: str, after=(), extra=()) -> Run:
    argv = ("--env-ids", task, "--total-timesteps", str(steps), "--learning-starts", "1000000", "--eval-every",
            str(steps), *TINY, *extra)  # fmt: skip
    return Run("", tag, SAC, argv, 1, tag, after=after)


def test_launcher_runs_stops_resumes_skips_and_reports(monkeypatch, tmp_path, environment, capsys, own_signal_handlers):
    """Real runs: one that finishes, one that fails, one that needs it, and one that is stopped and continued."""
    for name in ("PYTHONPATH", "JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.setenv(name, environment[name])
    good = tiny("gym/gym_tasks:Truncates20-v0", 60, "good")
    bad = tiny("dmc/no-such-task", 60, "bad")
    needy = tiny("gym/gym_tasks:Truncates20-v0", 60, "needy", after=(bad.name,), extra=("--utd", "3"))
    long = tiny("gym/gym_tasks:Slow-v0", 1500, "long")
    runs = [good, bad, needy, long]
    monkeypatch.setitem(EXPERIMENTS, "tiny", experiments.Experiment("tiny runs", lambda scale: runs))
    args = launch.Args(("tiny",), run_root=str(tmp_path), jobs=3)
    directory = {run.label: tmp_path / run.name for run in runs}
    good_job = launch.Job(good.name, [], good.length, str(directory["good"]), str(ROOT), [])

    ended = threading.Event()

    def has_ended(run: Path) -> bool:
        with (run / ".lock").open("w") as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the launcher's, which the script holds while it lives
            return True
        return False

    def stop_when_only_the_long_run_is_left():
        while not ended.wait(0.05):  # after the end, the signal would meet pytest
            finished = good_job.state() == "finished" and has_ended(directory["good"])
            if finished and checkpoint_steps(directory["long"]):
                return None if ended.is_set() else os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop_when_only_the_long_run_is_left)
    thread.start()
    status = launch.main(args)
    ended.set()
    thread.join()
    output = capsys.readouterr()
    assert status == 1
    assert f"{good.name}: finished" in output.out and f"{long.name}: stopped" in output.out
    assert f"{needy.name}: failed: needs {bad.name}, which is not finished" in output.err
    assert re.search(rf"{bad.name}: failed \(exit status 2\): error: unknown task 'dmc/no-such-task'", output.err)
    assert str(directory["bad"] / "log.txt") in output.err
    stopped_at = checkpoint_steps(directory["long"])[0]
    assert 50 <= stopped_at < 1500 and curve(directory["good"])[-1]["step"] == "60"

    good_before = {path: path.stat().st_mtime_ns for path in directory["good"].rglob("*") if path.is_file()}
    monkeypatch.setitem(EXPERIMENTS, "tiny", experiments.Experiment("tiny runs", lambda scale: [good, bad, long]))
    assert launch.main(replace(args, dry_run=True)) == 0
    dry = capsys.readouterr().out
    assert f"# finished: python {SAC}" in dry and f"python {SAC} --resume {directory['long']}\n" in dry
    assert "# 3 runs, 1 finished" in dry
    assert launch.main(args) == 1  # the bad one fails again
    output = capsys.readouterr()
    assert f"{long.name}: finished" in output.out and good.name not in output.out
    assert {path: path.stat().st_mtime_ns for path in directory["good"].rglob("*") if path.is_file()} == good_before
    assert [int(row["step"]) for row in curve(directory["long"])] == [0, 1500]
    assert f"resumed {directory['long']} at step {stopped_at:,}" in (directory["long"] / "log.txt").read_text()

    monkeypatch.setitem(EXPERIMENTS, "tiny", experiments.Experiment("tiny runs", lambda scale: [good, long]))
    assert launch.main(args) == 0
    assert "# 2 runs, 2 finished" in capsys.readouterr().out


def test_two_launchers_share_a_run_root(tmp_path):
    """What another launcher has finished or is running is not started again, and what needs that waits for it."""
    names = ("done", "running", "needy")
    jobs = [launch.Job(name, ["no-such-script.py"], 60, name, str(tmp_path), []) for name in names]
    done, running, needy = (tmp_path / name for name in names)
    jobs[2].after.append(jobs[1])
    end = ",".join(scores.EVAL_COLUMNS) + "\n60,0,1,x,1,1,,1\n"
    done.mkdir()
    (done / "eval.csv").write_text(end)
    running.mkdir()
    lock, waited = (running / ".lock").open("w"), []
    fcntl.flock(lock, fcntl.LOCK_EX)

    def end_elsewhere():
        waited.append(not needy.exists())
        (running / "eval.csv").write_text(end)
        lock.close()

    thread = threading.Timer(1, end_elsewhere)
    thread.start()
    outcomes = launch.run_local(jobs, 2)
    thread.join()
    assert waited == [True] and outcomes.pop("needy").startswith("failed (exit status 2): ")
    assert outcomes == {"done": "finished", "running": "skipped: another launcher runs it"}
    assert not (done / "log.txt").exists() and not (running / "log.txt").exists()


def test_locks(monkeypatch, tmp_path):
    """One that another launcher holds only to look whether it is free is had a moment later; without locks, always."""
    with (tmp_path / ".lock").open("w") as file, (tmp_path / ".lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert not launch.locked(file, exclusive=True) and launch.locked(file, exclusive=False)
        threading.Timer(0.05, other.close).start()
        assert launch.locked(file, exclusive=True)

    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert launch.locked(None, exclusive=True) and launch.locked(None, exclusive=False)


def test_a_run_that_cannot_start_leaves_the_others_alone(tmp_path, capsys):
    (tmp_path / "script.py").write_text("")
    (tmp_path / "blocked").write_text("a file in the way")
    jobs = [launch.Job(name, ["script.py"], 60, name, str(tmp_path), []) for name in ("other", "blocked")]
    outcomes = launch.run_local(jobs, 2)
    assert outcomes["other"] == "stopped" and outcomes["blocked"].startswith("failed: cannot start it: [Errno ")
    with pytest.raises(RuntimeError, match="blocked: failed: cannot start it"):
        jobs[1]()  # on Slurm


GOES_ON = """import sys
sys.path.insert(0, "benchmark")
import launch
jobs = [launch.Job(name, ["script.py"], 60, name, sys.argv[1], []) for name in "abc"]
launch.exit_with(lambda: len(launch.run_local(jobs, 1)) + 10)
"""


def test_a_launcher_outlives_its_reader(environment, tmp_path):
    """What reads its output, such as tee, may be killed: its runs go on, and the status is theirs."""
    (tmp_path / "script.py").write_text("")
    command = [sys.executable, "-c", GOES_ON, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(timeout=100) == 13 and all((tmp_path / name / "log.txt").exists() for name in "abc")


def test_a_signal_while_a_run_starts_is_not_lost(tmp_path, own_signal_handlers):
    class Late(launch.Job):
        def start(self) -> str:
            os.kill(os.getpid(), signal.SIGTERM)
            return super().start()

    (tmp_path / "script.py").write_text(STOPPABLE.format(handles=False))
    began = time.monotonic()
    assert launch.run_local([Late("run", ["script.py"], 60, "run", str(tmp_path), [])], 1) == {"run": "stopped"}
    assert time.monotonic() - began < 30


def test_exit_status_tells_whether_every_run_is_finished(monkeypatch, tmp_path, capsys):
    for outcome, status in (("finished", 0), ("stopped", 1), ("skipped: another launcher runs it", 1)):
        monkeypatch.setattr(launch, "run_local", lambda jobs, _, o=outcome: dict.fromkeys((j.name for j in jobs), o))
        assert launch.main(launch.Args(("figure7",), run_root=str(tmp_path))) == status
        assert ("give the same command again" in capsys.readouterr().err) == bool(status)


def test_what_another_launcher_has_finished_is_finished(monkeypatch, tmp_path, capsys):
    """Of two launchers the last to end said that the other one's runs were still to do."""

    def all_done_by_another(jobs, _):
        for run in EXPERIMENTS["figure7"].runs(LAPTOP):
            write_run(tmp_path, run, known)
        return {job.name: "skipped: another launcher runs it" for job in jobs}

    monkeypatch.setattr(launch, "run_local", all_done_by_another)
    assert launch.main(launch.Args(("figure7",), run_root=str(tmp_path))) == 0
    output = capsys.readouterr()
    assert output.out.splitlines()[-1].endswith(" finished") and "again" not in output.err


def test_estimated_hours():
    """By the script's own batch, 256 for one task; offline by one update each, and no environments."""
    wide = [run for run in EXPERIMENTS["figure4"].runs(PAPER) if run.x == 4096 and run.label == "BroNet (CE)"]
    single, multi = (next(run for run in wide if len(run.tasks(PAPER)) == n) for n in (1, 9))
    by_batch = {batch: launch.estimated_hours(replace(single, argv=(*single.argv, "--batch-size", batch)),
                                              single.tasks(PAPER), "paper") for batch in ("256", "1024")}  # fmt: skip
    assert launch.estimated_hours(single, single.tasks(PAPER), "paper") == by_batch["256"] < by_batch["1024"] / 3
    assert launch.estimated_hours(multi, multi.tasks(PAPER), "paper") == pytest.approx(by_batch["1024"])
    offline = next(run for run in EXPERIMENTS["figure12"].runs(PAPER) if run.script == OFFLINE)
    hours = launch.estimated_hours(offline, offline.tasks(PAPER), "paper")
    update = 2 * 1024 * (12 * ((43 + 32) * 4096 + 4 * 4096**2 + 101 * 4096) + 4 * ((43 + 32) * 256 + 2 * 256**2)) / 4e13
    assert hours == pytest.approx((120 + 1_000_000 * (update + 2e-3)) / 3600)


def test_a_run_that_others_read_is_finished_when_it_has_written_all(tmp_path):
    """Its last checkpoint and its replay come after its last evaluation. One that diverged is not begun again."""
    job = launch.Job("run", ["x.py", "--save-replay"], 60, "run", str(tmp_path), [])
    (tmp_path / "run" / "checkpoints" / "40").mkdir(parents=True)
    (tmp_path / "run" / "eval.csv").write_text(",".join(scores.EVAL_COLUMNS) + "\n60,0,1,x,1,1,,1\n")
    assert job.state() == "finished"
    job.has_readers = True
    assert job.state() == "stopped"
    (tmp_path / "run" / "checkpoints" / "60").mkdir()
    assert job.state() == "stopped"
    (tmp_path / "run" / "replay").mkdir()
    (tmp_path / "run" / "replay" / ".partial-x.npy").touch()  # of a full disk
    assert job.state() == "stopped"
    (tmp_path / "run" / "replay" / ".partial-x.npy").unlink()
    assert job.state() == "finished"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "args.json").write_text('{"diverged_at": 40}')
    assert launch.Job("other", ["x.py"], 60, "other", str(tmp_path), []).state() == "finished"


def test_a_run_is_finished_when_its_last_step_has_all_tasks(tmp_path):
    """A copy that was cut in its last evaluation had reached the end, by its last row."""
    rows = [f"{step},0,1,{task},1,1,,0.5" for step in (0, 60) for task in ("x/a", "x/b")]
    whole = "\n".join([",".join(scores.EVAL_COLUMNS), *rows, ""])
    (tmp_path / "args.json").write_text('{"total_timesteps": 60}')
    for text, step in ((whole, 60), (whole[:-1], 0), (whole[:-12], 0), (whole.rsplit("60", 1)[0], 0), ("step\n", -1)):
        (tmp_path / "eval.csv").write_text(text)
        assert launch.last_step(tmp_path) == step, text
        assert keep.finished(tmp_path) == (step == 60)


def test_embedding_transfer_is_finished_with_its_last_task(tmp_path):
    """It writes its tables after each task: one that was stopped after the first was never continued, and kept."""
    command = ["x.py", "--protocol", "embedding", "--heatmap"]
    job, directory = launch.Job("run", command, 600, "run", str(tmp_path), []), tmp_path / "run"
    assert job.state() == "new"
    directory.mkdir()
    (directory / "args.json").write_text(json.dumps({"heatmap": True, "env_info": {"task_names": ["x/a", "x/b"]}}))
    assert job.state() == "new"
    for tasks, state in ((["x/a"], "stopped"), (["x/a", "x/b"], "finished")):
        for name in ("embedding.csv", "heatmap.csv"):
            (directory / name).write_text("\n".join(["target,return", *(f"{task},1" for task in tasks), ""]))
        assert job.state() == state and keep.finished(directory) == (state == "finished")


def test_launcher_refuses_bad_input(capsys):
    assert launch.main(launch.Args(("figure99",))) == 2
    assert launch.main(launch.Args(())) == 2
    assert launch.main(launch.Args(("figure4",), jobs=0)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "figure99" in lines[0] and "figure4" in lines[0] and "--jobs" in lines[2]


@pytest.mark.parametrize("folder", ["file", "file/runs"])
def test_folders_that_cannot_be_made_are_one_line(folder, tmp_path, capsys):
    """A file is in the way of --run-root, and of --out of plots and of what is kept."""
    (tmp_path / "file").touch()
    run = EXPERIMENTS["figure7"].runs(LAPTOP)[0]
    directory, bad = write_run(tmp_path / "runs", run, known), tmp_path / folder
    picture = plot.Args((str(directory),), out=bad / "x.png")
    assert launch.main(launch.Args(("figure7",), run_root=str(bad))) == 2
    assert plot.main(plot.Args(("figure7",), runs=tmp_path / "runs", out=bad)) == plot.main(picture) == 2
    assert keep.main(keep.Args((directory,), bad)) == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ") and str(bad) in line]
    assert len(errors) == 4 and all("--run-root" in line or "--out" in line for line in errors), lines


@pytest.mark.parametrize(("where", "root"), [(".", "here"), ("..", "elsewhere/runs"), ("benchmark", "../runs")])
def test_run_root_is_relative_to_where_the_user_stands(where, root, monkeypatch, capsys, tmp_path):
    """The scripts run in the repository, wherever the launcher was called."""
    folder = ROOT / where if where == "benchmark" else tmp_path / where
    monkeypatch.chdir(folder)
    assert launch.main(launch.Args(("figure7",), run_root=root, dry_run=True)) == 0
    commands = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("python ")]
    assert len(commands) == LAPTOP.seeds
    for command in commands:
        assert (ROOT / command[command.index("--run-root") + 1]).resolve() == (folder / root).resolve()


STOPPABLE = """import signal, sys, time
if {handles}: signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("handles", "by_launcher", "outcome"),
    [(True, True, "stopped"), (False, True, "stopped"), (True, False, "stopped"),
     (False, False, "failed (exit status -15): ready")],
)  # fmt: skip
def test_a_stopped_run_has_not_failed(handles, by_launcher, outcome, tmp_path):
    """Neither one that wrote a checkpoint, nor one that the launcher stopped before it listens to signals."""
    (tmp_path / "script.py").write_text(STOPPABLE.format(handles=handles))
    job = launch.Job("run", ["script.py"], 60, "run", str(tmp_path), [])
    job.start()
    log = tmp_path / "run" / "log.txt"
    while "ready" not in log.read_text().splitlines():
        assert job.process.poll() is None, log.read_text()
        time.sleep(0.01)
    job.stop() if by_launcher else job.process.terminate()
    job.process.wait(timeout=30)
    assert job.outcome() == outcome


def test_dry_run_into_head(environment):
    """A reader that has seen enough: more commands than fit in a pipe, and no word about it. Nothing else changes."""
    command = [sys.executable, "benchmark/launch.py", "figure4", "figure1", "--scale", "paper", "--dry-run"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline().startswith(b"# figure4 at paper scale")
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(timeout=60) == 0
    process.stderr.close()


# ---------------------------------------------------------------------------------------------------- statistics


def test_statistics_by_hand():
    """Two seeds, four tasks: small enough to do on paper."""
    matrix = np.array([[0.0, 0.2, 0.4, 1.0], [0.2, 0.4, 0.8, 1.0]])
    row = scores.summary(matrix, 500)
    assert row["mean"] == pytest.approx(4.0 / 8)
    assert row["median"] == pytest.approx((0.3 + 0.6) / 2)  # of the tasks' means .1, .3, .6, 1
    assert row["iqm"] == pytest.approx((0.2 + 0.4 + 0.4 + 0.8) / 4)  # 0, .2 and 1, 1 are trimmed from eight scores
    assert (row["tasks"], row["seeds"]) == (4, 2)


def test_bootstrap_is_stratified():
    """rliable's interval against bootstrap means drawn here, and against the exact distribution of a small case."""
    rng = np.random.default_rng(0)
    matrix = rng.normal(np.arange(6), 1.0, (5, 6))  # tasks differ much, so drawing tasks as well would be much wider
    row = scores.summary(matrix, 4000)
    draws = rng.integers(5, size=(20_000, 5, 6))
    means = np.take_along_axis(matrix[None], draws, axis=1).mean((1, 2))
    low, high = np.quantile(means, [0.025, 0.975])
    assert row["mean_low"] == pytest.approx(low, abs=0.03) and row["mean_high"] == pytest.approx(high, abs=0.03)
    # one task, seeds 0 and 1: the mean is 0, .5, .5 or 1 with equal probability
    row = scores.summary(np.array([[0.0], [1.0]]), 200)
    assert (row["mean_low"], row["mean_high"]) == (0, 1)
    assert scores.summary(matrix, 50) == scores.summary(matrix, 50), "a figure drawn twice is the same"
    single = scores.summary(matrix[:1], 200)
    assert np.isnan([single["mean_low"], single["iqm_high"]]).all() and single["mean"] == matrix[0].mean()


def test_score_matrix_takes_as_many_seeds_as_all_tasks_have():
    rows = [("a", 1, 0.1), ("a", 2, 0.2), ("a", 3, 0.3), ("b", 3, 0.9), ("b", 1, 0.7), ("c", 1, np.nan)]
    table = pd.DataFrame(rows, columns=["task", "seed", "score"])
    matrix, tasks = scores.score_matrix(table)
    assert tasks == ["a", "b"], "c has no score"
    np.testing.assert_array_equal(matrix, [[0.1, 0.7], [0.2, 0.9]])
    matrix, _ = scores.score_matrix(table.assign(score=[np.nan, 0.2, -np.inf, 0.9, 0.7, np.nan]))
    np.testing.assert_array_equal(matrix, [[0, 0.7], [0.2, 0.9]], "a seed that diverged is one")


def test_mean_curve_needs_every_task():
    rows = [(step, task, seed, step + seed + 10 * (task == "b"))
            for step in (0, 1, 2) for task in "ab" for seed in (1, 2) if (step, task, seed) != (1, "b", 2)
            and (step, task) != (2, "b")]  # fmt: skip
    curve = scores.mean_curve(pd.DataFrame(rows, columns=["step", "task", "seed", "score"]), 100)
    assert list(curve["step"]) == [0, 1] and list(curve["seeds"]) == [2, 1]
    assert list(curve["mean"]) == [6.5, 1 + 1 + 5]  # at step 1 both tasks' first seeds only
    assert np.isnan(curve["low"].iloc[1]) and curve["low"].iloc[0] < 6.5 < curve["high"].iloc[0]


def test_shapley_values_are_means_over_orders():
    rng, players = np.random.default_rng(1), ["SQ", "CE", "TE", "X"]
    groups = [frozenset(p for i, p in enumerate(players) if bits >> i & 1) for bits in range(16)]
    values = dict(zip(groups, rng.normal(size=16), strict=True))
    gains = {player: [] for player in players}
    for order in permutations(players):
        for place, player in enumerate(order):
            gains[player].append(values[frozenset(order[: place + 1])] - values[frozenset(order[:place])])
    result = scores.shapley_values(values, players)
    assert result == pytest.approx({player: np.mean(gain) for player, gain in gains.items()})
    assert sum(result.values()) == pytest.approx(values[frozenset(players)] - values[frozenset()])


# ------------------------------------------------------------------------------------ the paper's printed numbers


def test_means_of_table_5_recompute():
    """From its cells with Agarwal et al.'s random and human scores. The single-task mean does not: the paper prints
    0.667, its cells give 0.694, because the MsPacman cell repeats KungFuMaster's 6310.5."""
    table, printed = plot.atari_table(), pd.read_csv(plot.PAPER_TABLES / "table5.csv").iloc[-1]
    assert len(table) == 26 and printed["game"] == "Mean"
    means = {
        agent: np.mean([drq.normalized_score(task, value) for task, value in table[agent].items()]) for agent in table
    }
    for agent in ("Human", "SimPLe", "DER", "SPR", "DrQ", "BRC*"):
        assert means[agent] == pytest.approx(printed[agent], abs=0.0006), agent
    assert printed["BRC"] == 0.667 and means["BRC"] == pytest.approx(0.694, abs=0.0006)
    assert table.loc["atari/mspacman", "BRC"] == table.loc["atari/kungfumaster", "BRC"] == 6310.5
    without = table["BRC"].drop("atari/mspacman")  # what MsPacman would have to be for the printed mean
    rest = sum(drq.normalized_score(task, value) for task, value in without.items())
    assert 26 * 0.667 - rest == pytest.approx(0.19, abs=0.02)


def test_table_2_is_what_the_script_normalizes_with():
    table = pd.read_csv(plot.PAPER_TABLES / "table2.csv")
    assert len(table) == 36
    for row in table.itertuples():
        assert sac.HUMANOIDBENCH[row.task.partition("/")[2]] == (row.random, row.optimal)
    assert set(sac.HUMANOIDBENCH) - {task.partition("/")[2] for task in table["task"]} == {"h1hand-cabinet"}


def test_table_1_is_what_the_script_builds():
    """Parameters of critics and targets at the paper's widths, in millions."""
    sizes = {}
    for run in EXPERIMENTS["table1"].runs(PAPER):
        saved = {"script": "brc_sac_continuous", "critic_width": int(run.x),
                 "env_info": {"num_tasks": 9, "observation_dim": 51, "action_dim": 19}}  # fmt: skip
        sizes[int(run.x)] = scores.critic_parameters(saved) / 1e6
    printed = {256: 1, 512: 4, 1024: 16, 2048: 64, 4096: 256, 8192: 1000}
    assert list(sizes) == list(printed)
    for width, size in sizes.items():
        assert 0.9 < size / printed[width] < 1.4, (width, size)


# -------------------------------------------------------------------------------------------- plots of synthetic runs


def write_run(root: Path, run: Run, value, part: float = 1.0) -> Path:
    """A run directory in the real layout, up to a part of its length; value(run, task, step) is the score."""
    directory, tasks = root / run.name, run.tasks(LAPTOP)
    directory.mkdir(parents=True, exist_ok=True)
    env_info = {"num_tasks": len(tasks), "task_names": list(tasks), "observation_dim": 39, "action_dim": 4}
    saved = {"script": run.script.removesuffix(".py"), "critic_width": int(run.flag("--critic-width", "128")),
             "critic_depth": 2, "seed": run.seed, "env_info": env_info, "heatmap": "--heatmap" in run.argv,
             "total_updates" if run.script == experiments.OFFLINE else "total_timesteps": run.length}  # fmt: skip
    (directory / "args.json").write_text(json.dumps(saved))

    def write(name, header, rows):
        with (directory / name).open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])

    if "embedding" in run.argv:
        for name, methods in (("embedding.csv", ("selected", "tuned")), ("heatmap.csv", ("heatmap",))):
            rows = [(task, method, source, 300, 10, 5.0, value(run, task, 0), value(run, task, 0))
                    for task in tasks for method in methods for source in ("a", "b")]  # fmt: skip
            write(name, scores.EMBEDDING_COLUMNS, rows)
        return directory
    if not run.length:
        return directory
    rows = []
    for step in range(0, int(run.length * part) + 1, int(run.flag("--eval-every"))):
        for task in tasks:
            score = value(run, task, step)
            success = score if task.startswith(("metaworld/", "shadowhand/")) else ""
            rows.append((step, 2 * step, step / 50, task, 10, 1000 * score, success,
                         score if scores.has_score(task) else ""))  # fmt: skip
    write("eval.csv", scores.EVAL_COLUMNS, rows)
    if "--log-task-statistics" in run.argv:
        rng, n = np.random.default_rng(zlib.crc32(run.name.encode())), len(tasks)
        (directory / "statistics").mkdir(exist_ok=True)
        np.savez(directory / "statistics" / f"{run.length}.npz", task=np.array(tasks), td_loss=rng.random(n),
                 gradient_cosine=np.full((n, n), -0.5 if run.seed == 1 else 0.5), gradient_norm=rng.random(n),
                 entropy=rng.random(n), embedding=rng.normal(size=(n, 32)))  # fmt: skip
    return directory


def known(run: Run, task: str, step: int) -> float:
    """Scores that differ by run and task, so that a mix-up of any two shows."""
    return step / run.length * (zlib.crc32(f"{run.name} {task}".encode()) % 1000) / 1000 if run.length else 0.5


def draw(*names: str, **options) -> int:
    return plot.main(plot.Args(names, **{"reps": 20, **options}))


def table_of(out: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(out / f"{name}-laptop.csv")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """All runs of all experiments at laptop scale."""
    root = tmp_path_factory.mktemp("finished")
    for run in experiments.unique_runs(list(EXPERIMENTS), LAPTOP):
        write_run(root, run, known)
    return root


@pytest.fixture(scope="module")
def drawn(finished, tmp_path_factory) -> tuple[Path, dict[str, str], str]:
    """Output directory of every figure and table of the finished runs, title of each figure, and standard error."""
    out, titles, error = tmp_path_factory.mktemp("drawn"), {}, io.StringIO()
    save = plot.save_picture

    def save_picture(figure, path, **options):
        titles[path.name] = " ".join(figure.get_suptitle().split())
        save(figure, path, **options)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(error):
        patch.setattr(plot, "save_picture", save_picture)
        assert draw(*EXPERIMENTS, runs=finished, out=out) == 0
    return out, titles, error.getvalue()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_figure_is_drawn(name, drawn):
    out, titles, error = drawn
    assert error == ""
    suffixes = {"csv", "md"} | ({"png", "pdf"} if name not in ("table1", "table2") else set())
    assert {path.name for path in out.glob(f"{name}-*")} == {f"{name}-laptop.{suffix}" for suffix in suffixes}
    assert (table_of(out, name)["scale"] == "laptop").all()
    assert f"{EXPERIMENTS[name].title}: laptop scale" in (out / f"{name}-laptop.md").read_text()
    if "png" in suffixes:
        assert titles[f"{name}-laptop.png"].startswith(f"{EXPERIMENTS[name].title}: laptop scale")
        assert matplotlib.image.imread(out / f"{name}-laptop.png").std() > 0.05  # not a blank page
        assert (out / f"{name}-laptop.pdf").read_bytes().startswith(b"%PDF")


@pytest.fixture
def two_tasks(monkeypatch) -> experiments.Scale:
    """A scale that is small enough to break every run of it in its own way."""
    suite = experiments.laptop_suite("two", experiments.SIX[:2])
    suites = {**LAPTOP.suites, **dict.fromkeys(("hb-medium", "hb-hard"), suite)}
    monkeypatch.setitem(SCALES, "laptop", replace(LAPTOP, suites=suites))
    return SCALES["laptop"]


def expected_mean(runs: list[Run]) -> float:
    """Over the tasks that have a score."""
    return np.mean([[known(run, task, run.length) for task in run.tasks(LAPTOP) if scores.has_score(task)]
                    for run in runs])  # fmt: skip


def test_numbers_of_the_tables(drawn):
    """Cells of figures 3, 4, 5, 6 and 24 and table 5 against means of what was written."""
    out, _, _ = drawn
    table = table_of(out, "figure3")
    mixed = table[(table["panel"] == "multi-task, mixed rewards") & table["tasks"].notna()]
    assert len(mixed) == 3 and (mixed["tasks"] == len(LAPTOP.suites["mw-dmc"].tasks) - 1).all()  # gym/ has no score
    for row in mixed.itertuples():
        runs = [r for r in EXPERIMENTS["figure3"].runs(LAPTOP) if (r.panel, r.label) == (row.panel, row.label)]
        assert row.mean == pytest.approx(expected_mean(runs), abs=1e-5)
    spread = table[table["label"].str.contains("sigma/mu")]
    assert spread.groupby("panel").size().to_dict() == {"multi-task": 9, "multi-task, mixed rewards": 9}

    table = table_of(out, "figure4")
    assert len(table) == (1 + 4) * 2  # of single-task agents BRC alone
    for row in table.itertuples():
        runs = [run for run in EXPERIMENTS["figure4"].runs(LAPTOP)
                if (run.panel, run.label, run.x) == (row.panel, row.label, row.x)]  # fmt: skip
        assert (row.tasks, row.seeds) == (6, 2)
        assert row.mean == pytest.approx(expected_mean(runs), abs=1e-5)
        assert row.mean_low <= row.mean <= row.mean_high
    bronet = table[(table["panel"] == "multi-task") & (table["label"] == "BroNet (CE)") & (table["x"] == 128)]
    assert bronet["parameters"].item() == 360_724  # what the script prints for these six tasks

    rates = table_of(out, "figure5").query("panel == 'conflicting gradients'")
    assert len(rates) == 4 and (rates["mean"] == 0.5).all()  # seed 1 always conflicts, seed 2 never

    table = table_of(out, "figure6").query("panel == 'Shapley value'").set_index("label")
    assert len(table) == 3
    by_label = {label: expected_mean([r for r in EXPERIMENTS["figure6"].runs(LAPTOP) if r.label == label])
                for label in {run.label for run in EXPERIMENTS["figure6"].runs(LAPTOP)}}  # fmt: skip
    gains = {player: [] for player in ("SQ", "CE", "TE")}
    for order in permutations(gains):
        for place, player in enumerate(order):
            names = [" + ".join(p for p in ("SQ", "CE", "TE") if p in group) or "none"
                     for group in (order[: place + 1], order[:place])]  # fmt: skip
            gains[player].append(by_label[names[0]] - by_label[names[1]])
    for player, gain in gains.items():
        assert table.loc[player, "mean"] == pytest.approx(np.mean(gain), abs=1e-5)

    games = table_of(out, "table5").set_index("game")
    runs = [run for run in EXPERIMENTS["table5"].runs(LAPTOP) if run.label == "BRC*"]
    expected = np.mean([1000 * known(run, "atari/pong", run.length) for run in runs])
    assert games.loc["atari/pong", "BRC* (ours, laptop)"] == pytest.approx(expected, rel=1e-4)
    assert games.loc["atari/pong", "SPR"] == -5.4
    assert list(table_of(out, "figure24").columns) == ["scale", "embedding", "shadowhand/pen"]


def test_claims(finished, monkeypatch, capsys, tmp_path):
    """Numbers of the table against what was written, a verdict by hand, and runs that are not there."""
    monkeypatch.setattr(claims, "LAPTOP", LAPTOP)
    assert claims.main(claims.Args(finished)) == 0
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2 + 36 and all(len(row) == 6 for row in rows)
    assert all(row[5] in ("seen", "not seen", "contradicted") for row in rows[2:])
    steps = (10_000, 12_500, 15_000)

    def by_seed(figure: str, label: str, **where) -> str:
        values = {}
        for run in EXPERIMENTS[figure].runs(LAPTOP):
            if run.label == label and all(getattr(run, name) == value for name, value in where.items()):
                tasks = [task for task in run.tasks(LAPTOP) if scores.has_score(task)]
                values.setdefault(run.seed, []).append(np.mean([known(run, t, s) for t in tasks for s in steps]))
        return " ".join(f"{np.mean(found):.2f}" for found in values.values())

    assert rows[2][2:4] == [by_seed("figure1", "BRC*"), by_seed("figure1", "BRC")]
    mixed = {"panel": "multi-task, mixed rewards"}
    assert rows[12][2:4] == [by_seed("figure3", label, **mixed) for label in ("CE + normalization", "MSE")]
    conflicts = next(row for row in rows if row[1].startswith("task embeddings: "))
    assert conflicts[2:4] == ["1.00 0.00", "1.00 0.00"] and conflicts[5] == "not seen"
    high, low = {1: 0.8, 2: 0.9}, {1: 0.1, 2: 0.2}
    assert claims.claim_row(1, "", high, low)[4:] == ["+0.700 (+0.396 to +1.004)", "seen"]  # t(2) = 4.303
    assert claims.claim_row(1, "", low, high)[5] == "contradicted"
    assert claims.claim_row(1, "", {1: 1.0, 2: 1.0}, {1: 0.0, 2: 0.0})[4:] == ["+1.000 (+1.000 to +1.000)", "seen"]
    assert claims.claim_row(6, "", high)[4] == "+0.850 (+0.215 to +1.485)"  # t(1) = 12.706
    assert claims.claim_row(1, "", high, {1: 0.1})[2:] == ["0.80 0.90", "0.10", "", "1 seed"]
    monkeypatch.setattr(claims, "LAPTOP", replace(LAPTOP, seeds=5))
    assert claims.claim_row(1, "", high, low)[5] == "seen (2 of 5 seeds)"
    assert claims.claim_row(1, "", {**high, 3: 0.85}, low)[5] == "seen (3 and 2 of 5 seeds)"
    for folder, words in ((tmp_path, "none of the runs"), (tmp_path / "none", "no directory")):
        assert claims.main(claims.Args(folder)) == 2
        output = capsys.readouterr()
        assert output.out == "" and re.fullmatch(f"error: {folder} .*{words}.*\n", output.err)


def test_claims_of_runs_that_lack_something(monkeypatch, tmp_path, capsys):
    """A mean of what is left is another number: without an evaluation or a task a run counts as not run, and is told.
    So is, once, what is wrong with its files."""
    monkeypatch.setattr(claims, "LAPTOP", LAPTOP)
    for label in ("MH-SAC*", "BRC*"):
        runs = [run for run in EXPERIMENTS["figure1"].runs(LAPTOP) if run.label == label]
        path = [write_run(tmp_path, run, known) / "eval.csv" for run in runs][0]
        lines = path.read_text().splitlines(keepends=True)
        gone = "12500," if label == "BRC*" else runs[0].tasks(LAPTOP)[0]
        path.write_text("".join(line for line in lines if not (line.startswith(gone) or f",{gone}," in line)))
    last = path.parent.with_name(runs[1].name)
    (last / "eval.csv").write_text((last / "eval.csv").read_text()[:-1])
    assert claims.main(claims.Args(tmp_path)) == 0
    output = capsys.readouterr()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in output.out.splitlines()]
    assert rows[5][2] == "-" and len(rows[5][3].split()) == 1 and rows[5][5] == "not run"
    told = [line for line in output.err.splitlines() if runs[0].name in line or runs[1].name in line]
    assert [line.partition("__")[2][8:] for line in told] == [
        "1: counts as not run, as it has 12 of 18 scores from step 10,000 to 15,000",
        "2: damaged eval.csv: line 43 and what follows is left out",
        "1: counts as not run, as it has 0 of 6 scores from step 12,500 to 12,500",  # Figure 9's
    ]  # fmt: skip
    assert sum("counts as not run, as it has 15 of 18 scores" in line for line in output.err.splitlines()) == 1


def test_mean_over_all_panels(monkeypatch, tmp_path, capsys, two_tasks):
    """Figure 1's mean over benchmarks: of continuous actions only, and only for what ran on all of them."""
    benchmarks = {"two": ("hb-medium",), "walker": ("dmc-dogs",), "Atari": ("atari",)}
    scale = replace(two_tasks, benchmarks=benchmarks)
    monkeypatch.setitem(SCALES, "laptop", scale)
    runs = EXPERIMENTS["figure1"].runs(scale)
    for run in runs:
        if not (run.panel == "walker" and run.label == "SAC"):
            write_run(tmp_path / "runs", run, known)
    assert draw("figure1", runs=tmp_path / "runs", out=tmp_path / "plots") == 0
    table = table_of(tmp_path / "plots", "figure1")
    whole = table[table["panel"] == "all continuous"].set_index("label")
    assert list(whole.index) == ["MH-SAC*", "BRC", "BRC*"] and (whole["tasks"] == 4).all()
    for label, mean in whole["mean"].items():
        cells = [known(run, task, run.length) for run in runs if run.label == label and run.panel != "Atari"
                 for task in run.tasks(scale)]  # fmt: skip
        assert mean == pytest.approx(np.mean(cells), abs=1e-5)
    assert set(table[table["panel"] == "Atari"]["label"]) == {"BRC", "BRC*"}
    assert "4 of 30 runs not started" in capsys.readouterr().err


def test_principal_components(finished, drawn):
    """Against the eigenvectors of the covariance."""
    table = table_of(drawn[0], "figure7")
    for run in EXPERIMENTS["figure7"].runs(LAPTOP):
        embedding = np.load(finished / run.name / "statistics" / f"{run.length}.npz")["embedding"]
        _, vectors = np.linalg.eigh(np.cov(embedding.T))
        expected = (embedding - embedding.mean(0)) @ vectors[:, [-1, -2]]
        found = table[table["seed"] == run.seed][["component_1", "component_2"]].to_numpy()
        np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-4)


def test_empty_runs(tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    assert draw("figure4", "figure7", runs=tmp_path / "runs", out=tmp_path / "plots") == 1
    error = capsys.readouterr().err
    planned = len(experiments.unique_runs(["figure4"], LAPTOP))
    assert f"figure4 (laptop scale): {planned} of {planned} runs not started" in error
    assert "figure4 (laptop scale): nothing to plot" in error and "launch.py figure7 --scale laptop" in error
    assert draw("table1", "table2", runs=tmp_path / "runs", out=tmp_path / "plots") == 1
    assert not (tmp_path / "plots").exists()


def test_a_row_whose_last_number_was_cut_is_damaged(tmp_path):
    """0.85 cut to 0 is a number, too."""
    text = ",".join(scores.EVAL_COLUMNS) + "\n0,0,1.0,x,1,5,0.85,0.85\n10,0,1.0,x,1,5,0.85,0.85\n"
    (tmp_path / "eval.csv").write_text(text)
    assert scores.read_table(tmp_path / "eval.csv", scores.EVAL_COLUMNS)[1] == ""
    (tmp_path / "eval.csv").write_text(text[:-4])
    table, problem = scores.read_table(tmp_path / "eval.csv", scores.EVAL_COLUMNS)
    assert table["score"].tolist() == [0.85]
    assert problem == "damaged eval.csv: line 3 and what follows is left out"


@pytest.mark.parametrize("name", ["eval_every", "total_timesteps", "diverged_at"])
def test_an_edited_args_json_is_damaged(name, tmp_path, capsys):
    run = EXPERIMENTS["figure7"].runs(LAPTOP)[0]
    path = write_run(tmp_path, run, lambda *_: np.nan) / "args.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eval_every": 2500, name: "x"}))
    assert plot.main(plot.Args((str(path.parent),), out=tmp_path / "x.png")) == 2
    told = f"left out {path.parent}: damaged args.json: {name} is 'x', no whole number"
    assert capsys.readouterr().err.splitlines() == [told, "error: no run could be read"]
    assert len(scores.read_evaluations(path.parent)[0])


def test_unfinished_and_damaged_runs(tmp_path, capsys, two_tasks):
    """Curves go as far as the runs did; final scores come from finished ones; every fault is named once."""
    root, by_label = tmp_path / "runs", {}
    for run in EXPERIMENTS["figure9"].runs(two_tasks):
        by_label.setdefault((run.label, run.tasks(LAPTOP)), {})[run.seed] = run
        write_run(root, run, known)
    (single_a, single_b), multi = [by_label[key] for key in by_label if key[0] == "BRC"], by_label[
        next(key for key in by_label if key[0] == "BRC*")]  # fmt: skip
    write_run(root, multi[2], known, part=0.5)  # unfinished
    (root / single_a[1].name / "args.json").write_text('{"critic_width": ')
    path = root / single_b[2].name / "eval.csv"
    path.write_text(path.read_text()[:-30])  # cut in its last row, as by a kill
    (root / single_b[1].name / "eval.csv").write_bytes(bytes(range(256)) * 4)
    assert draw("figure9", "figure17", runs=root, out=tmp_path / "plots") == 0
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("figure9")]
    for run, fault in ((multi[2], "unfinished: step 7,500 of 15,000"), (single_a[1], "damaged args.json"),
                       (single_b[2], "damaged eval.csv: line 8"),
                       (single_b[1], "damaged eval.csv: its first line")):  # fmt: skip
        assert sum(f"{run.name}: " in line and fault in line for line in lines) == 1, (run.name, fault, error)
    assert any("BRC: no mean, 1 of 2 tasks have a finished run" in line for line in lines)
    table = table_of(tmp_path / "plots", "figure9")
    assert list(table["label"]) == ["BRC*"] and table["seeds"].item() == 1
    assert table["mean"].item() == pytest.approx(expected_mean([multi[1]]), abs=1e-5)
    per_task = table_of(tmp_path / "plots", "figure17").set_index(["label", "task"])
    task = single_a[1].tasks(LAPTOP)[0]
    assert per_task.loc[("BRC", task), "seeds"] == 2  # args.json is not needed for a curve
    markdown = (tmp_path / "plots" / "figure9-laptop.md").read_text()
    assert "Missing:" in markdown and multi[2].name in markdown


def test_transfer_to_fewer_tasks_is_no_mean(tmp_path, capsys):
    """Figure 11: a curve over one of two new tasks could not stand beside those over both."""
    planned = EXPERIMENTS["figure11"].runs(LAPTOP)
    runs = [run for run in planned if run.label != "data transfer" or run.tasks(LAPTOP) == ("metaworld/reach-wall",)]
    for run in runs:
        write_run(tmp_path / "runs", run, lambda *_: 0.5)
    assert draw("figure11", runs=tmp_path / "runs", out=tmp_path / "plots") == 0
    assert "data transfer: no mean curve, 1 of 2 tasks have a run" in capsys.readouterr().err
    assert set(table_of(tmp_path / "plots", "figure11")["label"]) == {
        "model transfer", "from scratch", "selected", "tuned"
    }  # fmt: skip


def test_a_picture_that_a_full_disk_refuses_leaves_the_one_before(monkeypatch, tmp_path, capsys):
    directory = write_run(tmp_path, EXPERIMENTS["figure7"].runs(LAPTOP)[0], known)
    path = tmp_path / "x.png"
    path.write_bytes(b"before")

    def full(figure, partial_path, **_):
        partial_path.write_bytes(b"be")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", full)
    assert plot.main(plot.Args((str(directory),), out=path)) == 2 and path.read_bytes() == b"before"
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: cannot write {path}: No space left on device; choose another --out"
    assert not list(tmp_path.glob(".partial-*"))


def test_colors_are_the_same_in_every_panel():
    reference = pd.DataFrame({"agent": ["theirs"]})
    data = plot.Data(EXPERIMENTS["figure5"].runs(LAPTOP), LAPTOP, Path(), pd.DataFrame(), reference, 20, [])
    assert [data.color(name) for name in (*data.labels(), "theirs")] == ["C0", "C1", "C2", "C3"]
    row = {"label": "task embeddings", "x": 32, "parameters": 1e4, "mean": 0.5, "mean_low": 0.4, "mean_high": 0.6}
    table = pd.DataFrame([row])
    figure, axes = plot.new_figure(1, 1)
    plot.draw_scaling(axes[0, 0], table, "", labels=data.labels())
    assert axes[0, 0].lines[0].get_color() == data.color("task embeddings")
    plot.plt.close(figure)


def test_one_legend_beside_the_panels(finished, tmp_path, monkeypatch):
    """Legends in the panels covered dots and intervals: one names all, outside of every panel."""
    figures = {}
    monkeypatch.setattr(plot, "save_picture", lambda figure, path, **_: figures.setdefault(path.stem, figure))
    assert draw("figure3", "figure5", "figure9", runs=finished, out=tmp_path) == 0
    names = {"figure3-laptop": ["MSE", "MSE + normalization", "CE + normalization"], "figure9-laptop": ["BRC", "BRC*"],
             "figure5-laptop": ["single-task", "separate heads", "task embeddings"]}  # fmt: skip
    for stem, figure in figures.items():
        [legend] = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == names[stem]
        assert not any(axis.get_legend() for axis in figure.axes)
        figure.draw_without_rendering()
        assert not any(legend.get_window_extent().overlaps(axis.get_window_extent()) for axis in figure.axes)


def test_a_seed_that_diverged_stays_in_every_mean(tmp_path, capsys, two_tasks):
    """It counts as score 0 from where it ended itself: a mean of the survivors would be twice as high."""
    root, runs = tmp_path / "runs", EXPERIMENTS["figure9"].runs(two_tasks)
    whole, diverged = [run for run in runs if run.label == "BRC*"]
    length, every = diverged.length, int(diverged.flag("--eval-every"))
    for run in runs:
        path = write_run(root, run, lambda *_: 0.8, part=0.5 if run == diverged else 1) / "args.json"
        saved = {**json.loads(path.read_text()), "total_timesteps": length, "eval_every": every}
        path.write_text(json.dumps(saved | ({"diverged_at": length // 2 + 7} if run == diverged else {})))
    assert draw("figure9", "figure17", runs=root, out=tmp_path / "plots") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("figure9")]
    said = f"{diverged.name}: diverged at step {length // 2 + 7:,}, then counts as score 0, its lowest return"
    assert lines == [f"figure9 (laptop scale): {said}"]
    row = table_of(tmp_path / "plots", "figure9").query("label == 'BRC*'").iloc[0]
    assert row["seeds"] == 2 and row["mean"] == pytest.approx(0.4)
    assert said in (tmp_path / "plots" / "figure9-laptop.md").read_text()
    table, _ = scores.collect([whole, diverged], root)
    curve = scores.mean_curve(table, 10).set_index("step")["mean"]
    assert curve.to_dict() == pytest.approx({s: 0.8 if s <= length // 2 else 0.4 for s in range(0, length + 1, every)})

    args = plot.Args(tuple(str(root / run.name) for run in (whole, diverged)), out=tmp_path / "x.png")
    (group, *_), (other, _, curves, *_) = (plot.read_run(Path(name)) for name in args.what)
    assert group == other and all(points[-1] == (length, 0) for points in curves.values())
    assert plot.main(args) == 0 and said.partition(": ")[2] in capsys.readouterr().err


def test_values_that_are_not_finite_count_as_the_lowest(tmp_path):
    """In eval.csv and in published curves; a task without a score has its lowest return, and no score still."""
    tasks = {"dmc/walker-walk": 0.0, "gym/Pendulum-v1": np.nan}
    returns = ((0, 20.0), (10, 30.0), (20, np.inf), (30, np.nan))
    lines = [f"{step},0,1.0,{task},1,{value},,{'' if np.isnan(score) else value}"
             for step, value in returns for task, score in tasks.items()]  # fmt: skip
    (tmp_path / "eval.csv").write_text("\n".join([",".join(scores.EVAL_COLUMNS), *lines, ""]))
    (tmp_path / "args.json").write_text(json.dumps({"env_info": {}, "eval_every": 10, "total_timesteps": 45}))
    table, problem = scores.read_evaluations(tmp_path)
    assert problem == "diverged at step 20, then counts as score 0, its lowest return"
    for task, score in tasks.items():
        rows = table[table["task"] == task]
        assert rows["step"].tolist() == [0, 10, 20, 30, 40, 45]
        assert rows["return"].tolist() == [20, 30, 20, 20, 20, 20] and rows["success"].isna().all()
        np.testing.assert_equal(rows["score"].iloc[2:].tolist(), [score] * 4)
    (tmp_path / "eval.csv").write_text(",".join(scores.EVAL_COLUMNS) + "\n")
    (tmp_path / "args.json").write_text(json.dumps({"env_info": {}, "diverged_at": 0, "eval_every": 10}))
    assert scores.read_evaluations(tmp_path)[1] == "diverged at step 0, has no evaluation to count"
    rows = ["agent,task,seed,step,value", "x,dmc/walker-walk,1,10,900", "x,dmc/walker-walk,2,10,nan"]
    (tmp_path / "published.csv").write_text("\n".join(rows))
    reference, problem = scores.read_reference(tmp_path / "published.csv")
    assert reference["score"].tolist() == [0.9, 0]
    assert problem.endswith("1 values are missing or not finite: they count as score 0")


def test_damaged_statistics(finished, tmp_path, capsys):
    root = tmp_path / "runs"
    runs = EXPERIMENTS["figure7"].runs(LAPTOP)
    for run in runs:
        write_run(root, run, known)
    (root / runs[0].name / "statistics" / f"{runs[0].length}.npz").write_bytes(b"PK\x03\x04 no more")
    assert draw("figure7", runs=root, out=tmp_path / "plots") == 0
    assert f"{runs[0].name}: damaged statistics/{runs[0].length}.npz" in capsys.readouterr().err
    assert set(table_of(tmp_path / "plots", "figure7")["seed"]) == {runs[1].seed}


def test_published_curves_in_three_layouts(finished, tmp_path, capsys):
    """The same curves as CSV and as the authors' arrays read alike; agents that lack a task are not averaged."""
    values = np.array([[100.0, 500.0], [300.0, 700.0]])  # [seeds, evaluations]
    folder = tmp_path / "results" / "humanoidbench_hard" / "BRC_multitask"
    folder.mkdir(parents=True)
    np.save(folder / "h1hand-sit_simple-v0.npy", values)
    np.save(folder / "aggregate.npy", values)
    lines = ["suite,agent,task,seed,step,value"]
    lines += [f"hb-hard,multitask,humanoidbench/h1hand-sit-simple,{seed},{1_000_000 * (i + 1)},{values[seed, i]}"
              for seed in range(2) for i in range(2)]  # fmt: skip
    (tmp_path / "authors.csv").write_text("\n".join(lines) + "\n")
    (tree, _), (table, problem) = (scores.read_reference(tmp_path / name) for name in ("results", "authors.csv"))
    assert problem == ""
    pd.testing.assert_frame_equal(tree, table)
    assert table["agent"].unique().tolist() == ["BRC* (authors)"]
    assert table["score"].iloc[1] == pytest.approx((500 - 10.768) / (750 - 10.768))

    lines = ["agent,metric,task,seed,step,value"]
    lines += ["x,return,metaworld/reach,1,10,4000", "x,success,metaworld/reach,1,10,1"]
    for task in EXPERIMENTS["figure1"].runs(LAPTOP)[-1].tasks(LAPTOP):
        for seed, step in product((1, 2), (0, 500_000)):
            lines += [f"sac,success,{task},{seed},{step},{step / 1e6 + seed / 1e3}"]
    lines += ["half,success,metaworld/door-close,1,500000,0.9"]
    (tmp_path / "baselines.csv").write_text("\n".join(lines) + "\n")
    reference, _ = scores.read_reference(tmp_path / "baselines.csv")
    assert reference.query("agent == 'x (published)'")["value"].tolist() == [1]
    options = {"runs": finished, "out": tmp_path / "plots", "reference": (tmp_path / "baselines.csv",)}
    assert draw("figure1", "figure4", "figure16", "figure17", **options) == 0
    published = table_of(tmp_path / "plots", "figure1").query("source == 'published'")
    assert published["label"].tolist() == ["sac (published), 500,000 steps"]
    assert published["mean"].item() == pytest.approx(0.5015)


@pytest.mark.parametrize(("row", "words"), [
    ("x,dmc/dog-run,1,x,5", "row 2 after the first line: step 'x' is no number"),
    ("x,dmc/dog-run,1,10,zz", "row 2 after the first line: value 'zz' is no number"),
    ("x,dmc/dog-run,1,,5", "row 2 after the first line: no step"), ("x,,1,10,5", "row 2 after the first line: no task"),
    ("x,dmc/dog-run,,10,5", "row 2 after the first line: no seed"), ("cut", "end-of-stream"),
    ("x,atari/nope,1,10,5", "no task to plot, such as metaworld/reach; it has dmc/dog-walk, atari/nope"),
])  # fmt: skip
def test_bad_published_curves_are_one_line(row, words, tmp_path, capsys):
    """Damaged ones, and those of other tasks: a picture without them looks as if there were none."""
    run = EXPERIMENTS["figure7"].runs(LAPTOP)[0]
    directory = write_run(tmp_path / "runs", run, known)
    path = tmp_path / "published.csv.gz"
    packed = gzip.compress(f"agent,task,seed,step,value\nx,dmc/dog-walk,1,10,5\n{row}\n".encode())
    path.write_bytes(packed[:-12] if row == "cut" else packed)
    picture = plot.Args((str(directory),), out=tmp_path / "x.png", reference=(path,))
    assert plot.main(picture) == draw("figure9", runs=tmp_path / "runs", out=tmp_path, reference=(path,)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith(f"error: --reference {path}: ") and words in line for line in lines)


@pytest.mark.parametrize("arguments, words", [
    (("figure99",), ("figure99", "figure4")), ((), ("nothing to plot", "figure4")),
    (("figure4", "--runs", "no/such"), ("--runs no/such",)), (("figure4", "figure99"), ("figure99",)),
    (("figure4", "--runs", ".", "--reference", "no.csv"), ("--reference no.csv",)),
    (("figure4", "--runs", ".", "--reference", "README.md"), ("--reference README.md",)),
    (("figure4", "--runs", ".", "--reference", "tests"), ("--reference tests",)),
    (("figure4", "--runs", ".", "--reps", "0"), ("--reps",)),
    (("figure4", "--runs", ".", "--out", "README.md"), ("--out",)),
    (("tests",), ("no run",)), (("tests", "--out", "x.txt"), ("--out x.txt",)),
])  # fmt: skip
def test_bad_input_is_one_line(arguments, words, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert plot.main(plot.tyro.cli(plot.Args, args=list(arguments))) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("left out")]
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert all(word in lines[0] for word in words), lines[0]


def test_curves_of_run_directories(tmp_path, capsys):
    """README's use: groups by arguments, damaged runs are named and left out."""
    runs = EXPERIMENTS["figure7"].runs(LAPTOP)
    directories = [write_run(tmp_path, run, known) for run in runs]
    broken = tmp_path / "broken"
    broken.mkdir()
    out = tmp_path / "curve.png"
    args = plot.Args((*map(str, directories), str(broken)), out=out, labels=("ours",))
    assert plot.main(args) == 0
    output = capsys.readouterr()
    assert f"left out {broken}: no args.json" in output.err and f"wrote {out}" in output.out
    groups = [plot.read_run(directory)[0] for directory in directories]
    assert groups[0] == groups[1]  # they differ in the seed only
    curves = plot.read_run(directories[0])[2]
    assert list(curves) == list(runs[0].tasks(LAPTOP))
    last, end = {task: points[-1] for task, points in curves.items()}, runs[0].length
    units = {task: 1 if scores.has_score(task) else 1000 for task in curves}  # gym/: the return
    assert last == {task: (end, pytest.approx(unit * known(runs[0], task, end))) for task, unit in units.items()}


def test_the_legend_names_what_has_no_mean_over_all_tasks(tmp_path, monkeypatch):
    """Two single-task agents and one of both tasks, each a curve: the first two were not named."""
    legends = []
    monkeypatch.setattr(plot, "save_picture", lambda figure, *_, **__: legends.append(figure.legends))
    tasks = experiments.SIX[:2]
    runs = [tiny(task, 100, task) for task in tasks]
    both = ("--env-ids", *tasks, "--total-timesteps", "100", "--eval-every", "100")
    runs.append(Run("", "both", SAC, both, 1, "both"))
    directories = [write_run(tmp_path, replace(run, tag=f"run-{index}"), known) for index, run in enumerate(runs)]
    args = plot.Args(tuple(map(str, directories)), out=tmp_path / "x.png", labels=("first", "second", "both"))
    assert plot.main(args) == 0
    [[legend]] = legends
    assert [text.get_text() for text in legend.get_texts()] == ["first (1 seed)", "second (1 seed)", "both (1 seed)"]


def test_scores_and_returns_are_not_averaged(tmp_path, monkeypatch, capsys):
    """A return of 1,000 and two scores of at most 1 were one mean of 300, on one axis on which no score was seen."""
    figures = []
    monkeypatch.setattr(plot, "save_picture", lambda figure, *_, **__: figures.append(figure))
    tasks = ("metaworld/reach", "gym/Pendulum-v1", "dmc/walker-walk")
    argv = ("--env-ids", *tasks, "--total-timesteps", "100", "--eval-every", "100")
    directory = write_run(tmp_path, Run("", "x", SAC, argv, 1, "x"), lambda run, task, step: len(task) / 20)
    assert plot.main(plot.Args((str(directory),), out=tmp_path / "x.png")) == 0
    assert capsys.readouterr().err == "mean: tasks without a score are left out: gym/Pendulum-v1\n"
    drawn = {axis.get_title(): axis for axis in figures[0].axes if axis.lines}
    assert {title: axis.get_ylabel() for title, axis in drawn.items()} == {
        "metaworld/reach": "score", "gym/Pendulum-v1": "return", "dmc/walker-walk": "score", "mean of 2 scores": "score"
    }  # fmt: skip
    assert {line.get_ydata()[-1] for line in drawn["mean of 2 scores"].lines} == {0.75}
    assert drawn["gym/Pendulum-v1"].get_ylim()[0] > 2 > drawn["metaworld/reach"].get_ylim()[1], "axes of their own"


@pytest.mark.parametrize(("figure", "script", "unit"), [("figure12", OFFLINE, "updates"), ("figure9", SAC, "steps")])
def test_offline_runs_are_drawn_over_updates(figure, script, unit, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plot, "save_picture", lambda figure, *_, **__: figures.append(figure))
    run = next(run for run in EXPERIMENTS[figure].runs(LAPTOP) if run.script == script)
    assert plot.main(plot.Args((str(write_run(tmp_path, run, known)),), out=tmp_path / "x.png")) == 0
    assert {axis.get_xlabel() for axis in figures[0].axes} - {""} == {f"thousand {unit}"}


def test_two_runs_of_one_seed_are_told(tmp_path, capsys):
    """Once more by another name, or a copy: a mean of it would look like one of two seeds."""
    runs = [replace(tiny(task, 100, task), tag=tag) for task, tag in (("gym/A", "a"), ("gym/B", "b"), ("gym/A", "c"))]
    directories = [str(write_run(tmp_path, run, known)) for run in runs]
    assert plot.main(plot.Args(tuple(directories), out=tmp_path / "x.png", labels=("x",) * 3)) == 0
    [told] = [line for line in capsys.readouterr().err.splitlines() if "another run of seed" in line]
    assert told == f"{directories[2]}: x has another run of seed 1; both count"  # the second is another task


def test_curves_of_run_directories_beside_published_ones(tmp_path, monkeypatch):
    """Those of agents with all tasks of the run, as scores, dashed, as far as the run goes."""
    tasks = ("dmc/dog-run", "dmc/dog-walk")
    argv = ("--env-ids", *tasks, "--total-timesteps", "200", "--eval-every", "100")
    directory = write_run(tmp_path, Run("", "dogs", SAC, argv, 1, "dogs"), known)
    rows = [("whole", task, seed, step, step + seed) for task in tasks for seed in (0, 1) for step in (100, 200, 300)]
    rows.append(("one task of two", tasks[0], 0, 100, 50))
    columns = ["agent", "task", "seed", "step", "value"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "published.csv", index=False)
    drawn, figures = {}, plot.plt.subplots
    monkeypatch.setattr(plot.plt, "subplots", lambda *a, **k: drawn.setdefault("figure", figures(*a, **k)))
    args = plot.Args(
        (str(directory),), out=tmp_path / "x.png", reference=(tmp_path / "published.csv",), labels=("ours",)
    )
    assert plot.main(args) == 0
    for axis in drawn["figure"][1].flat[:3]:
        lines = {line.get_label(): line for line in axis.lines if line.get_linewidth() > 2}
        assert list(lines) == ["ours (1 seed)", "whole (2 seeds)"]
        published = lines["whole (2 seeds)"]
        assert published.get_linestyle() == "--" and lines["ours (1 seed)"].get_linestyle() == "-"
        assert published.get_xdata().tolist() == [0.1, 0.2]
        assert published.get_ydata().tolist() == pytest.approx([0.1005, 0.2005])


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_means_are_taken_at_equal_steps(order, tmp_path, monkeypatch, capsys):
    """Two runs of one label, evaluated every 1,000 and 2,000 steps, whose score is the step, a third that stopped: the
    mean at step 10,000 was 7,500, and in the other order an exception."""
    run = EXPERIMENTS["figure7"].runs(LAPTOP)[0]
    base = json.loads((write_run(tmp_path, run, known) / "args.json").read_text())
    for name, task, every, last in (("a", "A", 1000, 10_000), ("b", "B", 2000, 10_000), ("c", "A", 1000, 3000)):
        (tmp_path / name).mkdir()
        args = {**base, "seed": 1 + (name == "c"), "env_info": {**base["env_info"], "task_names": [task]}}
        (tmp_path / name / "args.json").write_text(json.dumps({**args, "eval_every": every, "env_ids": [task]}))
        rows = [f"{step},{step},1.0,gym/{task},1,{step},,{step}" for step in range(0, last + 1, every)]
        (tmp_path / name / "eval.csv").write_text("\n".join([",".join(drq.EVAL_COLUMNS), *rows, ""]))
    drawn, figures = {}, plot.plt.subplots
    monkeypatch.setattr(plot.plt, "subplots", lambda *a, **k: drawn.setdefault("figure", figures(*a, **k)))
    directories = [str(tmp_path / name) for name in (*order, "c")]
    assert plot.main(plot.Args(tuple(directories), out=tmp_path / "new" / "x.png", labels=("x",) * 3)) == 0
    lines = {
        axis.get_title(): {round(float(x), 1): float(y) for line in axis.lines if line.get_linewidth() > 2
                           for x, y in zip(*line.get_data(), strict=True)}
        for axis in drawn["figure"][1].flat
    }  # fmt: skip
    assert lines["mean"] == {x: x * 1000 for x in (0, 2, 4, 6, 8, 10)}
    assert lines["gym/A"] == {x: x * 1000 for x in (0, 1, 2, 3)}, "the steps that both seeds have"
    error = capsys.readouterr().err
    assert "mean: x, seed 2 is left out: it has 1 of 2 tasks" in error
    assert "gym/A: x, mean of steps that all 2 seeds have, to step 3,000 of 10,000" in error


@pytest.mark.parametrize("name", readme_tables.TABLES)
def test_readme_says_what_the_results_say(name):
    pages = ("README.md", *(f"benchmark/results/{page}.md" for page in ("README", "history", "laptop/README")))
    page = [line for path in pages for line in (ROOT / path).read_text().splitlines()]
    rows = [readme_tables.row_text(cells) for cells in readme_tables.TABLES[name]()]
    assert rows and [row for row in rows if row not in page] == []


def test_curves_do_not_jump_between_sets_of_seeds():
    """Seed 1 was evaluated every 1,000 steps, seed 2 every 2,000: a mean stands where both were."""
    rows = [("x", seed, step, 2 - seed) for seed in (1, 2) for step in range(0, 5000, 1000 * seed)]
    table = pd.DataFrame(rows, columns=["task", "seed", "step", "score"])
    curve = scores.mean_curve(table[(table["seed"] == 1) | (table["step"] < 4000)], 10)
    assert curve[["step", "mean", "seeds"]].to_numpy().tolist() == [
        [0, 0.5, 2], [2000, 0.5, 2], [3000, 1, 1], [4000, 1, 1],  # the second seed ended at 2,000
    ]  # fmt: skip


def test_readmes_means_are_taken_at_equal_steps(tmp_path):
    """A run that ended early, or whose value is not finite, is no mean of what is left."""
    rows = [
        "0,0,1.0,dmc/a-b,1,5,,0.1",
        "10,0,1.0,dmc/a-b,1,6,,0.2",
        "0,0,1.0,dmc/c-d,1,7,,0.3",
        "10,0,1.0,dmc/c-d,1,nan,,",
    ]
    (tmp_path / "eval.csv").write_text("\n".join([",".join(scores.EVAL_COLUMNS), *rows, ""]))
    (tmp_path / "args.json").write_text('{"total_timesteps": 20}')
    assert readme_tables.mean_of(tmp_path, "return", [0]) == 6
    assert readme_tables.mean_of(tmp_path, "return", [0, 10], "a-b") == 5.5
    for steps, task in (([10], ""), ([0, 20], "a-b"), (None, "")):
        with pytest.raises(ValueError, match="no finite return of every task at steps"):
            readme_tables.mean_of(tmp_path, "return", steps, task)


def test_keep_copies_what_plots_need(tmp_path, capsys):
    """Kept runs plot as the whole ones do, without checkpoints and older statistics."""
    runs = EXPERIMENTS["figure7"].runs(LAPTOP)
    for run in runs:
        directory = write_run(tmp_path / "runs", run, known)
        (directory / "checkpoints").mkdir()
        (directory / "statistics" / "900.npz").write_bytes(b"older")
        (directory / "statistics" / "notes.npz").write_bytes(b"another's")
    assert keep.main(keep.Args(tuple((tmp_path / "runs").iterdir()), tmp_path / "kept")) == 0
    names = {"args.json", "eval.csv", f"statistics/{runs[0].length}.npz"}
    for run in runs:
        kept = tmp_path / "kept" / run.name
        assert {str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file()} == names
    assert draw("figure7", runs=tmp_path / "kept", out=tmp_path / "plots") == 0
    capsys.readouterr()
    assert keep.main(keep.Args((tmp_path / "none",), tmp_path / "kept")) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'none'} is no run directory\n"
    (tmp_path / "begun").mkdir()
    assert keep.main(keep.Args((tmp_path / "begun",), tmp_path / "other")) == 2
    assert capsys.readouterr().err.startswith("error: none of the runs is finished: begun; ")

    name = runs[0].name
    assert keep.main(keep.Args((tmp_path / "begun", tmp_path / "runs" / name), tmp_path / "other")) == 0
    output = capsys.readouterr()
    assert output.err == "not finished, left out: begun\n" and output.out.startswith("kept 1 runs")
    (tmp_path / "kept" / name / "statistics" / "1.npz").touch()  # of a shorter run
    assert keep.main(keep.Args((tmp_path / "runs" / name,), tmp_path / "kept")) == 0
    assert len(list((tmp_path / "kept" / name / "statistics").iterdir())) == 1
    shutil.copytree(tmp_path / "runs" / name, tmp_path / "others" / name)
    both = tmp_path / "runs" / name, tmp_path / "others" / name
    assert keep.main(keep.Args(both, tmp_path / "kept")) == 2
    assert keep.main(keep.Args(both[:1], tmp_path / "runs")) == 2 and (both[0] / "args.json").exists()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"error: two runs are called {name}") and lines[1].startswith("error: --out ")


# --------------------------------------------------------------------------------------------------------- speed


@pytest.mark.parametrize("script", ["sac", "drq"])
def test_operations_counted_by_hand_agree_with_the_compiler(script):
    """At sizes where matrix products are nearly everything that there is to count. Beside them XLA counts element-wise
    operations, which matter for SAC, and leaves out products with the zeros around an image."""
    low, high = {"sac": (1.0, 1.15), "drq": (0.93, 1.0)}[script]
    if script == "sac":
        args = sac.Args(critic_width=256, batch_size=256)
        agent, batches = sac.make_agent(args, 3, 39, 6), speed.random_batch(args.utd, args.batch_size, 39, 6, 3)
        by_hand = speed.matmul_flops(args, 39, 6, args.embedding_size)
    else:
        args = drq.Args(critic_width=256, batch_size=8, encoder_channels=(32, 64, 64))
        agent, batches = drq.make_agent(args, 3, 18), speed.random_frames(args.utd, args.batch_size, 18, 3)
        by_hand = speed.convolution_flops(args, 18, args.embedding_size)
    state = jax.eval_shape(lambda: agent.init(0))
    counted = agent.update.lower(state, batches, np.ones(3, np.float32)).cost_analysis()["flops"]
    assert low * by_hand < counted < high * by_hand


def test_speed_of_a_call(monkeypatch):
    """The median of as many calls as were asked for, without the first, which compiles."""
    clock, durations = [0.0], iter([50, 1, 5, 2])

    def function():
        clock[0] += next(durations)

    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert speed.seconds_per_call(function, calls=3) == 2
    assert next(durations, None) is None


@pytest.mark.parametrize(("arguments", "words"), [
    (("environments", "--suites", "dmc-dogs", "nope"), ("unknown suite 'nope'", "metaworld", "atari")),
    (("environments", "--suites"), ("nothing to measure",)), (("update", "--widths"), ("nothing to measure",)),
    (("steps", "--env-ids", "dmc/nope"), ("dmc/nope",)), (("plan", "--widths", "0"), ("--critic-width 0",)),
    (("update", "--widths", "0"), ("--critic-width 0",)), (("update", "--batch-size", "0"), ("--batch-size 0",)),
    (("update", "--calls", "0"), ("--calls",)),
    (("update", "--script", "drq", "--widths", "0"), ("--critic-width 0",)),
])  # fmt: skip
def test_speed_refuses_in_one_line(arguments, words, capsys):
    assert speed.main(list(arguments)) == 2
    output = capsys.readouterr()
    assert output.out == "" and re.fullmatch("error: .*\n", output.err), output.err
    assert all(word in output.err for word in words)


def test_convert_without_its_packages_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensordict", None)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "benchmark" / "convert_tdmpc2.py"), run_name="__main__")
    assert ended.value.code == 2
    assert re.fullmatch("error: .*tensordict.*; uv run benchmark/convert_tdmpc2.py .*\n", capsys.readouterr().err)


RELEASED = ("--variant", "released-code")


@pytest.mark.parametrize(("code", "arguments", "words"), [
    ("no", (), ("no is no copy of the released code",)),
    ("released", ("--critic-loss", "mse", *RELEASED), ("knows no other --critic-loss than ce",)),
    ("released", (), ("knows no other --variant than released-code",)),
    ("released", RELEASED, ("No module named 'jaxrl.agent'",)),
])  # fmt: skip
def test_released_code_refuses_in_one_line(code, arguments, words, monkeypatch, tmp_path, capsys):
    """What it does with the real one is measured in results/laptop: no registry has it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "released" / "jaxrl").mkdir(parents=True)
    assert released_code.main([code, "--env-ids", "dmc/cartpole-balance", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines
    assert not (tmp_path / "runs").exists()
