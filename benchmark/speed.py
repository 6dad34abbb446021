"""How fast brc_sac_continuous.py and brc_drq_atari.py are, as ratios measured in one run of one machine.

Six questions, each answered on the scripts' own code:
  1. update   what share of the machine's matrix product and memory rates does the compiled update reach, and how long
              does acting take?
  2. steps    how many vector steps per second do environments and updates make together, with and without overlap?
  3. loop     of the training loop's wall time, how much is neither environment nor update?
  4. overlap  with environments that sleep, how close is a step to max(environment, update)?
  5. environments  how many vector steps per second do the parallel environments make, and how many does a plain loop?
  6. plan     what would an update sharded over several devices compute, hold and send, and take at given rates?

  python benchmark/speed.py update --widths 256 1024 --batch-size 1024
  python benchmark/speed.py update --script drq --widths 512 --dtype bfloat16 --calls 2     # Table 4's size
  python benchmark/speed.py steps --env-ids dmc/walker-walk metaworld/reach --critic-width 128 --batch-size 128
  python benchmark/speed.py steps --script drq --env-ids atari/pong --encoder-channels 8 16 16 --batch-size 32
  python benchmark/speed.py loop --env-ids dmc/walker-walk metaworld/reach --critic-width 128 --batch-size 128
  python benchmark/speed.py overlap
  python benchmark/speed.py environments --suites metaworld dmc-dogs mw-dmc
  XLA_FLAGS=--xla_force_host_platform_device_count=8 python benchmark/speed.py plan --widths 4096 8192   # a prediction

Absolute times depend on the machine and on what else runs there; the ratios are what to compare.
"""

import contextlib
import io
import json
import math
import os
import platform
import re
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch import exit_with, fail

import brc_drq_atari as drq
import brc_sac_continuous as brc

ScriptName = Literal["sac", "drq"]
NumberFormat = Literal["float32", "bfloat16"]


def seconds_per_call(function, min_seconds: float = 2.0, calls: int | None = None) -> float:
    """Median over repeated calls, after one warm-up call; `function` blocks until its result is ready.

    calls: how many to time (default: as many as fit into min_seconds, at least 3).
    """
    function()
    times, end = [], time.perf_counter() + min_seconds
    while len(times) < calls if calls else time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def matmul_rate(dtype: NumberFormat = "float32") -> float:
    """Operations per second of a square matrix product on this machine, in the precision that jax gives it (on a GPU,
    float32 means TF32). Random numbers: a GPU multiplies zeros and ones faster."""
    size = 8192 if on_gpu() else 2048
    matrix = jax.random.normal(jax.random.PRNGKey(0), (size, size), dtype)
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / seconds_per_call(lambda: product(matrix, matrix).block_until_ready())


def memory_rate() -> float:
    """Bytes per second that a pass over a large array reads and writes on this machine."""
    megabytes = 2048 if on_gpu() else 256
    array = jnp.ones(megabytes * 250_000, jnp.float32)
    shift = jax.jit(lambda x: x + 1)
    return 2 * array.nbytes / seconds_per_call(lambda: shift(array).block_until_ready())


def peak_memory() -> float:
    """Largest memory so far, in bytes: of the GPU where there is one, else of this process."""
    statistics = jax.devices()[0].memory_stats() or {}
    return statistics.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def random_batch(utd: int, batch_size: int, observation_dim: int, action_dim: int, num_tasks: int) -> brc.Batch:
    rng, shape = np.random.default_rng(0), (utd, batch_size)
    observations, next_observations = rng.normal(size=(2, *shape, observation_dim)).astype(np.float32)
    actions = rng.uniform(-1, 1, (*shape, action_dim)).astype(np.float32)
    rewards, terminated = rng.normal(size=shape).astype(np.float32), np.zeros(shape, np.float32)
    task_ids = rng.integers(num_tasks, size=shape).astype(np.int32)
    return brc.Batch(observations, actions, rewards, terminated, next_observations, task_ids)


def random_frames(utd: int, batch_size: int, num_actions: int, num_tasks: int) -> drq.Batch:
    rng, shape = np.random.default_rng(0), (utd, batch_size)
    frames, next_frames = rng.integers(256, size=(2, *shape, drq.STACK, *drq.FRAME), dtype=np.uint8)
    actions = rng.integers(num_actions, size=shape).astype(np.int32)
    returns, discounts = rng.normal(size=shape).astype(np.float32), np.full(shape, 0.97, np.float32)
    return drq.Batch(frames, actions, returns, discounts, next_frames, rng.integers(num_tasks, size=shape))


def no_evaluation(act, envs, episodes, stop) -> list[dict]:
    """In place of a script's evaluate: rows of eval.csv without a step."""
    return [{"task": task, "episodes": 1, "return": 0.0, "success": "", "score": ""} for task in envs.tasks]


def matmul_flops(args: brc.Args, observation_dim: int, action_dim: int, embedding_dim: int) -> float:
    """Multiply-adds x 2 of the matrix products of one vector step's updates, counted by hand.

    Per sample, with A the weights of the actor, C those of one critic, K critics: target A + K C, critic loss 3 K C
    (forward and two backward products), actor loss 3 A + 2 K C (the critics' own weights need no gradient).
    """
    width = args.critic_width
    critic = (observation_dim + action_dim + embedding_dim) * width + 2 * args.critic_depth * width**2
    critic += width * args.num_atoms
    actor = (observation_dim + embedding_dim) * args.actor_width + 2 * args.actor_depth * args.actor_width**2
    actor += 2 * args.actor_width * action_dim
    return 2 * args.utd * args.batch_size * (6 * args.num_critics * critic + 4 * actor)


def convolution_flops(args: drq.Args, num_actions: int, embedding_dim: int) -> float:
    """The same for DrQ: convolutions and dense layers. Per image: two forward passes for the target, one forward and
    two backward products for the loss, of which the first convolution needs no product towards its input. Products with
    the zeros around an image count, which XLA leaves out."""
    side, channels_in, products, first = drq.FRAME[0], drq.STACK, 0, 0
    for channels in args.encoder_channels:
        convolution = side**2 * 9 * channels_in * channels
        first = first or convolution
        side, channels_in = -(-side // 2), channels
        products += convolution + 4 * side**2 * 9 * channels**2
    inputs = side**2 * channels_in + embedding_dim
    for outputs in (*[args.critic_width] * args.critic_depth, num_actions * args.num_atoms):
        products, inputs = products + inputs * outputs, outputs
    return 2 * args.utd * args.batch_size * (5 * products - first)


@dataclass
class Update:
    """Cost of the update of one vector step and of acting, and the share of the machine's rates that it reaches."""

    script: ScriptName = "sac"
    """brc_sac_continuous.py or brc_drq_atari.py"""
    widths: tuple[int, ...] | None = None
    """critic widths (default: 256 512 1024; drq: 512)"""
    batch_size: int | None = None
    """transitions per update (default: the script's)"""
    dtype: NumberFormat = "float32"
    """--dtype of the script"""
    observation_dim: int = 39
    """sac: |S|"""
    action_dim: int = 6
    """sac: |A|"""
    encoder_channels: tuple[int, ...] = (128, 256, 256)
    """drq: channels of the encoder's sections"""
    num_tasks: int = 10
    """tasks"""
    calls: int | None = None
    """timed calls (default: as many as fit into 5 seconds, at least 3)"""

    def __call__(self) -> list[dict]:
        if self.calls is not None and self.calls < 1:
            raise brc.UserError("--calls: must be at least 1")
        widths = {"sac": (256, 512, 1024), "drq": (512,)}[self.script] if self.widths is None else self.widths
        return [self.measure(width) for width in widths]

    def measure(self, width: int) -> dict:
        batch_size = {"sac": 1024, "drq": 256}[self.script] if self.batch_size is None else self.batch_size
        sizes = {"critic_width": width, "batch_size": batch_size}  # by default of Tables 3 and 4
        task_ids, key = np.arange(self.num_tasks), jax.random.PRNGKey(0)
        if self.script == "sac":
            args = brc.check_ranges(brc.Args(**sizes, dtype=self.dtype))
            agent = brc.make_agent(args, self.num_tasks, self.observation_dim, self.action_dim)
            batches = random_batch(args.utd, args.batch_size, self.observation_dim, self.action_dim, self.num_tasks)
            flops = matmul_flops(args, self.observation_dim, self.action_dim, args.embedding_size)
            observations = batches.observations[0, : self.num_tasks]
            act = lambda state: agent.act(state.actor, state.critic, key, 0, observations, task_ids)  # noqa: E731
        else:
            num_actions = 18  # the full action space
            args = drq.check_ranges(drq.Args(**sizes, encoder_channels=self.encoder_channels, dtype=self.dtype))
            agent = drq.make_agent(args, self.num_tasks, num_actions)
            batches = random_frames(args.utd, args.batch_size, num_actions, self.num_tasks)
            flops = convolution_flops(args, num_actions, args.embedding_size)
            frames = np.resize(batches.frames[0], (self.num_tasks, drq.STACK, *drq.FRAME))
            act = lambda state: agent.act(state.critic, key, 0, frames, task_ids, 0.1)  # noqa: E731
        batches = jax.device_put(batches)  # where the scripts put them ahead of time
        max_return, holder = np.full(self.num_tasks, 50, np.float32), [agent.init(0)]
        compiled = agent.update.lower(holder[0], batches, max_return).compile()
        counted, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()

        def update():
            holder[0] = jax.block_until_ready(compiled(holder[0], batches, max_return)[0])

        # Rates are measured before and after, since another process may take its share of the machine.
        before = matmul_rate(self.dtype)
        seconds = seconds_per_call(update, 5, self.calls)
        after = matmul_rate(self.dtype)
        memory_bandwidth = memory_rate()
        acting = seconds_per_call(lambda: np.asarray(act(holder[0])), 1)
        moved = counted.get("bytes accessed", float("nan"))
        used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        used -= memory.alias_size_in_bytes
        return {
            "script": self.script, "width": width, "batch_size": args.batch_size, "dtype": self.dtype,
            "ms_per_step": round(1e3 * seconds, 2), "acting_ms": round(1e3 * acting, 3),
            "gflop_per_step": round(flops / 1e9, 2),
            "gflop_counted_by_xla": round(counted.get("flops", float("nan")) / 1e9, 2),
            "gbyte_counted_by_xla": round(moved / 1e9, 3), "gflop_per_s": round(flops / seconds / 1e9, 1),
            "matmul_gflop_per_s": round((before + after) / 2e9, 1),
            "share_of_matmul": round(2 * flops / seconds / (before + after), 3),
            "gbyte_per_s": round(moved / seconds / 1e9, 2), "memory_gbyte_per_s": round(memory_bandwidth / 1e9, 2),
            "share_of_memory": round(moved / seconds / memory_bandwidth, 3),
            "update_memory_mb": round(used / 1e6, 1), "peak_memory_mb": round(peak_memory() / 1e6, 1),
        }  # fmt: skip


def run_script(argv: list, module=brc, **replaced) -> None:
    """Runs a script's own main() in this process, quietly, in a run directory that is thrown away, with some of the
    module's names replaced."""
    with tempfile.TemporaryDirectory() as root, patch.multiple(module, **replaced):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            module.main(module.parse_args([*map(str, argv), "--run-root", root]))


def recording_progress(module, record: Callable[[], None]) -> type:
    """The script's progress bar, which calls record() after every step."""

    class Progress(module.tqdm):
        def update(self, n=1):
            record()
            return super().update(n)

    return Progress


@dataclass
class Steps:
    """Vector steps per second of environments alone and of the script's whole loop, as it is and with every update
    waited for before the environments start to step. A vector step is one step of every task, with its updates."""

    script: ScriptName = "sac"
    """brc_sac_continuous.py or brc_drq_atari.py"""
    env_ids: tuple[str, ...] = ("metaworld/reach", "metaworld/door-close", "metaworld/drawer-close")
    """tasks"""
    critic_width: int = 128
    """critic width"""
    batch_size: int = 128
    """transitions per update"""
    encoder_channels: tuple[int, ...] = (8, 16, 16)
    """drq: channels of the encoder's sections"""
    steps: int = 500
    """steps with updates to time"""
    seconds: float = 5.0
    """time to step the environments alone"""

    def __call__(self) -> list[dict]:
        module = {"sac": brc, "drq": drq}[self.script]
        environment = 1 / self.environments_alone(module)
        overlapped, _ = self.loop(module, serial=False)
        serial, update = self.loop(module, serial=True)
        return [{
            "script": self.script, "tasks": len(self.env_ids), "width": self.critic_width,
            "batch_size": self.batch_size, "environment_ms": round(1e3 * environment, 3),
            "update_ms": round(1e3 * update, 3), "step_ms": round(1e3 * overlapped, 3),
            "step_ms_without_overlap": round(1e3 * serial, 3),
            "environment_vector_steps_per_second": round(1 / environment, 1),
            "steps_per_second": round(1 / overlapped, 1), "steps_per_second_without_overlap": round(1 / serial, 1),
            "peak_memory_mb": round(peak_memory() / 1e6, 1),
        }]  # fmt: skip

    def environments_alone(self, module) -> float:
        """Vector steps per second with random actions."""
        rng, envs = np.random.default_rng(0), module.ParallelEnvs(list(self.env_ids), 1, 0, "auto")
        envs.reset()
        calls, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < self.seconds:
            if module is brc:
                envs.send(rng.uniform(-1, 1, (envs.size, envs.action_dim)).astype(np.float32))
            else:
                envs.send(rng.integers(envs.action_dims))
            envs.recv()
            calls += 1
        envs.close()
        return calls / elapsed

    def loop(self, module, serial: bool) -> tuple[float, float]:
        """Seconds per vector step of the script's loop, and of a waited-for update (serial only)."""
        marks, update_seconds, original = [], [], module.make_agent

        def make_agent(*args):
            agent = original(*args)

            def update(*arguments):
                start = time.perf_counter()
                result = jax.block_until_ready(agent.update(*arguments))
                update_seconds.append(time.perf_counter() - start)
                return result

            return agent._replace(update=update) if serial else agent

        class Envs(module.ParallelEnvs):
            """Steps only when the results are asked for, after the update."""

            def send(self, *arguments, **resting):
                self.sent = arguments, resting

            def recv(self):
                super().send(*self.sent[0], **self.sent[1])
                return super().recv()

        warm_up, starts = 20, 100
        argv = ["--env-ids", *self.env_ids, "--critic-width", self.critic_width, "--batch-size", self.batch_size,
                "--learning-starts", starts, "--total-timesteps", starts + warm_up + self.steps, "--eval-every", 10**9,
                "--eval-episodes", 1, "--checkpoint-every", 10**9]  # fmt: skip
        if module is drq:
            argv += ["--encoder-channels", *self.encoder_channels]
        progress = recording_progress(module, lambda: marks.append(time.perf_counter()))
        envs = Envs if serial else module.ParallelEnvs
        run_script(argv, module, make_agent=make_agent, ParallelEnvs=envs, tqdm=progress, evaluate=no_evaluation)
        wall = (marks[-1] - marks[starts + warm_up - 1]) / self.steps
        return wall, float(np.median(update_seconds)) if serial else float("nan")


@dataclass
class Loop:
    """Where the wall time of the training loop goes."""

    env_ids: tuple[str, ...] = ("metaworld/reach", "metaworld/door-close", "metaworld/drawer-close")
    """tasks"""
    critic_width: int = 128
    """critic width"""
    batch_size: int = 128
    """transitions per update"""
    steps: int = 3000
    """steps with updates to time"""

    def __call__(self) -> list[dict]:
        spent: dict[str, float] = defaultdict(float)
        marks: list[tuple[float, dict]] = []
        dispatched = [0.0]  # when the running update was

        def timed(name, function, wait=None):
            def call(*args, **kwargs):
                if wait:  # acting needs the newest policy: waiting for the update is not acting
                    start = time.perf_counter()
                    spent["behind the update"] += start - (dispatched[0] or start)
                    jax.block_until_ready(wait(*args))
                    spent["update (waiting)"] += time.perf_counter() - start
                start = time.perf_counter()
                result = jax.block_until_ready(function(*args, **kwargs)) if wait else function(*args, **kwargs)
                end = time.perf_counter()
                spent[name] += end - start
                if name == "update (dispatch)":
                    dispatched[0] = end
                return result

            return call

        def make_agent(*args):
            agent = original_make_agent(*args)
            return agent._replace(
                act=timed("acting", agent.act, wait=lambda actor, critic, *_: (actor, critic)),
                update=timed("update (dispatch)", agent.update),
            )

        class Envs(brc.ParallelEnvs):
            def __init__(self, tasks, num_envs, *args):
                super().__init__(tasks, num_envs, *args)
                if num_envs == 1:  # the training environments, not the evaluation's
                    self.send = timed("environments (send)", self.send)
                    self.recv = timed("environments (receive)", self.recv)

        original_make_agent = brc.make_agent
        progress = recording_progress(brc, lambda: marks.append((time.perf_counter(), dict(spent))))
        warm_up, starts = 200, 1000
        total = starts + warm_up + self.steps
        argv = ["--env-ids", *self.env_ids, "--critic-width", self.critic_width, "--batch-size", self.batch_size,
                "--learning-starts", starts, "--total-timesteps", total + 1, "--checkpoint-every", 10**9,
                "--eval-every", 10**9, "--eval-episodes", 2]  # fmt: skip
        with contextlib.ExitStack() as stack:
            for owner, name, label in (
                (brc.Replay, "sample", "replay"), (brc.Replay, "insert", "replay"),
                (brc.ReturnNormalizer, "update", "normalizer"), (brc.Run, "scalars", "logging"),
            ):  # fmt: skip
                stack.enter_context(patch.object(owner, name, timed(label, getattr(owner, name))))
            run_script(argv, make_agent=make_agent, ParallelEnvs=Envs, tqdm=progress)
        (start, before), (end, after) = marks[starts + warm_up], marks[total]
        wall = end - start
        parts = {name: after[name] - before.get(name, 0) for name in after}
        behind = parts.pop("behind the update")
        parts["everything else"] = wall - sum(parts.values())
        rows = [
            {"part": name, "ms_per_step": round(1e3 * s / self.steps, 3), "share": round(s / wall, 3)}
            for name, s in sorted(parts.items(), key=lambda item: -item[1])
        ]
        outside = sum(s for name, s in parts.items() if not name.startswith(("environments", "update")))
        hidden = behind - parts["environments (receive)"]  # what Python does while the device computes costs no time
        for part, s in (("neither environment nor update", outside), ("  of this, while an update runs", hidden),
                        ("  of this, while none runs", outside - hidden), ("wall", wall)):  # fmt: skip
            rows.append({"part": part, "ms_per_step": round(1e3 * s / self.steps, 3), "share": round(s / wall, 3)})
        return rows


class SleepingTask:
    """An environment whose step takes `seconds` without computing, like one that runs on other cores."""

    seconds = 0.0
    task_numbers, num_envs, observation_dims, action_dims = [0], 1, [308], [61]  # hb-hard's

    def send(self, actions, rows):
        self.ready = time.perf_counter() + self.seconds

    def recv(self):
        time.sleep(max(0.0, self.ready - time.perf_counter()))
        no = np.zeros(1, bool)
        return brc.Results(np.zeros((1, *self.observation_dims)), np.ones(1), no, no, np.full(1, np.nan), no)

    def close(self):
        pass


@dataclass
class Overlap:
    """Wall time of a step of the script's loop against max(environment, update), with environments that sleep and with
    observations and batches of full size to gather."""

    critic_width: int = 256
    """critic width"""
    batch_size: int = 1024
    """transitions per update"""
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """environment time over update time"""
    steps: int = 60
    """steps to time"""

    def __call__(self) -> list[dict]:
        args = brc.Args(critic_width=self.critic_width, batch_size=self.batch_size)
        sizes = *SleepingTask.observation_dims, *SleepingTask.action_dims
        agent, batches = brc.make_agent(args, 1, *sizes), random_batch(args.utd, self.batch_size, *sizes, 1)
        state = [agent.init(0)]

        def update():
            state[0] = jax.block_until_ready(agent.update(state[0], batches, np.full(1, 50, np.float32))[0])

        class Envs(brc.ParallelEnvs):
            def make_pools(self, *_):
                return [SleepingTask()]

        rows, starts = [], 20
        argv = ["--env-ids", "gym/Sleeping-v0", "--critic-width", self.critic_width, "--batch-size", self.batch_size,
                "--learning-starts", starts, "--total-timesteps", starts + 11 + self.steps, "--checkpoint-every", 10**9,
                "--eval-episodes", 1]  # fmt: skip
        for ratio in self.ratios:
            update_seconds = seconds_per_call(update, 3)
            SleepingTask.seconds = ratio * update_seconds
            marks: list[float] = []
            progress = recording_progress(brc, lambda: marks.append(time.perf_counter()))  # noqa: B023
            run_script(argv, ParallelEnvs=Envs, tqdm=progress, evaluate=no_evaluation)
            wall = (marks[starts + 10 + self.steps] - marks[starts + 10]) / self.steps
            update_seconds = (update_seconds + seconds_per_call(update, 3)) / 2
            longer = max(update_seconds, SleepingTask.seconds)
            rows.append({
                "environment_ms": round(1e3 * SleepingTask.seconds, 2), "update_ms": round(1e3 * update_seconds, 2),
                "step_ms": round(1e3 * wall, 2), "step_over_max": round(wall / longer, 3),
                "step_over_sum": round(wall / (update_seconds + SleepingTask.seconds), 3),
            })  # fmt: skip
        return rows


def proportional_memory(pid: int) -> int:
    """Bytes of a process, what it shares with others divided among them (PSS); 0 where the system does not say."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


@dataclass
class Environments:
    """Vector steps per second, one step of every task of a suite, with random actions: the script's parallel
    environments beside a plain Python loop over the same tasks' Gymnasium environments. Before that, how long training
    and evaluation environments take to start, first reset included, and the memory (PSS) of their worker processes."""

    suites: tuple[str, ...] = ("metaworld", "dmc-dogs", "mw-dmc")
    """suites to step, of both scripts, atari among them; hb-medium and hb-hard need HumanoidBench"""
    seconds: float = 10.0
    """time to step each for, in every round"""
    rounds: int = 4
    """rounds, in which the two take turns"""

    def __call__(self) -> list[dict]:
        rows, rng, known = [], np.random.default_rng(0), [*brc.SUITES, *drq.SUITES]
        if unknown := [suite for suite in self.suites if suite not in known]:  # before the others take their minutes
            raise brc.UserError(f"unknown suite '{unknown[0]}'; suites: {', '.join(known)}")
        for suite in self.suites:
            script = drq if suite in drq.SUITES else brc
            tasks, _ = script.SUITES[suite]
            workers, start = script.EnvWorkers(), time.perf_counter()
            parallel = script.ParallelEnvs(tasks, 1, 0, "auto", workers)
            evaluation = script.ParallelEnvs(tasks, script.eval_copies(len(tasks), 10), 1, "auto", workers)
            parallel.reset()
            evaluation.reset()
            start = time.perf_counter() - start

            def vector_step(envs):
                if script is drq:  # noqa: B023
                    envs.send(rng.integers(envs.action_dims))
                else:
                    envs.send(rng.uniform(-1, 1, (envs.size, envs.action_dim)).astype(np.float32))
                envs.recv()

            plain = [script.make_env(task, seed=0) for task in tasks]
            for env in plain:
                env.reset(seed=0)

            def sequential_step(envs):
                for env in envs:
                    if script is drq:  # noqa: B023
                        action = rng.integers(env.action_space.n)
                    else:
                        action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
                    *_, terminated, truncated, _ = env.step(action)
                    if terminated or truncated:
                        env.reset()

            # in turns, as the machine itself gets slower and faster by a tenth from one minute to the next
            rates = [(self.rate(lambda: vector_step(parallel)), self.rate(lambda: sequential_step(plain)))  # noqa: B023
                     for _ in range(self.rounds)]  # fmt: skip
            rate, sequential_rate = np.mean(rates, axis=0)
            in_envpool = sum(isinstance(pool, script.EnvPoolTask) for pool in parallel.pools)
            memory = sum(proportional_memory(worker.process.pid) for worker in workers.workers)
            for env in plain:
                env.close()
            evaluation.close()
            parallel.close()
            rows.append({
                "suite": suite, "tasks": len(tasks), "in_envpool": in_envpool, "workers": len(workers.workers),
                "start_seconds": round(start, 1), "workers_gb": round(memory / 1e9, 2),
                "parallel_vector_steps_per_second": round(rate, 2),
                "sequential_vector_steps_per_second": round(sequential_rate, 2),
                "ratio": round(rate / sequential_rate, 2),
                "ratio_of_each_round": [round(parallel / plain, 2) for parallel, plain in rates],
            })  # fmt: skip
        return rows

    def rate(self, step) -> float:
        """Calls per second over self.seconds."""
        step()
        start, calls = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < self.seconds:
            step()
            calls += 1
        return calls / elapsed


@dataclass
class Plan:
    """What the compiled update of --shard computes, holds and sends on each of this process' devices, which may be
    virtual, and a prediction of its time on real ones: products, memory and links one after the other. Nothing is run.
    """

    widths: tuple[int, ...] = (4096, 8192)
    """critic widths"""
    num_tasks: int = 50
    """tasks"""
    observation_dim: int = 39
    """|S|"""
    action_dim: int = 4
    """|A|"""
    matmul_tflop_per_s: float = 340
    """rate of matrix products of one device (default: measured, H100, TF32)"""
    memory_gbyte_per_s: float = 2570
    """rate of its memory (default: measured, H100)"""
    link_gbyte_per_s: float = 450
    """rate of its links in one direction (default: NVLink 4's data sheet)"""

    def __call__(self) -> list[dict]:
        return [self.predict(width) for width in self.widths]

    def predict(self, width: int) -> dict:
        args, devices = brc.check_ranges(brc.Args(critic_width=width, batch_size=1024)), jax.device_count()
        agent = brc.make_agent(args, self.num_tasks, self.observation_dim, self.action_dim)
        state = jax.eval_shape(lambda: agent.init(0))
        laid_out, everywhere = brc.layouts(state)
        placed = lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)  # noqa: E731
        batches = random_batch(args.utd, args.batch_size, self.observation_dim, self.action_dim, self.num_tasks)
        update = jax.jit(agent.update, donate_argnums=0, out_shardings=(laid_out, None)).lower(
            jax.tree.map(placed, state, laid_out), jax.tree.map(lambda leaf: placed(leaf, everywhere), batches),
            np.full(self.num_tasks, 50, np.float32),
        ).compile()  # fmt: skip
        memory = update.memory_analysis()
        held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        sent = [array_bytes(result) for result in COLLECTIVE.findall(update.as_text())]
        embedding = args.embedding_size
        flops = matmul_flops(args, self.observation_dim, self.action_dim, embedding) / devices
        moved = update.cost_analysis()["bytes accessed"]
        times = flops / self.matmul_tflop_per_s / 1e9, moved / self.memory_gbyte_per_s / 1e6
        link = sum(sent) / self.link_gbyte_per_s / 1e6
        return {
            "width": width, "devices": devices, "gflop": round(flops / 1e9), "moved_gbyte": round(moved / 1e9, 1),
            "held_gbyte": round(held / 1e9, 2), "collectives": len(sent), "sent_gbyte": round(sum(sent) / 1e9, 3),
            "largest_collective_mbyte": round(max(sent, default=0) / 1e6, 1),
            "predicted_ms": round(sum(times) + link, 1), "products_ms": round(times[0], 1),
            "memory_ms": round(times[1], 1), "links_ms": round(link, 2),
        }  # fmt: skip


COLLECTIVE = re.compile(r" = (.+?) (?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def array_bytes(result: str) -> int:
    """Bytes of the float32 arrays that a line of XLA's text names."""
    shapes = re.findall(r"f32\[([\d,]*)\]", result)
    return 4 * sum(math.prod(map(int, shape.split(","))) if shape else 1 for shape in shapes)


def main(argv: list[str] | None = None) -> int:
    Command = (
        Annotated[Update, tyro.conf.subcommand("update")]
        | Annotated[Steps, tyro.conf.subcommand("steps")]
        | Annotated[Loop, tyro.conf.subcommand("loop")]
        | Annotated[Overlap, tyro.conf.subcommand("overlap")]
        | Annotated[Environments, tyro.conf.subcommand("environments")]
        | Annotated[Plan, tyro.conf.subcommand("plan")]
    )
    command = tyro.cli(Command, args=argv, description=__doc__)
    try:
        rows = command()
    except (brc.UserError, drq.UserError) as error:
        return fail(str(error))
    if not rows:
        return fail("nothing to measure: a flag that takes several values has none")
    columns = list(rows[0])
    print(" | ".join(columns))
    for row in rows:
        print(" | ".join(str(row[column]) for column in columns))
    device = jax.devices()[0]
    print(json.dumps({
        "command": sys.argv[1:], "device": device.device_kind, "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0], "jax": jax.__version__, "rows": rows,
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    exit_with(main)
