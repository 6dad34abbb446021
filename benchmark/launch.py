"""Runs experiments of the paper, here or on a Slurm cluster.

  python benchmark/launch.py figure4 --scale laptop --dry-run            # commands, how many, estimated hours
  python benchmark/launch.py figure4 figure5 --scale laptop --jobs 2     # two at a time on this machine
  python benchmark/launch.py figure4 --scale paper --executor slurm --partition gpu --timeout-min 1440

Finished runs are skipped, stopped ones continue from their checkpoint, failed ones are reported with the last line of
their log (RUN_DIR/log.txt) and start again when the same command is given again, but for those that diverged, as they
would again. Runs that several figures share are done once, and two launchers may share a run root. The exit status is 0
if every run is finished.

On a cluster, in an environment and a checkout that all nodes see, after pip install -r requirements.txt:

  python benchmark/launch.py figure4 --scale paper --executor slurm --partition gpu --account me --timeout-min 1440
  squeue --me                                           # when it is empty, the launch command again for what failed
  python benchmark/plot.py figure4 --scale paper

Every run is one job of an array with a GPU of its own (--gpus-per-node 0: none). On preemption (scontrol requeue, or
the signal --signal-delay-s before the time limit) it writes a checkpoint, is requeued, and continues; Slurm lets it
wait two minutes first. Runs that read another run's directory start after it.
"""

import contextlib
import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


@dataclass
class Args:
    experiments: Annotated[tuple[str, ...], tyro.conf.Positional]
    """names such as figure1 or table5"""
    scale: Literal["paper", "laptop"] = "laptop"
    """the paper's tasks, sizes, steps and seeds, or a few easy tasks and narrow critics in the same structure"""
    executor: Literal["local", "slurm"] = "local"
    """this machine or a Slurm cluster"""
    dry_run: bool = False
    """print the commands, how many they are and estimated hours, and run nothing"""
    run_root: str = "runs"
    """directory that holds the run directories; on Slurm one that all nodes see"""
    data: str = "data"
    """directory with Figure 12's offline data at the paper's scale, converted to data/mt80"""
    seeds: int | None = None
    """only so many first seeds of every run"""
    jobs: int = 1
    """local: runs at a time; they share the processor and the GPU"""
    partition: str | None = None
    """slurm: partition (default: the cluster's)"""
    account: str | None = None
    """slurm: account"""
    timeout_min: int = 24 * 60
    """slurm: minutes until a run is requeued and continues"""
    gpus_per_node: int = 1
    """slurm: GPUs of a run"""
    cpus_per_task: int = 16
    """slurm: cores of a run (the paper's machines had 16)"""
    mem_gb: int | None = None
    """slurm: memory of a run (default: the cluster's)"""
    array_parallelism: int = 64
    """slurm: runs at a time"""
    signal_delay_s: int = 120
    """slurm: seconds between the signal to write a checkpoint and the end"""


@dataclass
class Job:
    """One run as a process of its own, here or in a Slurm job. Calling it again after any interruption continues it.

    It holds plain values and uses nothing of this repository's modules, as submitit pickles it for another machine.
    """

    name: str
    command: list[str]
    """script and arguments of a fresh start"""
    length: int
    """step at which eval.csv ends"""
    directory: str
    """run directory"""
    root: str
    """the repository"""
    after: list["Job"]
    """runs that must be finished first"""
    has_readers: bool = False
    """whether others read its directory, and so need what it writes after its last evaluation"""

    process = None
    terminated = False
    lock = None

    def state(self) -> str:
        """finished, stopped (has a checkpoint, or the first tasks of embedding transfer) or new."""
        directory = Path(self.root, self.directory)
        if self.finished(directory):
            return "finished"
        has_checkpoint = any(path.name.isdigit() for path in (directory / "checkpoints").glob("*"))
        return "stopped" if has_checkpoint or (directory / "embedding.csv").exists() else "new"

    def finished(self, directory: Path) -> bool:
        """Whether the run reached its end: the last row of eval.csv, or what it writes instead."""
        if "embedding" in self.command and "--protocol" in self.command:
            return self.adapted(directory)
        if self.length == 0:
            return (directory / "args.json").exists()
        wanted = [directory / "checkpoints" / str(self.length)] * self.has_readers
        partial = []
        if self.has_readers and "--save-replay" in self.command:
            wanted.append(directory / "replay")
            partial = list((directory / "replay").glob(".partial-*"))  # of a full disk, or a kill
        # one that diverged would diverge again
        return diverged(directory) or (
            last_step(directory) >= self.length and not partial and all(path.exists() for path in wanted)
        )

    @staticmethod
    def adapted(directory: Path) -> bool:
        """Whether a run of embedding transfer is through with all its tasks: it writes its tables after each."""
        try:
            args = json.loads((directory / "args.json").read_text())
            for name in ["embedding.csv"] + ["heatmap.csv"] * args["heatmap"]:
                with (directory / name).open(newline="") as file:
                    if not {row["target"] for row in csv.DictReader(file)} >= set(args["env_info"]["task_names"]):
                        return False
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return True

    def runs_elsewhere(self) -> bool:
        """Whether another launcher runs it now."""
        with contextlib.suppress(FileNotFoundError), Path(self.root, self.directory, ".lock").open() as file:
            return not locked(file, exclusive=False)
        return False

    def start(self) -> str:
        """Starts or continues the run; its output is appended to RUN_DIR/log.txt. Returns '', or why it did not."""
        waiting = [job.name for job in self.after if job.state() != "finished"]
        if waiting:
            return f"failed: needs {', '.join(waiting)}, which is not finished"
        directory = Path(self.root, self.directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self.lock = (directory / ".lock").open("w")
            if not locked(self.lock, exclusive=True):
                return "skipped: another launcher runs it"
            if (state := self.state()) == "finished":  # by another launcher, since this one began
                return "finished"
            command = [self.command[0], "--resume", self.directory] if state == "stopped" else self.command
            with (directory / "log.txt").open("a") as log:
                log.write(f"$ {shlex.join(['python', *command])}\n")
                log.flush()
                self.process = subprocess.Popen(
                    [sys.executable, *command], cwd=self.root, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C reaches it once, through stop()
                    pass_fds=[self.lock.fileno()],  # the lock lasts as long as the script, whoever dies first
                    # Slurm signals every process of a job, and submitit's signal would end one that does not know it
                    preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
                )  # fmt: skip
            return ""
        except OSError as error:  # a file in the way, a full disk, too many processes
            return f"failed: cannot start it: {error}"
        finally:
            if self.lock and not self.process:
                self.lock.close()

    def stop(self) -> None:
        """Asks the run, once, to write a checkpoint and end; a second signal would end it at once."""
        if self.process and self.process.poll() is None and not self.terminated:
            self.terminated = True
            self.process.terminate()

    def outcome(self) -> str:
        """How the ended process ended: finished, stopped, or failed with its last words."""
        self.lock.close()
        if self.process.returncode == 0 or (self.terminated and self.process.returncode == -signal.SIGTERM):
            return "finished" if self.state() == "finished" else "stopped"
        lines = Path(self.root, self.directory, "log.txt").read_text(errors="replace").replace("\r", "\n").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"failed (exit status {self.process.returncode}): {last}"

    def __call__(self) -> str:
        """Runs to the end inside a Slurm job. Raises RuntimeError for a run that failed."""
        if reason := self.start():
            if reason.startswith("failed"):
                raise RuntimeError(f"{self.name}: {reason}")
            return reason

        def terminated(signum, frame):  # Slurm sends it to the script as well
            self.terminated = True

        signal.signal(signal.SIGTERM, terminated)
        while self.process.poll() is None:
            time.sleep(0.5)
        outcome = self.outcome()
        print(f"{self.name}: {outcome}", flush=True)
        if outcome.startswith("failed"):
            raise RuntimeError(f"{self.name}: {outcome}")
        return outcome

    def checkpoint(self):
        """submitit calls this when the job is preempted or out of time: what it returns is requeued."""
        from submitit.helpers import DelayedSubmission

        self.stop()
        while self.process and self.process.poll() is None:  # Slurm kills what takes longer than signal_delay_s
            time.sleep(0.5)
        return DelayedSubmission(replace(self))


def diverged(directory: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return "diverged_at" in json.loads((directory / "args.json").read_text())
    return False


def last_step(directory: Path) -> int:
    """The last one of eval.csv at which all tasks of the first one have a row; -1 where there is none."""
    tasks = {}
    try:
        with (directory / "eval.csv").open() as file:
            for row in csv.DictReader(line for line in file if line.endswith("\n")):  # another one was cut
                tasks.setdefault(int(row["step"]), set()).add(row["task"])
        return max(step for step, found in tasks.items() if found >= tasks[min(tasks)])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


def locked(file, exclusive: bool) -> bool:
    """Whether this process got the lock, which the kernel frees however it ends. Where there are no locks, it did."""
    for seconds in (0.1, 0) if exclusive else (0,):  # another launcher may only be looking whether it is free
        try:
            if fcntl:
                fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(seconds)
        except OSError:  # a file system without locks
            return True
    return False


# --------------------------------------------------------------------------------------------------------- estimate

# Seconds per step of one task's environment (results/README.md: 2 cores), and the rate at which updates are computed,
# here that of one CPU core and of an A100 in float32. The longer of the two is what a vector step takes.
ENV_SECONDS = {"metaworld": 1.4e-4, "dmc": 3e-4, "humanoidbench": 1.2e-3, "shadowhand": 1e-3, "atari": 6e-4,
               "gym": 1e-4}  # fmt: skip
OPERATIONS_PER_SECOND = {"laptop": 5e10, "paper": 4e13}
START_SECONDS = {"laptop": 15, "paper": 120}
DIMENSIONS = {"metaworld": 43, "dmc": 88, "humanoidbench": 369, "shadowhand": 88, "gym": 20}  # |S| + |A|, roughly


def estimated_hours(run, tasks: tuple[str, ...], scale: str) -> float:
    """Hours of one run, right within a factor of two or three: it is for deciding what to start."""
    family = tasks[0].partition("/")[0]
    batch = int(run.flag("--batch-size", "256" if family == "atari" or len(tasks) == 1 else "1024"))
    width = run.width or int(run.flag("--critic-width", "512"))
    if family == "atari":
        c = [int(word) for word in run.argv[run.argv.index("--encoder-channels") + 1 :][:3]] if (
            "--encoder-channels" in run.argv) else [128, 256, 256]  # fmt: skip
        sides, inputs = (84, 42, 21), (4, c[0], c[1])
        encoder = sum(9 * s**2 * i * o + (s / 2) ** 2 * 4 * 9 * o * o for s, i, o in zip(sides, inputs, c, strict=True))
        products = 5 * encoder  # target, next action, and forward and backward of the loss
    else:
        critic = (DIMENSIONS[family] + 32) * width + 2 * 2 * width**2 + 101 * width
        if "mlp" in run.argv:
            critic = (DIMENSIONS[family] + 32) * width + width**2
        actor_width = int(run.flag("--actor-width", "256"))
        actor = (DIMENSIONS[family] + 32) * actor_width + 2 * actor_width**2
        products = 12 * critic + 4 * actor
    offline = run.length_unit == "updates"
    updates = 1 if offline else 2
    update = updates * 2 * batch * products / OPERATIONS_PER_SECOND[scale] + 2e-3
    environments = 0 if offline else len(tasks) * ENV_SECONDS[family]
    return (START_SECONDS[scale] + run.length * max(update, environments)) / 3600


# -------------------------------------------------------------------------------------------------------- executors


def run_local(jobs: list[Job], at_a_time: int) -> dict[str, str]:
    """Runs jobs in their order, so many at a time; returns name -> outcome. A signal stops them with checkpoints."""
    waiting, running, outcomes, stopping = list(jobs), [], {}, []
    ask_to_stop = lambda signum, frame: stopping.append(signum)  # noqa: E731
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # it is to outlive its terminal
    signals = [signal.SIGINT, signal.SIGTERM] + [signal.SIGHUP] * (not nohup)
    before = {signum: signal.signal(signum, ask_to_stop) for signum in signals}
    started_at = time.time()
    while running or (waiting and not stopping):
        while waiting and len(running) < at_a_time and not stopping:
            # a run that another one reads may still be running, here or in another launcher
            sources = lambda job: any(other in running or other.runs_elsewhere() for other in job.after)  # noqa: E731
            job = next((job for job in waiting if not sources(job)), None)
            if job is None:
                break
            waiting.remove(job)
            if reason := job.start():
                outcomes[job.name] = reason
                print(f"{job.name}: {reason}", flush=True)
            else:
                running.append(job)
        time.sleep(0.2)
        for job in running if stopping else ():
            job.stop()
        for job in [job for job in running if job.process.poll() is not None]:
            running.remove(job)
            outcomes[job.name] = job.outcome()
            minutes = (time.time() - started_at) / 60
            print(f"[{len(outcomes)}/{len(jobs)}, {minutes:.1f} min] {job.name}: {outcomes[job.name]}", flush=True)
    for signum, handler in before.items():
        signal.signal(signum, handler)
    return outcomes | {job.name: "not started" for job in waiting}


def run_slurm(jobs: list[Job], args: Args) -> list:
    """Submits job arrays: first what needs nothing, then what reads it. Returns submitit's jobs."""
    import submitit

    try:
        executor = submitit.SlurmExecutor(Path(args.run_root).absolute() / "slurm", max_num_timeout=100)
    except RuntimeError:
        sys.exit(fail("--executor slurm: no srun here; give this command where the cluster's jobs are submitted"))
    parameters = {
        "job_name": "brc", "time": args.timeout_min, "cpus_per_task": args.cpus_per_task, "partition": args.partition,
        "account": args.account, "mem": f"{args.mem_gb}GB" if args.mem_gb else None,
        "gpus_per_node": args.gpus_per_node or None, "array_parallelism": args.array_parallelism,
        "signal_delay_s": args.signal_delay_s, "additional_parameters": {"requeue": True, "open-mode": "append"},
    }  # fmt: skip
    submitted, previous, remaining = [], None, list(jobs)
    while remaining:
        names = {job.name for job in remaining}
        wave = [job for job in remaining if not any(other.name in names for other in job.after)]
        remaining = [job for job in remaining if job not in wave]
        extra = dict(parameters["additional_parameters"])
        if previous:  # not afterok: a failed run must not hold back what does not read it
            extra["dependency"] = f"afterany:{previous}"
        executor.update_parameters(**{k: v for k, v in parameters.items() if v is not None}
                                   | {"additional_parameters": extra})  # fmt: skip
        with executor.batch():
            array = [executor.submit(job) for job in wave]
        previous = array[0].job_id.partition("_")[0]
        submitted += array
        print(f"submitted job {previous} with {len(array)} run{'s' * (len(array) > 1)}")
    return submitted


# -------------------------------------------------------------------------------------------------------------- main


def exit_with(command: Callable[[], int | None]) -> None:
    """Ends the process with the status that `command` returns, whether its readers stay or go away, as `head` does."""
    from brc_sac_continuous import Output

    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    sys.exit(command())


def fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def main(args: Args) -> int:
    from experiments import EXPERIMENTS, SCALES, unique_runs

    unknown = [name for name in args.experiments if name not in EXPERIMENTS]
    if unknown or not args.experiments:
        what = f"unknown experiment '{unknown[0]}'" if unknown else "no experiment"
        return fail(f"{what}; experiments: {', '.join(EXPERIMENTS)}")
    if args.jobs < 1 or (args.seeds is not None and args.seeds < 1):
        return fail("--jobs and --seeds: must be at least 1")
    for name in ("run_root", "data"):  # relative to where the user stands, while the scripts run in the repository
        path = Path(getattr(args, name)).absolute()
        setattr(args, name, str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path))
    scale = SCALES[args.scale]
    runs = unique_runs(list(args.experiments), scale)
    runs = [run for run in runs if args.seeds is None or run.seed <= args.seeds]
    jobs = {}
    for run in runs:
        after = [jobs[name] for name in run.after if name in jobs]
        command = run.command(args.run_root, args.data)
        job = jobs[run.name] = Job(run.name, command, run.length, f"{args.run_root}/{run.name}", str(ROOT), after)
        for source in after:
            source.has_readers |= job.state() != "finished"
    open_runs = [run for run in runs if jobs[run.name].state() != "finished"]
    for name in args.experiments:
        note = EXPERIMENTS[name].note
        print(f"# {name} at {scale.name} scale: {EXPERIMENTS[name].title}{f' ({note})' if note else ''}")
    if args.dry_run:
        for run in runs:
            job = jobs[run.name]
            state = job.state()
            command = run.command(args.run_root, args.data, resume=state == "stopped")
            print("# finished: " * (state == "finished") + shlex.join(["python", *command]))
    hours = sum(estimated_hours(run, run.tasks(scale), scale.name) for run in open_runs)
    where = {"laptop": "core-hours", "paper": "GPU-hours"}[scale.name]
    print(f"# {len(runs)} runs, {len(runs) - len(open_runs)} finished; about {hours:,.1f} {where} to do", flush=True)
    if args.dry_run or not open_runs:
        return 0
    if not fcntl:
        return fail("runs are started on Linux and macOS; here --dry-run shows the commands")
    try:
        (ROOT / args.run_root).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return fail(f"cannot make {args.run_root}: {error.strerror}; choose another --run-root")
    # Runs of equal shapes compile once.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((ROOT / args.run_root / ".jax_cache").absolute()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    todo = [jobs[run.name] for run in open_runs]
    if args.executor == "slurm":
        run_slurm(todo, args)
        print(f"state: squeue --me; logs: {args.run_root}/RUN/log.txt; give the same command again for what failed")
        return 0
    outcomes = run_local(todo, args.jobs)
    for job in todo:
        if outcomes[job.name].startswith("skipped") and job.state() == "finished":
            outcomes[job.name] = "finished by another launcher"
    failed = {name: outcome for name, outcome in outcomes.items() if outcome.startswith("failed")}
    counts = {word: sum(outcome.startswith(word) for outcome in outcomes.values()) for word in
              ("finished", "stopped", "not started", "skipped", "failed")}  # fmt: skip
    print(", ".join(f"{count} {word}" for word, count in counts.items() if count))
    for name, outcome in failed.items():
        print(f"{name}: {outcome}\n  log: {args.run_root}/{name}/log.txt", file=sys.stderr)
    if counts["finished"] < len(outcomes):
        print("give the same command again to continue", file=sys.stderr)
    return int(counts["finished"] < len(outcomes))


if __name__ == "__main__":
    exit_with(lambda: main(tyro.cli(Args, description=__doc__)))
