"""The algorithm of brc_sac_continuous.py against independent float64 computations: projection (C.2), return
normalization (Eq. 2-4), one whole update, every ablation flag, per-task statistics, determinism."""

import functools
import math
import struct

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tensorboardX.proto import event_pb2

import brc_sac_continuous as brc

jax.config.update("jax_default_matmul_precision", "highest")  # no TF32 on a GPU: results are compared with float64


# ---------------------------------------------------------------------------------------------------- defaults


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("utd", 2),  # Table 3
        ("embedding_size", 32),
        ("discount", 0.99),
        ("num_atoms", 101),
        ("v_min", -10),
        ("v_max", 10),
        ("polyak_tau", 5e-3),
        ("weight_decay", 1e-4),
        ("batch_size", None),  # 1024 or, with one task, 256: see test_cli
        ("buffer_size", 1e6),
        ("actor_lr", 3e-4),
        ("critic_lr", 3e-4),
        ("temperature_lr", 3e-4),
        ("initial_temperature", 0.1),
        ("actor_depth", 1),
        ("actor_width", 256),
        ("critic_arch", "bronet"),
        ("critic_depth", 2),
        ("critic_width", 4096),
        ("num_critics", 2),
        ("critic_loss", "ce"),  # Section 3
        ("normalize_returns", True),  # C.2
        ("truncation_bootstrap", "critic"),  # C.2
        ("entropy_correction", "empirical"),  # Eq. 4
        ("task_conditioning", "embedding"),  # C.4
        ("embedding_norm", "l1"),  # C.4
    ],
)
def test_defaults_are_the_papers(argument, value):
    assert getattr(brc.Args(), argument) == value


# ---------------------------------------------------------------------------------------- categorical projection

project = jax.jit(brc.categorical_projection, static_argnums=(2, 3))


def brute_force_projection(probs, target_atoms, v_min, v_max) -> np.ndarray:
    """Bellemare et al. (2017), Algorithm 1: one atom at a time, in float64."""
    batch, num_atoms = probs.shape
    spacing = (v_max - v_min) / (num_atoms - 1)
    projected = np.zeros((batch, num_atoms))
    for row in range(batch):
        for atom in range(num_atoms):
            value = min(max(float(target_atoms[row, atom]), v_min), v_max)
            position = min(max((value - v_min) / spacing, 0.0), num_atoms - 1.0)
            below, above = math.floor(position), math.ceil(position)
            if below == above:
                projected[row, below] += float(probs[row, atom])
            else:
                projected[row, below] += float(probs[row, atom]) * (above - position)
                projected[row, above] += float(probs[row, atom]) * (position - below)
    return projected


def random_probs(rng, batch: int, num_atoms: int) -> np.ndarray:
    return rng.dirichlet(np.full(num_atoms, 0.3), batch).astype(np.float32)


@pytest.mark.parametrize(("v_min", "v_max", "num_atoms"), [(-10.0, 10.0, 101), (-1.0, 4.0, 7), (0.0, 10.0, 2)])
@pytest.mark.parametrize(
    ("reward_size", "discount", "entropy_size"),
    [
        (1.0, 0.99, 0.0),
        (1.0, 0.99, 2.0),  # with an entropy bonus, also negative
        (30.0, 0.99, 5.0),  # shifted beyond both ends
        (5.0, 0.0, 2.0),  # terminal: one value for all atoms
    ],
)
def test_projection_is_the_brute_force_one(v_min, v_max, num_atoms, reward_size, discount, entropy_size):
    rng = np.random.default_rng(0)
    probs, atoms = random_probs(rng, 40, num_atoms), np.linspace(v_min, v_max, num_atoms)
    rewards, bonus = reward_size * rng.normal(size=(40, 1)), entropy_size * rng.normal(size=(40, 1))
    target_atoms = (rewards + discount * (atoms + bonus)).astype(np.float32)
    result = np.asarray(project(probs, target_atoms, v_min, v_max))
    np.testing.assert_allclose(result, brute_force_projection(probs, target_atoms, v_min, v_max), atol=2e-5)
    np.testing.assert_allclose(result.sum(-1), probs.sum(-1), atol=1e-5)
    assert (result > -1e-6).all()


@pytest.mark.parametrize(("shift", "value"), [(1e6, 10.0), (-1e6, -10.0), (np.inf, 10.0), (-np.inf, -10.0)])
def test_projection_puts_what_is_outside_on_the_nearest_end(shift, value):
    probs = random_probs(np.random.default_rng(1), 3, 101)
    atoms = np.linspace(-10, 10, 101, dtype=np.float32)
    result = np.asarray(project(probs, np.broadcast_to(atoms + np.float32(shift), (3, 101)), -10.0, 10.0))
    np.testing.assert_allclose(result[:, atoms == value], 1, atol=1e-5)
    np.testing.assert_allclose(result[:, atoms != value], 0, atol=1e-6)


@pytest.mark.parametrize("steps", [-101, -100, -7, -1, 0, 1, 30, 100, 101])
def test_projection_of_exact_grid_hits_moves_whole_atoms(steps):
    probs = random_probs(np.random.default_rng(2), 4, 101)
    target_atoms = np.broadcast_to(np.float32((np.arange(101) + steps) * 0.25 - 12.5), (4, 101))  # exact in float32
    expected = np.zeros((4, 101))
    for atom in range(101):
        expected[:, min(max(atom + steps, 0), 100)] += probs[:, atom]
    np.testing.assert_allclose(project(probs, target_atoms, -12.5, 12.5), expected, atol=2e-6)


def test_projection_preserves_the_mean_inside_the_support():
    rng = np.random.default_rng(3)
    probs = random_probs(rng, 100, 101)
    atoms = np.linspace(-10, 10, 101)
    target_atoms = (rng.uniform(-4, 4, (100, 1)) + 0.5 * atoms).astype(np.float32)
    result = np.asarray(project(probs, target_atoms, -10.0, 10.0), np.float64)
    np.testing.assert_allclose((result * atoms).sum(-1), (probs * target_atoms.astype(float)).sum(-1), atol=2e-5)


def test_projection_builds_no_batch_atoms_atoms_tensor():
    batch, num_atoms = 1024, 101
    shapes = [jax.ShapeDtypeStruct((batch, num_atoms), jnp.float32)] * 2
    memory = project.lower(*shapes, -10.0, 10.0).compile().memory_analysis()
    assert memory.output_size_in_bytes == batch * num_atoms * 4  # the analysis is of what was asked for
    assert memory.temp_size_in_bytes < 0.1 * batch * num_atoms * num_atoms * 4


# ------------------------------------------------------------------------------------------ return normalization


def play(normalizer, steps, num_tasks: int = 1) -> np.ndarray:
    """steps: (reward, "" or "terminated" or "truncated" or "reset", bootstrap or None) per step, or a list of these."""
    for step in steps:
        rows = [step] if num_tasks == 1 else step
        rewards, events, values = zip(*rows, strict=True)
        events, bootstrap = np.array(events), None if values[0] is None else np.array(values)
        normalizer.update(
            np.float32(rewards), events == "terminated", events == "truncated", events != "reset", bootstrap
        )
    return normalizer.max_return


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        # terminated: 4 + 0.5 (2 + 0.5 8) = 7, 2 + 0.5 8 = 6, 8
        ([(4, "", None), (2, "", None), (8, "terminated", None)], 8),
        ([(4, "", None), (6, "", None), (4, "terminated", None)], 4 + 3 + 1),
        # negative rewards count by size
        ([(-4, "", None), (-6, "", None), (-4, "terminated", None)], 8),
        # opposite signs: -4 + 0.5 6 + 0.25 2 = -0.5; 6 + 1 = 7; 2
        ([(-4, "", None), (6, "", None), (2, "terminated", None)], 7),
        # truncated, critic says 12: 1 + 0.5 (1 + 0.5 12) = 4.5, 1 + 0.5 12 = 7
        ([(1, "", 99.0), (1, "truncated", 12.0)], 7),
        # truncated, critic says -12: -5
        ([(1, "", 99.0), (1, "truncated", -12.0)], 5),
        # truncated, mean reward 3 / (1 - 0.5) = 6 follows: 2 + 0.5 (4 + 0.5 6) = 5.5, 4 + 3 = 7
        ([(2, "", None), (4, "truncated", None)], 7),
        # a terminated episode takes no bootstrap value
        ([(1, "", 99.0), (1, "terminated", 99.0)], 1.5),
        # an unfinished episode counts by its largest |r|, not by its return
        ([(3, "", None), (-5, "", None), (4, "", None)], 5),
        # the reset between two episodes: neither its reward nor a link between them
        ([(1, "terminated", None), (50, "reset", None), (1, "", None), (1, "terminated", None)], 1.5),
        # an episode whose simulator failed counts by its largest |r|, and is no part of the next one
        ([(5, "", None), (77, "reset", None), (77, "reset", None), (1, "terminated", None)], 5),
        ([(4, "", None), (77, "reset", None), (2, "truncated", None)], 2 + 0.5 * 2 / (1 - 0.5)),
        # Eq. 2 never forgets
        ([(9, "terminated", None), (0, "reset", None), (1, "terminated", None)], 9),
        # nothing but zeros
        ([(0, "", None), (0, "truncated", None), (0, "reset", None), (0, "terminated", None)], 0),
        # sparse: 0 + 0.5 (0 + 0.5 1) for the first state, 1 for the last
        ([(0, "", None), (0, "", None), (1, "terminated", None)], 1),
    ],
)
def test_largest_return_by_hand(steps, expected):
    assert play(brc.ReturnNormalizer(1, 0.5), steps) == pytest.approx([expected])


def test_rewards_are_covered_before_their_episode_ends():
    normalizer, seen = brc.ReturnNormalizer(1, 0.99), 0.0
    for reward in np.random.default_rng(0).normal(size=50):
        seen = max(seen, abs(np.float32(reward)))
        assert play(normalizer, [(reward, "", None)]) >= seen


def test_tasks_are_separate():
    normalizer = brc.ReturnNormalizer(3, 0.5)
    play(normalizer, [[(4, "", 0.0), (1, "truncated", 10.0), (0, "", 0.0)]], 3)
    np.testing.assert_allclose(normalizer.max_return, [4, 6, 0])
    play(normalizer, [[(6, "", 0.0), (77, "reset", 77.0), (0, "truncated", 2.0)]], 3)
    np.testing.assert_allclose(normalizer.max_return, [6, 6, 1])
    play(normalizer, [[(4, "terminated", 77.0), (-8, "terminated", 77.0), (77, "reset", 77.0)]], 3)
    np.testing.assert_allclose(normalizer.max_return, [4 + 3 + 1, 8, 1])


@pytest.mark.parametrize("bootstrapped", [True, False])
def test_largest_return_of_random_streams(bootstrapped):
    """Against sums of discounted rewards from every state, for four tasks with episodes of different lengths."""
    rng, discount, num_tasks = np.random.default_rng(1), 0.9, 4
    normalizer = brc.ReturnNormalizer(num_tasks, discount)
    episodes, done, expected = [[] for _ in range(num_tasks)], np.zeros(num_tasks, bool), np.zeros(num_tasks)
    for _ in range(300):
        rewards, values = rng.normal(size=num_tasks).astype(np.float32), 3 * rng.normal(size=num_tasks)
        ends, kind = rng.random(num_tasks) < 0.1, rng.random(num_tasks) < 0.5
        terminated, truncated, valid = ends & kind, ends & ~kind, ~done
        normalizer.update(rewards, terminated, truncated, valid, values if bootstrapped else None)
        done = valid & ends
        for task in np.flatnonzero(valid):
            episodes[task].append(float(rewards[task]))
            expected[task] = max(expected[task], abs(rewards[task]))
        for task in np.flatnonzero(done):
            tail = (values[task] if bootstrapped else np.mean(episodes[task]) / (1 - discount)) * truncated[task]
            for start in range(len(episodes[task])):
                rest = episodes[task][start:] + [tail]
                expected[task] = max(expected[task], abs(sum(discount**k * r for k, r in enumerate(rest))))
            episodes[task] = []
        np.testing.assert_allclose(normalizer.max_return, expected, rtol=1e-6)


# ------------------------------------------------------------------------------------------- one whole update

NUM_TASKS, OBSERVATION_DIM, ACTION_DIM, BATCH = 3, 5, 2, 48
ACTION_DIMS = np.array([2, 1, 2])  # the tasks' own: the second one's actions are padded
SMALL = dict(critic_width=16, critic_depth=1, actor_width=12, actor_depth=1, num_atoms=21, embedding_size=4, utd=1)
SHALLOW = dict(critic_depth=0, actor_depth=0)  # compiles faster
FROZEN = (
    dict(critic_lr=0.0, weight_decay=0.0, embedding_norm="l2", entropy_correction="constant", num_critics=3) | SHALLOW
)
MSE = dict(critic_loss="mse", normalize_returns=False, target_entropy=50.0, weight_decay=0.5) | SHALLOW
SINGLE = dict(critic_arch="mlp", critic_depth=1, critic_width=8, actor_depth=0, num_critics=1)
HEADS = dict(task_conditioning="heads") | SHALLOW
SIMBA = dict(critic_arch="simba") | SHALLOW


def make(num_tasks: int = NUM_TASKS, **changes) -> tuple[brc.Args, brc.Agent]:
    """A small agent, compiled once for all tests."""
    return make_cached(num_tasks, frozenset(changes.items()))


@functools.cache
def make_cached(num_tasks: int, changes: frozenset) -> tuple[brc.Args, brc.Agent]:
    args = brc.Args(**(SMALL | dict(changes)))
    return args, brc.make_agent(
        args, num_tasks, OBSERVATION_DIM, ACTION_DIM, ACTION_DIMS.tolist() if num_tasks > 1 else None
    )


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


def make_batch(rng, num_tasks: int = NUM_TASKS, utd: int = 1, **changes) -> brc.Batch:
    shape = (utd, BATCH)
    values = dict(
        observations=rng.normal(size=(*shape, OBSERVATION_DIM)), actions=rng.uniform(-1, 1, (*shape, ACTION_DIM)),
        rewards=rng.uniform(-0.5, 0.5, shape), terminated=rng.random(shape) < 0.3,
        next_observations=rng.normal(size=(*shape, OBSERVATION_DIM)),
    )  # fmt: skip
    values = {
        name: np.broadcast_to(value, values[name].shape).astype(np.float32)
        for name, value in (values | changes).items()
        if name != "task_ids"
    }
    task_ids = changes.get("task_ids", rng.integers(num_tasks, size=shape))
    return brc.Batch(**values, task_ids=np.broadcast_to(task_ids, shape).astype(np.int32))


def first_gradient(optimizer, b1: float = 0.9):
    """The gradient of an Adam optimizer's only step so far, from its moving average."""
    return jax.tree.map(lambda mu: np.asarray(mu, np.float64) / (1 - b1), optax.tree_utils.tree_get(optimizer, "mu"))


def assert_trees_close(actual, expected, **tolerances):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), **tolerances),
        actual,
        expected,
    )


def trees_equal(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), a, b)))


class Reference:
    """The paper's quantities from the networks' outputs: NumPy in float64, JAX where a gradient is taken."""

    def __init__(self, args: brc.Args, num_tasks: int = NUM_TASKS):
        self.args, self.num_tasks = args, num_tasks
        heads = num_tasks if args.task_conditioning == "heads" else 1
        outputs = args.num_atoms if args.critic_loss == "ce" else 1
        self.embedded = num_tasks > 1 and args.task_conditioning == "embedding"
        backbone = {"bronet": brc.BroNet, "simba": brc.SimBa, "mlp": brc.MLP}[args.critic_arch]
        self.critic_network = brc.Critic(backbone, args.critic_width, args.critic_depth, outputs, heads)
        self.actor_network = brc.Actor(args.actor_width, args.actor_depth, ACTION_DIM, heads)
        self.atoms = args.v_min + np.arange(args.num_atoms) * (args.v_max - args.v_min) / (args.num_atoms - 1)

    def conditioned(self, x, critic, task_ids):
        if not self.embedded:
            return jnp.asarray(x)
        (table,) = jax.tree.leaves(critic["embedding"])
        power = 1 if self.args.embedding_norm == "l1" else 2
        unit = table / (abs(table) ** power).sum(-1, keepdims=True) ** (1 / power)
        return jnp.concatenate([x, unit[task_ids]], axis=-1)

    def outputs(self, critic, observations, actions, task_ids) -> list:
        """Of every critic of the ensemble."""
        x = self.conditioned(jnp.concatenate([observations, actions], axis=-1), critic, task_ids)
        members = [jax.tree.map(lambda leaf, k=k: leaf[k], critic["ensemble"]) for k in range(self.args.num_critics)]
        return [self.critic_network.apply(member, x, task_ids) for member in members]

    def values(self, outputs):
        """Mean over critics of the expected return."""
        if self.args.critic_loss == "mse":
            return sum(output[:, 0] for output in outputs) / len(outputs)
        return sum((jax.nn.softmax(output) * self.atoms).sum(-1) for output in outputs) / len(outputs)

    def act(self, key, actor, critic, observations, task_ids):
        """Actions and log-densities, the Gaussian density over the slope of tanh, in the dimensions that a task has."""
        mean, log_std = self.actor_network.apply(actor, self.conditioned(observations, critic, task_ids), task_ids)
        noise = jax.random.normal(key, mean.shape)
        x = mean + jnp.exp(log_std) * noise
        gaussian = -(noise**2) / 2 - log_std - math.log(2 * math.pi) / 2
        owned = np.arange(ACTION_DIM) < jnp.asarray(ACTION_DIMS)[task_ids][:, None]
        return jnp.where(owned, jnp.tanh(x), 0), jnp.where(owned, gaussian + 2 * jnp.log(jnp.cosh(x)), 0).sum(-1)

    def scale(self, state, max_return) -> np.ndarray:
        """V_max / (G_i + lambda_i), Eq. 3 and 4, with the magnitude of an entropy below zero."""
        if not self.args.normalize_returns:
            return np.ones(self.num_tasks)
        entropy = abs(np.asarray(state.entropy, np.float64))
        if self.args.entropy_correction == "constant":
            entropy = ACTION_DIMS[: self.num_tasks] / 4
        correction = math.exp(state.log_temperature) * entropy / (1 - self.args.discount)
        return self.args.v_max / (np.asarray(max_return, np.float64) + correction)

    def target(self, state, batch, max_return, key) -> np.ndarray:
        """Target distribution, or value, of one batch in float64."""
        actions, log_probs = self.act(key, state.actor, state.critic, batch.next_observations, batch.task_ids)
        outputs = self.outputs(state.target_critic, batch.next_observations, actions, batch.task_ids)
        rewards = batch.rewards.astype(np.float64) * self.scale(state, max_return)[batch.task_ids]
        discounts = self.args.discount * (1 - batch.terminated.astype(np.float64))
        bonus = -math.exp(state.log_temperature) * np.asarray(log_probs, np.float64)
        if self.args.critic_loss == "mse":
            return rewards + discounts * (np.asarray(self.values(outputs), np.float64) + bonus)
        logits = np.asarray(outputs, np.float64)
        probs = np.exp(logits - logits.max(-1, keepdims=True))
        probs = (probs / probs.sum(-1, keepdims=True)).mean(0)
        target_atoms = rewards[:, None] + discounts[:, None] * (self.atoms + bonus[:, None])
        return brute_force_projection(probs, target_atoms, self.args.v_min, self.args.v_max)

    def critic_loss(self, critic, batch, target):
        outputs = self.outputs(critic, batch.observations, batch.actions, batch.task_ids)
        if self.args.critic_loss == "mse":
            return sum(((output[:, 0] - target) ** 2).mean() for output in outputs)
        return sum(-(target * jax.nn.log_softmax(output)).sum(-1).mean() for output in outputs)

    def actor_loss(self, actor, critic, temperature, batch, key):
        actions, log_probs = self.act(key, actor, critic, batch.observations, batch.task_ids)
        q = self.values(self.outputs(critic, batch.observations, actions, batch.task_ids))
        return (temperature * log_probs - q).mean(), log_probs


MAX_RETURN = np.float32([0.5, 20.0, 3.0])


@functools.cache
def random_state(agent: brc.Agent) -> brc.AgentState:
    """A state in which nothing coincides: random parameters, also of the target critic, temperature 0.3, entropies of
    both signs. Shared by tests: an update, which consumes its state, needs a copy."""
    rng = np.random.default_rng(12)
    shapes = jax.eval_shape(lambda: agent.init(0))
    random = jax.tree.map(lambda leaf: jnp.float32(0.4 * rng.normal(size=leaf.shape)), shapes)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return zeros._replace(
        actor=random.actor,
        critic=random.critic,
        target_critic=random.target_critic,
        log_temperature=jnp.log(jnp.float32(0.3)),
        entropy=jnp.float32([0.02, -2.0, 1.5])[: len(shapes.entropy)],
        statistics=zeros.statistics._replace(variance=jnp.ones(OBSERVATION_DIM)),
        key=jax.random.PRNGKey(3),
    )


@functools.cache
def one_update(num_tasks: int = NUM_TASKS, **changes):
    """State before and after one update of one batch, the batch, and the update's metrics and keys.

    The batch has no rows of the last task, if there are several.
    """
    args, agent = make(num_tasks, **changes)
    before = random_state(agent)
    batch = make_batch(np.random.default_rng(0), task_ids=np.arange(BATCH) % max(num_tasks - 1, 1))
    after, metrics = agent.update(copy(before), batch, MAX_RETURN[:num_tasks])
    keys = jax.random.split(before.key, 3)[1:]  # the first is the next update's
    return args, before, after, jax.tree.map(lambda x: x[0], batch), {k: float(v) for k, v in metrics.items()}, keys


def check_critic_step(num_tasks: int = NUM_TASKS, **changes):
    """Losses, gradients, AdamW step and target critic of one update from independent computations."""
    args, before, after, batch, metrics, (critic_key, _) = one_update(num_tasks, **changes)
    reference = Reference(args, num_tasks)
    target = reference.target(before, batch, MAX_RETURN[:num_tasks], critic_key)
    loss, gradient = jax.jit(jax.value_and_grad(reference.critic_loss))(before.critic, batch, target.astype(np.float32))
    values = target if args.critic_loss == "mse" else (target * reference.atoms).sum(-1)
    expected = {
        "losses/critic": loss, "gradient_norms/critic": optax.tree.norm(gradient), "q/target_mean": values.mean(),
        "q/target_min": values.min(), "q/target_max": values.max(),
    }  # fmt: skip
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), rel=2e-4, abs=2e-5), name
    assert_trees_close(first_gradient(after.critic_optimizer), gradient, rtol=1e-3, atol=1e-5)
    assert_trees_close(
        after.critic, adamw(before.critic, after.critic_optimizer, args.critic_lr, args.weight_decay), atol=1e-6
    )
    tau = args.polyak_tau
    moved = jax.tree.map(lambda old, new: (1 - tau) * old + tau * new, before.target_critic, after.critic)
    assert_trees_close(after.target_critic, moved, rtol=1e-6, atol=1e-7)


def adamw(parameters, optimizer, learning_rate: float, weight_decay: float):
    """Parameters after a first AdamW step: bias correction makes both moments the gradient's own."""
    gradient = first_gradient(optimizer)
    return jax.tree.map(lambda x, g: x - learning_rate * (g / (abs(g) + 1e-8) + weight_decay * x), parameters, gradient)


def test_critic_and_target_critic_after_one_update():
    check_critic_step()


def test_normalized_rewards_after_one_update():
    args, before, _, batch, metrics, _ = one_update()
    rewards = batch.rewards * Reference(args).scale(before, MAX_RETURN)[batch.task_ids]
    assert metrics["rewards/normalized_mean"] == pytest.approx(rewards.mean(), rel=1e-4)
    assert metrics["rewards/normalized_max_abs"] == pytest.approx(abs(rewards).max(), rel=1e-5)


def test_actor_after_one_update():
    """The actor's step uses the updated critic and the old temperature, without clipped double Q."""
    args, before, after, batch, metrics, (_, actor_key) = one_update()
    reference = Reference(args)
    function = jax.jit(jax.value_and_grad(reference.actor_loss, has_aux=True))
    (loss, log_probs), gradient = function(before.actor, after.critic, 0.3, batch, actor_key)
    assert metrics["losses/actor"] == pytest.approx(float(loss), rel=1e-4, abs=1e-5)
    assert metrics["policy/entropy"] == pytest.approx(-float(log_probs.mean()), rel=1e-5)
    assert metrics["gradient_norms/actor"] == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-3)
    assert_trees_close(first_gradient(after.actor_optimizer), gradient, rtol=2e-3, atol=1e-5)
    assert_trees_close(
        after.actor, adamw(before.actor, after.actor_optimizer, args.actor_lr, args.weight_decay), atol=1e-6
    )


def test_temperature_and_task_entropies_after_one_update():
    args, before, after, batch, metrics, (_, actor_key) = one_update()
    _, log_probs = Reference(args).act(actor_key, before.actor, after.critic, batch.observations, batch.task_ids)
    entropies = -np.asarray(log_probs, np.float64)
    target = -ACTION_DIMS[batch.task_ids].mean() / 2  # each task's own -|A| / 2
    gradient = 0.3 * (entropies.mean() - target)  # of alpha (H - H_target) by log alpha
    assert metrics["losses/temperature"] == pytest.approx(gradient, rel=1e-4)
    assert first_gradient(after.temperature_optimizer, b1=0.5) == pytest.approx(gradient, rel=1e-4)
    step = -args.temperature_lr * np.sign(gradient)
    assert float(after.log_temperature - before.log_temperature) == pytest.approx(step, rel=1e-2)
    assert metrics["policy/temperature"] == pytest.approx(math.exp(after.log_temperature), rel=1e-6)
    means = [entropies[batch.task_ids == task].mean() for task in range(2)]
    old = np.asarray(before.entropy)
    expected = [*(old[:2] + brc.ENTROPY_RATE * (means - old[:2])), old[2]]  # no rows of the last task in this batch
    np.testing.assert_allclose(after.entropy, expected, rtol=1e-4)


def test_temperature_falls_when_entropy_is_above_its_target_and_rises_below():
    _, before, after, _, metrics, _ = one_update()
    assert after.log_temperature > before.log_temperature and metrics["policy/entropy"] < -1
    _, before, after, _, metrics, _ = one_update(**MSE)
    assert after.log_temperature > before.log_temperature and metrics["policy/entropy"] < 50


def test_two_batches_in_one_call_are_two_updates():
    _, agent = make(1, **SINGLE)
    state, max_return = copy(random_state(agent)), MAX_RETURN[:1]
    batches = make_batch(np.random.default_rng(5), 1, utd=2)
    at_once, metrics = make(1, **SINGLE, utd=2)[1].update(copy(state), batches, max_return)
    for k in range(2):
        state, one_metrics = agent.update(state, jax.tree.map(lambda x, k=k: x[k : k + 1], batches), max_return)
    assert_trees_close(at_once, state, rtol=1e-3, atol=1e-5)
    assert metrics["losses/critic"] == pytest.approx(float(one_metrics["losses/critic"]), rel=1e-4)


def test_same_seed_same_state_and_old_buffers_are_donated():
    _, agent = make(**MSE)
    batch = make_batch(np.random.default_rng(6))
    starts, ends = [], []
    for seed in (7, 7, 8):
        state = agent.init(seed)
        starts.append(jax.device_get(copy(state)))  # a view of the state itself would keep its buffers
        for _ in range(3):
            old, (state, _) = state, agent.update(state, batch, MAX_RETURN)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves((old.actor, old.critic, old.critic_optimizer)))
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves((old.target_critic, old.actor_optimizer)))
        ends.append(jax.device_get(state))
    if jax.default_backend() == "cpu":  # elsewhere scatter-adds may sum in any order
        assert trees_equal(ends[0], ends[1])
    for tree in (lambda state: state.actor, lambda state: state.critic["ensemble"], agent_embedding):
        assert trees_equal(tree(starts[0]), tree(starts[1]))
        assert not trees_equal(tree(starts[0]), tree(starts[2]))
        assert not trees_equal(tree(starts[0]), tree(ends[0]))


def test_critics_start_different_and_their_targets_equal():
    args, agent = make(**MSE)
    state = agent.init(0)
    assert trees_equal(state.critic, state.target_critic)
    kernels = [leaf for leaf in jax.tree.leaves(state.critic["ensemble"]) if leaf.ndim == 3]
    assert len(kernels) == 2 and not any(np.array_equal(leaf[0], leaf[1]) for leaf in kernels)
    assert math.exp(state.log_temperature) == pytest.approx(args.initial_temperature)


@pytest.mark.parametrize("part", ["actor", "critic", "target_critic", "critic_optimizer"])
def test_no_checkpoint_of_a_lost_network(part, tmp_path, own_signal_handlers):
    args, agent = make(run_root=str(tmp_path), run_name="run", **MSE)
    state = random_state(agent)
    *others, last = jax.tree.leaves(getattr(state, part))
    leaves = [*others, last.at[(0,) * last.ndim].set(jnp.nan)]
    lost = jax.tree.unflatten(jax.tree.structure(getattr(state, part)), leaves)
    with pytest.raises(brc.UserError, match="not finite at step 5: parameters"), brc.Run(args, "task", 10) as run:
        run.start()
        run.step = 5
        run.save(state._replace(**{part: lost}))
    assert not (tmp_path / "run/checkpoints").exists()


# ---------------------------------------------------------------------------------------------- guards of Eq. 3


def update_metrics(state, max_return, task: int = 0, **batch):
    _, agent = make()
    batch = make_batch(np.random.default_rng(0), task_ids=task, **batch)
    state, metrics = agent.update(copy(state), batch, np.float32(max_return))
    return state, {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize("entropy", [-1e6, -30.0, -1.0, 0.0, 1e-3, 2.0])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_normalized_rewards_stay_within_v_max_and_keep_their_sign(entropy, size):
    """Even when the policy is sharp, G_i is nothing but the one reward, and lambda_i alone would be negative."""
    state = random_state(make()[1])._replace(entropy=jnp.full(NUM_TASKS, entropy, jnp.float32))
    for sign in (-1, 1):
        _, metrics = update_metrics(state, [size] * NUM_TASKS, rewards=sign * size)
        assert 0 < sign * metrics["rewards/normalized_mean"] <= 10 * (1 + 1e-6)
        assert metrics["rewards/normalized_max_abs"] <= 10 * (1 + 1e-6)


@pytest.mark.parametrize(("entropy", "divisor"), [(1.5, 47.0), (-1.5, 47.0), (0.0, 2.0)])
def test_empirical_entropy_correction(entropy, divisor):
    state = random_state(make()[1])._replace(entropy=jnp.float32([entropy, 7.0, 8.0]))
    _, metrics = update_metrics(state, [2, 100, 100], rewards=1.0)
    assert metrics["rewards/normalized_mean"] == pytest.approx(10 / divisor, rel=1e-4)


@pytest.mark.parametrize("entropy", [-50.0, 0.0, 3.0])
def test_a_task_without_any_reward_stays_finite(entropy):
    state = random_state(make()[1])._replace(entropy=jnp.full(NUM_TASKS, entropy, jnp.float32))
    state, metrics = update_metrics(state, [0, 0, 0], rewards=0.0)
    assert metrics["rewards/normalized_max_abs"] == 0
    assert all(math.isfinite(value) for value in metrics.values())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state)))


def test_rewards_of_a_running_episode_are_within_v_max():
    """Replay learns from rewards before the episode's return is known: reward and G_i as main() has them."""
    rng, normalizer, state = np.random.default_rng(9), brc.ReturnNormalizer(NUM_TASKS, 0.99), random_state(make()[1])
    rewards = np.zeros((0, NUM_TASKS), np.float32)
    for step in range(12):
        rewards = np.vstack([rewards, rng.normal(size=NUM_TASKS) * 2.0**step]).astype(np.float32)
        normalizer.update(rewards[-1], np.zeros(3, bool), np.zeros(3, bool), np.ones(3, bool))
        chosen = rewards[rng.integers(len(rewards), size=BATCH), 1]
        _, metrics = update_metrics(state, normalizer.max_return, task=1, rewards=chosen)
        assert metrics["rewards/normalized_max_abs"] <= 10 * (1 + 1e-6)


def test_value_is_in_units_of_reward():
    """What the normalizer bootstraps with: Q of the mean action, with Eq. 3 undone."""
    args, agent = make()
    state, reference = random_state(agent), Reference(args)
    observations = np.random.default_rng(10).normal(size=(NUM_TASKS, OBSERVATION_DIM)).astype(np.float32)
    task_ids = np.arange(NUM_TASKS)
    mean, _ = reference.actor_network.apply(
        state.actor, reference.conditioned(observations, state.critic, task_ids), task_ids
    )
    actions = np.where(np.arange(ACTION_DIM) < ACTION_DIMS[:, None], jnp.tanh(mean), 0)
    q = reference.values(reference.outputs(state.critic, observations, actions, task_ids))
    assert np.abs(q).max() < args.v_max and state.entropy.all(), "lambda is not 0, and must not matter"
    np.testing.assert_allclose(agent.value(state, observations, MAX_RETURN), q * MAX_RETURN / args.v_max, rtol=1e-4)
    assert not np.any(agent.value(state, observations, np.zeros(NUM_TASKS, np.float32)))


@pytest.mark.parametrize("critic", ["optimistic", "pessimistic", "any"])
@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_largest_return_is_bounded_by_the_largest_reward(critic, loss):
    """G_i <= max |r| / (1 - gamma), however wrong the critic is and however large lambda: random episodes, most of them
    truncated, in three tasks of other scales. The bound is tight: where all rewards are equal and the critic is certain
    of V_max, G_i comes close to it."""
    args, agent = make(critic_loss=loss, discount=0.9)
    state, rng = random_state(agent)._replace(log_temperature=jnp.float32(5.0)), np.random.default_rng(4)
    head = state.critic["ensemble"]["params"]["Heads_0"]["Dense_0"]
    extreme = {"optimistic": -1, "pessimistic": 0}.get(critic)
    if extreme is not None:
        bias = head["bias"].at[:, extreme].set(1e4 if loss == "ce" else 1e4 * (-1) ** (1 + extreme))
        params = state.critic["ensemble"]["params"]
        head = {"kernel": 0 * head["kernel"], "bias": bias}
        ensemble = {"params": params | {"Heads_0": {"Dense_0": head}}}
        state = state._replace(critic=state.critic | {"ensemble": ensemble})
    normalizer, scales, largest = brc.ReturnNormalizer(NUM_TASKS, 0.9), np.float32([1e-3, 1, 500]), np.zeros(NUM_TASKS)
    for _ in range(400):
        rewards = (scales * (1 if critic == "optimistic" else rng.uniform(-1, 1, NUM_TASKS))).astype(np.float32)
        largest = np.maximum(largest, np.abs(rewards))
        truncated = rng.random(NUM_TASKS) < 0.3
        terminated = ~truncated & (rng.random(NUM_TASKS) < 0.05)
        observations = rng.normal(size=(NUM_TASKS, OBSERVATION_DIM)).astype(np.float32)
        bootstrap = np.asarray(agent.value(state, observations, normalizer.max_return))
        assert (np.abs(bootstrap) <= normalizer.max_return * (1 + 1e-6)).all()
        normalizer.update(rewards, terminated, truncated, np.ones(NUM_TASKS, bool), bootstrap)
        assert (normalizer.max_return <= largest / (1 - 0.9) * (1 + 1e-5)).all()
    if critic == "optimistic":
        assert (normalizer.max_return > 0.99 * largest / (1 - 0.9)).all()


# ------------------------------------------------------------------------------------------------------ ablations


def norms(agent: brc.Agent, state: brc.AgentState, order: int) -> np.ndarray:
    embeddings = np.asarray(agent.embed(state.critic, np.arange(NUM_TASKS)), np.float64)
    return (abs(embeddings) ** order).sum(-1) ** (1 / order)


def test_embeddings_have_norm_1_before_and_after_learning():
    _, before, after, *_ = one_update()
    assert agent_embedding(before).shape == (NUM_TASKS, SMALL["embedding_size"])
    np.testing.assert_allclose(norms(make()[1], before, 1), 1, atol=1e-5)
    np.testing.assert_allclose(norms(make()[1], after, 1), 1, atol=1e-5)
    _, agent = make(**FROZEN)
    np.testing.assert_allclose(norms(agent, random_state(agent), 2), 1, atol=1e-5)
    assert (norms(agent, random_state(agent), 1) > 1.01).all()


def agent_embedding(state: brc.AgentState) -> np.ndarray:
    """The table as it is learned, before normalization."""
    (table,) = jax.tree.leaves(state.critic["embedding"])
    return np.asarray(table)


def test_embeddings_learn_from_the_critic_and_only_the_tasks_of_the_batch():
    _, before, after, *_ = one_update()
    moved = abs(agent_embedding(after) - agent_embedding(before)).max(-1)
    assert (moved[:2] > 1e-4).all()
    assert moved[2] < 1e-6  # no rows of this task: nothing but weight decay


def test_actor_loss_does_not_reach_the_critic_or_the_embeddings():
    """With a critic that cannot learn, all of it stays bit-identical while the actor moves. And where it learns, its
    gradient is that of the critic loss alone: test_critic_and_target_critic_after_one_update."""
    _, before, after, *_ = one_update(**FROZEN)
    assert trees_equal(before.critic, after.critic)
    assert not trees_equal(before.actor, after.actor)


def test_l2_embeddings_constant_entropy_correction_and_three_critics_in_one_update():
    check_critic_step(**FROZEN)
    args, before, _, batch, metrics, _ = one_update(**FROZEN)
    divisors = MAX_RETURN + 0.3 * (ACTION_DIMS / 4) / (1 - 0.99)
    expected = abs(batch.rewards * 10 / divisors[batch.task_ids]).max()
    assert metrics["rewards/normalized_max_abs"] == pytest.approx(expected, rel=1e-4)


def test_mse_without_return_normalization():
    check_critic_step(**MSE)
    *_, batch, metrics, _ = one_update(**MSE)
    assert metrics["rewards/normalized_max_abs"] == abs(batch.rewards).max()
    assert metrics["losses/temperature"] == pytest.approx(0.3 * (metrics["policy/entropy"] - 50), rel=1e-5)


def test_weight_decay_of_actor_and_critic():
    """Decoupled from the gradient (AdamW), at a size that the paper's 1e-4 would need many updates to show."""
    args, before, after, *_ = one_update(**MSE)
    for name, rate in (("actor", args.actor_lr), ("critic", args.critic_lr)):
        start, end, optimizer = (
            getattr(x, y) for x, y in ((before, name), (after, name), (after, f"{name}_optimizer"))
        )
        assert_trees_close(end, adamw(start, optimizer, rate, weight_decay=0.5), atol=1e-6)
        without = jax.tree.map(
            lambda e, x: float(abs(e - x).max()), end, adamw(start, optimizer, rate, weight_decay=0.0)
        )
        assert min(jax.tree.leaves(without)) > 1e-5


def test_single_task_with_one_mlp_critic_has_no_embedding():
    check_critic_step(1, **SINGLE)
    _, agent = make(1, **SINGLE)
    state = random_state(agent)
    assert "embedding" not in state.critic


def test_heads_learn_from_their_own_task_only():
    check_critic_step(**HEADS)
    args, agent = make(**HEADS)
    assert "embedding" not in random_state(agent).critic
    batch = make_batch(np.random.default_rng(0), task_ids=1)
    state, _ = agent.update(copy(random_state(agent)), batch, MAX_RETURN)
    for optimizer, per_head, count in (
        (state.critic_optimizer, args.num_atoms, 1),
        (state.actor_optimizer, ACTION_DIM, 2),
    ):
        gradient = first_gradient(optimizer)
        heads = [leaf for leaf in jax.tree.leaves(gradient) if leaf.shape[-1] == NUM_TASKS * per_head]
        assert len(heads) == 2 * count  # kernel and bias, in the actor of mean and standard deviation
        for leaf in heads:
            size = abs(leaf.reshape(-1, NUM_TASKS, per_head)).max((0, 2))
            assert size[1] > 1e-6 and size[0] == size[2] == 0


def test_simba_statistics_are_those_of_all_batches():
    _, agent = make(**SIMBA)
    state, rng, seen = copy(random_state(agent)), np.random.default_rng(0), []
    for shift in (0, 3, -20):
        batch = make_batch(
            rng, observations=shift + rng.normal(size=(1, BATCH, OBSERVATION_DIM)) * np.arange(OBSERVATION_DIM)
        )
        seen.append(batch.observations[0].astype(np.float64))
        state, metrics = agent.update(state, batch, MAX_RETURN)
        everything = np.concatenate(seen)
        assert int(state.statistics.count) == len(everything)
        np.testing.assert_allclose(state.statistics.mean, everything.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state.statistics.variance, everything.var(0), rtol=1e-4, atol=1e-4)
        assert all(math.isfinite(value) for value in metrics.values())


def test_simba_critic_sees_normalized_observations():
    args, agent = make(**SIMBA)
    state, reference = random_state(agent), Reference(args)
    mean, variance = jnp.arange(1.0, 6.0), jnp.arange(2.0, 7.0) ** 2
    state = state._replace(statistics=brc.RunningStatistics(jnp.float32(100), mean, variance))
    observations = np.random.default_rng(2).normal(size=(NUM_TASKS, OBSERVATION_DIM)).astype(np.float32)
    task_ids = np.arange(NUM_TASKS)
    actions = agent.act_deterministic(state.actor, state.critic, observations, task_ids)
    q = reference.values(reference.outputs(state.critic, (observations - mean) / jnp.sqrt(variance), actions, task_ids))
    expected = q * MAX_RETURN / args.v_max
    np.testing.assert_allclose(agent.value(state, observations, MAX_RETURN), expected, rtol=1e-3)


@pytest.mark.parametrize("changes", [{}, HEADS], ids=["embedding", "heads"])
def test_actions_depend_on_the_task_and_stay_in_its_own_dimensions(changes):
    _, agent = make(**changes)
    state, observations = random_state(agent), np.ones((NUM_TASKS, OBSERVATION_DIM), np.float32)
    key, task_ids = jax.random.PRNGKey(0), np.arange(NUM_TASKS)
    mean = np.asarray(agent.act_deterministic(state.actor, state.critic, observations, task_ids))
    assert len(np.unique(mean[:, 0])) == NUM_TASKS
    assert mean.shape == (NUM_TASKS, ACTION_DIM) and (abs(mean) <= 1).all()
    actions = [agent.act(state.actor, state.critic, key, step, observations, task_ids) for step in range(200)]
    actions = np.asarray(actions)
    padding = np.arange(ACTION_DIM) >= ACTION_DIMS[:, None]
    for values in (mean, *actions):
        assert (values[padding] == 0).all() and (abs(values) <= 1).all()
    assert (actions.std(0)[~padding] > 0).all()
    assert abs(np.median(np.arctanh(actions), axis=0) - np.arctanh(mean)).max() < 0.5


# ------------------------------------------------------------------------------------------- per-task statistics


UNIT_RETURN = np.ones(NUM_TASKS, np.float32)


def opposed_state(agent: brc.Agent) -> brc.AgentState:
    """Without entropy correction, and with a critic near the uniform distribution."""
    state = random_state(agent)
    return state._replace(critic=jax.tree.map(lambda x: x / 4, state.critic), entropy=jnp.zeros(NUM_TASKS))


def opposed_batches() -> brc.Batch:
    """One batch per task on the same states and actions. All transitions are terminal, with rewards that normalize to
    V_max for the first and the last task and to V_min for the second."""
    batch = make_batch(np.random.default_rng(11), utd=NUM_TASKS, terminated=1.0, task_ids=np.arange(NUM_TASKS)[:, None])
    same = {name: np.repeat(getattr(batch, name)[:1], NUM_TASKS, axis=0) for name in ("observations", "actions")}
    return batch._replace(**same, rewards=np.repeat(np.float32([[1], [-1], [1]]), BATCH, axis=1))


def test_task_statistics_against_separate_gradients():
    args, agent = make(**SHALLOW)
    reference, batches = Reference(args), opposed_batches()
    state = opposed_state(agent)
    td_loss, norm, entropy, cosine = map(np.asarray, brc.task_statistics(agent, state, batches, UNIT_RETURN))
    function, gradients = jax.jit(jax.value_and_grad(reference.critic_loss)), []
    for task in range(NUM_TASKS):
        batch = jax.tree.map(lambda x, task=task: x[task], batches)
        target = np.zeros((BATCH, args.num_atoms), np.float32)
        target[:, 0 if task == 1 else -1] = 1
        loss, gradient = function(state.critic, batch, target)
        gradients.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)]).astype(np.float64))
        assert td_loss[task] == pytest.approx(float(loss), rel=1e-4)
        many = jax.tree.map(lambda x: np.repeat(x, 100, axis=0), batch)
        other_key = jax.random.PRNGKey(5)  # the same entropy from other noise than the agent's
        _, log_probs = reference.act(other_key, state.actor, state.critic, many.observations, many.task_ids)
        log_probs = np.asarray(log_probs)
        assert abs(entropy[task] + log_probs.mean()) < 5 * log_probs.std() / math.sqrt(BATCH)
    expected_norms = np.linalg.norm(gradients, axis=-1)
    np.testing.assert_allclose(norm, expected_norms, rtol=1e-3)
    expected_cosine = np.inner(gradients, gradients) / np.outer(expected_norms, expected_norms)
    np.testing.assert_allclose(cosine, expected_cosine, atol=1e-3)
    assert expected_cosine[0, 1] < -0.01 and expected_cosine[0, 2] > 0.1, expected_cosine


def read_scalars(run_dir) -> dict[str, float]:
    """Last value of every scalar in a TensorBoard file."""
    (path,) = run_dir.glob("events.out.tfevents.*")
    data, position, scalars = path.read_bytes(), 0, {}
    while position < len(data):  # length (8 bytes), its checksum (4), event, its checksum (4)
        (length,) = struct.unpack_from("<Q", data, position)
        event = event_pb2.Event.FromString(data[position + 12 : position + 12 + length])
        scalars |= {value.tag: value.simple_value for value in event.summary.value}
        position += length + 16
    return scalars


def test_log_task_statistics_writes_arrays_and_scalars(tmp_path, own_signal_handlers):
    """Replay holds, for each task, one transition again and again, so that every sampled batch is the same."""
    args, agent = make(run_root=str(tmp_path), run_name="run", **SHALLOW)
    tasks, step = ["dmc/walker-run", "metaworld/reach", "gym/Pendulum-v1"], 75
    one = jax.tree.map(lambda x: x[:, 0], opposed_batches())
    replay = brc.Replay(NUM_TASKS, 20, OBSERVATION_DIM, ACTION_DIM)
    replay.start(one.observations)
    for _ in range(10):
        replay.insert(one.actions, one.rewards, one.terminated, np.ones(NUM_TASKS, bool), one.observations)
    normalizer = brc.ReturnNormalizer(NUM_TASKS, 0.99)
    normalizer.max_return[:] = UNIT_RETURN
    state = opposed_state(agent)
    with brc.Run(args, "task", 100) as run:
        run.start()
        run.step = step
        brc.log_task_statistics(agent, state, replay, normalizer, tasks, run, batch_size=BATCH)

    batches = jax.tree.map(lambda x: np.repeat(x[:, None], BATCH, axis=1), one)._replace(
        task_ids=opposed_batches().task_ids
    )
    names = ("td_loss", "gradient_norm", "entropy", "gradient_cosine")
    found = brc.task_statistics(agent, state, batches, UNIT_RETURN)
    expected = dict(zip(names, map(np.asarray, found), strict=True))
    saved = np.load(tmp_path / "run/statistics" / f"{step}.npz", allow_pickle=False)
    assert saved["task"].tolist() == tasks
    np.testing.assert_allclose(saved["embedding"], agent.embed(state.critic, np.arange(NUM_TASKS)))
    for name in ("td_loss", "gradient_norm", "gradient_cosine"):
        np.testing.assert_allclose(saved[name], expected[name], rtol=1e-3, atol=1e-4)

    scalars = read_scalars(tmp_path / "run")
    for name in ("td_loss", "gradient_norm", "entropy"):
        for task, value in zip(tasks, saved[name], strict=True):
            assert scalars[f"tasks/{name}/{task}"] == pytest.approx(float(value), rel=1e-5)
        assert scalars[f"relative_variance/{name}"] == pytest.approx(
            saved[name].std() / abs(saved[name].mean()), rel=1e-4
        )
    conflicts = np.mean([saved["gradient_cosine"][i, j] < 0 for i, j in ((0, 1), (0, 2), (1, 2))])
    assert 0 < conflicts < 1
    assert scalars["gradient_conflict_rate"] == pytest.approx(conflicts)
