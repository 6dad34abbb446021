"""--shard of brc_sac_continuous.py on eight virtual devices of the CPU, which exist in processes of their own only."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "brc_sac_continuous.py"
WIDTH, BATCH = 128, 64
COLLECTIVE = re.compile(r" = (.+?) (?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
UPDATES = f"""
import json, sys
import jax, numpy as np
sys.path.insert(0, {str(SCRIPT.parent)!r})
import brc_sac_continuous as brc

rng, tasks, shape = np.random.default_rng(0), 3, (2, {BATCH})
args = brc.Args(critic_width={WIDTH}, actor_width=32, batch_size={BATCH})
agent = brc.make_agent(args, tasks, 17, 6)
one, many = agent.init(0), agent.init(0)
sharded, many, everywhere = brc.shard(agent, many)
max_return, parts, update = np.full(tasks, 50, np.float32), {{}}, None
for name in ("critic", "target_critic", "critic_optimizer"):
    leaves = jax.tree.leaves(getattr(many, name))
    parts[name] = sum(x.addressable_shards[0].data.nbytes for x in leaves) / sum(x.nbytes for x in leaves)
for _ in range(10):  # of two updates each
    observations, next_observations = rng.normal(size=(2, *shape, 17)).astype(np.float32)
    batches = brc.Batch(
        observations, rng.uniform(-1, 1, (*shape, 6)).astype(np.float32), rng.normal(size=shape).astype(np.float32),
        np.zeros(shape, bool), next_observations, rng.integers(tasks, size=shape, dtype=np.int32),
    )
    one, _ = agent.update(one, batches, max_return)
    batches = jax.device_put(batches, everywhere)
    update = update or sharded.update.lower(many, batches, max_return).compile()
    before = jax.tree.map(lambda x: x.sharding, many)
    many, _ = update(many, batches, max_return)
    assert before == jax.tree.map(lambda x: x.sharding, many), "an update must leave the layout as it is"
pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True)]
difference = max(float(np.abs(a - b).max()) for a, b in pairs if a.dtype == np.float32)
print(json.dumps([jax.device_count(), parts, difference, update.as_text()]))
"""


def devices(environment: dict, number: int) -> dict:
    flags = os.environ.get("XLA_FLAGS", "")
    return environment | {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={number}"}


@pytest.fixture(scope="module")
def measured(environment) -> list:
    command = [sys.executable, "-c", UPDATES]
    done = subprocess.run(command, env=devices(environment, 8), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_updates_equal_those_of_one_device(measured):
    number, _, difference, _ = measured
    assert number == 8 and 0 < difference < 1e-4


def test_every_device_holds_its_part(measured):
    for name, part in measured[1].items():
        assert part < 1.05 / 8, name


def test_weights_stay_where_they_are(measured):
    """What travels is of the size of activations, of which a device has BATCH x WIDTH."""
    shapes = [shape for result in COLLECTIVE.findall(measured[3]) for shape in re.findall(r"f32\[([\d,]*)\]", result)]
    sizes = [math.prod(map(int, shape.split(","))) if shape else 1 for shape in shapes]
    assert len(sizes) > 20 and max(sizes) == BATCH * WIDTH < WIDTH**2


@pytest.mark.parametrize("numbers", [(2, 1), *(pytest.param(n, marks=pytest.mark.slow) for n in ((8, 2), (2, 1, 8)))])
def test_checkpoints_go_from_any_number_of_devices_to_any_other(environment, tmp_path, numbers):
    small = """--critic-width 16 --critic-depth 1 --actor-width 8 --batch-size 8 --utd 1 --eval-episodes 1
        --eval-every 1000""".split()
    first = ["--env-ids", "gym/gym_tasks:Truncates20-v0", *small, "--learning-starts", "10", "--run-root", tmp_path]
    arguments = [*first, "--run-name", "run"]
    for steps, number in zip((20, 30, 40), numbers, strict=False):
        how = "--shard" if number > 1 else "--no-shard"
        command = [sys.executable, str(SCRIPT), *map(str, arguments), how, "--total-timesteps", str(steps)]
        done = subprocess.run(command, env=devices(environment, number), capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
        counters = json.loads((tmp_path / "run" / "checkpoints" / str(steps) / "checkpoint.json").read_text())
        assert (counters["step"], counters["updates"]) == (steps, steps - 10)
        arguments = ["--resume", tmp_path / "run"]
