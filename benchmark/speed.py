"""How fast brc_sac_continuous.py is, as ratios measured in one run of one machine.

Four questions, each answered on the script's own code:
  1. update   what share of the machine's float32 matrix product does the compiled update reach?
  2. loop     of the training loop's wall time, how much is neither environment nor update?
  3. overlap  with environments that sleep, how close is a step to max(environment, update)?
  4. environments  how many vector steps per second do the parallel environments make, and how many does a plain loop?

  python benchmark/speed.py update --widths 256 1024 --batch-size 1024
  python benchmark/speed.py loop --env-ids dmc/walker-walk metaworld/reach --critic-width 128 --batch-size 128
  python benchmark/speed.py overlap
  python benchmark/speed.py environments --suites metaworld dmc-dogs mw-dmc

Absolute times depend on the machine and on what else runs there; the ratios are what to compare.
"""

import contextlib
import io
import json
import platform
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import brc_sac_continuous as brc


def seconds_per_call(function, min_seconds: float = 2.0) -> float:
    """Median over repeated calls, after one warm-up call; `function` blocks until its result is ready."""
    function()
    times, end = [], time.perf_counter() + min_seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def matmul_rate(size: int = 2048) -> float:
    """Float32 operations per second of a square matrix product on this machine."""
    matrix = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / seconds_per_call(lambda: product(matrix, matrix).block_until_ready())


def random_batch(utd: int, batch_size: int, observation_dim: int, action_dim: int, num_tasks: int) -> brc.Batch:
    rng, shape = np.random.default_rng(0), (utd, batch_size)
    observations, next_observations = rng.normal(size=(2, *shape, observation_dim)).astype(np.float32)
    actions = rng.uniform(-1, 1, (*shape, action_dim)).astype(np.float32)
    rewards, terminated = rng.normal(size=shape).astype(np.float32), np.zeros(shape, np.float32)
    task_ids = rng.integers(num_tasks, size=shape).astype(np.int32)
    return brc.Batch(observations, actions, rewards, terminated, next_observations, task_ids)


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


@dataclass
class Update:
    """Share of the machine's matrix-product rate that the update reaches."""

    widths: tuple[int, ...] = (256, 512, 1024)
    """critic widths"""
    batch_size: int = 1024
    """transitions per update"""
    observation_dim: int = 39
    """|S|"""
    action_dim: int = 6
    """|A|"""
    num_tasks: int = 10
    """tasks"""

    def __call__(self) -> list[dict]:
        rows = []
        for width in self.widths:
            args = brc.Args(critic_width=width, batch_size=self.batch_size)
            agent = brc.make_agent(args, self.num_tasks, self.observation_dim, self.action_dim)
            batches = random_batch(args.utd, self.batch_size, self.observation_dim, self.action_dim, self.num_tasks)
            max_return = np.full(self.num_tasks, 50, np.float32)
            holder = [agent.init(0)]

            def update(agent=agent, batches=batches, max_return=max_return, holder=holder):
                holder[0] = jax.block_until_ready(agent.update(holder[0], batches, max_return)[0])

            # The product is measured before and after, since another process may take its share of the machine.
            before, seconds, after = matmul_rate(), seconds_per_call(update, 5), matmul_rate()
            flops = matmul_flops(args, self.observation_dim, self.action_dim, args.embedding_size)
            rows.append({
                "width": width, "batch_size": self.batch_size, "ms_per_step": round(1e3 * seconds, 2),
                "gflop_per_step": round(flops / 1e9, 2), "gflop_per_s": round(flops / seconds / 1e9, 1),
                "matmul_gflop_per_s": round((before + after) / 2e9, 1),
                "share_of_matmul": round(2 * flops / seconds / (before + after), 3),
            })  # fmt: skip
        return rows


def run_script(argv: list[str], make_agent=None, parallel_envs=None) -> None:
    """Runs the script's own main() in this process, quietly, in a run directory that is thrown away."""
    originals = brc.make_agent, brc.ParallelEnvs
    brc.make_agent, brc.ParallelEnvs = make_agent or originals[0], parallel_envs or originals[1]
    try:
        with tempfile.TemporaryDirectory() as root, contextlib.redirect_stdout(io.StringIO()):
            with contextlib.redirect_stderr(io.StringIO()):
                brc.main(brc.parse_args([*argv, "--run-root", root]))
    finally:
        brc.make_agent, brc.ParallelEnvs = originals


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

        class Progress(brc.tqdm):
            def update(self, n=1):
                marks.append((time.perf_counter(), dict(spent)))
                return super().update(n)

        original_make_agent = brc.make_agent
        patched = [(brc.Replay, "sample", "replay"), (brc.Replay, "insert", "replay"),
                   (brc.ReturnNormalizer, "update", "normalizer"), (brc.Logger, "scalars", "logging")]  # fmt: skip
        originals = [getattr(owner, name) for owner, name, _ in patched] + [brc.tqdm]
        for owner, name, label in patched:
            setattr(owner, name, timed(label, getattr(owner, name)))
        brc.tqdm = Progress
        warm_up, starts = 200, 1000
        total = starts + warm_up + self.steps
        try:
            run_script(
                ["--env-ids", *self.env_ids, "--critic-width", str(self.critic_width), "--batch-size",
                 str(self.batch_size), "--learning-starts", str(starts), "--total-timesteps", str(total + 1),
                 "--eval-every", str(10**9), "--eval-episodes", "2", "--checkpoint-every", str(10**9)],
                make_agent, Envs,
            )  # fmt: skip
        finally:
            for (owner, name, _), original in zip(patched, originals, strict=False):
                setattr(owner, name, original)
            brc.tqdm = originals[-1]
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
    num_envs, observation_dim, action_dim = 1, 20, 6

    def reset(self):
        return np.zeros((1, self.observation_dim))

    def send(self, actions):
        self.ready = time.perf_counter() + self.seconds

    def recv(self):
        time.sleep(max(0.0, self.ready - time.perf_counter()))
        return np.zeros((1, self.observation_dim)), np.ones(1), np.zeros(1, bool), np.zeros(1, bool), {}

    def close(self):
        pass


@dataclass
class Overlap:
    """Wall time of a step of the script's loop against max(environment, update), with environments that sleep."""

    critic_width: int = 256
    """critic width"""
    batch_size: int = 256
    """transitions per update"""
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """environment time over update time"""
    steps: int = 150
    """steps to time"""

    def __call__(self) -> list[dict]:
        args = brc.Args(critic_width=self.critic_width, batch_size=self.batch_size)
        agent = brc.make_agent(args, 1, SleepingTask.observation_dim, SleepingTask.action_dim)
        batches = random_batch(args.utd, self.batch_size, SleepingTask.observation_dim, SleepingTask.action_dim, 1)
        state = [agent.init(0)]

        def update():
            state[0] = jax.block_until_ready(agent.update(state[0], batches, np.full(1, 50, np.float32))[0])

        class Envs(brc.ParallelEnvs):
            def make_pool(self, *_):
                return SleepingTask()

        class Progress(brc.tqdm):
            def update(self, n=1):
                marks.append(time.perf_counter())
                return super().update(n)

        def evaluate(agent, state, envs, episodes, stop):
            return np.zeros((1, 1)), np.zeros((1, 1))

        rows, originals = [], (brc.tqdm, brc.evaluate)
        brc.tqdm, brc.evaluate = Progress, evaluate
        try:
            for ratio in self.ratios:
                update_seconds = seconds_per_call(update, 3)
                SleepingTask.seconds = ratio * update_seconds
                marks: list[float] = []
                starts = 20
                run_script(
                    ["--env-ids", "gym/Sleeping-v0", "--critic-width", str(self.critic_width), "--batch-size",
                     str(self.batch_size), "--learning-starts", str(starts), "--total-timesteps",
                     str(starts + 11 + self.steps), "--checkpoint-every", str(10**9), "--eval-episodes", "1"],
                    None, Envs,
                )  # fmt: skip
                wall = (marks[starts + 10 + self.steps] - marks[starts + 10]) / self.steps
                update_seconds = (update_seconds + seconds_per_call(update, 3)) / 2
                longer = max(update_seconds, SleepingTask.seconds)
                rows.append({
                    "environment_ms": round(1e3 * SleepingTask.seconds, 2), "update_ms": round(1e3 * update_seconds, 2),
                    "step_ms": round(1e3 * wall, 2), "step_over_max": round(wall / longer, 3),
                    "step_over_sum": round(wall / (update_seconds + SleepingTask.seconds), 3),
                })  # fmt: skip
        finally:
            brc.tqdm, brc.evaluate = originals
        return rows


@dataclass
class Environments:
    """Vector steps per second, one step of every task of a suite, with random actions: the script's parallel
    environments beside a plain Python loop over the same tasks' Gymnasium environments."""

    suites: tuple[str, ...] = ("metaworld", "dmc-dogs", "mw-dmc")
    """suites to step; hb-medium and hb-hard need HumanoidBench"""
    seconds: float = 20.0
    """time to step each for"""

    def __call__(self) -> list[dict]:
        rows, rng = [], np.random.default_rng(0)
        for suite in self.suites:
            tasks, _ = brc.SUITES[suite]
            parallel = brc.ParallelEnvs(tasks, 1, 0, "auto")
            parallel.reset()

            def vector_step(envs):
                envs.send(rng.uniform(-1, 1, (envs.size, envs.action_dim)).astype(np.float32))
                envs.recv()

            rate = self.rate(lambda: vector_step(parallel))  # noqa: B023
            in_envpool = sum(isinstance(pool, brc.EnvPoolTask) for pool in parallel.pools)
            parallel.close()
            plain = [brc.make_env(task, seed=0) for task in tasks]
            for env in plain:
                env.reset(seed=0)

            def sequential_step(envs):
                for env in envs:
                    *_, terminated, truncated, _ = env.step(
                        rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
                    )
                    if terminated or truncated:
                        env.reset()

            sequential_rate = self.rate(lambda: sequential_step(plain))  # noqa: B023
            for env in plain:
                env.close()
            rows.append({
                "suite": suite, "tasks": len(tasks), "in_envpool": in_envpool,
                "parallel_vector_steps_per_second": round(rate, 2),
                "sequential_vector_steps_per_second": round(sequential_rate, 2),
                "ratio": round(rate / sequential_rate, 2),
            })  # fmt: skip
        return rows

    def rate(self, step) -> float:
        """Calls per second over self.seconds, long enough for the resets to count."""
        step()
        start, calls = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < self.seconds:
            step()
            calls += 1
        return calls / elapsed


def main() -> None:
    Command = (
        Annotated[Update, tyro.conf.subcommand("update")]
        | Annotated[Loop, tyro.conf.subcommand("loop")]
        | Annotated[Overlap, tyro.conf.subcommand("overlap")]
        | Annotated[Environments, tyro.conf.subcommand("environments")]
    )
    command = tyro.cli(Command, description=__doc__)
    rows = command()
    columns = list(rows[0])
    print(" | ".join(columns))
    for row in rows:
        print(" | ".join(str(row[column]) for column in columns))
    device = jax.devices()[0]
    print(json.dumps({
        "command": sys.argv[1:], "device": device.device_kind, "cpu": platform.processor() or platform.machine(),
        "jax": jax.__version__, "rows": rows,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
