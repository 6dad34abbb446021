"""Part 3, the run: one owner of a directory, curves that no fault can mix or lose, output and disks that fail."""

import csv
import errno
import glob
import json
import os
import resource
import signal
import struct
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from run_files import error_line
from tensorboardX.proto.event_pb2 import Event

import brc_sac_continuous as brc

SCRIPT = Path(brc.__file__)
pytestmark = pytest.mark.usefixtures("own_signal_handlers")


class State(NamedTuple):
    """A learner of 400 kB."""

    weights: object = jnp.arange(100_000.0)


def new_run(root: Path, total: int = 100, **arguments) -> brc.Run:
    return brc.Run(brc.Args(run_root=str(root), **arguments), "dmc/walker-walk", total)


def row(value: float) -> dict:
    return {"task": "dmc/walker-walk", "episodes": 1, "return": value, "success": "", "score": value / 1000}


def evaluate_at(run: brc.Run, *steps: int) -> None:
    for step in steps:
        run.step = step
        assert run.log_evaluation([row(float(step))])


def curve(run: brc.Run) -> list[tuple[str, str]]:
    with (run.directory / "eval.csv").open(newline="") as file:
        return [(row["step"], row["return"]) for row in csv.DictReader(file)]


def points(directory: Path) -> list[tuple[int, str, float]]:
    """Step, name and value of everything in TensorBoard's files."""
    found = []
    for path in sorted(glob.glob(f"{directory}/events*")):
        data, place = Path(path).read_bytes(), 0
        while place < len(data):
            length = struct.unpack("<Q", data[place : place + 8])[0]
            event = Event.FromString(data[place + 12 : place + 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            place += 16 + length
    return found


@pytest.fixture
def small_files():
    """small_files(bytes): no file may grow beyond that, as on a disk that is full, until it is called with None."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))

    yield limit
    limit(None)


# ------------------------------------------------------------------------------------------------------- one owner


def test_runs_that_start_in_one_second_get_two_directories(tmp_path, monkeypatch):
    monkeypatch.setattr(brc.time, "time", lambda: 1_700_000_000.5)
    with new_run(tmp_path) as first, new_run(tmp_path) as second, new_run(tmp_path) as third:
        for run in (first, second, third):
            run.start()
        assert len({run.directory for run in (first, second, third)}) == 3
    assert sorted(path.name.partition("__1700000000")[2] for path in tmp_path.iterdir()) == ["", "-2", "-3"]
    with new_run(tmp_path, exp_name="sweep/a") as first, new_run(tmp_path, exp_name="sweep/a") as second:
        assert second.directory == first.directory.with_name(f"{first.directory.name}-2")


def test_a_directory_in_use_is_refused_and_free_again_afterwards(tmp_path):
    with new_run(tmp_path, run_name="one") as run:
        run.start()
        with pytest.raises(brc.UserError, match="in use by another process"):
            new_run(tmp_path, run_name="one")
    with new_run(tmp_path, run_name="one"):
        pass


def test_a_curve_never_mixes_with_that_of_an_earlier_run_of_its_name(tmp_path):
    with new_run(tmp_path, run_name="one") as run:
        run.start()
        evaluate_at(run, 0, 10, 20)
    with new_run(tmp_path, run_name="one") as run:
        run.start()
        evaluate_at(run, 0, 5)
        assert curve(run) == [("0", "0.0"), ("5", "5.0")]
        assert {step for step, *_ in points(run.directory)} == {0, 5}
    (before,) = tmp_path.glob("one/before-*")
    assert (before / "eval.csv").read_text().count("\n") == 4, "and nothing of the first is lost"


@pytest.mark.parametrize("name", [None, "run"])
def test_a_file_in_the_way_is_one_line(tmp_path, name):
    (tmp_path / "root").touch()
    (tmp_path / "run").touch()
    with pytest.raises(brc.UserError, match="cannot make .*--run-root") as error:
        new_run(tmp_path if name else tmp_path / "root", run_name=name)
    assert "\n" not in str(error.value)


def test_no_device_is_one_line(run):
    result = run("--env-ids", "gym/Pendulum-v1", JAX_PLATFORMS="cuda")
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("error: JAX has no device (JAX_PLATFORMS=cuda)")


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python 3.14 takes a shorter folder itself")
def test_a_path_too_long_for_sockets_is_one_line(run, tmp_path):
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    result = run("--env-ids", "gym/Pendulum-v1", "--run-root", tmp_path / "runs", TMPDIR=str(folder))
    assert result.returncode == 2 and "set TMPDIR to a short path" in error_line(result.stderr)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words", ["--env-ids a --env-ids b", "--env-ids=a --env_ids b"])
def test_values_of_a_list_given_by_two_flags_are_refused(words):
    """tyro would take the last one without a word."""
    with pytest.raises(brc.UserError, match="--env-ids is given twice"):
        brc.parse_args(words.split())


@pytest.mark.parametrize("words", ["--seed 1 --utd 1 --seed=2", "--track --no-track --seed 2"])
def test_of_other_flags_the_last_one_counts_and_a_line_says_so(words, capsys):
    args = brc.parse_args(words.split())
    assert args.seed == 2 and not args.track
    assert capsys.readouterr().err.count("is given twice; the last one counts") == 1


# ---------------------------------------------------------------------------------------------------------- curves


def test_points_and_rows_are_on_disk_at_once(tmp_path):
    """Nothing is closed here: as after kill -9."""
    run = new_run(tmp_path)
    run.start()
    evaluate_at(run, 0, 10)
    run.scalars({"losses/critic": 3.5}, step=7)
    assert (7, "losses/critic", 3.5) in points(run.directory)
    assert (10, "eval/return/dmc/walker-walk", 10.0) in points(run.directory)
    assert curve(run) == [("0", "0.0"), ("10", "10.0")]
    run.__exit__(None, None, None)


def test_wall_time_does_not_follow_a_clock_that_is_set_back(tmp_path, monkeypatch):
    with new_run(tmp_path) as run:
        run.start()
        monkeypatch.setattr(brc.time, "time", lambda: 0.0)
        evaluate_at(run, 10)
        assert 0 <= run.rows[0]["wall_time"] < 60


HEADER = "step,updates,wall_time,task,episodes,return,success,score"
ROWS = ["0,0,1.5,dmc/walker-walk,10,20.5,,0.0205", "10,8,3.5,dmc/walker-walk,10,60.0,,0.06"]


@pytest.mark.parametrize(
    ("text", "steps", "kept"),
    [
        ("\n".join([HEADER, *ROWS, ""]), [0, 10], False),
        ("\r\n".join([HEADER, *ROWS, ""]), [0, 10], False),
        ("\n".join([HEADER, ROWS[0], "10.0,8.0,3.5,dmc/walker-walk,10,60,,0.06"]), [0, 10], False),
        ("\ufeff" + "\n".join([HEADER, *ROWS]).replace(",", ";").replace("3.5", "3,5"), [0, 10], False),
        ("\n".join([HEADER, *ROWS]).replace(",", "\t"), [0, 10], False),
        ("\n".join([HEADER, "ten,8,3.5,dmc/walker-walk,10,60.0,,0.06", ROWS[0]]), [0], True),
        ("\n".join([HEADER, ROWS[0], "10,8,3.5,dmc/wal"]), [0], True),  # cut by a kill of an older version
        ("\n".join(["note," + HEADER, "mine," + ROWS[0]]), [0], True),
        ("\n".join([HEADER.replace("score", "points"), *ROWS]), [], True),
        ("\n".join([",".join(reversed(HEADER.split(","))), ",".join(reversed(ROWS[0].split(",")))]), [0], True),
        ("", [], False),
    ],
)  # fmt: skip
def test_a_curve_that_a_person_changed(text, steps, kept, tmp_path, capsys):
    path = tmp_path / "eval.csv"
    path.write_text(text, encoding="utf-8", newline="")
    rows = brc.read_curve(path)
    assert [row["step"] for row in rows] == steps
    assert all(list(row) == list(brc.EVAL_COLUMNS) and float(row["wall_time"]) in (1.5, 3.5) for row in rows)
    copies = list(tmp_path.glob("eval-as-found-*.csv"))
    assert len(copies) == kept
    assert capsys.readouterr().err.count("\n") == kept
    if kept:
        assert copies[0].read_bytes() == text.encode()


# ----------------------------------------------------------------------------------------- disks, output and signals


def test_a_full_disk_costs_curves_for_a_while_and_never_the_run(tmp_path, small_files, capsys):
    with new_run(tmp_path) as run:
        run.start()
        evaluate_at(run, 0)
        small_files(100)
        evaluate_at(run, 10, 20)
        run.scalars({"a": 1.0})
        small_files(None)
        assert curve(run) == [("0", "0.0")]
        evaluate_at(run, 30)
        assert [step for step, _ in curve(run)] == ["0", "10", "20", "30"], "what the disk refused comes later"
        run.save(State())
        run.scalars({"b": 2.0})
        assert (30, "b", 2.0) in points(run.directory), "a checkpoint opens another file of points"
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 2 and "eval.csv" in warnings[0] + warnings[1], "one line for each"


def test_a_checkpoint_that_cannot_be_written_is_tried_again(tmp_path, small_files, monkeypatch, capsys):
    with new_run(tmp_path, checkpoint_every=10) as run:
        run.start()
        evaluate_at(run, 10)
        run.save(State())
        run.step, run.last_evaluation = 20, 20
        small_files(50_000)
        assert run.checkpoint_due()
        run.save(State())
        small_files(None)
        assert capsys.readouterr().err.count("warning: cannot write the checkpoint of step 20") == 1
        assert brc.checkpoint_steps(run.directory) == [10]
        run.step = 21
        assert not run.checkpoint_due()
        later = time.monotonic() + 61
        monkeypatch.setattr(brc.time, "monotonic", lambda: later)
        assert run.checkpoint_due(), "a minute later"
        run.save(State())
        assert brc.checkpoint_steps(run.directory) == [21, 10] and not list(run.directory.glob("checkpoints/.p*"))
        assert not run.checkpoint_due()
        run.stop.append(signal.SIGTERM)
        run.step = 22
        small_files(50_000)
        with pytest.raises(brc.UserError, match="step 22; earlier ones are whole.*--resume"):
            run.save(State())
        small_files(None)
    state, counters = brc.load_checkpoint(run.directory, State(jnp.zeros(100_000)))
    assert counters["step"] == 21 and float(state.weights[-1]) == 99_999


class More(NamedTuple):
    """A learner that has come to hold more than State."""

    weights: object = jnp.arange(100_000.0)
    average: object = jnp.arange(100_000.0)


@pytest.mark.parametrize("other", [More(), State(jnp.zeros(50))], ids=["another tree", "other sizes"])
def test_a_checkpoint_of_another_learner_is_not_called_damaged(tmp_path, capsys, other):
    """One line, where Orbax prints both trees with their numbers; and the checkpoint stays as it is."""
    with new_run(tmp_path, checkpoint_every=10) as run:
        run.start()
        evaluate_at(run, 10)
        run.save(State())
    with pytest.raises(brc.UserError, match="is whole, but of other arguments or of another version") as raised:
        brc.load_checkpoint(run.directory, other)
    assert len(str(raised.value)) < 300 and "damaged" not in capsys.readouterr().err
    brc.load_checkpoint(run.directory, State(jnp.zeros(100_000)))


def test_an_old_checkpoint_that_cannot_be_removed_does_not_end_the_run(tmp_path, monkeypatch):
    rename = Path.rename

    def busy(self, target):
        if self.name == "10":
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    with new_run(tmp_path, keep_checkpoints=1) as run:
        run.start()
        for step in (10, 20, 30):
            if step == 30:
                monkeypatch.setattr(Path, "rename", rename)
            run.step = run.last_evaluation = step
            run.save(State())
        assert brc.checkpoint_steps(run.directory) == [30]


def test_output_whose_reader_went_away_leads_nowhere():
    reader, writer = os.pipe()
    with os.fdopen(writer, "w", buffering=1) as stream:
        output = brc.Output(stream)
        print("heard", file=output, flush=True)
        assert os.read(reader, 100) == b"heard\n"
        os.close(reader)
        for _ in range(3):
            print("unheard", file=output, flush=True)
        assert output.fileno() == writer


def test_output_into_a_full_pipe_comes_back_when_it_is_read():
    """As of a terminal or a supervisor that made it non-blocking."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with os.fdopen(writer, "w", buffering=1) as stream:
        output = brc.Output(stream)
        for _ in range(200):
            print("x" * 1000, file=output, flush=True)
        while len(os.read(reader, 1 << 16)) == 1 << 16:
            pass
        print("error: why", file=output, flush=True)
        os.set_blocking(reader, False)
        assert os.read(reader, 1 << 20).endswith(b"error: why\n")
    os.close(reader)


def test_output_on_a_full_disk_comes_back_with_its_space(tmp_path):
    """A log on the disk that fills must still say how the run ended."""
    with open("/dev/full", "w") as full, (tmp_path / "log").open("w") as log:
        output = brc.Output(full)
        print("refused", file=output, flush=True)
        os.dup2(log.fileno(), full.fileno())  # the disk has space again
        print("error: why", file=output, flush=True)
    assert (tmp_path / "log").read_text().endswith("error: why\n")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_signals_that_ask_a_run_to_stop(tmp_path, name):
    signal.signal(getattr(signal, name), lambda *_: None)  # also where pytest itself runs under nohup
    with new_run(tmp_path) as run:
        run.start()
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(0.01)
        assert run.stop == [getattr(signal, name)] and run.over()


def test_nohup_is_respected(tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with new_run(tmp_path) as run:
        run.start()
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.01)
        assert not run.stop


def test_a_lost_wandb_does_not_end_a_run(tmp_path, monkeypatch, capsys):
    """Its own process may be killed, also between the last point and the end."""

    def lost(*_):
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    wandb = SimpleNamespace(init=lambda **_: SimpleNamespace(log=lost, finish=lost))
    monkeypatch.setitem(brc.sys.modules, "wandb", wandb)
    with new_run(tmp_path, track=True) as run:
        run.start()
        for _ in range(2):
            run.scalars({"x": 1.0})
    assert (
        capsys.readouterr().err.count("cannot write to Weights & Biases: Connection reset by peer; the run goes") == 1
    )
    with new_run(tmp_path, track=True, run_name="other") as run:
        run.start()


def test_runs_of_one_name_are_two_in_wandb(tmp_path, monkeypatch):
    begun = []
    wandb = SimpleNamespace(init=lambda **arguments: begun.append(arguments) or SimpleNamespace(finish=lambda: None))
    monkeypatch.setitem(brc.sys.modules, "wandb", wandb)
    for root in ("expA", "expB"):
        with new_run(tmp_path / root, run_name="seed:1", track=True) as run:
            run.start()
            run.step = run.last_evaluation = 10
            run.save(State())
    monkeypatch.chdir(tmp_path / "expB" / "seed:1")
    with brc.Run(brc.Args(resume=".", track=True), "", 100) as run:
        run.restore(State())
        run.start()
    first, second, resumed = (arguments["id"] for arguments in begun)
    assert first != second == resumed
    assert first.replace("-", "").replace("_", "").isalnum()
    assert begun[2]["name"] == "seed:1"


def test_a_finished_run_is_refused_before_anything_is_made(tmp_path):
    with new_run(tmp_path, run_name="one", total=20) as run:
        run.start()
        evaluate_at(run, 20)
        run.save(State())
    with pytest.raises(brc.UserError, match="is finished .step 20.; to go on, give a larger --total-timesteps"):
        brc.Run(brc.Args(resume=str(run.directory)), "", 20)
    with brc.Run(brc.Args(resume=str(run.directory)), "", 30):
        pass


def test_a_run_that_diverged_says_so_to_those_who_compare_runs(tmp_path):
    """In args.json, until it goes on; what ends before it begins, or otherwise, did not diverge."""
    saved = lambda: json.loads((tmp_path / "run/args.json").read_text())  # noqa: E731
    with pytest.raises(brc.UserError, match="not finite at step 30"), new_run(tmp_path, run_name="run") as run:
        run.start()
        run.step = 30
        raise FloatingPointError("losses/critic")
    assert saved()["diverged_at"] == 30 and saved()["run_name"] == "run"
    with pytest.raises(brc.UserError, match="failed"), new_run(tmp_path, resume=str(tmp_path / "run")) as run:
        run.start()
        assert "diverged_at" not in saved()
        raise brc.WorkerFailure("failed")
    assert "diverged_at" not in saved()
    with pytest.raises(brc.UserError, match="not finite"), new_run(tmp_path):
        raise FloatingPointError("a reward")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_finite_checkpoints_only(tmp_path):
    with new_run(tmp_path) as run:
        run.start()
        with pytest.raises(FloatingPointError):
            run.save(State(jnp.array(np.nan)[None]))


# ------------------------------------------------------------------------- signals, odd names, damage and odd files


def filled(run: brc.Run, replay: brc.Replay, step: int) -> None:
    """A checkpoint with a piece of replay of ten steps."""
    if not replay.inserted:
        replay.start(np.zeros((1, 2)))
    for _ in range(10):
        replay.insert(np.zeros((1, 1)), np.ones(1), np.zeros(1), np.ones(1), np.full((1, 2), step))
    run.step = run.last_evaluation = step
    run.save(State(), replay)


@pytest.mark.parametrize(("name", "apart", "ends"), [("SIGTERM", 0.0, False), ("SIGTERM", 3.0, True),
                                                     ("SIGINT", 0.0, True)])  # fmt: skip
def test_one_event_told_twice_is_one(tmp_path, monkeypatch, name, apart, ends):
    """A closed terminal and GNU timeout send a signal twice; a person's second one ends the process."""
    signum, now, killed = getattr(signal, name), [100.0], []
    monkeypatch.setattr(brc.time, "monotonic", lambda: now[0])
    with new_run(tmp_path) as run:
        run.start()
        os.kill(os.getpid(), signum)
        time.sleep(0.01)
        if signal.getsignal(signum) == signal.SIG_DFL:  # the next one would end pytest
            killed.append(signum)
        else:
            now[0] += apart
            monkeypatch.setattr(brc.os, "kill", lambda pid, signum: killed.append(signum))
            run.ask_to_stop(signum, None)
        assert run.stop[0] == signum and killed == [signum] * ends


def test_a_second_save_of_a_step_keeps_the_first_until_it_is_whole(tmp_path, monkeypatch):
    with new_run(tmp_path) as run:
        run.start()
        run.step = 10
        run.save(State())
        run.last_evaluation, rename = 10, Path.rename

        def fails(path, target):
            if target.name == "10" and path.name == ".partial-10":
                raise OSError(errno.ENOTEMPTY, "Directory not empty")
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", fails)
        run.save(State(jnp.zeros(100_000)))
        assert brc.checkpoint_steps(run.directory) == [10]
        state, counters = brc.load_checkpoint(run.directory, State())
        assert float(state.weights[-1]) == 99_999 and counters["last_evaluation"] == -1
        monkeypatch.undo()
        run.save(State(jnp.zeros(100_000)))
        state, counters = brc.load_checkpoint(run.directory, State())
        assert float(state.weights[-1]) == 0 and counters["last_evaluation"] == 10


def test_replay_with_strange_missing_and_damaged_files(tmp_path):
    replay = brc.Replay(1, 100, 2, 1)
    with new_run(tmp_path) as run:
        run.start()
        filled(run, replay, 10)
        (run.directory / "checkpoints/10/replay/.DS_Store").touch()
        again = brc.Replay(1, 100, 2, 1)
        assert brc.load_checkpoint(run.directory, State(), again)[1]["step"] == 10 and again.inserted == 10
        (piece,) = (run.directory / "checkpoints/10/replay").glob("0*")
        piece.unlink()  # as a cluster's purge of old files
        filled(run, replay, 20)
        again = brc.Replay(1, 100, 2, 1)
        assert brc.load_checkpoint(run.directory, State(), again)[1]["step"] == 20
        np.testing.assert_array_equal(again.slots["observation"][0, :21], replay.slots["observation"][0, :21])
        (piece,) = (run.directory / "checkpoints/20/replay").glob("0*")
        piece.write_bytes(piece.read_bytes()[:-1] + b"\xff")
        assert brc.load_checkpoint(run.directory, State(), read_only=True)[1]["step"] == 20, "--play needs no replay"


def test_a_read_error_is_no_damage(tmp_path, monkeypatch):
    """A network file system that is away for a moment: the newest checkpoint must not be passed over for good."""
    with new_run(tmp_path) as run:
        run.start()
        for step in (10, 20):
            run.step = step
            run.save(State())
    with monkeypatch.context() as patch:
        patch.setattr(brc, "checksum", lambda path: (_ for _ in ()).throw(OSError(errno.ESTALE, "Stale file handle")))
        with pytest.raises(brc.UserError, match="cannot read checkpoint .*20: Stale file handle; try again"):
            brc.load_checkpoint(run.directory, State())
    assert brc.checkpoint_steps(run.directory) == [20, 10]


def test_rows_that_a_full_disk_refused_come_with_the_checkpoint(tmp_path, monkeypatch):
    with new_run(tmp_path) as run:
        run.start()
        with monkeypatch.context() as patch:
            patch.setattr(brc, "replace_file", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
            evaluate_at(run, 100)
        assert curve(run) == []
        run.save(State())
        assert curve(run) == [("100", "100.0")]


def test_a_name_that_orbax_takes_for_a_pattern_is_refused(tmp_path):
    with pytest.raises(brc.UserError, match="choose another"):
        new_run(tmp_path, run_name="lr[1e-3]")
    assert not list(tmp_path.iterdir())


def test_a_run_killed_in_its_first_checkpoint_begins_again(tmp_path):
    (tmp_path / "r" / "checkpoints" / ".partial-100").mkdir(parents=True)
    with new_run(tmp_path, run_name="r") as run:
        run.start()
        run.step = 10
        run.save(State())
    assert brc.checkpoint_steps(tmp_path / "r") == [10]


@pytest.mark.parametrize("line", ['10,20,1.0,"dmc/walker-walk' + "x" * 140_000, "1e999,20,1.0,a,1,1,,1"])
def test_a_curve_that_is_no_table(line, tmp_path, capsys):
    path = tmp_path / "eval.csv"
    path.write_text(",".join(brc.EVAL_COLUMNS) + f"\n{line}\n")
    assert brc.read_curve(path) == [] and "was changed" in capsys.readouterr().err
    assert len(list(tmp_path.glob("eval-as-found-*"))) == 1


def test_streams_that_are_closed_or_lack_a_letter(tmp_path):
    print("lost", file=brc.Output(None), flush=True)
    path = tmp_path / "log"
    with path.open("w", encoding="ascii") as stream:
        print("é", file=brc.Output(stream), flush=True)
    assert path.read_text() == "\\xe9\n"
