# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax==0.10.2", "flax==0.12.8", "optax==0.2.8", "orbax-checkpoint==0.12.8", "numpy==2.4.6", "scipy==1.17.1",
#   "tyro==1.0.17", "gymnasium==1.4.0", "envpool==1.2.5", "metaworld==3.0.0",
#   "mujoco==3.2.0; python_version < '3.13'", "mujoco==3.8.1; python_version >= '3.13'",
#   "dm_control==1.0.21.post1; python_version < '3.13'",
#   "minari[hdf5,hf]==0.5.4", "tensorboardX==2.6.5", "wandb==0.31.0", "tqdm==4.70.1",
#   "imageio[ffmpeg]==2.38.1",
# ]
# ///
"""Offline BRC+BC: one agent from a fixed data set of one or many tasks, in one file.

"Bigger, Regularized, Categorical: High-Capacity Value Functions are Efficient Multi-Task Learners"
(Nauman et al., 2025, arXiv:2505.23150), Section 5 and Figure 12: the critic of SAC+BRC trained on data that others
collected, with a behavioral-cloning term in the actor's loss. Appendix C, said to detail this term, does not; it is
derived here from TD3+BC (Fujimoto and Gu, 2021) and DDPG+BC (Park et al., 2024): the value is divided by its mean
magnitude, so that one coefficient fits all scales, and the actions of the data are cloned by squared error or by
likelihood. (FQL, Park et al., 2025, the third that the paper cites, distills a flow policy instead.) In the paper's
notation, with data (s, a, r, s'):

  actor loss       mean[alpha log pi(a~|s) - Q(s, a~)] / sg(mean |Q(s, a~)|) + c BC,   a~ ~ pi(s),  c = --bc-coef
  BC (mse)         mean[|tanh mu(s) - a|^2 / |A|]                           the default, as in TD3+BC
  BC (nll)         -mean[log pi(a|s) / |A|]                                 as in DDPG+BC;
                   in it |a| <= .999 and the standard deviation >= e^-2, so that no single action decides;
                   likelihood sets the policy's spread, so alpha = 0 in every loss: no entropy bonus
  critic loss, temperature, task embeddings, target critic                  as in SAC+BRC (Section 3, B, C.1-C.4)
  normalization    r <- r V_max / (Gbar_i + lambda_i), Gbar_i the largest |return| in the data of task i    (Eq. 2-4)
                   after a truncation a return goes on with mean reward / (1 - gamma), as in the released code
  evaluation       by a moving average of the actor's parameters (ours; --actor-average-rate 1: by the actor)

sg: no gradient. |A|: the task's own number of action dimensions, so that c means the same for every body. --bc-only
leaves the first term out (behavioral cloning); --bc-coef 0 leaves the second out (offline SAC+BRC). Data may be larger
than memory: .npy files are memory-mapped, Minari's are made such first; nothing in them is executed. What --save-replay
writes is replay-quality data; for expert-like data take the end of a run that learned (--last-transitions 20000), for
medium ones a run stopped half way. TD-MPC2's mt30 and mt80 are read after benchmark/convert_tdmpc2.py.

  python brc_sac_continuous.py --env-ids dmc/walker-walk --save-replay --run-name walker     # collect data
  python brc_offline_bc.py --dataset runs/walker/replay --total-updates 100000               # learn from it alone
  python brc_offline_bc.py --dataset D4RL/pen/human-v2 --env-ids gym/gymnasium_robotics:AdroitHandPen-v1    # Minari's
  python brc_offline_bc.py --resume runs/RUN                                                 # continue a stopped run
  python brc_offline_bc.py --play runs/RUN --capture-video                                   # watch what it learned
"""

import atexit
import contextlib
import csv
import ctypes
import errno
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.metadata import version
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

import flax.linen as nn
import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from scipy.signal import lfilter
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ======================================================================================================================
# Part 1 of 3, the algorithm. Whoever stops reading at its end has read all of it: arguments, networks, projection,
# agent, data, main. Part 2: tasks and environments. Part 3: the run.
# ======================================================================================================================

SCRIPT = "brc_offline_bc"
PACKAGES = ("jax", "flax", "optax", "envpool", "mujoco", "dm_control", "metaworld", "gymnasium")
AGGREGATES = {"mean": np.mean}  # over tasks, for what an evaluation reports

PositiveInt = Annotated[int, "[1, inf)"]  # intervals are checked in part 3
NonNegativeInt = Annotated[int, "[0, inf)"]
NonNegativeFloat = Annotated[float, "[0, inf)"]


@dataclass
class Args:
    """Offline BRC+BC (Nauman et al., 2025, Section 5). Defaults are Table 3's where it has one."""

    dataset: tuple[str, ...] = ()
    """replay/ folder of a run made with --save-replay, a folder made by benchmark/convert_tdmpc2.py, or Minari data set
    ids or local paths, one per task"""
    env_ids: tuple[str, ...] = ()
    """tasks to learn, as family/task (default: all of the folder); with Minari, the tasks of its data sets, in order"""
    seed: Annotated[int, "[0, 2147483648)"] = 1
    """seed of networks, batches and evaluation"""
    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the run's name (default: the file's, so that a renamed copy is its own)"""
    run_name: str | None = None
    """name of the run directory (default: {first task}__{exp_name}__{seed}__{unix time})"""
    run_root: str = "runs"
    """directory that holds the run directories"""
    resume: str | None = None
    """run directory to continue from its newest good checkpoint, with the saved arguments; those of length, evaluation,
    checkpoints, logging, videos and environments may be given anew, and --dataset where the same data were moved"""
    play: str | None = None
    """run directory whose newest good checkpoint is evaluated, with --capture-video filmed; nothing else is written"""
    env_backend: Literal["auto", "envpool", "gymnasium"] = "auto"
    """what evaluation steps: envpool is fastest; gymnasium is the reference and runs every family"""
    env_workers: Annotated[int | None, "[1, inf)"] = None
    """processes for the environments that envpool does not step (default: one per core, at most one per task)"""
    env_timeout: Annotated[float, "(0, inf)"] = 600.0
    """seconds after which such a process counts as hung: it is started again, and its episodes are dropped"""
    total_updates: NonNegativeInt = 1_000_000
    """length of the training (ours: the paper gives none); 0 builds everything and exits"""
    clip_actions: bool = False
    """clip recorded actions to [-1, 1], as the environment would; without it, data with others are refused"""
    last_transitions: Annotated[int | None, "[1, inf)"] = None
    """learn from this many newest transitions of each task only: the expert end of a run that learned"""
    eval_every: PositiveInt = 25_000
    """updates between evaluations"""
    eval_episodes: PositiveInt = 10
    """evaluation episodes per task, actions at the policy's mean"""
    checkpoint_every: PositiveInt = 100_000
    """updates between checkpoints; one more is written at the end and when stopped"""
    keep_checkpoints: PositiveInt = 2
    """newest checkpoints to keep"""
    capture_video: bool = False
    """write an mp4 of one evaluation episode per task to RUN_DIR/videos/ (headless: MUJOCO_GL=egl)"""
    track: bool = False
    """log to Weights & Biases too (WANDB_MODE=offline is respected)"""
    wandb_project: str = "brc"
    """Weights & Biases project"""

    bc_coef: NonNegativeFloat = 0.03
    """c, the weight of behavioral cloning; 0 is offline SAC+BRC (default: the best of small sweeps, not by much; see
    benchmark/results/README.md)"""
    bc_loss: Literal["nll", "mse"] = "mse"
    """clone by the data action's negative log-likelihood (alpha is 0 then, if c > 0), or by the mean action's squared
    error"""
    bc_only: bool = False
    """behavioral cloning alone: no Q in the actor's loss, and alpha is 0"""

    discount: Annotated[float, "[0, 1)"] = 0.99
    """gamma (Table 3)"""
    batch_size: PositiveInt = 1024
    """transitions per update; every task is equally likely (Table 3, for one task, too: see Appendix D)"""
    polyak_tau: Annotated[float, "[0, 1]"] = 5e-3
    """rate of the target critic's moving average, after every update (Table 3)"""
    actor_average_rate: Annotated[float, "(0, 1]"] = 2e-3
    """rate of the moving average of the actor's parameters, with which evaluation and films act; 1 is the actor itself,
    as in the paper (default: better, see benchmark/results/README.md)"""
    actor_lr: NonNegativeFloat = 3e-4
    """AdamW learning rate of the actor (Table 3)"""
    critic_lr: NonNegativeFloat = 3e-4
    """AdamW learning rate of the critic and the task embeddings (Table 3)"""
    temperature_lr: NonNegativeFloat = 3e-4
    """learning rate of the temperature (Table 3), by Adam with b1 = 0.5 as in the released code"""
    weight_decay: NonNegativeFloat = 1e-4
    """AdamW weight decay, of all parameters (Table 3)"""
    initial_temperature: Annotated[float, "[1e-12, inf)"] = 0.1
    """alpha at the start (Table 3); it takes 15,000 updates to fall to 0.001, where a much shorter run should start"""
    target_entropy: Annotated[float | None, "(-inf, inf)"] = None
    """the policy entropy that the temperature aims at (default: -|A|/2 with the task's own |A|, as in the released code
    and BRO; Table 3 prints |A|/2)"""
    num_atoms: Annotated[int, "[2, inf)"] = 101
    """atoms of the categorical critic (Table 3)"""
    v_min: Annotated[float, "(-inf, 0]"] = -10.0
    """lowest atom (Table 3)"""
    v_max: Annotated[float, "(0, inf)"] = 10.0
    """highest atom (Table 3), to which Eq. 3 scales the largest return"""
    critic_width: PositiveInt = 4096
    """hidden units of the BroNet critic (Table 3; the sizes of Table 1 are 256 ... 8192)"""
    critic_depth: NonNegativeInt = 2
    """residual blocks of the BroNet critic (Table 3)"""
    num_critics: PositiveInt = 2
    """critics in the ensemble; targets average them, no clipped double Q (C.1)"""
    actor_width: PositiveInt = 256
    """hidden units of the BroNet actor (Table 3)"""
    actor_depth: NonNegativeInt = 1
    """residual blocks of the BroNet actor (Table 3)"""
    embedding_size: PositiveInt = 32
    """task embedding size (Table 3)"""
    variant: Literal["paper", "released-code"] = "paper"
    """where the paper and the authors' released code differ: released-code stands for --embedding-norm l2, unless that
    is given"""
    embedding_norm: Literal["l1", "l2"] = "l1"
    """the norm that is 1 for every embedding: l1 in the paper (C.4), l2 in the released code"""


RELEASED_CODE = {"variant": "released-code", "embedding_norm": "l2"}  # defaults under --variant released-code
RESUMABLE = {  # arguments that a resumed run may change
    "total_updates", "eval_every", "eval_episodes", "checkpoint_every", "keep_checkpoints", "capture_video", "track",
    "wandb_project", "env_backend", "env_workers", "env_timeout", "resume", "dataset",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ networks

orthogonal = nn.initializers.orthogonal(math.sqrt(2))


# Copied from brc_sac_continuous.py
class BroNet(nn.Module):
    """BroNet (Nauman et al., 2024; C.3, Figure 13): dense, layer norm, ReLU, then residual blocks of two normalized
    dense layers, whose products are in `dtype` (None: that of their inputs)."""

    width: int
    depth: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = partial(nn.Dense, self.width, kernel_init=orthogonal)
        x = nn.relu(nn.LayerNorm()(dense()(x)))
        for _ in range(self.depth):
            y = nn.relu(nn.LayerNorm()(dense(dtype=self.dtype)(x)))
            x = x + nn.LayerNorm()(dense(dtype=self.dtype)(y))
        return x


# Copied from brc_sac_continuous.py
class Heads(nn.Module):
    """A linear output; with num_heads > 1, one per task, of which each row takes its own (multi-head SAC: Yu et al.,
    2020, Meta-World)."""

    features: int
    num_heads: int
    gain: float = math.sqrt(2)

    @nn.compact
    def __call__(self, x: jax.Array, task_ids: jax.Array) -> jax.Array:
        def head_by_head(key, shape, dtype):  # one orthogonal matrix over all heads, wider than tall, shrinks outputs
            keys, init = jax.random.split(key, self.num_heads), nn.initializers.orthogonal(self.gain)
            return jnp.concatenate([init(k, (shape[0], self.features), dtype) for k in keys], axis=1)

        x = nn.Dense(self.num_heads * self.features, kernel_init=head_by_head)(x)
        if self.num_heads == 1:
            return x
        x = x.reshape(*x.shape[:-1], self.num_heads, self.features)
        return jnp.take_along_axis(x, task_ids[:, None, None], axis=-2).squeeze(-2)


# Copied from brc_sac_continuous.py
class Critic(nn.Module):
    """One Q-network: [batch, |S| + |A| (+ embedding)] to [batch, num_atoms] logits, or [batch, 1] values with MSE."""

    backbone: type[nn.Module]
    width: int
    depth: int
    features: int
    num_heads: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, task_ids: jax.Array) -> jax.Array:
        x = self.backbone(self.width, self.depth, self.dtype)(x)
        return Heads(self.features, self.num_heads)(x, task_ids)


# Copied from brc_sac_continuous.py
class Actor(nn.Module):
    """Tanh-Gaussian policy: mean and log standard deviation in [-10, 2] before the tanh, each [batch, |A|]."""

    width: int
    depth: int
    action_dim: int
    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array, task_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = BroNet(self.width, self.depth)(x)
        mean = Heads(self.action_dim, self.num_heads)(x, task_ids)
        log_std = Heads(self.action_dim, self.num_heads, gain=1.0)(x, task_ids)  # as in BRO and the released code
        return mean, -10.0 + 6.0 * (1.0 + jnp.tanh(log_std))  # the range is BRO's and the released code's


# Copied from brc_sac_continuous.py
def sample_action(key: jax.Array, mean: jax.Array, log_std: jax.Array, mask=1.0) -> tuple[jax.Array, jax.Array]:
    """Reparameterized tanh-Gaussian sample [batch, |A|] and its log-density [batch].

    mask [batch, |A|] is 0 in the dimensions that a task does not have: no action there, and no entropy.
    """
    noise = jax.random.normal(key, mean.shape)
    x = mean + jnp.exp(log_std) * noise
    log_density = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    log_det_tanh = 2 * (math.log(2) - x - nn.softplus(-2 * x))  # log(1 - tanh(x)^2), stable for large |x|
    return jnp.tanh(x) * mask, ((log_density - log_det_tanh) * mask).sum(-1)


MIN_LOG_STD = -2.0  # of the likelihood that behavioral cloning maximizes


def action_log_density(mean: jax.Array, log_std: jax.Array, mask: jax.Array, actions: jax.Array) -> jax.Array:
    """Log-density [batch] of given actions [batch, |A|] under the tanh-Gaussian; see sample_action.

    Actions at the bounds, which the data of a saturated policy hold, have no finite inverse of tanh: they count as
    +-0.999. The standard deviation counts as at least exp(MIN_LOG_STD): that of a fresh actor is anywhere between e^-10
    and e^2, and dividing by its square would let a few rows drown all others.
    """
    log_std = jnp.maximum(log_std, MIN_LOG_STD)
    x = jnp.arctanh(jnp.clip(actions, -0.999, 0.999))
    log_density = -0.5 * ((x - mean) / jnp.exp(log_std)) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
    log_det_tanh = 2 * (math.log(2) - x - nn.softplus(-2 * x))
    return ((log_density - log_det_tanh) * mask).sum(-1)


# ---------------------------------------------------------------------------------------------- categorical projection


# Copied from brc_sac_continuous.py
def categorical_projection(probs: jax.Array, target_atoms: jax.Array, v_min: float, v_max: float) -> jax.Array:
    """Projects a distribution onto the fixed support (C.2; Bellemare et al., 2017, Algorithm 1).

    Args: probs [batch, N], mass at target_atoms [batch, N]; atoms outside [v_min, v_max] go to the nearest end.
    Returns [batch, N]: mass on N evenly spaced atoms, each atom's mass shared by its two neighbours. Two scatter-adds;
    a [batch, N, N] tensor is never built.
    """
    num_atoms = probs.shape[-1]
    position = (jnp.clip(target_atoms, v_min, v_max) - v_min) * ((num_atoms - 1) / (v_max - v_min))
    lower = jnp.clip(jnp.floor(position), 0, num_atoms - 2)
    upper_share = position - lower
    rows, lower = jnp.arange(len(probs))[:, None], lower.astype(jnp.int32)
    projected = jnp.zeros_like(probs).at[rows, lower].add(probs * (1 - upper_share))
    return projected.at[rows, lower + 1].add(probs * upper_share)


# ---------------------------------------------------------------------------------------------- agent state and update

# Copied from brc_sac_continuous.py
ENTROPY_RATE = 0.05  # ours: H_i of Eq. 4 starts at 0 and moves by this share to each batch's mean over task i
# Copied from brc_sac_continuous.py
MIN_SCALE = 1e-8  # of Eq. 3's divisor; reached only by a task whose rewards were all zero


class AgentState(NamedTuple):
    """Everything that an update changes, on the device."""

    actor: Any  # parameters; *_optimizer: the optimizer's state
    actor_optimizer: Any
    average_actor: Any  # moving average of the actor's parameters, which evaluation uses
    critic: Any  # parameters {"embedding": nn.Embed's, or absent, "ensemble": Critic's, leaves [num_critics, ...]}
    critic_optimizer: Any
    target_critic: Any  # as critic, its own averaged embedding included
    log_temperature: jax.Array  # one alpha for all tasks
    temperature_optimizer: Any
    entropy: jax.Array  # [num_tasks], H_i of Eq. 4
    key: jax.Array


class Agent(NamedTuple):
    """The functions of one agent, see make_agent; the last two are compiled."""

    init: Callable
    act_deterministic: Callable
    update: Callable


def make_agent(args: Args, num_tasks: int, observation_dim: int, action_dim: int, action_dims=None) -> Agent:
    """The agent as pure functions of AgentState. One task takes the same path, without embedding.

    action_dims: the tasks' own action sizes (default: action_dim for all); entropy and cloning count these only.
    """
    use_embedding = num_tasks > 1
    own_dims = jnp.array(action_dims or [action_dim] * num_tasks)
    action_mask = (jnp.arange(action_dim) < own_dims[:, None]).astype(jnp.float32)  # [num_tasks, |A|]
    target_entropy = -own_dims / 2 if args.target_entropy is None else jnp.full(num_tasks, args.target_entropy)
    atoms = jnp.linspace(args.v_min, args.v_max, args.num_atoms)  # Eq. 1
    actor_network = Actor(args.actor_width, args.actor_depth, action_dim, 1)
    critic_network = Critic(BroNet, args.critic_width, args.critic_depth, args.num_atoms, 1)
    embedding_network = nn.Embed(num_tasks, args.embedding_size)
    actor_optimizer = optax.adamw(args.actor_lr, weight_decay=args.weight_decay)
    critic_optimizer = optax.adamw(args.critic_lr, weight_decay=args.weight_decay)
    temperature_optimizer = optax.adam(args.temperature_lr, b1=0.5)

    def init(seed: int) -> AgentState:
        key, actor_key, embedding_key, *critic_keys = jax.random.split(jax.random.PRNGKey(seed), 3 + args.num_critics)
        task_ids = jnp.zeros(1, jnp.int32)
        conditioned_dim = observation_dim + args.embedding_size * use_embedding
        actor = jax.jit(actor_network.init)(actor_key, jnp.zeros((1, conditioned_dim)), task_ids)
        # One critic at a time: vmapped orthogonal initializers inside one jit deadlock on jaxlib 0.10.2 with 2 cores.
        critic_init = jax.jit(critic_network.init)
        members = [critic_init(k, jnp.zeros((1, conditioned_dim + action_dim)), task_ids) for k in critic_keys]
        critic = {"ensemble": jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)}
        if use_embedding:
            critic["embedding"] = embedding_network.init(embedding_key, task_ids)
        # Neither lets the temperature steer the policy's spread: likelihood sets it, and cloning alone has no entropy
        # term. It would rise without end and carry the targets out of the support: no entropy then.
        clones_spread = args.bc_only or (args.bc_loss == "nll" and args.bc_coef > 0)
        log_temperature = jnp.log(jnp.float32(0 if clones_spread else args.initial_temperature))
        return AgentState(
            actor, actor_optimizer.init(actor), jax.tree.map(jnp.copy, actor), critic, critic_optimizer.init(critic),
            jax.tree.map(jnp.copy, critic), log_temperature, temperature_optimizer.init(log_temperature),
            jnp.zeros(num_tasks), key,
        )  # fmt: skip

    # Copied from brc_sac_continuous.py
    def embed(critic, task_ids):
        """Unit-norm task embeddings (C.4), [..., embedding_size]."""
        embedding = embedding_network.apply(critic["embedding"], task_ids)
        order = 1 if args.embedding_norm == "l1" else 2
        return embedding / jnp.linalg.norm(embedding, ord=order, axis=-1, keepdims=True)

    # Copied from brc_sac_continuous.py
    def policy(actor, critic, observations, task_ids):
        """Mean, log standard deviation and action mask, each [batch, |A|]. The embedding is the critic's, without
        gradient: only the critic's loss trains it (Section 3, C.4)."""
        if use_embedding:
            observations = jnp.concatenate([observations, jax.lax.stop_gradient(embed(critic, task_ids))], axis=-1)
        return *actor_network.apply(actor, observations, task_ids), action_mask[task_ids]

    def critic_outputs(critic, observations, actions, task_ids):
        """Logits of every critic, [num_critics, batch, num_atoms]."""
        inputs = [observations, actions] + ([embed(critic, task_ids)] if use_embedding else [])
        apply = jax.vmap(critic_network.apply, in_axes=(0, None, None))
        return apply(critic["ensemble"], jnp.concatenate(inputs, axis=-1), task_ids)

    def reward_scale(state, max_return):
        """V_max / (Gbar_i + lambda_i) for each task (Eq. 3, 4); |H_i| for H_i, which turns negative."""
        entropy_bound = jnp.exp(state.log_temperature) * jnp.abs(state.entropy) / (1 - args.discount)
        return args.v_max / jnp.maximum(max_return + entropy_bound, MIN_SCALE)

    def td_target(state, batch, max_return, key):
        """Target distribution [batch, num_atoms] (C.2) and normalized rewards [batch]."""
        next_observations, task_ids = batch.next_observations, batch.task_ids
        rewards = batch.rewards * reward_scale(state, max_return)[task_ids]
        discounts = args.discount * (1 - batch.terminated)
        next_policy = policy(state.actor, state.critic, next_observations, task_ids)
        next_actions, next_log_probs = sample_action(key, *next_policy)
        outputs = critic_outputs(state.target_critic, next_observations, next_actions, task_ids)
        entropy_bonus = -jnp.exp(state.log_temperature) * next_log_probs
        target_atoms = rewards[:, None] + discounts[:, None] * (atoms + entropy_bonus[:, None])
        return categorical_projection(nn.softmax(outputs).mean(0), target_atoms, args.v_min, args.v_max), rewards

    def critic_loss(critic, batch, target):
        """Cross-entropy with the target distribution; mean over the batch, sum over critics."""
        outputs = critic_outputs(critic, batch.observations, batch.actions, batch.task_ids)
        return -(target * nn.log_softmax(outputs)).sum(-1).mean(-1).sum()

    def actor_loss(actor, state, batch, key):
        """Policy improvement over its mean |Q|, and cloning; see the top of the file."""
        mean, log_std, mask = policy(actor, state.critic, batch.observations, batch.task_ids)
        actions, log_probs = sample_action(key, mean, log_std, mask)
        outputs = critic_outputs(state.critic, batch.observations, actions, batch.task_ids)
        q = (nn.softmax(outputs) * atoms).sum(-1).mean(0)
        q_scale = jax.lax.stop_gradient(jnp.abs(q).mean())
        improvement = (jnp.exp(state.log_temperature) * log_probs - q).mean() / jnp.maximum(q_scale, 1e-6)
        if args.bc_loss == "nll":
            cloning = -action_log_density(mean, log_std, mask, batch.actions)
        else:
            cloning = (((jnp.tanh(mean) - batch.actions) * mask) ** 2).sum(-1)
        cloning = (cloning / own_dims[batch.task_ids]).mean()
        loss = cloning if args.bc_only else improvement + args.bc_coef * cloning
        return loss, (log_probs, {"losses/improvement": improvement, "losses/cloning": cloning, "q/policy": q.mean()})

    def update(state: AgentState, batch: Batch, max_return: jax.Array):
        """Critic, target critic, actor, temperature, in this order. batch: [batch_size, ...]; max_return: Gbar_i."""
        key, critic_key, actor_key = jax.random.split(state.key, 3)
        target, rewards = td_target(state, batch, max_return, critic_key)
        critic_loss_value, critic_gradient = jax.value_and_grad(critic_loss)(state.critic, batch, target)
        changes, opt_state = critic_optimizer.update(critic_gradient, state.critic_optimizer, state.critic)
        critic = optax.apply_updates(state.critic, changes)
        target_critic = optax.incremental_update(critic, state.target_critic, args.polyak_tau)
        state = state._replace(key=key, critic=critic, critic_optimizer=opt_state, target_critic=target_critic)

        actor_value_and_grad = jax.value_and_grad(actor_loss, has_aux=True)
        (actor_loss_value, aux), actor_gradient = actor_value_and_grad(state.actor, state, batch, actor_key)
        log_probs, parts = aux
        changes, opt_state = actor_optimizer.update(actor_gradient, state.actor_optimizer, state.actor)
        actor = optax.apply_updates(state.actor, changes)
        # At first the plain mean of the actors so far, until there are 1 / rate; the initial one has no part.
        rate = jnp.maximum(args.actor_average_rate, 1 / optax.tree.get(opt_state, "count"))
        average_actor = optax.incremental_update(actor, state.average_actor, rate)
        state = state._replace(actor=actor, actor_optimizer=opt_state, average_actor=average_actor)

        counts = jnp.zeros(num_tasks).at[batch.task_ids].add(1.0)
        task_entropy = jnp.zeros(num_tasks).at[batch.task_ids].add(-log_probs) / jnp.maximum(counts, 1)
        moved = state.entropy + ENTROPY_RATE * (task_entropy - state.entropy)
        state = state._replace(entropy=jnp.where(counts > 0, moved, state.entropy))

        entropy = -log_probs.mean()
        temperature_loss = jnp.exp(state.log_temperature) * (entropy - target_entropy[batch.task_ids].mean())
        gradient = temperature_loss  # by log alpha: d alpha / d log alpha = alpha, so the loss is its own gradient
        changes, opt_state = temperature_optimizer.update(gradient, state.temperature_optimizer)
        log_temperature = state.log_temperature + changes
        state = state._replace(log_temperature=log_temperature, temperature_optimizer=opt_state)
        q = (target * atoms).sum(-1)
        metrics = {
            "losses/critic": critic_loss_value, "losses/actor": actor_loss_value,
            "losses/temperature": temperature_loss, "gradient_norms/critic": optax.tree.norm(critic_gradient),
            "gradient_norms/actor": optax.tree.norm(actor_gradient), "policy/entropy": entropy,
            "policy/temperature": jnp.exp(state.log_temperature), "q/target_mean": q.mean(), "q/target_min": q.min(),
            "q/target_max": q.max(), "rewards/normalized_mean": rewards.mean(),
            "rewards/normalized_max_abs": jnp.abs(rewards).max(), **parts,
        }  # fmt: skip
        return state, metrics

    # Copied from brc_sac_continuous.py
    def act_deterministic(actor, critic, observations, task_ids):
        mean, _, mask = policy(actor, critic, observations, task_ids)
        return jnp.tanh(mean) * mask

    return Agent(init, jax.jit(act_deterministic), jax.jit(update, donate_argnums=0))


# ---------------------------------------------------------------------------------------------------------------- data


# Copied from brc_sac_continuous.py
class Batch(NamedTuple):
    """Transitions; leading axes [batch_size], online after [utd]."""

    observations: np.ndarray  # [..., |S|]
    actions: np.ndarray  # [..., |A|]
    rewards: np.ndarray  # [...], as the environment gave them: Eq. 3 is applied when they are used
    terminated: np.ndarray  # [...], True if the episode terminated here; truncation does not cut the bootstrap
    next_observations: np.ndarray  # [..., |S|]
    task_ids: np.ndarray  # [...]


# Copied from brc_sac_continuous.py
def record_type(observation_dim: int, action_dim: int) -> np.dtype:
    """One slot of replay, and one record of what is written to disk: an observation and what was done there; its next
    observation is the next slot's.

    Environments reset on the step after an episode's end and ignore that step's action (next-step autoreset, as in
    envpool and Gymnasium). Here an episode of two steps ends and the next one begins:

      slot           0      1      2           3      4
      observation    s_0    s_1    s_2, last   s'_0   s'_1
      action         a_0    a_1    ignored     a'_0   a'_1
      reward         r_0    r_1    0           r'_0   r'_1
      valid          yes    yes    no          yes    yes

    The transition of slot 1 ends in s_2, where the bootstrap of a truncated episode is taken. Slot 2 is the step that
    reset: it is not valid, no transition, never learned from.
    """
    return np.dtype([
        ("observation", "f4", (observation_dim,)), ("action", "f4", (action_dim,)), ("reward", "f4"),
        ("terminated", "?"), ("valid", "?"),
    ])  # fmt: skip


class Dataset:
    """Transitions of several tasks, memory-mapped: one .npy per task, an array of records (see record_type).

    Record t holds an observation and what was done there; its next observation is record t + 1's. The record of an
    episode's final observation is not valid: it is no transition.
    """

    def __init__(
        self, tasks: list[str], paths: list[Path], envs: "ParallelEnvs", last: int | None, discount: float,
        clip_actions: bool = False, all_whole: bool = False,
    ):  # fmt: skip
        """last: how many of each task's newest transitions to take, None for all. all_whole: no episode was cut by a
        run's end. Raises UserError for data that do not fit or cannot be learned from."""
        self.observation_dim, self.action_dim = envs.observation_dim, envs.action_dim
        self.records, self.starts, returns = [], [], []  # starts: of transitions
        for task, path, *sizes in zip(tasks, paths, envs.observation_dims, envs.action_dims, strict=True):
            records = self.mapped(task, path, record_type(*sizes))
            starts = np.flatnonzero(records["valid"][:-1])[-(last or 0) :]  # -0: all
            if not len(starts):
                raise UserError(f"{path}: no transition of {task} in it")
            newest = records[starts[0] :]
            self.check_content(path, newest, clip_actions)
            is_cut = bool(starts[0] > 0 and records["valid"][starts[0] - 1])
            returns.append(returns_of(newest, discount, is_cut, all_whole))
            self.records.append(records)
            self.starts.append(starts)
        largest, self.mean_return = zip(*returns, strict=True)
        self.max_return = np.array(largest, np.float32)  # Gbar_i

    def mapped(self, task: str, path: Path, dtype: np.dtype) -> np.ndarray:
        """Maps a file. Raises UserError if it is damaged or not what the task's sizes ask for."""
        try:
            records = np.lib.format.open_memmap(path, mode="r")  # refuses pickled objects
        except Exception as error:  # a damaged header is parsed as Python, with errors of many kinds
            reason = " ".join(str(error).split())
            raise UserError(f"{path} is damaged or not a NumPy file: {type(error).__name__}: {reason}") from error
        if records.ndim != 1 or records.dtype.names != dtype.names:
            raise UserError(f"{path} is not a data set of this project: it holds {records.dtype} {records.shape}")
        if records.dtype != dtype:
            raise UserError(f"{path} does not fit {task}: it has {records.dtype.descr}, the task {dtype.descr}")
        return records

    def check_content(self, path: Path, records: np.ndarray, clip_actions: bool, rows: int = 100_000) -> None:
        """Raises UserError for values that are not finite and, unless they are to be clipped, for actions outside
        [-1, 1]; reads `rows` at a time."""
        for first in range(0, len(records), rows):
            part = records[first : first + rows]
            for name in ("observation", "action", "reward"):
                values = part[name] if name == "observation" else part[name][part["valid"]]
                if not np.isfinite(values).all():
                    raise UserError(f"{path}: {name} holds values that are not finite")
                if name == "action" and not clip_actions and np.abs(values).max(initial=0) > 1 + 1e-5:
                    largest = np.abs(values).max()
                    raise UserError(f"{path}: actions reach {largest:.3g}, not in [-1, 1]; clip them: --clip-actions")

    def sample(self, rng: np.random.Generator, batch_size: int) -> Batch:
        """A batch [batch_size, ...]: every task is equally likely, and so is every transition of a task."""
        task_ids = np.sort(rng.integers(len(self.records), size=batch_size, dtype=np.int32))
        observations, next_observations = np.zeros((2, batch_size, self.observation_dim), np.float32)
        actions = np.zeros((batch_size, self.action_dim), np.float32)
        rewards, terminated = np.zeros(batch_size, np.float32), np.zeros(batch_size, bool)
        for task in np.unique(task_ids):
            rows, records = task_ids == task, self.records[task]
            starts = rng.choice(self.starts[task], rows.sum())
            now = records[starts]
            size = now["observation"].shape[1]
            observations[rows, :size] = now["observation"]
            next_observations[rows, :size] = records["observation"][starts + 1]
            actions[rows, : now["action"].shape[1]] = np.clip(now["action"], -1, 1)
            rewards[rows], terminated[rows] = now["reward"], now["terminated"]
        return Batch(observations, actions, rewards, terminated, next_observations, task_ids)


def returns_of(records: np.ndarray, discount: float, is_cut: bool, all_whole: bool = False) -> tuple[float, float]:
    """Largest absolute discounted return (Eq. 2) and mean undiscounted return of the episodes in `records`.

    After the end of an episode comes nothing if it terminated, else its mean reward for ever, as in the released code:
    no critic is there yet to be asked (C.2). A piece that a stopped run leaves, shorter than the longest episode and
    than the horizon 1 / (1 - discount), says too little about what would have come: nothing is added. The mean is over
    whole episodes: terminated or as long as the longest, without the first where `is_cut` says that its beginning is
    missing, and without a last one longer than all others, which may have been going on; over all pieces if none is
    whole. all_whole: every episode ended by itself, as those of Minari, whatever its length.
    """
    valid, rewards = np.array(records["valid"]), records["reward"].astype(np.float64)
    terminated = np.array(records["terminated"])
    last = valid & (terminated | ~np.append(valid[1:], False))
    starts, ends = np.flatnonzero(valid & ~np.append(False, (valid & ~last)[:-1])), np.flatnonzero(last) + 1
    lengths = ends - starts
    longest = lengths.max()
    largest, whole, pieces = 0.0, [], []
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        episode, truncated = rewards[start:end], not terminated[end - 1]
        returns = lfilter([1.0], [1.0, -discount], episode[::-1])[::-1]
        if truncated and (all_whole or len(episode) >= min(longest, 1 / (1 - discount))):
            returns = returns + discount ** np.arange(len(episode), 0, -1) * episode.mean() / (1 - discount)
        largest = max(largest, float(np.abs(returns).max()), float(np.abs(episode).max()))
        pieces.append(episode.sum())
        begun_before = is_cut and number == 0
        going_on = number == len(lengths) - 1 and len(episode) > lengths[int(is_cut) : -1].max(initial=0) > 0
        complete = all_whole or not truncated or (len(episode) == longest and not going_on)
        if complete and not begun_before:
            whole.append(episode.sum())
    return largest, float(np.mean(whole or pieces))


def is_folder(dataset: tuple[str, ...]) -> bool:
    """Whether --dataset is a folder of .npy files; else its entries are Minari's."""
    return len(dataset) == 1 and Path(dataset[0]).is_dir() and any(Path(dataset[0]).glob("*.npy"))


def dataset_tasks(args: Args) -> list[str]:
    """Names of the tasks to learn. Raises UserError if the data set does not say, or lacks one."""
    if not args.dataset:
        raise UserError("no data: give --dataset, such as --dataset runs/RUN/replay of a run made with --save-replay")
    if not is_folder(args.dataset):
        if any(is_folder((entry,)) for entry in args.dataset):
            raise UserError(
                "--dataset takes one folder: put the tasks' .npy files into one, a link each is enough, and beside "
                "them the action_repeat and pieces_per_episode of a converter's dataset.json, in a dataset.json"
            )
        if len(args.env_ids) != len(args.dataset):
            raise UserError(
                f"--dataset {' '.join(args.dataset)}: no folder with .npy files, such as runs/RUN/replay; Minari data "
                "sets need as many --env-ids, in the same order"
            )
        check_tasks(list(args.env_ids))
        return list(args.env_ids)
    folder, found = Path(args.dataset[0]), None
    described = [folder / "dataset.json", folder.parent / "args.json"]  # a converter's, or the run's that made it
    # a resumed run knows them, in the order of its embeddings
    for path in [Path(args.resume, "args.json")] if args.resume else described:
        if path.exists():
            try:
                found = [name.strip() for name in json.loads(path.read_text())["env_info"]["task_names"]]
                break
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if not args.env_ids:
                    raise UserError(f"{path} does not name the data set's tasks ({error}); give --env-ids") from error
    tasks = list(args.env_ids) or found
    if not tasks:
        raise UserError(f"{folder} does not say which tasks it holds (no args.json beside it); give --env-ids")
    check_tasks(tasks)
    for task in tasks:
        if not (folder / f"{file_name(task)}.npy").exists():
            have = ", ".join(sorted(path.stem for path in folder.glob("*.npy")))
            raise UserError(f"{folder} has no data of {task}; it has: {have}")
    return tasks


def how_collected(args: Args, tasks: list[str]) -> tuple[int, dict[str, int]]:
    """Steps for which each recorded action was held, and the pieces that each task's episodes were cut into: 1, unless
    a converter's dataset.json says otherwise. A run remembers both in its args.json."""
    about, run_dir = {}, args.play or args.resume
    paths = [] if args.play else [Path(args.dataset[0], "dataset.json")]
    for path in [*paths, Path(run_dir, "args.json")] if run_dir else paths:
        try:
            about = {**about, **(json.loads(path.read_text()) if path.is_file() else {})}
            action_repeat = about.get("action_repeat", 1)
            pieces = {task: about.get("pieces_per_episode", {}).get(task, 1) for task in tasks}
            if not all(isinstance(value, int) and value >= 1 for value in (action_repeat, *pieces.values())):
                raise ValueError("action_repeat and pieces_per_episode must be whole numbers from 1 on")
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged: {error}") from error
    return action_repeat, pieces


def data_files(args: Args, tasks: list[str], run_dir: Path) -> list[Path]:
    """One file of records per task: of the folder, or in RUN_DIR/data/, made there from Minari's data sets."""
    if is_folder(args.dataset):
        return [Path(args.dataset[0]) / f"{file_name(task)}.npy" for task in tasks]
    paths = [run_dir / "data" / f"{file_name(task)}.npy" for task in tasks]
    changed = args.resume and json.loads((run_dir / "args.json").read_text())["dataset"] != list(args.dataset)
    if changed and any(path.exists() for path in paths):
        raise UserError(f"--resume {run_dir}: it has its data in {run_dir / 'data'}; leave --dataset out")
    for name, task, path in zip(args.dataset, tasks, paths, strict=True):
        if not args.resume or not path.exists():
            convert_minari(name, task, path)
    return paths


def load_data(args: Args, tasks: list[str], run_dir: Path, envs: "ParallelEnvs") -> Dataset:
    """The data of --dataset. What was converted from Minari and then refused is removed: the next try has another run
    directory."""
    converted = not is_folder(args.dataset)
    try:
        files = data_files(args, tasks, run_dir)
        return Dataset(tasks, files, envs, args.last_transitions, args.discount, args.clip_actions, converted)
    except UserError:
        if converted and not args.resume:
            shutil.rmtree(run_dir / "data", ignore_errors=True)
        raise


def environment_parts(task: str) -> dict | None:
    """Names and spaces (dm_control's: None) of what the environment observes, in its order; None if that is no Dict."""
    env = make_env(task)
    try:
        if isinstance(env.unwrapped, DMControlEnv):
            return dict.fromkeys(env.unwrapped.env.observation_spec())
        return env.get_wrapper_attr("parts")
    except AttributeError:
        return None
    finally:
        env.close()


def joined(observations, space: dict | gym.Space | None) -> np.ndarray:
    """Recorded observations [time, ...], or a dict or tuple of them, as vectors [time, |S|] in the order of `space`."""
    if isinstance(observations, dict):
        if set(observations) - {"achieved_goal"} != set(space or ()) - {"achieved_goal"}:
            raise ValueError(f"it observes {sorted(observations)}, the environment {sorted(space or ())}")
        return np.concatenate([joined(observations[key], part) for key, part in dict(space).items()], axis=1)
    if isinstance(space, gym.spaces.Tuple):
        return np.concatenate([joined(part, own) for part, own in zip(observations, space, strict=True)], axis=1)
    if isinstance(space, gym.Space) and not isinstance(space, gym.spaces.Box):
        return np.stack([gym.spaces.flatten(space, value) for value in observations])
    return np.reshape(observations, (len(observations), -1))


def unit_actions(actions: np.ndarray, space: gym.spaces.Box) -> np.ndarray:
    """Inverse of own_action: to [-1, 1], whole numbers to the middle of their share."""
    low, high, actions = np.float64(space.low), np.float64(space.high), np.float64(actions)
    if not np.issubdtype(space.dtype, np.floating):
        low, high = low - 0.5, high + 0.5
    return 2 * (actions - low) / np.where(high > low, high - low, 2) - (high > low)


def new_records(path: Path, dtype: np.dtype, length: int) -> np.memmap:
    """A .npy file in a memory map, with its space on the disk: a full disk under a map would be a crash."""
    if length * dtype.itemsize > shutil.disk_usage(path.parent).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    records = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(length,))
    if hasattr(os, "posix_fallocate"):  # others may fill the disk meanwhile, and a quota shows only here
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return records


def convert_minari(name: str, task: str, path: Path) -> None:
    """Writes a Minari data set as one file of records, episode by episode; actions become those of [-1, 1].

    name: a data set's id, downloaded when it is not there, or the path of one. Raises UserError if it cannot be read.
    """
    try:
        import minari
        from minari.storage.datasets_root_dir import get_dataset_path
    except ImportError as error:
        raise UserError(f"{name} needs Minari ({error}); install: pip install 'minari[hdf5,hf]==0.5.4'") from error
    partial_path, records, first = path.with_name(f".partial-{path.name}"), None, 0
    try:
        folder = Path(name) if Path(name).is_dir() else get_dataset_path(name)
        if not folder.is_dir():
            minari.download_dataset(name)
        folder = folder / "data" if (folder / "data").is_dir() else folder
        if not {"observation_space", "action_space"} <= set(json.loads((folder / "metadata.json").read_text())):
            # Minari would take them from an environment that the file names, and so run whatever it names
            raise ValueError("its metadata.json lacks the spaces of observations and actions")
        data = minari.MinariDataset(folder)
        if not isinstance(data.action_space, gym.spaces.Box) or not data.action_space.is_bounded():
            raise ValueError(f"its actions are no bounded Box but {data.action_space}")
        if isinstance(data.observation_space, gym.spaces.Tuple):
            raise ValueError("its observations are a Tuple")
        one_vector = not isinstance(data.observation_space, gym.spaces.Dict)
        parts = environment_parts(task) if task.startswith("gym/") or not one_vector else None
        if one_vector and len(parts or ()) > 1:
            raise ValueError(f"its observations are one vector, the environment's are {list(parts)}, in an order that "
                             "flattened data need not have; record the dictionaries")  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        for episode in data.iterate_episodes():
            observations = joined(episode.observations, parts)
            if records is None:
                dtype = record_type(observations.shape[1], data.action_space.shape[0])
                records = new_records(partial_path, dtype, int(data.total_steps) + int(data.total_episodes))
            counts = [len(part) for part in (observations[1:], episode.actions, episode.rewards, episode.terminations)]
            if len(set(counts)) > 1:  # NumPy would repeat a single one
                names = "steps by its observations, actions, rewards and terminations"
                raise ValueError(f"episode {episode.id} has {counts} {names}")
            last = first + len(episode.actions)  # the final observation's record, which is not a transition
            rows = records[first : last + 1]
            rows["observation"] = observations
            rows["action"][:-1] = unit_actions(episode.actions, data.action_space)
            rows["reward"][:-1], rows["terminated"][:-1] = episode.rewards, episode.terminations
            rows["valid"] = np.arange(len(rows)) < len(rows) - 1
            first = last + 1
        if records is None:
            raise ValueError("it has no episodes")
        records.flush()
        partial_path.replace(path)
    except Exception as error:  # Minari's, HDF5's and the network's own, of many kinds
        partial_path.unlink(missing_ok=True)
        reason = f"cannot read a Minari data set of that name: {' '.join(str(error).split())}"
        raise UserError(f"--dataset {name}: no folder with .npy files, and {reason}") from error


def check_same_data(run_dir: Path, **found: dict[str, float]) -> None:
    """Raises UserError if a resumed run would go on with other data than it began with."""
    before = json.loads((run_dir / "args.json").read_text())
    for what, values in found.items():
        if what in before and not (
            set(before[what]) == set(values)
            and all(math.isclose(before[what][task], value, rel_tol=1e-6) for task, value in values.items())
        ):
            now = f"{what} {values}, before {before[what]}"
            raise UserError(f"--resume {run_dir}: --dataset is not the data that this run learns from: {now}")


# ---------------------------------------------------------------------------------------------------------------- main


def main(args: Args) -> None:
    """Trains one agent on the data of `args`; everything it writes is in its run directory."""
    tasks = list(args.env_ids) if args.play else dataset_tasks(args)  # --play needs no data
    with Run(args, tasks[0], args.total_updates, unit="update") as run:
        workers = EnvWorkers(args.env_workers, args.env_timeout, run.environment_failed, run.stop)
        copies = eval_copies(len(tasks), args.eval_episodes)
        eval_envs = ParallelEnvs(tasks, copies, run.seeds()[1], args.env_backend, workers)
        eval_envs.action_repeat, pieces = how_collected(args, tasks)
        data, about_data = None, {}
        if not args.play:
            data = load_data(args, tasks, run.directory, eval_envs)
            about_data["data_transitions"] = dict(zip(tasks, map(len, data.starts), strict=True))
            mean_returns = zip(tasks, data.mean_return, strict=True)
            about_data["data_mean_return"] = {task: mean * pieces[task] for task, mean in mean_returns}
            if args.resume:
                check_same_data(Path(args.resume), **about_data)
        sizes = eval_envs.observation_dim, eval_envs.action_dim
        agent = make_agent(args, len(tasks), *sizes, eval_envs.action_dims)
        rng = np.random.default_rng(args.seed)
        state, saved = run.restore(agent.init(args.seed))
        if saved:
            rng.bit_generator.state = saved["rng"]
        print(f"tasks: {len(tasks)}, |S| = {sizes[0]}, |A| = {sizes[1]}; parameters: "
              f"{parameter_count([state.critic, state.target_critic]):,} in critics and targets, "
              f"{parameter_count(state.actor):,} in the actor")  # fmt: skip
        for task in tasks if data else ():
            cut = f", episodes in {pieces[task]} pieces" * (pieces[task] > 1)
            print(f"data: {task} {about_data['data_transitions'][task]:,} transitions{cut}, "
                  f"mean return {about_data['data_mean_return'][task]:.1f}")  # fmt: skip
        how = {"action_repeat": eval_envs.action_repeat, "pieces_per_episode": pieces}
        run.start(env_info=eval_envs.information(), **how, **about_data)
        if args.total_updates == 0:
            return eval_envs.close()
        rng_state = rng.bit_generator.state  # saved: a resumed run draws the pending batch again
        batch = data and data.sample(rng, args.batch_size)

        while True:
            if run.evaluation_due():
                act = partial(agent.act_deterministic, state.average_actor, state.critic)
                evaluated = run.log_evaluation(evaluate(act, eval_envs, args.eval_episodes, run.stop))
                if evaluated and args.capture_video:
                    record_videos(act, eval_envs, run)
            if run.checkpoint_due():
                run.save(state, rng=rng_state)
            if run.evaluation_due():
                continue  # still due: an environment failed and cut it
            if run.over():
                break

            state, metrics = agent.update(state, batch, data.max_return)
            rng_state = rng.bit_generator.state
            batch = data.sample(rng, args.batch_size)  # while the device updates
            jax.block_until_ready(metrics)
            run.advance(updates=1)
            if run.log_due():
                run.log(metrics)

        run.finish()
        eval_envs.close()


# ======================================================================================================================
# Part 2 of 3, tasks and environments: names and suites, scores, environments, evaluation, videos. The same in
# brc_sac_continuous.py, brc_offline_bc.py and brc_embedding_transfer.py.
# ======================================================================================================================

DMC = """acrobot-swingup acrobot-swingup-sparse ball-in-cup-catch cartpole-balance cartpole-balance-sparse
cartpole-swingup cartpole-swingup-sparse cheetah-run dog-run dog-stand dog-trot dog-walk finger-spin finger-turn-easy
finger-turn-hard fish-swim fish-upright hopper-hop hopper-stand humanoid-run humanoid-stand humanoid-walk
manipulator-bring-ball pendulum-swingup point-mass-easy quadruped-run quadruped-walk reacher-easy reacher-hard
swimmer-swimmer6 swimmer-swimmer15 walker-run walker-stand walker-walk""".split()
DMC_EXTRA = """cheetah-run-backwards cheetah-run-front cheetah-run-back cheetah-jump walker-walk-backwards
walker-run-backwards hopper-hop-backwards reacher-three-easy reacher-three-hard ball-in-cup-spin
pendulum-spin""".split()  # TD-MPC2's, in benchmark/dmc_extra_tasks.py
METAWORLD = """assembly basketball bin-picking box-close button-press-topdown button-press-topdown-wall button-press
button-press-wall coffee-button coffee-pull coffee-push dial-turn disassemble door-close door-lock door-open
door-unlock hand-insert drawer-close drawer-open faucet-open faucet-close hammer handle-press-side handle-press
handle-pull-side handle-pull lever-pull pick-place-wall pick-out-of-hole pick-place plate-slide plate-slide-side
plate-slide-back plate-slide-back-side peg-insert-side peg-unplug-side soccer stick-push stick-pull push push-wall
push-back reach reach-wall shelf-place sweep-into sweep window-open window-close""".split()
HUMANOIDBENCH = {  # task: (random score, success score), Table 2; cabinet is missing there: the released code's
    "h1-crawl": (272.658, 700), "h1-hurdle": (2.214, 700), "h1-maze": (106.441, 1200), "h1-pole": (20.090, 700),
    "h1-run": (2.020, 700), "h1-slide": (3.191, 700), "h1-stair": (3.112, 700), "h1-stand": (10.545, 800),
    "h1-walk": (2.377, 700), "h1hand-balance-hard": (10.032, 800), "h1hand-balance-simple": (10.170, 800),
    "h1hand-basketball": (8.979, 1200), "h1hand-cabinet": (37.733, 2500), "h1hand-bookshelf-hard": (14.848, 2000),
    "h1hand-bookshelf-simple": (16.777, 2000), "h1hand-crawl": (278.868, 800), "h1hand-door": (2.771, 600),
    "h1hand-hurdle": (2.371, 700), "h1hand-insert-normal": (1.673, 350), "h1hand-insert-small": (1.653, 350),
    "h1hand-maze": (106.233, 1200), "h1hand-package": (-10040.932, 1500), "h1hand-pole": (19.721, 700),
    "h1hand-powerlift": (17.638, 800), "h1hand-push": (-526.800, 700), "h1hand-reach": (-50.024, 12000),
    "h1hand-room": (3.018, 400), "h1hand-run": (1.927, 700), "h1hand-sit-hard": (2.477, 750),
    "h1hand-sit-simple": (10.768, 750), "h1hand-slide": (3.142, 700), "h1hand-spoon": (4.661, 650),
    "h1hand-stair": (3.161, 700), "h1hand-stand": (11.973, 800), "h1hand-truck": (562.419, 3000),
    "h1hand-walk": (2.505, 700), "h1hand-window": (2.713, 650),
}  # fmt: skip
SHADOWHAND = """e-toy-airplane knife flat-screwdriver elephant apple scissors i-cups cup foam-brick pudding-box
wristwatch padlock power-drill binoculars b-lego-duplo ps-controller mouse hammer f-lego-duplo piggy-bank can
extra-large-clamp peach a-lego-duplo racquetball tuna-fish-can a-cups pan strawberry d-toy-airplane wood-block
small-marker sugar-box ball torus i-toy-airplane chain j-cups c-toy-airplane airplane nine-hole-peg-test water-bottle
c-cups medium-clamp large-marker h-cups b-colored-wood-blocks j-lego-duplo f-toy-airplane toothbrush tennis-ball mug
sponge k-lego-duplo phillips-screwdriver f-cups c-lego-duplo d-marbles d-cups camera d-lego-duplo golf-ball
k-toy-airplane b-cups softball wine-glass chips-can cube master-chef-can alarm-clock gelatin-box h-lego-duplo baseball
light-bulb banana rubber-duck headphones i-lego-duplo b-toy-airplane pitcher-base j-toy-airplane g-lego-duplo
cracker-box orange e-cups""".split()
SHADOWHAND_TRANSFER = """rubiks-cube dice bleach-cleanser pear e-lego-duplo pyramid stapler flashlight large-clamp
a-toy-airplane tomato-soup-can fork cell-phone m-lego-duplo toothpaste flute stanford-bunny a-marbles potted-meat-can
timer lemon utah-teapot train g-cups l-lego-duplo bowl door-knob mustard-bottle plum""".split()
SHADOWHAND_ENVPOOL = {  # Gymnasium-Robotics' own objects need no extra package; task: the id there and in envpool
    "block": "HandManipulateBlockRotateZ-v1", "egg": "HandManipulateEggRotate-v1", "pen": "HandManipulatePenRotate-v1",
}  # fmt: skip
FAMILIES = {
    "dmc": DMC + DMC_EXTRA, "metaworld": METAWORLD, "humanoidbench": list(HUMANOIDBENCH),
    "shadowhand": SHADOWHAND + SHADOWHAND_TRANSFER + list(SHADOWHAND_ENVPOOL),
}  # fmt: skip
INSTALL = {  # what a family needs besides requirements.txt, or without it
    "dmc": "pip install dm_control==1.0.21.post1 mujoco==3.2.0",
    "metaworld": "pip install metaworld==3.0.0 mujoco==3.2.0",
    "humanoidbench": "pip install torch --index-url https://download.pytorch.org/whl/cpu && pip install --no-deps -e "
    "git+https://github.com/carlosferrazza/humanoid-bench@791405f5eacf879adbc99105adb3fee73f5a49fc#egg=humanoid_bench",
    "shadowhand": "pip install gymnasium-robotics && "
    "git clone https://github.com/naumix/BiggerRegularizedCategorical && "
    "git -C BiggerRegularizedCategorical checkout -q eec512f4e060da63f8a114b91898c554a60ed66b && "
    "export PYTHONPATH=$PWD/BiggerRegularizedCategorical",
}
if sys.version_info >= (3, 13):  # for which labmaze, a dependency of every dm_control, has no wheel, nor has mujoco 3.2
    INSTALL |= {"metaworld": "pip install metaworld==3.0.0 mujoco==3.8.1"} | dict.fromkeys(
        ("dmc", "humanoidbench"), "Python 3.12, as dm_control has no wheels for newer ones: uv run --python 3.12 FILE"
    )
LOCOMOTION = "walk stand run stair crawl pole slide hurdle maze".split()
HB_MANIPULATION = """sit-simple sit-hard balance-simple balance-hard reach spoon window insert-small insert-normal
bookshelf-simple bookshelf-hard""".split()
MW_DMC = """walker-stand walker-walk walker-run cheetah-run reacher-easy reacher-hard acrobot-swingup pendulum-swingup
cartpole-balance cartpole-balance-sparse cartpole-swingup cartpole-swingup-sparse ball-in-cup-catch finger-spin
finger-turn-easy finger-turn-hard fish-swim hopper-stand hopper-hop""".split()
HB_MEDIUM_TRANSFER = "run hurdle maze".split()
HB_HARD_TRANSFER = "truck powerlift room door basketball push cabinet".split()
METAWORLD_TRANSFER = "assembly disassemble dial-turn lever-pull push-back".split()
SUITES = {  # name: (tasks, environment steps per task): E.1, the splits of E.2, and Figure 10's three tasks
    "dmc-dogs": ([f"dmc/dog-{t}" for t in ("stand", "walk", "trot", "run")], 500_000),
    "dmc-humanoids": ([f"dmc/humanoid-{t}" for t in ("stand", "walk", "run")], 500_000),
    "metaworld": ([f"metaworld/{t}" for t in METAWORLD], 500_000),
    "hb-medium": ([f"humanoidbench/h1-{t}" for t in LOCOMOTION], 1_000_000),
    "hb-hard": ([f"humanoidbench/h1hand-{t}" for t in LOCOMOTION + HB_MANIPULATION], 2_000_000),
    "shadowhand": ([f"shadowhand/{t}" for t in SHADOWHAND], 1_000_000),
    "mw-dmc": ([f"metaworld/{t}" for t in METAWORLD] + [f"dmc/{t}" for t in MW_DMC + DMC_EXTRA], 500_000),
    "metaworld-pretrain": ([f"metaworld/{t}" for t in METAWORLD if t not in METAWORLD_TRANSFER], 500_000),
    "metaworld-transfer": ([f"metaworld/{t}" for t in METAWORLD_TRANSFER], 500_000),
    "hb-medium-3": ([f"humanoidbench/h1-{t}" for t in ("walk", "stair", "slide")], 1_000_000),
    "hb-medium-pretrain": ([f"humanoidbench/h1-{t}" for t in LOCOMOTION if t not in HB_MEDIUM_TRANSFER], 1_000_000),
    "hb-medium-transfer": ([f"humanoidbench/h1-{t}" for t in HB_MEDIUM_TRANSFER], 1_000_000),
    "hb-hard-transfer": ([f"humanoidbench/h1hand-{t}" for t in HB_HARD_TRANSFER], 2_000_000),
    "shadowhand-transfer": ([f"shadowhand/{t}" for t in SHADOWHAND_TRANSFER], 1_000_000),
}  # fmt: skip
SUITES |= {  # other names of the same sets
    "hb-medium-6": SUITES["hb-medium-pretrain"], "hb-medium-9": SUITES["hb-medium"],
    "hb-hard-pretrain": SUITES["hb-hard"], "shadowhand-pretrain": SUITES["shadowhand"],
}  # fmt: skip


def check_tasks(tasks: list[str]) -> None:
    """Raises UserError for an unknown family or task, naming the valid ones, and for a task named twice."""
    for task in tasks:
        family, _, name = task.partition("/")
        if family == "gym" and name:
            continue
        if family not in FAMILIES:
            raise UserError(f"unknown task '{task}'; tasks are family/task with a family of {', '.join(FAMILIES)}, gym")
        if name not in FAMILIES[family]:
            raise UserError(f"unknown task '{task}'; {family}/ has: {', '.join(FAMILIES[family])}")
    if len(set(map(file_name, tasks))) < len(tasks):
        raise UserError("a task is named twice in --env-ids, or two of them have one file name")


def resolve_tasks(suite: str | None, env_ids: tuple[str, ...]) -> tuple[list[str], int]:
    """Task names and the environment steps per task that Section 4 gives them (1,000,000 where it gives none).

    Raises UserError for an unknown suite, family or task, naming the valid ones.
    """
    if suite and env_ids:
        raise UserError("--suite and --env-ids exclude each other: give one of them")
    if suite and suite not in SUITES:
        raise UserError(f"unknown suite '{suite}'; suites: {', '.join(SUITES)}")
    tasks, steps = SUITES[suite] if suite else (list(env_ids), 1_000_000)
    if not tasks:
        raise UserError(f"no tasks: give --env-ids, such as --env-ids dmc/walker-walk, or --suite: {', '.join(SUITES)}")
    check_tasks(tasks)
    return tasks, steps


def normalized_score(task: str, episode_return: float, success: float) -> float:
    """Score of an episode (E.3): success for metaworld and shadowhand, return / 1000 for dmc, Eq. 5 with Table 2 for
    humanoidbench, NaN where the paper defines none (gym)."""
    family, _, name = task.partition("/")
    if family == "dmc":
        return episode_return / 1000
    if family == "humanoidbench":
        random_return, success_return = HUMANOIDBENCH[name]
        return (episode_return - random_return) / (success_return - random_return)
    return success if family in ("metaworld", "shadowhand") else math.nan


ENVPOOL_KEYS = {  # dm_control's observations in its order, where envpool has more of them or another order; and the
    # hand's, whose achieved goal is part of the observation
    "dmc/dog-": "joint_angles joint_velocites torso_pelvis_height z_projection torso_com_velocity inertial_sensors "
    "foot_forces touch_sensors actuator_state",
    "dmc/humanoid-": "joint_angles head_height extremities torso_vertical com_velocity velocity",
    "dmc/quadruped-": "egocentric_state torso_velocity torso_upright imu force_torque",
    "dmc/finger-spin": "position velocity touch",
    "dmc/fish-swim": "joint_angles upright target velocity",
    "dmc/fish-upright": "joint_angles upright velocity",
    "shadowhand/": "observation desired_goal",
}
STEP_COST = {  # milliseconds of a step in Python, measured, by the beginning of a task's name, the first that fits
    "humanoidbench/h1hand-bookshelf": 7.0, "humanoidbench/h1hand-slide": 6.0, "humanoidbench/h1hand-truck": 6.0,
    "humanoidbench/h1hand-spoon": 5.5, "humanoidbench/h1hand-": 4.2, "humanoidbench/": 1.5, "shadowhand/": 5.0,
    "dmc/dog-": 1.5, "dmc/humanoid-": 0.8, "dmc/": 0.3, "metaworld/": 0.8, "gym/": 0.2,
}  # fmt: skip
ROTATE_Z = {  # what dex_envs asks of its objects, for all three hand tasks
    "target_rotation": "z", "ignore_z_target_rotation": False, "randomize_initial_rotation": True,
}  # fmt: skip
ENVPOOL_BROKEN = {  # in envpool 1.2.5 these are other tasks than dm_control's and Meta-World's, which step them instead
    "metaworld/hammer", "metaworld/shelf-place",  # the goal moves on at every reset, out of reach
    "metaworld/dial-turn",  # its MuJoCo is 3.6, with which not even Meta-World's expert turns the dial
    "dmc/ball-in-cup-catch",  # the ball counts as caught too early
}  # fmt: skip

MAX_EPISODE_STEPS = 30_000  # of a gym/ task that is registered without max_episode_steps


class DMControlEnv(gym.Env):
    """A dm_control task as a Gymnasium environment: flat float32 observation, actions rescaled by dm_control's own
    wrapper to [-1, 1], truncation at dm_control's time limit (1,000 steps).

    load: makes the dm_control environment from a seed or None.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, load: Callable[[int | None], Any], render_mode: str | None = None):
        from dm_control.suite.wrappers import action_scale

        self.load = lambda seed: action_scale.Wrapper(load(seed), minimum=-1, maximum=1)
        self.env, self.render_mode = self.load(None), render_mode
        size = sum(int(np.prod(spec.shape)) for spec in self.env.observation_spec().values())
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, self.env.action_spec().shape, np.float32)

    def flatten(self, observation: dict) -> np.ndarray:
        return np.concatenate([np.ravel(value) for value in observation.values()]).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        if seed is not None:
            self.env = self.load(seed)
        return self.flatten(self.env.reset().observation), {}

    def step(self, action: np.ndarray):
        step = self.env.step(action.astype(np.float64))
        terminated = step.last() and step.discount == 0
        return self.flatten(step.observation), step.reward, terminated, step.last() and not terminated, {}

    def render(self) -> np.ndarray:
        return self.env.physics.render(height=240, width=320, camera_id=0)


def extra_task_id(name: str) -> str:
    """Gymnasium's id of a task in DMC_EXTRA, after importing the file that registers them: the one thing that a script
    takes from benchmark/, found beside the script whatever the current directory is."""
    gym_id, path = f"brc/{name}-v0", Path(__file__).resolve().parent / "benchmark" / "dmc_extra_tasks.py"
    if gym_id not in gym.registry:
        if not path.exists():
            source = f"benchmark/{path.name} of the repository that {Path(__file__).name} comes from"
            raise UserError(f"dmc/{name} is not in dm_control but in {source}: copy it to {path}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return gym_id


def make_env(task: str, render_mode: str | None = None, seed: int | None = None) -> gym.Env:
    """One Gymnasium environment with a flat Box observation, actions in [-1, 1] and the paper's episode length (E.1).

    Raises UserError when a package is missing or the spaces do not fit.
    """
    if seed is not None:
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 (several HumanoidBench tasks draw from NumPy's global generator)
    family, _, name = task.partition("/")
    try:
        if family == "dmc" and name in DMC_EXTRA:
            env = gym.make(extra_task_id(name), render_mode=render_mode)
        elif family == "dmc":
            from dm_control import suite

            vars(np).setdefault("in1d", np.isin)  # dm_control's quadruped calls it; NumPy 2.4 dropped it
            domain, task_name = next((d, t) for d, t in suite.ALL_TASKS if f"{d}-{t}".replace("_", "-") == name)
            env = DMControlEnv(lambda seed: suite.load(domain, task_name, {"random": seed}), render_mode)
        elif family == "metaworld":
            import metaworld

            env = metaworld.ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{name}-v3-goal-observable"](render_mode=render_mode)
            env._freeze_rand_vec = False  # a new goal at every reset, as in envpool
            env = gym.wrappers.TimeLimit(env, 200)
        elif family == "humanoidbench":
            import humanoid_bench  # noqa: F401 (registers the tasks)

            robot, _, task_name = name.partition("-")
            env = gym.make(f"{robot}-{task_name.replace('-', '_')}-v0", render_mode=None)  # drawn by frame_renderer
        elif family == "shadowhand" and name in SHADOWHAND_ENVPOOL:
            import gymnasium_robotics

            gym.register_envs(gymnasium_robotics)
            env = gym.make(SHADOWHAND_ENVPOOL[name], render_mode=render_mode)
            for name_, value in ROTATE_Z.items():  # the constructors do not take them all
                setattr(env.unwrapped, name_, value)
        elif family == "shadowhand":
            import dex_envs  # noqa: F401 (registers the tasks)

            env = gym.make(f"{name.replace('-', '_')}-rotate-v1", reward_type="sparse", render_mode=render_mode)
        else:
            env = gym.make(name, **({"render_mode": render_mode} if render_mode else {}))
            if env.spec.max_episode_steps is None:  # its episodes may never end
                env = gym.wrappers.TimeLimit(env, MAX_EPISODE_STEPS)
    except ImportError as error:
        hint = INSTALL.get(family, f"pip install the package that registers {name}")
        raise UserError(f"{task} needs a package that is missing ({error}); install: {hint}") from error
    except (gym.error.Error, ValueError, TypeError, AttributeError, AssertionError) as error:
        unnamed = isinstance(error, (gym.error.NameNotFound, gym.error.NamespaceNotFound)) and ":" not in name
        hint = f"; name the module that registers it, such as gym/gymnasium_robotics:{name}" * unnamed
        raise UserError(f"cannot make {task}: {describe(error)}{hint}") from error
    if isinstance(env.observation_space, gym.spaces.Dict):
        parts = observation_parts(env.observation_space, family)
        try:
            size = sum(gym.spaces.flatdim(space) for space in parts.values())
        except (NotImplementedError, ValueError) as error:
            raise UserError(f"{task}: no vector can be made of the observations {env.observation_space}") from error
        flat = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        env = gym.wrappers.TransformObservation(env, partial(flat_observation, parts), flat)
        env.parts = parts
    for space, what in ((env.observation_space, "observation"), (env.action_space, "action")):
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1 or space.shape[0] == 0:
            raise UserError(f"{task}: this script needs a flat continuous (1-D Box) {what} space, not {space}")
    low, high = np.float64(env.action_space.low), np.float64(env.action_space.high)
    if not np.all(np.isfinite(low) & np.isfinite(high) & (high - low < 2.0**31) & (low <= high)):
        raise UserError(f"{task}: the action space needs finite bounds, less than 2**31 apart, not {env.action_space}")
    unit = gym.spaces.Box(-1.0, 1.0, env.action_space.shape, np.float32)
    return gym.wrappers.TransformAction(env, partial(own_action, env.action_space), unit)


def observation_parts(space: gym.spaces.Dict, family: str) -> dict[str, gym.Space]:
    """What of a Dict is observed, in the space's own order: all of it, but for a hand's achieved goal, which is part of
    the observation. Elsewhere it may not be: AntMaze tells its place there alone."""
    keys = ("observation", "desired_goal") if family == "shadowhand" else tuple(space)
    return {key: space[key] for key in keys}


def flat_observation(parts: dict[str, gym.Space], observation: dict) -> np.ndarray:
    """One float32 vector, also of nested spaces."""
    return np.concatenate([gym.spaces.flatten(space, observation[key]) for key, space in parts.items()]).astype("f4")


def own_action(space: gym.spaces.Box, action: np.ndarray) -> np.ndarray:
    """From [-1, 1] to the task's bounds; of whole numbers, each takes an equal share of [-1, 1]."""
    low, high, share = np.float64(space.low), np.float64(space.high), (np.clip(np.float64(action), -1, 1) + 1) / 2
    if not np.issubdtype(space.dtype, np.floating):
        return np.minimum(low + np.floor(share * (high - low + 1)), high).astype(space.dtype)
    return np.clip(low + share * (high - low), low, high).astype(space.dtype)


def envpool_id(task: str) -> str | None:
    """envpool's name of a dmc/, metaworld/ or shadowhand/ task, or None if it has none that works."""
    import envpool

    family, _, name = task.partition("/")
    camel = "".join(part.capitalize() for part in name.split("-"))
    hand = SHADOWHAND_ENVPOOL.get(name)
    found = {"dmc": f"{camel}-v1", "metaworld": f"MetaWorld/{camel}-v3", "shadowhand": hand}.get(family)
    return found if found in envpool.list_all_envs() and task not in ENVPOOL_BROKEN else None


OBSERVATION = np.float32
REPORTED = ("success", "is_success")  # of a step's info
IMPORTS = {  # what the worker processes of a family import, once for all of them
    "dmc": "dm_control.suite", "metaworld": "metaworld", "humanoidbench": "humanoid_bench", "shadowhand": "dex_envs",
    "gym": "gymnasium",
}  # fmt: skip


def step_cost(task: str) -> float:
    return next(cost for beginning, cost in STEP_COST.items() if task.startswith(beginning))


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def steps_in_envpool(task: str, backend: str) -> bool:
    """Whether envpool steps this task, or else a worker process. Raises UserError if it must and cannot."""
    problem = f"envpool has no {task} that works"
    if backend != "gymnasium" and task.startswith(("dmc/", "metaworld/", "shadowhand/")):
        try:
            if envpool_id(task):
                return True
        except ImportError:
            problem = "envpool is missing: pip install envpool==1.2.5"
    if backend == "envpool":
        raise UserError(f"{problem}; or take --env-backend auto")
    return False


class Results(NamedTuple):
    """What the environments that were sent an action answer, a row each."""

    observations: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    reported: np.ndarray  # what its info says of REPORTED, NaN where it says nothing
    restarted: np.ndarray  # its simulator failed: this is the first observation of an episode, or nothing


def reported(info: dict) -> float:
    value = np.ravel(next((info[key] for key in REPORTED if key in info), math.nan))
    return float(value[0]) if value.size and value.dtype.kind in "biuf" else math.nan  # a task may report None or text


class EnvPoolTask:
    """num_envs copies of one task in one envpool pool, of which some or all step while other work goes on."""

    def __init__(self, task: str, num_envs: int, seed: int, number: int = 0):
        import envpool

        kwargs = {
            "metaworld": {"max_episode_steps": 200, "partially_observable": False},
            "shadowhand": ROTATE_Z,
        }.get(task.partition("/")[0], {})
        self.pool = envpool.make(  # results come one by one, so that copies that finished need not be stepped
            envpool_id(task), env_type="gymnasium", num_envs=num_envs, batch_size=1,
            num_threads=min(num_envs, cores()), seed=seed, **kwargs,
        )  # fmt: skip
        space = self.pool.observation_space
        self.keys = list(space.spaces) if isinstance(space, gym.spaces.Dict) else None
        for prefix, keys in ENVPOOL_KEYS.items():
            if task.startswith(prefix):
                self.keys = keys.split()
        self.task_numbers, self.num_envs, self.action_dims = [number], num_envs, list(self.pool.action_space.shape)
        self.send(None, np.arange(num_envs))
        self.observation_dims = [self.recv().observations.shape[1]]

    def send(self, actions: np.ndarray | None, rows: np.ndarray) -> None:
        """Steps the given copies; without actions resets all."""
        self.waiting = len(rows)
        if actions is None:
            return self.pool.async_reset()
        self.pool.send(own_action(self.pool.action_space, actions[:, : self.action_dims[0]]), rows)

    def recv(self) -> Results:
        parts = sorted((self.pool.recv() for _ in range(self.waiting)), key=lambda part: part[4]["env_id"][0])
        observations, rewards, terminated, truncated, infos = zip(*parts, strict=True)
        if self.keys is not None:
            observations = [np.concatenate([o[key].reshape(1, -1) for key in self.keys], axis=1) for o in observations]
        arrays = map(np.concatenate, (observations, rewards, terminated, truncated))
        return Results(*arrays, np.array([reported(info) for info in infos]), np.zeros(len(infos), bool))

    def close(self) -> None:
        self.pool.close()


def next_seed(seeds: np.random.SeedSequence) -> int:
    """Of an environment that is made again: not the seed with which it failed."""
    return int(seeds.spawn(1)[0].generate_state(1)[0] % 2**30)


class WorkerEnv:
    """make_env(task) in a worker process, with next-step autoreset as in envpool.

    NumPy's global generator, from which several HumanoidBench tasks draw, is its own: its trajectories are those that
    it would have alone in its process.
    """

    def __init__(self, task: str, seed: int):
        self.task, self.seeds = task, np.random.SeedSequence(seed)
        self.make(seed)

    def make(self, seed: int) -> None:
        with contextlib.suppress(Exception):  # what failed may hold a port or a process; the first time there is none
            self.env.close()
        self.generator, self.cached = np.random.MT19937(), None
        self.words = (ctypes.c_uint32 * 625).from_address(self.generator.ctypes.state_address)  # the last: a position
        self.seed, self.done = seed, True
        with self.own_random_numbers():
            self.env = make_env(self.task, seed=seed)
        if mujoco := sys.modules.get("mujoco"):
            # without a handler it writes MUJOCO_LOG.TXT wherever it is; of one text a warning is shown once
            mujoco.set_mju_user_warning(lambda message: warnings.warn(message.partition(" Time =")[0], stacklevel=1))
            mujoco.MjModel.from_xml_string("<mujoco/>")  # it keeps the last model, 100 MB for a humanoid with hands
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL("libc.so.6").malloc_trim(0)

    @contextlib.contextmanager
    def own_random_numbers(self):
        np.random.set_bit_generator(self.generator)
        if self.cached:  # the second half of a pair of Gaussians is no part of the generator, and copies are slow
            np.random.set_state(self.cached)  # noqa: NPY002
        position = self.words[624]
        yield
        if self.cached or self.words[624] != position:
            state = np.random.get_state(legacy=False)  # noqa: NPY002
            self.cached = state if state["has_gauss"] else None

    def step(self, action: np.ndarray | None) -> tuple:
        """As gym.Env.step; a reset after an episode's end and without an action. Raises ValueError for an observation
        or reward of another shape than they should have, and for an observation that is not finite."""
        with self.own_random_numbers():
            if action is None or self.done:
                observation, info = self.env.reset(seed=self.seed)
                self.seed = None  # later resets continue the environment's own random stream
                result = observation, 0.0, False, False, info
            else:
                space = self.env.action_space
                result = self.env.step(action[: space.shape[0]].astype(space.dtype) if space.shape else action)
        observation, reward, terminated, truncated, info = result
        if np.shape(observation) != self.env.observation_space.shape:
            declared = self.env.observation_space.shape
            raise ValueError(f"an observation of shape {np.shape(observation)} where its space has {declared}")
        with np.errstate(over="ignore"):  # what is infinite in float32 is not finite to the agent
            observation = np.asarray(observation).astype(OBSERVATION)
        if not np.isfinite(observation).all():
            raise ValueError("an observation that is not finite")
        self.done = terminated or truncated
        # many tasks reward by an array of one number
        return observation, np.asarray(reward, np.float64).item(), terminated, truncated, info


class WorkerEnvs:
    """The environments of one ParallelEnvs in a worker process, stepped in turn; results are left in shared memory."""

    def __init__(self, connection, tasks: list[str], seeds: list[int]):
        self.envs, shapes = [], []
        for task, seed in zip(tasks, seeds, strict=True):
            with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(io.StringIO()) as printed:
                warnings.simplefilter("default")
                self.envs.append(WorkerEnv(task, seed))
            env = self.envs[-1].env
            shapes.append(env.observation_space.shape)
            said = [*(str(warning.message) for warning in caught), *printed.getvalue().splitlines()]
            connection.send((shapes[-1][0], int(gym.spaces.flatdim(env.action_space)), said))
        dtype = results_type((max(shape[0] for shape in shapes), *shapes[0][1:]))
        self.memory = SharedMemory(create=True, size=len(tasks) * dtype.itemsize)
        self.results = np.ndarray(len(tasks), dtype, self.memory.buf)
        connection.send((self.memory.name, dtype.descr))

    def step(self, rows: np.ndarray, actions: np.ndarray | None) -> list[str]:
        """Returns what failed."""
        failures = []
        for i, row in enumerate(rows):
            env = self.envs[row]
            self.results["stepping"][row], restarted = True, False
            try:
                observation, *step, info = env.step(None if actions is None else actions[i])
            except (Exception, SystemExit) as error:
                failures.append(f"{env.task} failed: {describe(error)}")
                env.make(next_seed(env.seeds))
                (observation, *step, info), restarted = env.step(None), True
            self.results["observations"][row, : len(observation)] = observation
            for name, value in zip(Results._fields[1:], (*step, reported(info), restarted), strict=True):
                self.results[name][row] = value
            self.results["stepping"][row] = False
        return failures


def results_type(shape: tuple[int, ...]) -> np.dtype:
    """A row of shared memory: Results, and whether its simulator is at work."""
    return np.dtype([
        ("observations", OBSERVATION, shape), ("rewards", "f8"), ("terminated", "?"), ("truncated", "?"),
        ("reported", "f8"), ("restarted", "?"), ("stepping", "?"),
    ])  # fmt: skip


def run_worker(connection) -> None:
    """Body of a worker process: makes, resets and steps environments as the main process asks, and closes them when it
    is asked to end or the main process has ended. Signals are the main process' to handle."""

    def end_with_parent():
        multiprocessing.parent_process().join()
        time.sleep(Worker.grace)  # an environment that hangs is not closed
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for signum in SIGNALS:
        if signal.getsignal(signum) != signal.SIG_IGN:  # nohup's SIGHUP stays ignored, too
            # no SIG_IGN, which processes that a task starts would inherit: they could not be terminated
            signal.signal(signum, lambda *_: None)
            os.register_at_fork(after_in_child=partial(signal.signal, signum, signal.SIG_DFL))
    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    groups = []
    try:
        while request := connection.recv():
            group, *message = request
            try:
                if group is None:
                    groups.append(WorkerEnvs(connection, *message))
                else:
                    connection.send(groups[group].step(*message))
            except (Exception, SystemExit) as error:
                by_user = isinstance(error, UserError)
                connection.send({"error": str(error) if by_user else describe(error), "by_user": by_user})
    finally:
        for env in (env for group in groups for env in group.envs):
            with contextlib.suppress(Exception):
                env.env.close()
        os._exit(0)


class WorkerFailure(Exception):
    """A worker process died or hung, or what it steps failed too often."""


class Worker:
    """A worker process, which may hold environments of several ParallelEnvs, started again when it died or hung.

    timeout: seconds for one answer. report: called with every failure, the process' or an environment's. stop: once it
    fills, a step has `grace` seconds more.
    """

    max_failures, failures_apart = 5, 1000  # so many failures with fewer steps between them are one too many
    grace = 5

    def __init__(self, timeout: float, report: Callable[[str], None], stop):
        self.timeout, self.report, self.stop, self.process, self.groups = timeout, report, stop, None, []
        self.failures = self.steps = 0
        atexit.register(self.close)
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        self.connection, theirs = context.Pipe()
        process = context.Process(target=run_worker, args=(theirs,))  # a daemon's tasks could start no processes
        process.start()
        theirs.close()
        self.process = process

    def kill(self) -> None:
        if self.process:
            self.process.kill()  # it ignores other signals, and has nothing to save
            self.connection.close()
        self.process = None

    def close(self) -> None:
        """Ends the process, which closes its environments first: they may have processes of their own."""
        if self.process:
            self.ask()
            self.process.join(self.grace)
            self.kill()

    def ask(self, *message) -> None:
        with contextlib.suppress(OSError):  # it died, and will not answer either
            self.connection.send(message)

    def answer(self, culprit: Callable[[], str], stop=()) -> Any:
        """Raises WorkerFailure if there is none, UserError if it is one. culprit(): the task that is at work."""
        reason = "ended its worker process, perhaps for lack of memory"
        with contextlib.suppress(EOFError, OSError):
            deadline, here = time.monotonic() + self.timeout, False
            while not (here or stop) and time.monotonic() < deadline:
                here = self.connection.poll(min(1, self.timeout))
            if here or (stop and self.connection.poll(min(self.grace, self.timeout))):
                answer = self.connection.recv()
                if not isinstance(answer, dict):
                    return answer
                if answer["by_user"]:
                    raise UserError(answer["error"])
                raise WorkerFailure(f"{culprit()} failed: {answer['error']}")
            limit = f"{self.grace} s of the stop" if stop else f"{self.timeout:g} s (--env-timeout)"
            reason = f"gave no answer within {limit}"
        raise WorkerFailure(f"{culprit()} {reason}")

    def failed(self, *reasons: str) -> None:
        self.failures = self.failures + 1 if self.steps < self.failures_apart else 1
        self.reason, self.steps = reasons[-1], 0
        for reason in reasons:
            self.report(reason)

    def revive(self) -> None:
        """Starts a process that died again. Raises WorkerFailure after max_failures with little between them."""
        while self.process is None or self.failures >= self.max_failures:
            if self.failures >= self.max_failures:
                raise WorkerFailure(f"{self.reason}; {self.failures} failures, each soon after the one before")
            self.start()
            try:
                for group in self.groups:
                    group.make([next_seed(seeds) for seeds in group.seeds])
                    group.made()
            except (WorkerFailure, UserError) as error:
                self.kill()
                self.failed(str(error))


class WorkerGroup:
    """The environments of one ParallelEnvs that one worker steps; used as an EnvPoolTask is."""

    num_envs = 1

    def __init__(self, worker: Worker, task_numbers: list[int], tasks: list[str], seeds: list[int]):
        self.worker, self.task_numbers, self.tasks = worker, task_numbers, [tasks[number] for number in task_numbers]
        self.seeds = [np.random.SeedSequence(seeds[number]) for number in task_numbers]
        self.number, self.results = len(worker.groups), None
        worker.groups.append(self)
        self.make([seeds[number] for number in task_numbers])

    def make(self, seeds: list[int]) -> None:
        self.fresh, self.results = True, None  # fresh: the next step resets
        self.worker.ask(None, self.tasks, seeds)

    def made(self) -> list[str]:
        """Waits for the environments and returns what they said, warnings and lines."""
        made = [self.worker.answer(lambda task=task: task) for task in self.tasks]
        self.observation_dims, self.action_dims, said = zip(*made, strict=True)
        name, dtype = self.worker.answer(lambda: self.tasks[-1])
        self.memory = SharedMemory(name)
        self.memory.unlink()  # both processes have it now, and nothing is left when they end
        self.results = np.ndarray(len(self.tasks), np.dtype(dtype), self.memory.buf)
        return [text for texts in said for text in texts]

    def send(self, actions: np.ndarray | None, rows: np.ndarray) -> None:
        self.worker.revive()
        self.restarted = self.fresh and actions is not None
        self.rows, self.fresh = rows, False
        self.worker.ask(self.number, rows, None if self.restarted else actions)

    def recv(self) -> Results:
        try:
            if failures := self.worker.answer(self.at_work, self.worker.stop):
                self.worker.failed(*failures)
        except (WorkerFailure, UserError) as error:
            self.worker.kill()
            self.worker.failed(str(error))
            self.results["restarted"][self.rows] = True
        self.worker.steps += 1
        results = self.results[self.rows]
        results["restarted"] |= self.restarted
        return Results(*(results[name] for name in Results._fields))

    def at_work(self) -> str:
        return self.tasks[self.results["stepping"].argmax()]

    def close(self) -> None:
        self.worker.close()


class EnvWorkers:
    """Worker processes for the environments that envpool does not step, started when the first ones are made.

    number: default one per core; never more than tasks. Each holds several tasks, dealt by what their steps cost. They
    come from a fork server that imported the heavy modules once: never a fork of this process, whose JAX threads would
    not survive it.
    """

    heavy_modules = ("jax", "flax.linen", "optax", "orbax.checkpoint", "tyro", "gymnasium")

    def __init__(self, number: int | None = None, timeout: float = 600, report: Callable[[str], None] = print, stop=()):
        self.number, self.about, self.workers = number or cores(), (timeout, report, stop), []

    def make(self, numbers: list[int], tasks: list[str], seeds: list[int]) -> list[WorkerGroup]:
        """One environment of each task that `numbers` counts."""
        if not self.workers:
            imports = {IMPORTS[tasks[number].partition("/")[0]] for number in numbers}
            multiprocessing.get_context("forkserver").set_forkserver_preload([*self.heavy_modules, *imports])
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the processes inherit
            try:
                multiprocessing.forkserver.ensure_running()
            except OSError as error:  # a path too long for a socket, or a full disk
                way_out = "set TMPDIR to a short path with free space"
                raise UserError(f"cannot start worker processes: {error}; {way_out}") from error
            finally:
                signal.signal(signal.SIGINT, handler)
            self.workers = [Worker(*self.about) for _ in range(min(self.number, len(numbers)))]
        dealt, load = [[] for _ in self.workers], np.zeros(len(self.workers))
        for number in sorted(numbers, key=lambda number: -step_cost(tasks[number])):
            least = load.argmin()
            dealt[least].append(number)
            load[least] += step_cost(tasks[number])
        dealt = zip(self.workers, map(sorted, dealt), strict=True)
        groups = [WorkerGroup(worker, numbers, tasks, seeds) for worker, numbers in dealt if numbers]
        try:
            said = [text for group in groups for text in group.made()]
        except WorkerFailure as error:
            raise UserError(str(error)) from error
        for text in dict.fromkeys(said):  # what many tasks say is shown once
            print(text, file=sys.stderr)
        return groups


class Step(NamedTuple):
    """One step of every row of ParallelEnvs, [size, ...]. Where it was a reset (next-step autoreset, see record_type),
    valid is False, and so are terminated, truncated and done, the reward is 0 and success NaN."""

    observations: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray  # and not terminated
    valid: np.ndarray
    success: np.ndarray  # NaN where the environment reports none

    @property
    def done(self) -> np.ndarray:
        return self.terminated | self.truncated


class ParallelEnvs:
    """num_envs copies of every task that envpool steps, and one of every other, stepped all at once.

    Row r is a copy of task task_ids[r]. Observations are zero-padded to the widest task, actions cut to the task's own
    size (E.1's mixes). After done, the next step resets that row and ignores the action: next-step autoreset, see
    record_type. Where a simulator failed, its episode is dropped: that step is a reset too, and interrupted is True.
    episode_return, episode_success (at any step) and episode_length are those of each row's current episode, at a done
    step of the whole one.
    """

    action_repeat = 1  # steps for which evaluate holds an action: offline data may have been collected so

    def __init__(self, tasks: list[str], num_envs: int, seed: int, backend: str, workers: EnvWorkers | None = None):
        self.tasks, seeds = tasks, (np.random.SeedSequence(seed).generate_state(len(tasks)) % 2**30).tolist()
        self.pools = self.make_pools(num_envs, seeds, backend, workers or EnvWorkers())
        copies = {number: pool.num_envs for pool in self.pools for number in pool.task_numbers}
        self.task_ids = np.repeat(np.arange(len(tasks)), [copies[number] for number in range(len(tasks))])
        self.size = len(self.task_ids)
        self.rows = [np.flatnonzero(np.isin(self.task_ids, pool.task_numbers)) for pool in self.pools]
        self.observation_dims, self.action_dims = [0] * len(tasks), [0] * len(tasks)
        for pool in self.pools:
            for number, *dims in zip(pool.task_numbers, pool.observation_dims, pool.action_dims, strict=True):
                self.observation_dims[number], self.action_dims[number] = dims
        self.observation_dim, self.action_dim = max(self.observation_dims), max(self.action_dims)
        self.action_mask = np.arange(self.action_dim) < np.array(self.action_dims)[:, None]

    def make_pools(self, num_envs: int, seeds: list[int], backend: str, workers: EnvWorkers) -> list:
        in_envpool = [steps_in_envpool(task, backend) for task in self.tasks]
        numbers = [number for number, found in enumerate(in_envpool) if not found]
        pools = [EnvPoolTask(self.tasks[n], num_envs, seeds[n], n) for n, found in enumerate(in_envpool) if found]
        return pools + (workers.make(numbers, self.tasks, seeds) if numbers else [])

    def information(self) -> dict:
        """env_info of args.json."""
        return {
            "num_tasks": len(self.tasks), "task_names": self.tasks, "observation_dim": self.observation_dim,
            "action_dim": self.action_dim, "observation_dims": self.observation_dims, "action_dims": self.action_dims,
        }  # fmt: skip

    def reset(self) -> np.ndarray:
        """First observations [size, observation_dim]: a step that resets all."""
        self.done, self.last_returns = np.ones(self.size, bool), {}
        self.episode_return, self.episode_length = np.zeros(self.size), np.zeros(self.size, int)
        self.episode_success = np.full(self.size, np.nan)
        self.send(None)
        return self.recv().observations

    def send(self, actions: np.ndarray | None, resting: np.ndarray | None = None) -> None:
        """actions: [size, action_dim] in [-1, 1]. Rows where resting [size] is True are not stepped. Raises
        FloatingPointError for an action that is not finite: what a simulator makes of it is not the simulator's fault.
        """
        if actions is not None and not np.isfinite(actions).all():
            raise FloatingPointError("actions")
        self.stepping = []
        for rows, pool in zip(self.rows, self.pools, strict=True):
            places = np.arange(len(rows)) if resting is None else np.flatnonzero(~resting[rows])
            if len(places):
                pool.send(None if actions is None else actions[rows[places]], places)
                self.stepping.append((rows[places], pool))

    def recv(self) -> Step:
        """Raises FloatingPointError for an observation or reward that is not finite. Rows that were not stepped are as
        if they had been reset."""
        observations = np.zeros((self.size, self.observation_dim), np.float32)
        rewards, success = np.zeros(self.size, np.float32), np.full(self.size, np.nan, np.float32)
        terminated, truncated, restarted, stepped = np.zeros((4, self.size), bool)
        for rows, pool in self.stepping:
            results, stepped[rows] = pool.recv(), True
            observations[rows, : results.observations.shape[1]], rewards[rows] = results.observations, results.rewards
            terminated[rows], truncated[rows] = results.terminated, results.truncated
            success[rows], restarted[rows] = results.reported, results.restarted
        began, self.interrupted = (self.done & stepped) | restarted, bool(restarted.any())
        valid = stepped & ~began
        rewards = np.where(valid, rewards, 0)  # of a reset envpool gives what happens to be in memory, also NaN
        finite = np.isfinite(rewards) & np.isfinite(observations).all(axis=1)
        if not finite.all():
            raise FloatingPointError(f"observation or reward of {self.tasks[self.task_ids[finite.argmin()]]}")
        step = Step(
            observations, rewards, terminated & valid, truncated & ~terminated & valid, valid,
            np.where(valid, success, np.nan),
        )  # fmt: skip
        self.done = np.where(stepped, step.done, self.done)
        self.episode_return = np.where(began, 0, self.episode_return) + step.rewards
        self.episode_length = np.where(began, 0, self.episode_length) + valid
        self.episode_success = np.fmax(np.where(began, np.nan, self.episode_success), step.success)
        for row in np.flatnonzero(step.done):
            self.last_returns[f"train/return/{self.tasks[self.task_ids[row]]}"] = self.episode_return[row]
        return step

    def close(self) -> None:
        for pool in self.pools:
            pool.close()


EVAL_ENVS = 40  # at most, for several tasks: one of Meta-World's takes 25 MB, a dog 86 MB


def eval_copies(num_tasks: int, episodes: int) -> int:
    """Copies of each task that evaluation steps at once: a divisor of `episodes`, so that none is played in vain."""
    return max(n for n in range(1, episodes + 1) if episodes % n == 0 and (n == 1 or n * num_tasks <= EVAL_ENVS))


def act_in_rows(act: Callable, observations: np.ndarray, task_ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """act's actions [size, ...] in the given rows, 0 in the others. It is called for these rows alone, repeated to a
    half, a quarter, ... of all, so that it is compiled for a few sizes only."""
    size = len(task_ids)
    while size // 2 >= len(rows):
        size //= 2
    taken = np.resize(rows, size)
    chosen = np.asarray(act(observations[taken], task_ids[taken]))[: len(rows)]
    actions = np.zeros((len(task_ids), *chosen.shape[1:]), chosen.dtype)
    actions[rows] = chosen
    return actions


def evaluate(act: Callable, envs: ParallelEnvs, episodes: int, stop: list) -> list[dict] | None:
    """Means over whole episodes, a row of eval.csv per task, empty where a column has no meaning; None if `stop` fills
    or an environment fails meanwhile.

    act: observations [rows, |S|] and task_ids [rows] to actions [rows, |A|]. Every copy of a task plays the same number
    of episodes, so that short ones are not counted more often, and rests when it has.
    """
    returns, successes = [[[] for _ in envs.tasks] for _ in range(2)]
    left = np.ceil(episodes / np.bincount(envs.task_ids)).astype(int)[envs.task_ids]  # to play, of each row
    observations, actions = envs.reset(), np.zeros((envs.size, envs.action_dim), np.float32)
    while left.any():
        if stop or envs.interrupted:
            return None
        deciding = np.flatnonzero((left > 0) & (envs.episode_length % envs.action_repeat == 0))
        if len(deciding):
            actions[deciding] = act_in_rows(act, observations, envs.task_ids, deciding)[deciding]
        envs.send(actions, resting=left == 0)
        step = envs.recv()
        observations = step.observations
        left -= step.done
        for row in np.flatnonzero(step.done):
            returns[envs.task_ids[row]].append(envs.episode_return[row])
            successes[envs.task_ids[row]].append(envs.episode_success[row])
    table = []
    for task, episode_returns, episode_successes in zip(envs.tasks, returns, successes, strict=True):
        told = np.isfinite(episode_successes).any()  # a task may tell of success alone, and not of its lack
        mean_return, success = np.mean(episode_returns), np.nan_to_num(episode_successes).mean() if told else np.nan
        score = normalized_score(task, mean_return, success)  # linear in both
        table.append({
            "task": task, "episodes": len(episode_returns), "return": rounded(float(mean_return)),
            "success": "" if np.isnan(success) else round(float(success), 5),
            "score": "" if np.isnan(score) else round(float(score), 5),
        })  # fmt: skip
    return table


def frame_renderer(env: gym.Env):
    """A function that returns an RGB frame [height, width, 3]; HumanoidBench's own fails on current Gymnasium."""
    if not type(env.unwrapped).__module__.startswith("humanoid_bench"):
        return env.render
    import mujoco

    renderer = mujoco.Renderer(env.unwrapped.model, 256, 256)

    def render() -> np.ndarray:
        renderer.update_scene(env.unwrapped.data, camera=env.unwrapped.task.camera_name)
        return renderer.render()

    return render


VIDEO_FPS = 30  # every second step


def record_videos(act: Callable, envs: ParallelEnvs, run: "Run") -> None:
    """One episode of every task as RUN_DIR/videos/<task>-<step>.mp4, up to where the run is stopped. act: as in
    evaluate. What cannot be drawn is a warning."""
    for task_id, task in enumerate(envs.tasks):
        if run.stop:
            return
        path = run.directory.absolute() / "videos" / f"{file_name(task)}-{run.step}.mp4"
        partial_path = path.with_name(f".partial-{path.name}")  # the film of an earlier --play stays until there is one
        try:
            import imageio

            path.parent.mkdir(exist_ok=True)
            with (
                contextlib.chdir("."),  # back to here, wherever a task goes
                warnings.catch_warnings(action="ignore", category=RuntimeWarning),  # JAX's of ffmpeg's fork: it execs
                imageio.get_writer(partial_path, fps=VIDEO_FPS, macro_block_size=2) as video,
            ):
                for frame in episode_frames(act, task, task_id, envs, run.stop):
                    video.append_data(frame)
            partial_path.replace(path)
        except (Exception, SystemExit) as error:  # a graphics library or a package for drawing may be missing
            partial_path.unlink(missing_ok=True)
            tqdm.write(f"warning: no video of {task}: {error}", file=sys.stderr)


def episode_frames(act: Callable, task: str, task_id: int, envs: ParallelEnvs, stop: list) -> Iterator[np.ndarray]:
    """Every second frame of one episode."""
    with contextlib.closing(make_env(task, render_mode="rgb_array")) as env:
        render = frame_renderer(env)
        observation, done = env.reset()[0], False
        for time_step in itertools.count():
            if time_step % 2 == 0:
                yield render()
            if done or stop:
                return
            if time_step % envs.action_repeat == 0:
                padded = np.zeros((1, envs.observation_dim), np.float32)
                padded[0, : len(observation)] = observation
                action = np.asarray(act(padded, np.array([task_id])))[0]
            observation, _, terminated, truncated, _ = env.step(action[: env.action_space.shape[0]])
            done = terminated or truncated


# ======================================================================================================================
# Part 3 of 3, the run: arguments, run directory, curves, progress, signals, checkpoints, resume, errors. The same in
# all four scripts; part 1 says in SCRIPT, PACKAGES, RESUMABLE, RELEASED_CODE and AGGREGATES what differs.
# ======================================================================================================================

EVAL_COLUMNS = ("step", "updates", "wall_time", "task", "episodes", "return", "success", "score")
LOG_EVERY = 500  # steps between TensorBoard points and checks for values that are not finite
SIGNALS = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")]  # the last is Slurm's
PLAYABLE = {"play", "eval_episodes", "capture_video", "env_backend", "env_workers", "env_timeout", "pretrained"}


class UserError(Exception):
    """Something the user can mend: printed as one line, exit status 2."""


def parse_args(argv: list[str] | None = None) -> Args:
    """Arguments of the command line; with --resume and --play those of the saved run, overridden by the command
    line's."""
    words = [word.partition("=")[0].replace("_", "-") for word in (sys.argv[1:] if argv is None else argv)]
    flags = [word.replace("--no-", "--", 1) for word in words if word.startswith("--")]
    lists = {"--" + field.name.replace("_", "-") for field in fields(Args) if "tuple" in str(field.type)}
    for flag in dict.fromkeys(flag for flag in flags if flags.count(flag) > 1):
        if flag in lists:
            raise UserError(f"{flag} is given twice: its values follow one flag, as in {flag} A B")
        print(f"warning: {flag} is given twice; the last one counts", file=sys.stderr)
    args = tyro.cli(Args, args=argv)
    if args.resume and args.play:
        raise UserError("--resume and --play exclude each other: give one of them")
    if "" in (args.resume, args.play):  # as of an unset variable
        raise UserError("--resume and --play need a run directory, not an empty name")
    if not (args.resume or args.play):
        released = getattr(args, "variant", "paper") == "released-code"
        return check_ranges(tyro.cli(Args, args=argv, default=Args(**RELEASED_CODE)) if released else args)
    asked = f"--play {args.play}" if args.play else f"--resume {args.resume}"
    path = Path(args.play or args.resume) / "args.json"
    try:
        saved = json.loads(path.read_text())
        if saved.get("script", SCRIPT) != SCRIPT:
            raise UserError(f"{asked}: that run was made by {saved['script']}, not by this script")
        if args.play:  # the tasks by name, and nothing that writes
            saved |= {"env_ids": saved["env_info"]["task_names"], "suite": None, "resume": None, "buffer_size": 12}
            saved |= dict.fromkeys(("save_replay", "capture_video", "log_task_statistics", "track", "heatmap"), False)
        saved = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
        known = {field.name: saved[field.name] for field in fields(Args) if field.name in saved}  # older runs lack some
        default = Args(**{**known, "env_ids": tuple(saved["env_ids"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{asked}: no run of this script there ({path}: {error})") from error
    args = tyro.cli(Args, args=argv, default=default)
    free = PLAYABLE if args.play else RESUMABLE
    changed = [k for k, v in asdict(args).items() if v != getattr(default, k) and k not in free]
    if changed:
        names = ", ".join("--" + name.replace("_", "-") for name in changed)
        if args.play:
            raise UserError(f"--play takes the run's own arguments, not {names}; --eval-episodes may be given")
        raise UserError(f"a resumed run cannot change {names}; start a new run instead")
    return check_ranges(args)


def check_ranges(args: Args) -> Args:
    """Raises UserError for a number, also in a tuple, outside the interval that stands beside its field in Args."""
    for name, hint in get_type_hints(Args, include_extras=True).items():
        value = getattr(args, name)
        for interval in getattr(hint, "__metadata__", ()) if value is not None else ():
            low, high = map(float, interval[1:-1].split(","))
            for number in (value or (math.nan,)) if isinstance(value, tuple) else (value,):  # no tuple may be empty
                if not isinstance(number, int | float):  # of an args.json that was edited
                    raise UserError(f"--{name.replace('_', '-')} {value!r}: must be a number")
                inside = low <= number <= high and not (number == low and interval[0] == "(")
                if not inside or (number == high and interval[-1] == ")"):
                    raise UserError(f"--{name.replace('_', '-')} {value}: must be in {interval}")
    return args


def file_name(task: str) -> str:
    return task.replace("/", "-").replace(":", "-")


def rounded(value: float) -> float:
    """To four decimals; a small number to as many digits."""
    return round(value, 4) if abs(value) >= 0.1 else float(f"{value:.4g}")


def replace_file(path: Path, text: str) -> None:
    """Writes a file so that a crash, also of the machine, or a full disk leaves the old one."""
    partial_path = path.with_name(f".partial-{path.name}")
    with partial_path.open("w", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial_path.replace(path)


def save_array(path: Path, array: np.ndarray) -> None:
    """Whole or not at all, and beside a file that another process maps."""
    partial_path = path.with_name(f".partial-{path.name}")
    try:
        np.save(partial_path, array)
    except OSError as error:  # of a full disk numpy says how many items it wrote, without a number
        raise OSError(error.errno or errno.ENOSPC, "cannot write", str(partial_path)) from error
    partial_path.replace(path)


class Run:
    """A run directory, owned by one process: curves, progress, signals, checkpoints, resume. Use it in a `with`.

    step, updates: vector steps (offline: batches) and gradient steps done so far. stop: filled by the first Ctrl-C or
    SIGTERM, upon which the run writes a checkpoint and ends; a second one ends the process at once.

    With --play it is the end of a run of which only one evaluation is left: nothing is owned, logged or written but
    videos, and the run may still be going on in another process.
    """

    def __init__(self, args: Args, name: str, total: int, unit: str = "step", experiment: str = ""):
        if "DISPLAY" not in os.environ:  # training needs no graphics library, videos need a headless one
            os.environ.setdefault("MUJOCO_GL", "egl" if args.capture_video else "disable")
        self.args, self.total, self.unit, self.stop = args, total, unit, []
        self.step, self.updates, self.last_evaluation, self.rows = 0, 0, -1, []
        self.seconds, self.tensorboard, self.bar, self.wandb = 0.0, None, None, None
        self.curve, self.cut, self.save_at, self.warned = [], 0, math.inf, set()  # save_at: on the monotonic clock
        self.asked: dict[int, float] = {}  # signal: when it came first
        name = args.run_name or f"{file_name(name)}__{experiment or args.exp_name}__{args.seed}__{int(time.time())}"
        try:
            jax.devices()
        except (RuntimeError, AssertionError) as error:
            asked = f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"
            raise UserError(f"JAX has no device ({asked}); unset it, or install jax for it") from error
        self.directory, self.created, self.lock = Path(args.resume or Path(args.run_root) / name), [], None
        if args.play:
            self.directory = Path(args.play)
            return
        if re.search(r"\[.*\]", path := str(self.directory.absolute())) or (os.sep == "/" and "\\" in path):
            raise UserError(f"{path}: Orbax cannot save below a name with [ ] or \\ in it; choose another or rename it")
        parts = [*(self.directory / "checkpoints").glob("[!.]*"), *self.directory.glob("embedding.csv")]
        if not args.resume and parts:
            go_on = f"continue it with --resume {self.directory}, or choose another --run-name"
            raise UserError(f"{self.directory} holds a run: {go_on}")
        for step in checkpoint_steps(self.directory)[:1] if args.resume else ():
            with contextlib.suppress(OSError, ValueError, KeyError):  # a damaged one is told when it is loaded
                self.refuse_finished(read_counters(self.directory / "checkpoints" / str(step)))
        self.created = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
        try:
            for number in itertools.count(2):  # two runs that start in one second get two directories
                with contextlib.suppress(FileExistsError):
                    self.directory.mkdir(parents=True, exist_ok=bool(args.resume or args.run_name))
                    break
                if not self.directory.is_dir():
                    raise NotADirectoryError(errno.ENOTDIR, "a file is in the way")
                self.directory = Path(args.run_root) / f"{name}-{number}"
                self.created = [self.directory]
            self.lock = os.open(self.directory, os.O_RDONLY) if fcntl else None
        except OSError as error:
            raise UserError(f"cannot make {self.directory}: {error.strerror}; choose another --run-root") from error
        try:
            if fcntl:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it, however the process ends
        except BlockingIOError as error:
            os.close(self.lock)
            raise UserError(f"{self.directory} is in use by another process") from error
        except OSError:  # a file system without locks
            pass

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.tensorboard:
            with contextlib.suppress(OSError):  # a full disk
                self.tensorboard.close()
        if self.wandb:
            with contextlib.suppress(Exception):  # its process may have died
                self.wandb.finish()
        started = self.bar is not None and not self.args.play
        if isinstance(error, FloatingPointError) and started:  # for those who compare runs: see scores.py
            text = json.dumps({**self.information, "diverged_at": self.step}, indent=2)
            with contextlib.suppress(OSError):
                replace_file(self.directory / "args.json", text)
        if self.lock is not None:
            os.close(self.lock)
        with contextlib.suppress(OSError):
            for path in self.created:
                path.rmdir()  # where nothing was written
        if isinstance(error, (FloatingPointError, WorkerFailure)):
            good = [f"{self.directory}/checkpoints/{step}" for step in checkpoint_steps(self.directory)[:1]]
            last = f"the last good checkpoint is {good[0]}" if good else "there is no checkpoint yet"
            what = "not finite" if isinstance(error, FloatingPointError) else "environments failed"
            raise UserError(f"{what} at step {self.step:,}: {error}; {last}") from error

    def seeds(self) -> list[int]:
        """Two seeds, of training and evaluation environments; a resumed run does not repeat its beginning."""
        resumed_at = (checkpoint_steps(self.directory) or [0])[0]
        return np.random.SeedSequence([self.args.seed, resumed_at]).generate_state(2).tolist()

    def restore(self, state, replay=None) -> tuple[Any, dict | None]:
        """With --resume and --play learner and counters of the newest undamaged checkpoint, else the given state and
        None. --resume fills `replay`."""
        if not (self.args.resume or self.args.play):
            return state, None
        state, counters = load_checkpoint(self.directory, state, None if self.args.play else replay, self.args.play)
        self.step, self.updates, self.seconds = counters["step"], counters["updates"], counters["wall_time"]
        if self.args.play:
            self.total = self.step
            print(f"playing {self.directory}, step {self.step:,}")
            return state, counters
        self.refuse_finished(counters)
        self.last_evaluation = counters["last_evaluation"]
        print(f"resumed {self.directory} at step {self.step:,}")
        return state, counters

    def refuse_finished(self, counters: dict) -> None:
        if getattr(self.args, "save_replay", False) and counters["step"] == self.total:
            directory = self.directory / "replay"  # not asked for then, or the disk was full: the checkpoint has it
            if not directory.exists() or any(directory.glob(".partial-*")):
                return
        if counters["step"] > self.total or counters["last_evaluation"] >= self.total:
            longer = "--total-updates" if self.unit == "update" else "--total-timesteps"
            step = f"{counters['step']:,}"
            raise UserError(f"{self.directory} is finished (step {step}); to go on, give a larger {longer}")

    def start(self, **information) -> None:
        """Writes args.json: arguments, versions and `information`. Opens everything else unless there is nothing to do.
        What the curves hold beyond the checkpoint that a run resumes from is dropped, and that it diverged there."""
        if self.args.play:
            self.bar, self.started = tqdm(disable=True), time.monotonic()
            return
        names = ("args.json", "eval.csv", "events.*", "statistics", "videos")
        found = [path for name in names for path in self.directory.glob(name) if not self.args.resume]
        if found:  # of a run of the same name that left no checkpoint
            before = self.directory / f"before-{time.time_ns()}"
            before.mkdir()
            for path in found:
                path.rename(before / path.name)
        self.information = {**asdict(self.args), **run_information(), **information}
        replace_file(self.directory / "args.json", json.dumps(self.information, indent=2))
        print(f"device: {self.information['device']}; run directory: {self.directory}")
        if self.total == 0:
            return
        for signum in SIGNALS:
            if not (signum.name == "SIGHUP" and signal.getsignal(signum) == signal.SIG_IGN):  # nohup's
                signal.signal(signum, self.ask_to_stop)
        self.curve = [row for row in read_curve(self.directory / "eval.csv") if row["step"] <= self.last_evaluation]
        self.write_curve()
        if self.args.track:
            path = self.directory.resolve()
            unique = re.sub(r"[^\w-]", "-", path.name) + f"-{zlib.crc32(str(path).encode()):08x}"
            about = {"project": self.args.wandb_project, "name": path.name, "id": unique}
            try:
                import wandb

                self.wandb = wandb.init(resume="allow", dir=str(self.directory), config=self.information, **about)
            except Exception as error:  # not installed, not logged in, no network
                ways = "pip install wandb, wandb login, or set WANDB_MODE=offline"
                raise UserError(f"--track: {' '.join(str(error).split())}; {ways}") from error
        self.open_events()
        quiet = 0.5 if sys.stderr.isatty() else 30
        self.bar = tqdm(total=self.total, initial=self.step, unit=self.unit, mininterval=quiet)
        self.started, self.logged = time.monotonic() - self.seconds, (time.monotonic(), self.step)
        self.saved = self.step, self.last_evaluation

    def ask_to_stop(self, signum: int, frame) -> None:
        """A second Ctrl-C ends the process. Other signals come twice for one event, as from `timeout` or a terminal
        that is closed: only a later one does."""
        since = time.monotonic() - self.asked.setdefault(signum, time.monotonic())
        self.stop.append(signum)
        if signum == signal.SIGINT or since > 2:
            signal.signal(signum, signal.SIG_DFL)
        if since > 2:
            os.kill(os.getpid(), signum)

    def open_events(self) -> None:
        """TensorBoard's file, written without the usual thread, in which a full disk would go unnoticed and block."""
        from tensorboardX.event_file_writer import EventsWriter  # here: it imports torch where that is installed
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        try:
            self.tensorboard = EventsWriter(str(self.directory / "events"))
            if self.step:  # hides what an earlier process wrote beyond the checkpoint
                log = SessionLog(status=SessionLog.START)
                self.tensorboard.write_event(Event(step=self.step + 1, wall_time=time.time(), session_log=log))
        except OSError as error:
            self.cannot_write("TensorBoard's file", error)

    def cannot_write(self, what: str, error: Exception) -> None:
        """Logging never ends a run: what cannot be written is left out, with one warning."""
        if what not in self.warned:
            reason = getattr(error, "strerror", None) or describe(error)
            tqdm.write(f"warning: cannot write {what}: {reason}; the run goes on without", file=sys.stderr)
        self.warned.add(what)

    def write_curve(self) -> None:
        """All of it: what a full disk left out comes with the next evaluation."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, EVAL_COLUMNS)
        writer.writeheader()
        writer.writerows(self.curve)
        try:
            replace_file(self.directory / "eval.csv", text.getvalue())
        except OSError as error:
            self.cannot_write("eval.csv", error)

    def evaluation_due(self) -> bool:
        due = self.step % self.args.eval_every == 0 or self.step == self.total or self.last_evaluation < 0
        return due and self.last_evaluation < self.step and not self.stop

    def checkpoint_due(self) -> bool:
        due = self.step % self.args.checkpoint_every == 0 or self.over() or time.monotonic() >= self.save_at
        return due and self.step > 0 and not self.args.play and (self.step, self.last_evaluation) != self.saved

    def environment_failed(self, reason: str) -> None:
        """Says so; a checkpoint of the healthy learner is due at once."""
        tqdm.write(f"warning: step {self.step:,}: {reason}; its episodes are dropped, it starts again", file=sys.stderr)
        self.save_at = 0

    def over(self) -> bool:
        return self.step == self.total or bool(self.stop)

    def log_due(self) -> bool:
        return self.step % LOG_EVERY == 0

    def advance(self, updates: int) -> None:
        """Counts a step with so many updates."""
        self.step, self.updates = self.step + 1, self.updates + updates
        self.bar.update()

    def log(self, values: dict) -> None:
        """Scalars and the speed since the last call. Raises FloatingPointError for a value that is not finite."""
        if bad := [name for name, value in values.items() if not np.isfinite(value)]:
            raise FloatingPointError(", ".join(bad))
        now, (before, step) = time.monotonic(), self.logged
        speed = {f"speed/{self.unit}s_per_second": (self.step - step) / (now - before), "updates": self.updates}
        self.scalars({**values, **speed})
        self.logged = now, self.step

    def scalars(self, values: dict, step: int | None = None) -> None:
        """Points in TensorBoard and W&B, of this step by default."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        step = self.step if step is None else step
        try:
            for name, value in values.items() if self.tensorboard else ():
                event = Event(step=step, wall_time=time.time(), summary=scalar(name, float(value)))
                self.tensorboard.write_event(event)
            if self.tensorboard:
                self.tensorboard.flush()
        except OSError as error:  # the file's end may be cut: the next checkpoint opens another
            with contextlib.suppress(OSError):
                self.tensorboard.close()
            self.tensorboard = None
            self.cannot_write("TensorBoard's file", error)
        try:
            if self.wandb:
                self.wandb.log({**values, "step": step})
        except Exception as error:  # its process died
            self.wandb = None
            self.cannot_write("to Weights & Biases", error)

    def log_evaluation(self, rows: list[dict] | None) -> bool:
        """Writes one row per task to eval.csv and shows the means; False if the evaluation was cut (rows None), by a
        signal or by an environment that failed. Raises WorkerFailure when that happens again and again."""
        if rows is None:
            self.cut += not self.stop
            if self.cut > Worker.max_failures:
                raise WorkerFailure(f"{self.cut} evaluations of this policy, each cut by an environment that failed")
            return False
        self.last_evaluation, self.cut = self.step, 0
        counts = {"step": self.step, "updates": self.updates, "wall_time": round(time.monotonic() - self.started, 2)}
        self.rows, values = [{**counts, **row} for row in rows], {}
        if self.args.play:
            return True
        self.curve += self.rows
        self.write_curve()
        for column in ("return", "success", "score"):
            if found := {f"eval/{column}/{row['task']}": row[column] for row in rows if row[column] != ""}:
                totals = {name: float(mean(list(found.values()))) for name, mean in AGGREGATES.items()}
                values |= {**found, **{f"eval/{name}_{column}": total for name, total in totals.items()}}
                self.bar.set_postfix({column: f"{totals['mean']:.3f}"}, refresh=False)
        self.scalars(values)
        return True

    def save(self, state, replay=None, **counters) -> None:
        """Writes a checkpoint. Raises FloatingPointError, before anything is written, if a parameter is not finite."""
        for leaf in jax.tree.leaves(state):
            if leaf.ndim and jnp.issubdtype(leaf.dtype, jnp.floating) and not jnp.isfinite(leaf).all():
                raise FloatingPointError("parameters")
        counters |= {
            "step": self.step, "updates": self.updates, "last_evaluation": self.last_evaluation,
            "wall_time": time.monotonic() - self.started,
        }  # fmt: skip
        self.write_curve()  # with rows that a full disk refused, as no resumed run makes them again
        try:
            save_checkpoint(self.directory, self.step, state, replay, counters, self.args.keep_checkpoints)
        except Exception as error:  # Orbax reports a full disk in exceptions of its own
            shutil.rmtree(self.directory / "checkpoints" / f".partial-{self.step}", ignore_errors=True)
            reason = getattr(error, "strerror", None) or describe(error)[:200]
            if "No space left" in str(error) or "quota" in str(error).lower():
                reason = "disk full, free space"
            message = f"cannot write the checkpoint of step {self.step:,}; earlier ones are whole: {reason}"
            if self.over():
                raise UserError(f"{message}, then continue with --resume {self.directory}") from error
            tqdm.write(f"warning: {message}; another try in a minute", file=sys.stderr)
            self.save_at = time.monotonic() + 60
            return
        self.saved, self.save_at = (self.step, self.last_evaluation), math.inf
        if not self.tensorboard:
            self.open_events()

    def finish(self) -> None:
        """Says how the run ended: the last evaluation, or how to go on."""
        self.bar.close()
        if self.stop and self.last_evaluation < self.total:
            resume = f"; continue with --resume {self.directory}" if checkpoint_steps(self.directory) else ""
            print(f"stopped at step {self.step:,}{resume}")
            return
        if not self.rows:  # a finished run, resumed for its replay
            return
        width = max(len(row["task"]) for row in self.rows)
        print(f"{'task':<{width}} {'return':>10} {'success':>8} {'score':>7}")
        for row in self.rows:
            print(f"{row['task']:<{width}} {row['return']:>10.1f} {row['success']:>8} {row['score']:>7}")
        if scores := [row["score"] for row in self.rows if row["score"] != ""]:
            for name, mean in AGGREGATES.items():
                print(f"{name:<{width}} {'':>10} {'':>8} {mean(scores):>7.3f}")


def read_curve(path: Path) -> list[dict]:
    """Rows of eval.csv with whole numbers as steps, also where a spreadsheet or a person has been at work: columns in
    another order, other separators, a byte order mark, 60.0 for 60. Rows that cannot be read are left out; then the
    file is kept as it was found, beside it."""
    if not path.exists():
        return []
    text, rows = path.read_text(encoding="utf-8-sig", errors="replace"), []
    separator = max(",;\t", key=text.partition("\n")[0].count)
    try:
        found = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=separator))
    except csv.Error:  # such as a quotation mark that is never closed
        found = [{}]
    for row in found:
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, OverflowError):
            values = {name: row[name].strip().replace(",", ".") for name in EVAL_COLUMNS}
            values |= {name: int(float(values[name])) for name in ("step", "updates", "episodes")}
            for name in ("wall_time", "return", "success", "score"):
                float(values[name] or 0)
            rows.append(values)
    if len(rows) < len(found) or (found and list(found[0]) != list(EVAL_COLUMNS)):
        kept = path.with_name(f"eval-as-found-{time.time_ns()}.csv")
        shutil.copyfile(path, kept)
        print(f"warning: {path} was changed: {len(rows)} of {len(found)} rows read; as found: {kept}", file=sys.stderr)
    return rows


def run_information() -> dict:
    """Versions, device and commit, for args.json."""
    try:
        git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except ImportError:
            versions[package] = None
    return {"script": SCRIPT, "versions": versions, "device": jax.devices()[0].device_kind, "git_commit": commit}


def parameter_count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def checksum(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Steps of the complete checkpoints, newest first."""
    return sorted((int(p.name) for p in (run_dir / "checkpoints").glob("[0-9]*") if p.name.isdigit()), reverse=True)


def save_checkpoint(run_dir: Path, step: int, state, replay, counters: dict, keep: int) -> None:
    """Writes checkpoints/<step>/: learner state (a NamedTuple, by Orbax), replay, counters, and every file's checksum.

    The directory is renamed into place when complete. Replay is written once: a checkpoint holds the slots since the
    previous one and hard links to the older pieces.
    """
    root = run_dir / "checkpoints"
    path, partial_path = root / str(step), root / f".partial-{step}"
    for unfinished in root.glob(".partial-*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    if sum(leaf.nbytes for leaf in jax.tree.leaves(state)) > shutil.disk_usage(run_dir).free:
        raise OSError(errno.ENOSPC, "No space left on device")  # before Orbax's threads meet it
    (partial_path / "replay").mkdir(parents=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((partial_path / "state").absolute(), state._asdict())
    files = {}
    if replay is not None:
        files = save_replay_piece(root, step, partial_path, replay)
        counters["replay_inserted"] = replay.inserted
    for file in sorted(partial_path.rglob("*")):
        name = str(file.relative_to(partial_path))
        if file.is_file() and name not in files:
            files[name] = checksum(file)
    contents = {**counters, "files": files}
    contents["crc32"] = zlib.crc32(json.dumps(contents).encode())
    replace_file(partial_path / "checkpoint.json", json.dumps(contents))
    before = root / f".partial-{step}-before"  # of the same step: in place until the new one can be
    if path.exists():
        path.rename(before)
    try:
        partial_path.rename(path)
    except OSError:
        if before.exists():
            before.rename(path)
        raise
    shutil.rmtree(before, ignore_errors=True)
    for old in checkpoint_steps(run_dir)[keep:]:
        with contextlib.suppress(OSError):  # one that a reader holds open (NFS): the next checkpoint tries again
            (root / str(old)).rename(root / f".partial-{old}")
            shutil.rmtree(root / f".partial-{old}", ignore_errors=True)


def save_replay_piece(root: Path, step: int, partial_path: Path, replay) -> dict[str, int]:
    """Links the previous checkpoint's pieces of replay into a new one and writes the slots since then as another.

    Returns the checksums of the linked pieces: those of when they were written, as new ones would hide damage.
    """
    first, files, pieces = 0, {}, {}
    for previous in [root / str(s) for s in checkpoint_steps(root.parent) if s < step][:1]:
        with contextlib.suppress(OSError, ValueError, KeyError):  # damaged since: the whole replay is written again
            known = read_counters(previous)["files"]
            pieces = {previous / name: known[name] for name in sorted(known) if name.startswith("replay/")}
    for path, crc in pieces.items() if all(map(Path.is_file, pieces)) else ():
        end = int(path.stem.split("-")[1])
        first = max(first, end)
        if end > replay.inserted - replay.slots.shape[1]:  # older pieces were overwritten in the ring
            files[f"replay/{path.name}"], link = crc, partial_path / "replay" / path.name
            try:
                os.link(path, link)
            except OSError:  # a file system without hard links
                shutil.copy2(path, link)
    # with the slot at the head: it holds the last observation
    numbers = np.arange(max(first, replay.inserted - replay.slots.shape[1] + 1), replay.inserted + 1)
    with (partial_path / f"replay/{numbers[0]:012d}-{replay.inserted:012d}.npy").open("wb") as piece:
        header = {"descr": replay.slots.dtype.descr, "fortran_order": False, "shape": (len(replay.slots), len(numbers))}
        np.lib.format.write_array_header_1_0(piece, header)
        for slots in replay.slots:  # one task at a time: a copy of the whole replay may not fit in memory
            piece.write(slots[numbers % len(slots)])
    return files


def read_counters(path: Path) -> dict:
    """checkpoint.json of one checkpoint. Raises ValueError if it is damaged."""
    counters = json.loads((path / "checkpoint.json").read_text())
    if not isinstance(counters, dict) or counters.pop("crc32") != zlib.crc32(json.dumps(counters).encode()):
        raise ValueError("checkpoint.json does not match its checksum")
    return counters


def load_checkpoint(run_dir: Path, state, replay=None, read_only=False) -> tuple[Any, dict]:
    """Newest undamaged checkpoint: learner state like `state`, and counters; fills `replay`. Executes no file. Unless
    read_only, damaged ones get another name."""
    damaged_paths, steps = [], checkpoint_steps(run_dir)
    for step in steps:
        path = run_dir / "checkpoints" / str(step)
        try:
            counters = read_counters(path)
            pieces = [name for name in sorted(counters["files"]) if name.startswith("replay/") and replay is not None]
            wanted = [*pieces, *(name for name in counters["files"] if not name.startswith("replay/"))]
            damaged = [name for name in wanted if checksum(path / name) != counters["files"][name]]
            if damaged:
                raise ValueError(f"{damaged[0]} does not match its checksum")
            with ocp.StandardCheckpointer() as checkpointer:
                try:
                    state = type(state)(**checkpointer.restore((path / "state").absolute(), state._asdict()))
                except ValueError as error:  # Orbax's, which prints both trees; the files are as they were written
                    another = "is whole, but of other arguments or of another version of this script"
                    raise UserError(f"checkpoint {path} {another}; start a new run") from error
            for piece in (path / name for name in pieces):
                ring, inserted = replay.slots.shape[1], counters["replay_inserted"]
                first, last = map(int, piece.stem.split("-"))
                saved = np.load(piece, mmap_mode="r", allow_pickle=False)[:, max(0, inserted - ring + 1 - first) :]
                numbers = np.arange(last + 1 - saved.shape[1], last + 1) % ring
                for slots, records in zip(replay.slots, saved, strict=True):
                    slots[numbers] = records
                replay.inserted = inserted
            for damaged_path in () if read_only else damaged_paths:  # so that no later checkpoint builds on them
                with contextlib.suppress(OSError):  # where nothing may be written, there are no later ones
                    damaged_path.rename(damaged_path.with_name(f"damaged-{damaged_path.name}-{time.time_ns()}"))
            return state, counters
        except (OSError, ValueError, KeyError, TypeError) as error:
            gone = isinstance(error, FileNotFoundError | NotADirectoryError)
            if isinstance(error, OSError) and not (gone or read_only):  # it may be read again in a minute
                reason = error.strerror or error
                raise UserError(f"cannot read checkpoint {path}: {reason}; try again, or move it away") from error
            print(f"warning: checkpoint {path} is damaged ({error}); trying the one before", file=sys.stderr)
            damaged_paths.append(path)
    if read_only and set(checkpoint_steps(run_dir)) - set(steps):  # written since, and those removed
        return load_checkpoint(run_dir, state, replay, read_only)
    asked, way_out = ("play", "wait for one") if read_only else ("resume", "start a new run")
    raise UserError(f"--{asked} {run_dir}: no undamaged checkpoint in {run_dir / 'checkpoints'}; {way_out}")


class Output:
    """A standard stream whose reader may go away: from then on it leads nowhere. Output is never worth a run, nor is a
    letter that the terminal lacks. What a full disk refuses is lost, not what comes when it has space again."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # None where it was closed, as by `>&-`
        if isinstance(self.stream, io.TextIOWrapper):
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self.guarded(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self.guarded(self.stream.flush)

    def guarded(self, function: Callable, *arguments) -> None:
        try:
            function(*arguments)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


if __name__ == "__main__":
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    try:
        main(parse_args())
    except (UserError, OSError, MemoryError, jax.errors.JaxRuntimeError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            message = f"disk full ({error.filename or 'run directory'}): free space, then --resume the run directory"
        elif isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in message:
            message = "out of memory: lower the width, --batch-size or, online, --buffer-size"
        elif isinstance(error, jax.errors.JaxRuntimeError):
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before the run listens to signals, or in --play
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # JAX may be compiling in threads of its own, which an orderly end would crash
