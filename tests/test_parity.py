"""Whole updates of brc_sac_continuous.py against two computations that share no code with it.

The authors' released code: released_update.npz holds numbers only, from their modules run once, unmodified, in float64.
An agent for three tasks and one for a single task (widths 8, embeddings of 4, 21 and 11 atoms up to 4 and 2, as float32
places 101 atoms up to 10 in steps of 8e-6 only) made five updates of 16 rows each, from initial parameters with noise
everywhere. Stored of each: names and shapes of our parameter trees, which the flat arrays
follow; parameters before (*_start, exact in 16 bits) and after (*_end); raw batches, largest returns G_i, and the
standard normal noise that their policy drew; losses and entropy of every update; target distribution and gradients of
the first. Their RewardNormalizer normalized the rewards, with the temperature of the moment.

The paper's equations in NumPy: one update with the paper's choices, its gradients by finite differences.
"""

import math
from pathlib import Path

import jax
import numpy as np
import pytest

import brc_sac_continuous as brc

jax.config.update("jax_default_matmul_precision", "highest")  # no TF32 on a GPU

OBSERVATION_DIM, ACTION_DIM, BATCH = 5, 3, 16
SIZES = dict(critic_width=8, actor_width=8, embedding_size=4, utd=1)


def compiled_update(agent: brc.Agent):
    """The agent's update with its target distribution as a third result; state.key holds the noise, [2, batch, |A|], of
    the next actions and of the actor's actions, in place of random bits."""

    def update(state, batch, max_return):
        project, split, targets = brc.categorical_projection, jax.random.split, []
        with pytest.MonkeyPatch.context() as patch:  # while JAX traces
            patch.setattr(jax.random, "split", lambda x, n: (x, *x) if x.ndim == 3 else split(x, n))
            patch.setattr(jax.random, "normal", lambda noise, _: noise)
            patch.setattr(brc, "categorical_projection", lambda *x: targets.append(project(*x)) or targets[-1])
            state, metrics = agent.update.__wrapped__(state, batch, max_return)
        return state, metrics, *targets

    return jax.jit(update, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time


def empty_state(agent: brc.Agent, dtype) -> brc.AgentState:
    shapes = jax.eval_shape(lambda: agent.init(0))
    return jax.tree.map(lambda x: np.zeros(x.shape, dtype if x.dtype == np.float32 else x.dtype), shapes)


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def unflat(vector, like):
    leaves, structure = jax.tree.flatten(like)
    pieces = np.split(vector, np.cumsum([leaf.size for leaf in leaves])[:-1])
    return jax.tree.unflatten(structure, [x.reshape(leaf.shape) for x, leaf in zip(pieces, leaves, strict=True)])


# ------------------------------------------------------------------------------------- the authors' released code


@pytest.mark.parametrize("case", ["multi", "single"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-12)])
def test_five_updates_of_the_released_code(case, dtype, tolerance):
    with np.load(Path(__file__).with_name("released_update.npz"), allow_pickle=False) as file:
        data = {name.removeprefix(f"{case}_"): file[name] for name in file.files if name.startswith(case)}
    num_tasks, num_atoms, v_max = len(data["max_return"]), data["target"].shape[-1], 4.0 if case == "multi" else 2.0
    args = brc.Args(**SIZES, num_atoms=num_atoms, v_min=-v_max, v_max=v_max, **brc.RELEASED_CODE)

    with jax.enable_x64(dtype == "float64"):
        agent = brc.make_agent(args, num_tasks, OBSERVATION_DIM, ACTION_DIM)
        state, update = empty_state(agent, dtype), compiled_update(agent)
        for name in ("actor", "critic", "target_critic"):
            leaves = jax.tree_util.tree_leaves_with_path(getattr(state, name))
            names = [f"{jax.tree_util.keystr(path, simple=True, separator='/')} {leaf.shape}" for path, leaf in leaves]
            assert names == data[f"{name.removeprefix('target_')}_names"].tolist()
            start = unflat(data[f"{name}_start"].astype(dtype), getattr(state, name))
            state = state._replace(**{name: start})
        state = state._replace(log_temperature=data["log_temperature_start"].astype(dtype))
        fields = [data[name].astype("int32" if name == "task_ids" else dtype) for name in brc.Batch._fields]
        for k in range(5):
            state = state._replace(key=data["noise"][k].astype(dtype))
            batch = brc.Batch(*(field[k : k + 1] for field in fields))
            state, metrics, target = update(state, batch, data["max_return"])
            if k == 0:
                np.testing.assert_allclose(target, data["target"], rtol=0, atol=tolerance)
                for name in ("critic", "actor"):
                    gradient = flat(getattr(state, f"{name}_optimizer")[0].mu) / (1 - 0.9)
                    expected = data[f"{name}_gradient"]
                    assert np.linalg.norm(gradient - expected) <= tolerance * np.linalg.norm(expected), name
            for name in ("critic", "actor", "temperature"):
                assert metrics[f"losses/{name}"] == pytest.approx(data[f"{name}_loss"][k], rel=tolerance), (name, k)
            assert metrics["policy/entropy"] == pytest.approx(data["entropy"][k], rel=tolerance), k
        for name in ("critic", "target_critic", "actor", "log_temperature"):
            end = flat(getattr(state, name))
            np.testing.assert_allclose(end, data[f"{name}_end"].ravel(), rtol=0, atol=tolerance, err_msg=name)


# ------------------------------------------------------------------------------------- the paper's equations

ACTION_DIMS = np.array([3, 1, 2])  # the tasks' own
NUM_ATOMS, V_MAX, GAMMA, TAU = 101, 10.0, 0.99, 5e-3  # Table 3
ATOMS = np.array([-V_MAX + j * 2 * V_MAX / (NUM_ATOMS - 1) for j in range(NUM_ATOMS)])  # Eq. 1


def dense(layer, x):
    return x @ layer["kernel"] + layer["bias"]


def dense_and_norm(net, index, x):
    x = dense(net[f"Dense_{index}"], x)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * net[f"LayerNorm_{index}"]["scale"] + net[f"LayerNorm_{index}"]["bias"]


def bronet(net, depth, x):
    """Figure 13."""
    x = np.maximum(dense_and_norm(net, 0, x), 0)
    for block in range(depth):
        x = x + dense_and_norm(net, 2 * block + 2, np.maximum(dense_and_norm(net, 2 * block + 1, x), 0))
    return x


def embeddings(critic, task_ids):
    table = critic["embedding"]["params"]["embedding"]
    return (table / abs(table).sum(-1, keepdims=True))[task_ids]


def act(actor, critic, observations, task_ids, noise):
    """Actions and log pi(a|s), the Gaussian density over the slope of tanh; a task's own dimensions count."""
    net = actor["params"]
    x = bronet(net["BroNet_0"], 1, np.concatenate([observations, embeddings(critic, task_ids)], -1))
    mean, raw = dense(net["Heads_0"]["Dense_0"], x), np.tanh(dense(net["Heads_1"]["Dense_0"], x))
    std = np.exp(-10 + (2 - -10) * (raw + 1) / 2)
    x = mean + std * noise
    log_density = np.log(np.exp(-(noise**2) / 2) / (std * math.sqrt(2 * math.pi)) * np.cosh(x) ** 2)
    own = np.arange(ACTION_DIM) < ACTION_DIMS[task_ids][:, None]
    return np.where(own, np.tanh(x), 0), np.where(own, log_density, 0).sum(-1)


def probabilities(critic, observations, actions, task_ids):
    """p_k(s, a) of both critics, [2, batch, atoms]."""
    x, found = np.concatenate([observations, actions, embeddings(critic, task_ids)], -1), []
    for k in range(2):
        net = jax.tree.map(lambda leaf, k=k: leaf[k], critic["ensemble"]["params"])
        exponentials = np.exp(dense(net["Heads_0"]["Dense_0"], bronet(net["BroNet_0"], 2, x)))
        found.append(exponentials / exponentials.sum(-1, keepdims=True))
    return np.array(found)


def gradient_of(old, new, b1: float = 0.9):
    """Of one Adam step, from the first moments before and after."""
    return jax.tree.map(lambda x, y: (y - b1 * x) / (1 - b1), old[0].mu, new[0].mu)


def check_gradient(function, parameters, gradient, rng):
    """By central differences, along one random direction in every leaf."""
    leaves, structure = jax.tree.flatten(parameters)
    for i, slope in enumerate(jax.tree.leaves(gradient)):
        direction = rng.normal(size=slope.shape)
        moved = [[*leaves[:i], leaves[i] + step * direction, *leaves[i + 1 :]] for step in (1e-6, -1e-6)]
        above, below = (function(jax.tree.unflatten(structure, tree)) for tree in moved)
        assert (above - below) / 2e-6 == pytest.approx((slope * direction).sum(), rel=1e-6, abs=1e-7)


def check_adam(before, after, gradient, old, new, weight_decay: float, b1: float = 0.9):
    """A step from moments that three earlier ones left, decay apart from the gradient; Table 3's learning rate."""

    def step(x, g, mu, nu):
        mean, square = b1 * mu + (1 - b1) * g, 0.999 * nu + 0.001 * g**2
        adam = mean / (1 - b1**4) / (np.sqrt(square / (1 - 0.999**4)) + 1e-8)
        return x - 3e-4 * (adam + weight_decay * x)

    expected = jax.tree.map(step, before, gradient, old[0].mu, old[0].nu)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-12), after, expected)
    assert new[0].count == 4


def test_one_update_of_the_papers_equations():
    rng, max_return = np.random.default_rng(0), np.array([0.5, 20.0, 3.0])
    task_ids = np.arange(BATCH) % 3
    batch = brc.Batch(
        rng.normal(size=(BATCH, OBSERVATION_DIM)), rng.uniform(-1, 1, (BATCH, ACTION_DIM)),
        rng.uniform(-1, 1, BATCH) * max_return[task_ids], (rng.random(BATCH) < 0.3).astype(float),
        rng.normal(size=(BATCH, OBSERVATION_DIM)), task_ids,
    )  # fmt: skip
    with jax.enable_x64(True):
        agent = brc.make_agent(brc.Args(**SIZES), 3, OBSERVATION_DIM, ACTION_DIM, ACTION_DIMS.tolist())
        state = jax.tree.map(lambda x: 0.4 * rng.normal(size=x.shape), empty_state(agent, "float64"))
        for name in ("actor_optimizer", "critic_optimizer", "temperature_optimizer"):
            moments, *others = getattr(state, name)
            moments = moments._replace(count=np.int32(3), nu=jax.tree.map(abs, moments.nu))
            state = state._replace(**{name: (moments, *others)})
        old = state._replace(entropy=np.array([0.02, -2.0, 1.5]), key=rng.normal(size=(2, BATCH, ACTION_DIM)))
        new, metrics, target = compiled_update(agent)(old, jax.tree.map(lambda x: x[None], batch), max_return)
        new, metrics, target = jax.tree.map(np.asarray, (new, metrics, target))
    alpha, (next_noise, noise) = math.exp(old.log_temperature), old.key
    exact = dict(rtol=1e-10, atol=1e-12)

    # normalized rewards, Eq. 3 and 4 with the magnitude of an entropy below zero
    rewards = batch.rewards * (V_MAX / (max_return + alpha * abs(old.entropy) / (1 - GAMMA)))[task_ids]
    np.testing.assert_allclose(metrics["rewards/normalized_mean"], rewards.mean(), **exact)
    np.testing.assert_allclose(metrics["rewards/normalized_max_abs"], abs(rewards).max(), **exact)

    # critic target, C.1 and C.2: every atom shares its mass between those less than one spacing away
    next_actions, next_log_probs = act(old.actor, old.critic, batch.next_observations, task_ids, next_noise)
    p = probabilities(old.target_critic, batch.next_observations, next_actions, task_ids).mean(0)
    shifted = ATOMS - alpha * next_log_probs[:, None]
    shifted = np.clip(rewards[:, None] + GAMMA * (1 - batch.terminated)[:, None] * shifted, -V_MAX, V_MAX)
    share = np.maximum(1 - abs(shifted[:, :, None] - ATOMS) / (ATOMS[1] - ATOMS[0]), 0)
    y = (p[:, :, None] * share).sum(1)
    np.testing.assert_allclose(target, y, **exact)

    # critic and target critic
    def critic_loss(critic):
        log_p = np.log(probabilities(critic, batch.observations, batch.actions, task_ids))
        return sum(-(y * log_p[k]).sum(-1).mean() for k in range(2))

    np.testing.assert_allclose(metrics["losses/critic"], critic_loss(old.critic), **exact)
    gradient = gradient_of(old.critic_optimizer, new.critic_optimizer)
    check_gradient(critic_loss, old.critic, gradient, rng)
    check_adam(old.critic, new.critic, gradient, old.critic_optimizer, new.critic_optimizer, 1e-4)
    moved = jax.tree.map(lambda x, y: (1 - TAU) * x + TAU * y, old.target_critic, new.critic)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **exact), new.target_critic, moved)

    # actor, on the updated critic
    def actor_loss(actor):
        actions, log_probs = act(actor, new.critic, batch.observations, task_ids, noise)
        q = (probabilities(new.critic, batch.observations, actions, task_ids) * ATOMS).sum(-1).mean(0)
        return (alpha * log_probs - q).mean()

    np.testing.assert_allclose(metrics["losses/actor"], actor_loss(old.actor), **exact)
    gradient = gradient_of(old.actor_optimizer, new.actor_optimizer)
    check_gradient(actor_loss, old.actor, gradient, rng)
    check_adam(old.actor, new.actor, gradient, old.actor_optimizer, new.actor_optimizer, 1e-4)

    # entropies H_i of Eq. 4, and temperature, with each task's own |A| in its target
    _, log_probs = act(old.actor, new.critic, batch.observations, task_ids, noise)
    means = np.array([-log_probs[task_ids == task].mean() for task in range(3)])
    np.testing.assert_allclose(new.entropy, old.entropy + brc.ENTROPY_RATE * (means - old.entropy), **exact)
    loss = alpha * (-log_probs - -ACTION_DIMS[task_ids] / 2).mean()  # also its slope by log alpha
    np.testing.assert_allclose(metrics["losses/temperature"], loss, **exact)
    check_adam(old.log_temperature, new.log_temperature, loss, old.temperature_optimizer, new.temperature_optimizer,
               0.0, b1=0.5)  # fmt: skip
