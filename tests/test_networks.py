"""Networks of brc_sac_continuous.py: architectures in float64 NumPy, sizes of Table 1, the tanh-Gaussian policy."""

import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brc_sac_continuous as brc

jax.config.update("jax_default_matmul_precision", "highest")  # no TF32 on a GPU: results are compared with float64

WIDTH, DEPTH, INPUTS, BATCH = 6, 2, 4, 5


def perturbed(parameters, seed: int = 0):
    """Parameters with noise everywhere, in float32: initial biases of 0 and scales of 1 would hide a missing term."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: np.float32(leaf + 0.5 * rng.normal(size=leaf.shape)), parameters)


class Float64:
    """Dense and layer norm of a Flax parameter tree, in NumPy, in the order in which the layers were made."""

    def __init__(self, parameters):
        self.parameters = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), parameters["params"])

    def dense(self, index: int, x: np.ndarray) -> np.ndarray:
        layer = self.parameters[f"Dense_{index}"]
        return x @ layer["kernel"] + layer["bias"]

    def norm(self, index: int, x: np.ndarray) -> np.ndarray:
        layer = self.parameters[f"LayerNorm_{index}"]
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * layer["scale"] + layer["bias"]


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def bronet(net: Float64, x: np.ndarray) -> np.ndarray:
    x = relu(net.norm(0, net.dense(0, x)))
    for block in range(DEPTH):
        y = relu(net.norm(2 * block + 1, net.dense(2 * block + 1, x)))
        x = x + net.norm(2 * block + 2, net.dense(2 * block + 2, y))
    return x


def simba(net: Float64, x: np.ndarray) -> np.ndarray:
    x = net.dense(0, x)
    for block in range(DEPTH):
        x = x + net.dense(2 * block + 2, relu(net.dense(2 * block + 1, net.norm(block, x))))
    return net.norm(DEPTH, x)


def mlp(net: Float64, x: np.ndarray) -> np.ndarray:
    for layer in range(DEPTH):
        x = relu(net.dense(layer, x))
    return x


@pytest.mark.parametrize(
    ("module", "reference", "dense_layers", "norms"),
    [
        (brc.BroNet, bronet, 1 + 2 * DEPTH, 1 + 2 * DEPTH),
        (brc.SimBa, simba, 1 + 2 * DEPTH, 1 + DEPTH),
        (brc.MLP, mlp, DEPTH, 0),
    ],
)
def test_architecture_in_float64(module, reference, dense_layers, norms):
    network = module(WIDTH, DEPTH)
    x = np.random.default_rng(1).normal(size=(BATCH, INPUTS)).astype(np.float32)
    parameters = perturbed(network.init(jax.random.PRNGKey(0), x))
    np.testing.assert_allclose(network.apply(parameters, x), reference(Float64(parameters), x), rtol=2e-4, atol=2e-5)
    layers = list(parameters["params"])
    assert sum(name.startswith("Dense") for name in layers) == dense_layers
    assert sum(name.startswith("LayerNorm") for name in layers) == norms


def test_simba_has_an_inverted_bottleneck_of_4():
    shapes = jax.eval_shape(brc.SimBa(WIDTH, 1).init, jax.random.PRNGKey(0), jnp.zeros((1, INPUTS)))["params"]
    assert shapes["Dense_1"]["kernel"].shape == (WIDTH, 4 * WIDTH)
    assert shapes["Dense_2"]["kernel"].shape == (4 * WIDTH, WIDTH)


def test_bronet_kernels_start_orthogonal_with_gain_sqrt_2():
    parameters = brc.BroNet(WIDTH, DEPTH).init(jax.random.PRNGKey(3), jnp.zeros((1, INPUTS)))["params"]
    for index in range(1 + 2 * DEPTH):
        kernel = np.asarray(parameters[f"Dense_{index}"]["kernel"])
        np.testing.assert_allclose(kernel @ kernel.T, 2 * np.eye(len(kernel)), atol=1e-5)
        assert not parameters[f"Dense_{index}"]["bias"].any()


def test_every_row_takes_the_head_of_its_task():
    heads, features = 3, 2
    network, task_ids = brc.Heads(features, heads), jnp.array([2, 0, 1, 1, 2])
    x = np.random.default_rng(2).normal(size=(BATCH, INPUTS)).astype(np.float32)
    parameters = perturbed(network.init(jax.random.PRNGKey(0), x, task_ids))
    everything = Float64(parameters).dense(0, x).reshape(BATCH, heads, features)
    expected = everything[np.arange(BATCH), np.asarray(task_ids)]
    np.testing.assert_allclose(network.apply(parameters, x, task_ids), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_heads", [1, 3])
def test_the_log_std_head_starts_with_gain_1_and_the_mean_with_sqrt_2(num_heads):
    parameters = brc.Actor(WIDTH, 1, 4, num_heads).init(
        jax.random.PRNGKey(0), jnp.zeros((2, INPUTS)), jnp.zeros(2, jnp.int32)
    )
    for name, gain in (("Heads_0", math.sqrt(2)), ("Heads_1", 1.0)):  # mean, then log_std
        kernel = np.asarray(parameters["params"][name]["Dense_0"]["kernel"]).reshape(WIDTH, num_heads, 4)
        for head in range(num_heads):
            np.testing.assert_allclose(kernel[:, head].T @ kernel[:, head], gain**2 * np.eye(4), atol=1e-5)


@pytest.mark.parametrize("num_heads", [1, 3])
def test_log_std_covers_minus_10_to_2_and_no_more(num_heads):
    network, task_ids = brc.Actor(WIDTH, 1, 2, num_heads), jnp.arange(64) % num_heads
    x = np.random.default_rng(3).normal(size=(64, INPUTS)).astype(np.float32)
    parameters = network.init(jax.random.PRNGKey(0), x, task_ids)
    _, log_std = network.apply(jax.tree.map(lambda leaf: 100 * leaf, parameters), x, task_ids)
    assert log_std.shape == (64, 2)
    assert -10 <= log_std.min() < -9.99 and 1.99 < log_std.max() <= 2
    _, middle = network.apply(jax.tree.map(jnp.zeros_like, parameters), x, task_ids)
    np.testing.assert_allclose(middle, -4)


# ------------------------------------------------------------------------------------------------- policy density


def test_log_density_is_the_numerical_change_of_variables():
    rng, key = np.random.default_rng(4), jax.random.PRNGKey(5)
    mean = rng.uniform(-2, 2, (200, 3)).astype(np.float32)
    log_std = rng.uniform(-6, 0.3, (200, 3)).astype(np.float32)
    actions, log_probs = brc.sample_action(key, mean, log_std)
    std = np.exp(log_std.astype(np.float64))
    noise = np.asarray(jax.random.normal(key, mean.shape), np.float64)
    x = mean + std * noise
    np.testing.assert_allclose(actions, np.tanh(x), atol=1e-6)
    gaussian = np.exp(-((x - mean) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi))
    slope = (np.tanh(x + 1e-5) - np.tanh(x - 1e-5)) / 2e-5  # da/dx: density of a is density of x over the slope
    np.testing.assert_allclose(log_probs, np.log(gaussian / slope).sum(-1), rtol=2e-5, atol=2e-4)


def test_log_density_far_in_the_tails():
    """Where float32 rounds tanh to 1, log(1 - tanh(x)^2) = log 4 - 2|x| up to e^-2|x|."""
    mean = np.float32([[-60.0], [-15.0], [15.0], [60.0]])
    log_std = np.full_like(mean, -10.0)
    actions, log_probs = brc.sample_action(jax.random.PRNGKey(0), mean, log_std)
    noise = np.asarray(jax.random.normal(jax.random.PRNGKey(0), mean.shape), np.float64)
    gaussian = -0.5 * noise**2 + 10 - 0.5 * math.log(2 * math.pi)
    np.testing.assert_allclose(log_probs, (gaussian - math.log(4) + 2 * abs(mean))[:, 0], rtol=1e-5)
    assert (abs(actions) <= 1).all()


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, 0.0), (0.7, -0.5), (-1.0, -2.0), (0.3, -6.0)])
def test_mean_log_density_is_the_entropy_from_quadrature(mean, log_std):
    """Says nothing about how the sample was drawn: the average of -log p(a) must be the integral of -p log p da."""
    samples, std = 200_000, math.exp(log_std)
    ones = jnp.ones((samples, 1))
    _, log_probs = brc.sample_action(jax.random.PRNGKey(6), mean * ones, log_std * ones)
    x = np.linspace(mean - 12 * std, mean + 12 * std, 200_001)
    density = np.exp(-((x - mean) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi))
    log_density = (
        -((x - mean) ** 2) / (2 * std**2) - log_std - 0.5 * math.log(2 * math.pi) - np.log1p(-(np.tanh(x) ** 2))
    )
    entropy = -(density * log_density).sum() * (x[1] - x[0])
    error = np.std(log_probs) / math.sqrt(samples)
    assert abs(-np.mean(log_probs) - entropy) < 5 * error + 1e-4


def test_log_densities_of_dimensions_add_up():
    mean, log_std = np.float32([[0.1, -0.4]]), np.float32([[-1.0, 0.2]])
    action, log_prob = brc.sample_action(jax.random.PRNGKey(7), mean, log_std)
    x = np.arctanh(np.asarray(action, np.float64))
    parts = (
        -((x - mean) ** 2) / (2 * np.exp(2.0 * log_std))
        - log_std
        - 0.5 * math.log(2 * math.pi)
        - np.log(1 - np.tanh(x) ** 2)
    )
    assert log_prob.shape == (1,)
    np.testing.assert_allclose(log_prob, parts.sum(-1), rtol=1e-4)


def test_masked_dimensions_have_no_action_and_no_density():
    mean = np.random.default_rng(9).normal(size=(4, 3)).astype(np.float32)
    mask = np.float32([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]])
    actions, log_probs = brc.sample_action(jax.random.PRNGKey(7), mean, mean - 1, mask)
    unmasked, _ = brc.sample_action(jax.random.PRNGKey(7), mean, mean - 1)
    np.testing.assert_array_equal(actions, np.where(mask, unmasked, 0))
    x = np.arctanh(np.asarray(unmasked, np.float64))
    parts = -((x - mean) ** 2) / (2 * np.exp(2.0 * (mean - 1))) - (mean - 1) - 0.5 * math.log(2 * math.pi)
    np.testing.assert_allclose(log_probs, ((parts - np.log(1 - np.tanh(x) ** 2)) * mask).sum(-1), rtol=2e-4)


@pytest.mark.parametrize("log_std", [-10.0, 2.0])
@pytest.mark.parametrize("mean", [-100.0, 0.0, 100.0])
def test_actions_are_bounded_and_log_densities_finite(mean, log_std):
    ones = jnp.ones((1000, 2))
    actions, log_probs = brc.sample_action(jax.random.PRNGKey(8), mean * ones, log_std * ones)
    assert (jnp.abs(actions) <= 1).all() and jnp.isfinite(log_probs).all()
    gradient = jax.grad(lambda m: brc.sample_action(jax.random.PRNGKey(8), m * ones, log_std * ones)[1].sum())(mean)
    assert jnp.isfinite(gradient)


# ---------------------------------------------------------------------------------------------------------- sizes


def shapes_of(num_tasks: int = 9, observation_dim: int = 51, action_dim: int = 19, **changes):
    """Shapes of the initial state of an agent, on HumanoidBench-Medium if not told otherwise; allocates nothing."""
    agent = brc.make_agent(brc.Args(**changes), num_tasks, observation_dim, action_dim)
    return jax.eval_shape(lambda: agent.init(0))


@pytest.mark.parametrize(
    ("width", "size", "tolerance"),
    [
        (256, 1e6, 0.3),  # here the first and last layers, which Table 1 must leave out, are a fifth of the critic
        (512, 4e6, 0.2),
        (1024, 16e6, 0.15),
        (2048, 64e6, 0.15),
        (4096, 256e6, 0.15),
        (8192, 1e9, 0.15),
    ],
)
def test_parameter_counts_of_table_1(width, size, tolerance):
    """Table 1 counts both critics and both targets: half as many would be far outside every tolerance."""
    state = shapes_of(critic_width=width)
    assert brc.parameter_count([state.critic, state.target_critic]) == pytest.approx(size, rel=tolerance)
    blocks = sum(leaf.size for leaf in jax.tree.leaves(state.critic) if leaf.shape[1:] == (width, width))
    assert 2 * blocks == pytest.approx(size, rel=0.08)  # what scales as width squared


def test_parameter_count_by_hand():
    inputs, width, atoms, tasks = 51 + 19 + 32, 256, 101, 9
    critic = inputs * width + 4 * width**2 + 5 * width + 2 * 5 * width + width * atoms + atoms
    state = shapes_of(critic_width=width)
    assert brc.parameter_count(state.critic) == 2 * critic + tasks * 32
    actor = (51 + 32) * 256 + 2 * 256**2 + 3 * 256 + 2 * 3 * 256 + 2 * (256 * 19 + 19)
    assert brc.parameter_count(state.actor) == actor


@pytest.mark.parametrize(
    ("changes", "inputs", "outputs"),
    [
        (dict(num_tasks=1), 51 + 19, 101),
        (dict(task_conditioning="heads"), 51 + 19, 9 * 101),
        (dict(embedding_size=8), 51 + 19 + 8, 101),
        (dict(critic_loss="mse"), 51 + 19 + 32, 1),
        (dict(num_atoms=31, num_critics=3), 51 + 19 + 32, 31),
    ],
)
def test_inputs_and_outputs_of_the_critic(changes, inputs, outputs):
    state = shapes_of(critic_width=64, critic_depth=1, **changes)
    kernels = {leaf.shape for leaf in jax.tree.leaves(state.critic["ensemble"]) if leaf.ndim == 3}
    members = changes.get("num_critics", 2)
    assert kernels == {(members, inputs, 64), (members, 64, 64), (members, 64, outputs)}
    assert ("embedding" in state.critic) == (inputs > 51 + 19)


@pytest.mark.parametrize(("critic_arch", "per_block"), [("bronet", 2), ("simba", 8)])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_width_and_depth_of_the_critic(critic_arch, per_block, depth):
    state = shapes_of(critic_arch=critic_arch, critic_width=64, critic_depth=depth)
    kernels = [leaf for leaf in jax.tree.leaves(state.critic["ensemble"]) if leaf.ndim == 3]
    hidden = [leaf.size for leaf in kernels if set(leaf.shape[1:]) <= {64, 256}]
    assert sum(hidden) == 2 * depth * per_block * 64**2


def test_initialization_at_width_512_on_2_cores_ends():
    """Vmapped orthogonal initializers inside one jit deadlock on jaxlib 0.10.2 with 2 CPU cores at this width."""
    program = (
        "import os\n"
        "if hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, range(min(2, os.cpu_count())))\n"
        "import jax, brc_sac_continuous as brc\n"
        "state = brc.make_agent(brc.Args(critic_width=512), 2, 51, 19).init(0)\n"
        "print(brc.parameter_count(jax.block_until_ready(state).critic))"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(brc.__file__).parent)}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 2e6


@pytest.mark.parametrize("arch", ["bronet", "simba", "mlp"])
def test_bfloat16_is_close_to_float32(arch):
    """Products inside the blocks are in it; parameters, what an update changes, targets and losses stay float32."""
    rng, shape = np.random.default_rng(0), (2, 256)
    batches = brc.Batch(
        *(rng.normal(size=(*shape, size)).astype(np.float32) for size in (17, 6)),
        rng.normal(size=shape).astype(np.float32), np.zeros(shape, np.float32),
        rng.normal(size=(*shape, 17)).astype(np.float32), rng.integers(3, size=shape, dtype=np.int32),
    )  # fmt: skip
    batch, max_return = jax.tree.map(lambda x: x[0], batches), np.full(3, 50, np.float32)
    results = {}
    for dtype in ("float32", "bfloat16"):
        args = brc.Args(critic_arch=arch, critic_width=64, actor_width=32, batch_size=256, dtype=dtype)
        agent = brc.make_agent(args, 3, 17, 6)
        state = agent.init(0)
        target, _ = jax.jit(agent.td_target)(state, batch, max_return, jax.random.PRNGKey(1))
        loss, gradient = jax.jit(jax.value_and_grad(agent.critic_loss))(state.critic, state, batch, target)
        text = str(jax.make_jaxpr(agent.critic_loss)(state.critic, state, batch, target))
        assert ("bf16" in text) == (dtype == "bfloat16")
        changed = jax.eval_shape(agent.update, state, batches, max_return)
        floats = [leaf for leaf in jax.tree.leaves((changed, target, gradient)) if leaf.dtype.kind in "fV"]
        assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}
        results[dtype] = target, loss, jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(gradient)])
    (target, loss, gradient), (rough_target, rough_loss, rough_gradient) = results["float32"], results["bfloat16"]
    assert 0 < np.abs(rough_target - target).max() < 0.02
    assert abs(rough_loss - loss) < 0.003 * loss
    cosine = jnp.vdot(gradient, rough_gradient) / jnp.linalg.norm(gradient) / jnp.linalg.norm(rough_gradient)
    assert 0.999 < cosine < 1 and abs(jnp.linalg.norm(rough_gradient) / jnp.linalg.norm(gradient) - 1) < 0.02
