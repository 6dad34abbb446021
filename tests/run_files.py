"""What a run leaves behind, and its processes: for the tests of every script's command line."""

import csv
import fcntl
import json
import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event


def curve(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "eval.csv").open() as file:
        return list(csv.DictReader(file))


def counters(run_dir: Path, step: int | str) -> dict:
    return json.loads((run_dir / "checkpoints" / str(step) / "checkpoint.json").read_text())


def tensorboard(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every tag in the run's only file of events."""
    (path,) = run_dir.glob("events.out.tfevents.*")
    data, values = path.read_bytes(), {}
    while data:  # records: length, its checksum, event, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
        for value in event.summary.value:
            values.setdefault(value.tag, []).append((event.step, value.simple_value))
    return values


def assert_same(one, other) -> None:
    """Bit for bit: two AgentStates, or two Replays."""
    if type(one).__name__ == "Replay":
        one, other = vars(one), vars(other)
    leaves, others = jax.tree.leaves_with_path(one), jax.tree.leaves(other)
    assert len(leaves) == len(others)
    for (path, leaf), counterpart in zip(leaves, others, strict=True):
        leaf, counterpart = np.asarray(leaf), np.asarray(counterpart)
        assert leaf.dtype == counterpart.dtype and leaf.shape == counterpart.shape, jax.tree_util.keystr(path)
        assert leaf.tobytes() == counterpart.tobytes(), f"{jax.tree_util.keystr(path)} differs"


def error_line(stderr: str) -> str:
    """The one line that a user sees; progress bars and warnings about checkpoints may come before it."""
    assert "Traceback" not in stderr and "Exception ignored" not in stderr, stderr
    lines = [line for line in re.split(r"[\r\n]", stderr) if line.startswith("error: ")]
    assert len(lines) == 1, stderr
    assert stderr.rstrip().endswith(lines[0]), f"something follows the error:\n{stderr}"
    return lines[0]


def played(script, run_dir: Path, *arguments) -> tuple[tuple[Callable, ...], list[dict]]:
    """--play in this process: the policies that it evaluated and their rows. Meanwhile the run is another process', and
    nothing in its directory but videos/ may change."""

    def content() -> dict[Path, tuple[int, bytes]]:
        files = (path for path in run_dir.rglob("*") if path.is_file() and path.parent.name != "videos")
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    evaluate, found, before = script.evaluate, [], content()

    def watched(act, *rest):
        found.append((act, evaluate(act, *rest)))
        return found[-1][1]

    lock = os.open(run_dir, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "evaluate", watched)
        script.main(script.parse_args(["--play", str(run_dir), *map(str, arguments)]))
    os.close(lock)
    assert content() == before
    policies, rows = zip(*found, strict=True)
    return policies, [row for some in rows for row in some]


def started(script: Path, arguments, environment: dict[str, str], log: Path) -> subprocess.Popen:
    command = [sys.executable, str(script), *map(str, arguments)]
    with log.open("w") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Steps of the complete checkpoints, newest first."""
    return sorted((int(path.name) for path in (run_dir / "checkpoints").glob("[0-9]*")), reverse=True)


def wait_for_checkpoint(run_dir: Path, step: int, process: subprocess.Popen, log: Path, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not (found := checkpoint_steps(run_dir)) or found[0] < step:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)
