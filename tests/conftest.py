"""Puts the repository root on the path, as the scripts are single files and no package, and holds what the tests of
every script's command line share. A module that takes these fixtures names its script in SCRIPT. Counts the tasks that
test_every_task.py stepped.
"""

import importlib.util
import os
import runpy
import signal
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import jax
import pytest

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS.parent / "benchmark")]


# Tests compile many small agents and run each for a moment: unoptimized, and by XLA's older CPU emitters, an update
# compiles in a quarter of the time.
# A jaxlib that does not know a flag ends the process.
OLDER_EMITTERS = "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""
os.environ.setdefault("XLA_FLAGS", f"--xla_backend_optimization_level=0 {OLDER_EMITTERS}".strip())


@pytest.fixture(scope="session", autouse=True)
def compiled_code(tmp_path_factory) -> Path:
    """Cache of compiled code of this process, of pytest-xdist's others and of the runs that they start."""
    root = tmp_path_factory.getbasetemp()
    directory = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    return directory


@pytest.fixture(scope="module")
def environment(compiled_code) -> dict[str, str]:
    """Environment variables of a run: finds the test tasks, stays on the CPU and shares compiled code with others."""
    return os.environ | {
        "PYTHONPATH": str(TESTS), "JAX_PLATFORMS": "cpu", "WANDB_MODE": "offline", "WANDB_SILENT": "true",
        "JAX_COMPILATION_CACHE_DIR": str(compiled_code), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(request, environment):
    """run(*arguments): the finished process of the script, with its output; fails when it does not end."""

    def run(*arguments, seconds: float = 400, **variables: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(request.module.SCRIPT), *map(str, arguments)]
        return subprocess.run(
            command, env=environment | variables, capture_output=True, text=True, timeout=seconds, cwd=TESTS.parent
        )

    return run


@pytest.fixture(scope="module")
def learn(run):
    """learn(*arguments): what `run` does, for thousands of updates, for which optimized code is faster in the end."""

    def learn(*arguments) -> None:
        result = run(*arguments, XLA_FLAGS=OLDER_EMITTERS)
        assert result.returncode == 0, result.stderr

    return learn


@pytest.fixture
def own_signal_handlers():
    """`main` sets handlers of signals; here they must not outlive the test."""
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    handlers = {signum: signal.getsignal(signum) for signum in map(signal.Signals.__getitem__, names)}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@pytest.fixture
def command_line(request, monkeypatch, capfd):
    """command_line(*arguments): exit status and standard error of the script, run as __main__ in this process."""

    def command_line(*arguments) -> tuple[int, str]:
        script = str(request.module.SCRIPT)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        for name in ("stdout", "stderr"):  # which the script replaces
            monkeypatch.setattr(sys, name, getattr(sys, name))
        status = 0
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as error:
            status = error.code
        return status, capfd.readouterr().err

    return command_line


def pytest_runtest_setup(item):
    """Skips what is marked dm_control where that is not, as on Python 3.13, with the line that a user reads."""
    if item.get_closest_marker("dm_control") and importlib.util.find_spec("dm_control") is None:
        pytest.skip(f"needs {importlib.import_module('brc_sac_continuous').INSTALL['dmc']}")


def pytest_terminal_summary(terminalreporter):
    """How many tasks of each family test_every_task.py stepped."""
    counts = {
        outcome: Counter(
            report.nodeid.partition("[")[2].partition("/")[0]
            for report in terminalreporter.stats.get(outcome, [])
            if "test_every_task.py::test_steps[" in report.nodeid
        )
        for outcome in ("passed", "failed", "skipped")
    }
    if families := sorted({family for counter in counts.values() for family in counter}):
        terminalreporter.section("tasks stepped")
        for family in families:
            done, total = counts["passed"][family], sum(counter[family] for counter in counts.values())
            terminalreporter.write_line(f"{family}: {done} of {total}")
