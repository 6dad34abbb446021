# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax==0.10.2", "flax==0.12.8", "optax==0.2.8", "orbax-checkpoint==0.12.8", "numpy==2.4.6", "tyro==1.0.17",
#   "gymnasium==1.4.0", "envpool==1.2.5", "metaworld==3.0.0",
#   "mujoco==3.2.0; python_version < '3.13'", "mujoco==3.8.1; python_version >= '3.13'",
#   "dm_control==1.0.21.post1; python_version < '3.13'",
#   "tensorboardX==2.6.5", "wandb==0.31.0", "tqdm==4.70.1", "imageio[ffmpeg]==2.38.1", "matplotlib==3.11.2",
# ]
# ///
"""Transfer of a multi-task SAC+BRC agent to new tasks: by its weights, by a task embedding alone, or by its data.

"Bigger, Regularized, Categorical: High-Capacity Value Functions are Efficient Multi-Task Learners"
(Nauman et al., 2025, arXiv:2505.23150), Section 4 "Transfer learning" and Figures 2, 10, 11 and 24. It starts from the
run directory of a multi-task run of brc_sac_continuous.py and never acts in the pretraining tasks again:

  model      a single-task learner starts from the pretrained actor, critic and target critic, with a new embedding, and
             learns online from the new task alone: SAC+BRC as in brc_sac_continuous.py              (Figures 2, 10, 11)
  embedding  everything is frozen but the embedding e of the new task, inferred from --adaptation-transitions of it:
               selected  the pretrained e_j with the lowest TD(e) on all transitions, among those that succeeded while
                         they acted, if any did    (the paper's few-shot, Figure 11: "the best-performing"; how is ours)
               random    one of the pretrained e_j                               (the paper's zero-shot, Figure 11)
               tuned     Adam on TD(e) from the selected one; the e with the lowest TD(e) on the way         (ours)
               mean      the mean of the pretrained e_j, of unit norm again                                  (ours)
               oracle    with --heatmap: the e_j that evaluation itself finds best, which no method can know
  data       a fresh learner; a share of each batch is transitions of pretraining (Ball et al., 2023) (Figure 11):
               single-task  as if they were the new task's, so one Gbar covers all of them              (the paper's)
               multi-task   each with its own task's embedding and Gbar, in a critic of old and new tasks       (ours)
  scratch    the control: the same learner with nothing given

  TD(e)      KL(y || p_k(s, a, e)), summed over critics k, mean over transitions; y gets no gradient. (Cross-entropy
             alone would prefer the e whose own target is sharpest.)
  y          as in C.2: projection of  r V_max / (Gbar + lambda) + gamma (1 - terminated) (z - alpha log pi(a'|s', e))
             with a' ~ pi(s', e), z with the target critics' mean p(s', a', e); Gbar and lambda (Eq. 2-4) are those of
             the pretraining task that e comes from, so that TD(e_j) compares e_j whose tasks have a similar Gbar

All four protocols have the networks of the pretrained run, and what --variant chose in pretraining (embedding norm,
tail of a truncated return, lambda) holds here, too. A new task may have fewer observations and actions than the
pretrained agent: they are padded as in pretraining.

  python brc_sac_continuous.py --env-ids metaworld/reach metaworld/door-close metaworld/handle-press --run-name many
  python brc_embedding_transfer.py --pretrained runs/many --env-ids metaworld/reach-wall                   # model
  python brc_embedding_transfer.py --pretrained runs/many --env-ids metaworld/reach-wall --protocol scratch
  python brc_embedding_transfer.py --pretrained runs/many --suite metaworld-transfer --protocol embedding --heatmap
  python brc_embedding_transfer.py --resume runs/RUN                                                   # continue a run
  python brc_embedding_transfer.py --play runs/RUN --capture-video                                     # watch it
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
from functools import cache, partial
from importlib.metadata import version
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

import flax.linen as nn
import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ======================================================================================================================
# Part 1 of 3, the algorithm. SAC+BRC's agent and replay are copies of brc_sac_continuous.py's, whose args are here
# merged_settings; transfer itself begins at "the pretrained agent". Part 2: tasks and environments. Part 3: the run.
# ======================================================================================================================

SCRIPT = "brc_embedding_transfer"
PACKAGES = ("jax", "flax", "optax", "envpool", "mujoco", "dm_control", "metaworld", "gymnasium")
AGGREGATES = {"mean": np.mean}  # over tasks, for what an evaluation reports

PositiveInt = Annotated[int, "[1, inf)"]  # intervals are checked in part 3
NonNegativeInt = Annotated[int, "[0, inf)"]
NonNegativeFloat = Annotated[float, "[0, inf)"]


@dataclass
class Args:
    """Transfer of a multi-task SAC+BRC agent (Nauman et al., 2025, Section 4). Learning is Table 3's, the networks are
    the pretrained run's."""

    pretrained: str | None = None
    """run directory of a multi-task run of brc_sac_continuous.py; scratch takes its arguments and sizes, none of its
    weights or data"""
    protocol: Literal["model", "embedding", "data", "scratch"] = "model"
    """what of the pretrained run is used: its weights, its embeddings with everything frozen, its data, or nothing"""
    env_ids: tuple[str, ...] = ()
    """new tasks, as family/task; model, data and scratch learn one task a run"""
    suite: str | None = None
    """a set of new tasks by name: metaworld-transfer, hb-medium-transfer, hb-hard-transfer or shadowhand-transfer"""
    seed: Annotated[int, "[0, 2147483648)"] = 1
    """seed of fresh networks, exploration, replay sampling, environments and the random embedding"""
    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the run's name (default: the file's, so that a renamed copy is its own)"""
    run_name: str | None = None
    """name of the run directory (default: {suite or first task}__{exp_name}-{protocol}__{seed}__{unix time})"""
    run_root: str = "runs"
    """directory that holds the run directories"""
    resume: str | None = None
    """run directory to continue from its newest good checkpoint, with the saved arguments; those of length, evaluation,
    checkpoints, logging, videos and environments may be given anew"""
    play: str | None = None
    """run directory whose newest good checkpoint is evaluated, with --capture-video filmed; nothing else is written"""
    env_backend: Literal["auto", "envpool", "gymnasium"] = "auto"
    """envpool steps dmc/ and metaworld/ tasks fastest; gymnasium is the reference and runs every family"""
    env_workers: Annotated[int | None, "[1, inf)"] = None
    """processes for the environments that envpool does not step (default: one per core, at most one per task)"""
    env_timeout: Annotated[float, "(0, inf)"] = 600.0
    """seconds after which such a process counts as hung: it is started again, and its episodes are dropped"""
    total_timesteps: NonNegativeInt = 500_000
    """environment steps of model, data and scratch (Figure 11); 0 builds everything and exits"""
    learning_starts: PositiveInt = 5_000
    """steps before the first update: of the pretrained policy in model, uniformly random in data and scratch"""
    eval_every: PositiveInt = 25_000
    """environment steps between evaluations"""
    eval_episodes: PositiveInt = 10
    """evaluation episodes, actions at the policy's mean"""
    checkpoint_every: PositiveInt = 100_000
    """environment steps between checkpoints; one more is written at the end and when stopped"""
    keep_checkpoints: PositiveInt = 2
    """newest checkpoints to keep"""
    capture_video: bool = False
    """write an mp4 of one evaluation episode to RUN_DIR/videos/ (headless: MUJOCO_GL=egl)"""
    track: bool = False
    """log to Weights & Biases too (WANDB_MODE=offline is respected)"""
    wandb_project: str = "brc"
    """Weights & Biases project"""

    embedding_init: Literal["mean", "best", "random"] = "mean"
    """model: the new embedding is the mean of the pretrained ones (the paper does not say), a random one of them, or
    the best, which costs the first --adaptation-transitions steps, evaluations due meanwhile, and the one at 0"""
    load_optimizer: bool = False
    """model: continue with the pretrained optimizers' moments, too"""
    adaptation_transitions: PositiveInt = 300
    """transitions of a new task from which embedding, and --embedding-init best, infer its embedding (Section 5)"""
    embedding_lr: NonNegativeFloat = 3e-4
    """embedding: Adam learning rate of the tuned embedding (1e-4 to 1e-2 do alike: benchmark/results/README.md)"""
    embedding_updates: NonNegativeInt = 500
    """embedding: gradient steps on the tuned embedding, each on all transitions"""
    heatmap: bool = False
    """embedding: evaluate every pretrained embedding on every new task, to heatmap.csv and heatmap.png (Figure 24)"""
    prior_learner: Literal["single-task", "multi-task"] = "single-task"
    """data: what learns from pretraining's transitions: one task, to which they seem to belong (the paper's), or each
    with its own embedding and Gbar (ours)"""
    prior_fraction: Annotated[float | None, "[0, 1)"] = 0.5
    """data: share of pretraining transitions in each batch (Ball et al., 2023, on whom D.1 builds, take half); None
    samples all transitions alike, as from a buffer that held pretraining's (Section 4)"""

    discount: Annotated[float | None, "[0, 1)"] = None
    """gamma (default: the pretrained run's)"""
    batch_size: Annotated[int | None, "[1, inf)"] = None
    """transitions per update (default: 256 for one task, as in the released code, though Appendix D applies Table 3's
    1024 to it too; 1024 with --prior-learner multi-task)"""
    utd: PositiveInt = 2
    """updates per environment step (Table 3)"""
    buffer_size: Annotated[int, "[9, inf)"] = 1_000_000
    """replay capacity (Table 3); a ring of fewer than 9 slots could hold nothing but resets"""
    polyak_tau: Annotated[float, "[0, 1]"] = 5e-3
    """rate of the target critic's moving average, after every update (Table 3)"""
    actor_lr: NonNegativeFloat = 3e-4
    """AdamW learning rate of the actor (Table 3)"""
    critic_lr: NonNegativeFloat = 3e-4
    """AdamW learning rate of the critic and the task embeddings (Table 3)"""
    temperature_lr: NonNegativeFloat = 3e-4
    """learning rate of the temperature (Table 3), by Adam with b1 = 0.5 as in the released code"""
    weight_decay: NonNegativeFloat = 1e-4
    """AdamW weight decay, of all parameters (Table 3)"""
    initial_temperature: Annotated[float | None, "[1e-12, inf)"] = None
    """alpha at the start (default: in model that of the end of pretraining, else the pretrained run's at its start)"""
    target_entropy: Annotated[float | None, "(-inf, inf)"] = None
    """the policy entropy that the temperature aims at (default: -|A|/2 with the task's own |A|, as in the released code
    and BRO; Table 3 prints |A|/2)"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """number format of the products inside the critic's blocks, where nearly all arithmetic is; everything else, its
    first and last layer too, is float32 (default: the pretrained run's)"""


RELEASED_CODE: dict = {}  # the pretrained run decides what the paper's variant is
RESUMABLE = {  # arguments that a resumed run may change
    "total_timesteps", "eval_every", "eval_episodes", "checkpoint_every", "keep_checkpoints", "capture_video", "track",
    "wandb_project", "env_backend", "env_workers", "env_timeout", "resume", "pretrained",
}  # fmt: skip
BATCH_SIZES = {"single-task": 256, "multi-task": 1024}
USED_BY = {  # argument: the protocols that use it, if not all do
    **dict.fromkeys(("embedding_init", "load_optimizer"), ("model",)),
    **dict.fromkeys(("prior_learner", "prior_fraction"), ("data",)),
    **dict.fromkeys(("embedding_lr", "embedding_updates", "heatmap"), ("embedding",)),
    "adaptation_transitions": ("embedding", "model"),
    "discount": ("model", "data", "scratch"),  # TD(e) is of the critic that was trained with another
    **dict.fromkeys(
        ("total_timesteps", "learning_starts", "eval_every", "checkpoint_every", "keep_checkpoints", "track",
         "batch_size", "utd", "buffer_size", "polyak_tau", "actor_lr", "critic_lr", "temperature_lr", "weight_decay",
         "initial_temperature", "target_entropy"), ("model", "data", "scratch"),
    ),
}  # fmt: skip


def check_together(args: Args, tasks: list[str]) -> None:
    """Raises UserError for arguments that do not go together, also for one that the protocol would ignore."""
    if not args.pretrained:
        raise UserError("no pretrained agent: give --pretrained, a run of brc_sac_continuous.py on several tasks")
    if len(tasks) > 1 and args.protocol != "embedding":
        raise UserError(f"--protocol {args.protocol} learns one task a run, not {len(tasks)}: give one with --env-ids")
    saved = args.resume or args.play  # a run whose arguments were checked
    if args.resume and args.protocol == "embedding" and not args.total_timesteps:
        raise UserError(f"--resume {args.resume}: --total-timesteps 0 adapts nothing; give 1 or more, which means all")
    given = [name for name in USED_BY if getattr(args, name) != getattr(Args, name) and not saved]
    for name in given:
        *others, last = USED_BY[name]
        builds = name == "total_timesteps" and not args.total_timesteps  # 0 builds everything, in every protocol
        if args.protocol not in USED_BY[name] and not builds:
            protocols = f"{', '.join(others)} or {last}" if others else last
            raise UserError(f"--{name.replace('_', '-')} goes with --protocol {protocols}, not {args.protocol}")
    if "adaptation_transitions" in given and args.protocol == "model" and args.embedding_init != "best":
        raise UserError("--adaptation-transitions goes with --protocol embedding or --embedding-init best")
    if args.protocol == "data" and args.prior_fraction:
        size = args.batch_size or BATCH_SIZES[args.prior_learner]
        if round(size * args.prior_fraction) in (0, size):
            raise UserError(
                f"--prior-fraction {args.prior_fraction}: rounds to none or all of --batch-size {size} rows"
            )
    choosing = args.adaptation_transitions if args.protocol == "model" and args.embedding_init == "best" else 0
    if 0 < args.total_timesteps < choosing:
        raise UserError(f"--total-timesteps {args.total_timesteps}: fewer than --adaptation-transitions {choosing}")
    if args.buffer_size < 2 * choosing and not args.play:  # resets take slots, too
        raise UserError(f"--buffer-size {args.buffer_size}: at least twice --adaptation-transitions {choosing}")
    if args.learning_starts < choosing:
        raise UserError(
            f"--learning-starts {args.learning_starts}: --embedding-init best takes --adaptation-transitions "
            f"{choosing} steps before learning can start"
        )


# ------------------------------------------------------------------------------------------------------------- networks

# Copied from brc_sac_continuous.py
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
class SimBa(nn.Module):
    """SimBa (Lee et al., 2024): pre-norm residual blocks with a 4x inverted bottleneck. The agent normalizes its
    observations by running statistics of the sampled batches."""

    width: int
    depth: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = partial(nn.Dense, kernel_init=nn.initializers.he_normal(), dtype=self.dtype)
        x = nn.Dense(self.width, kernel_init=nn.initializers.orthogonal(1.0))(x)
        for _ in range(self.depth):
            y = dense(4 * self.width)(nn.LayerNorm()(x))
            x = x + dense(self.width)(nn.relu(y))
        return nn.LayerNorm()(x)


# Copied from brc_sac_continuous.py
class MLP(nn.Module):
    """The vanilla SAC network: `depth` ReLU layers."""

    width: int
    depth: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in range(self.depth):
            x = nn.relu(nn.Dense(self.width, kernel_init=orthogonal, dtype=self.dtype if layer else None)(x))
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


# ----------------------------------------------------------------------------------------------- categorical projection


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


# ------------------------------------------------------------------------------------------------- return normalization


# Copied from brc_sac_continuous.py
class ReturnNormalizer:
    """Largest absolute return seen in each task (C.2, Eq. 2): max_return is Gbar_i.

    It covers every reward as it arrives (ours: a reward is learned from before its episode ends), and every return of
    an episode once that has ended. What follows the end counts 0 if the episode terminated, the given bootstrap value
    if it was truncated. The critic's is at most Gbar_i in magnitude, so that Gbar_i <= max |r| / (1 - discount) by
    induction: |r| + discount Gbar_i keeps the bound.
    """

    def __init__(self, num_tasks: int, discount: float):
        self.max_return = np.zeros(num_tasks, np.float32)
        self.discount = discount
        self.episodes: list[list[float]] = [[] for _ in range(num_tasks)]

    def update(self, rewards, terminated, truncated, valid, bootstrap=None) -> None:
        """One step of every task, each [num_tasks]; valid is False where it was a reset (next-step autoreset).
        bootstrap: value of the final observation in units of reward, used where truncated; None takes the episode's
        mean reward / (1 - discount), as the released code does."""
        # a new array: an update in flight may still read the old one
        self.max_return = np.where(valid, np.maximum(self.max_return, np.abs(rewards)), self.max_return)
        for task in np.flatnonzero(~valid):
            self.episodes[task] = []  # also of an episode that its simulator did not survive
        for task in np.flatnonzero(valid):
            self.episodes[task].append(float(rewards[task]))
            if not (terminated[task] or truncated[task]):
                continue
            episode, self.episodes[task] = self.episodes[task], []
            value = 0.0
            if truncated[task]:
                value = np.mean(episode) / (1 - self.discount) if bootstrap is None else float(bootstrap[task])
            for reward in reversed(episode):
                value = reward + self.discount * value
                self.max_return[task] = max(self.max_return[task], abs(value))

    def named(self, tasks: list[str]) -> dict[str, float]:
        """Gbar_i, for TensorBoard."""
        return {f"normalizer/{task}": g for task, g in zip(tasks, self.max_return, strict=True)}


# ----------------------------------------------------------------------------------------------- agent state and update

# Copied from brc_sac_continuous.py
ENTROPY_RATE = 0.05  # ours: H_i of Eq. 4 starts at 0 and moves by this share to each batch's mean over task i
# Copied from brc_sac_continuous.py
MIN_SCALE = 1e-8  # of Eq. 3's divisor; reached only by a task whose rewards were all zero


# Copied from brc_sac_continuous.py
class RunningStatistics(NamedTuple):
    """Mean and variance of observations [|S|], for SimBa's input normalization."""

    count: jax.Array
    mean: jax.Array
    variance: jax.Array


# Copied from brc_sac_continuous.py
class AgentState(NamedTuple):
    """Everything that an update changes, on the device."""

    actor: Any  # parameters; *_optimizer: the optimizer's state
    actor_optimizer: Any
    critic: Any  # parameters {"embedding": nn.Embed's, or absent, "ensemble": Critic's, leaves [num_critics, ...]}
    critic_optimizer: Any
    target_critic: Any  # as critic, its own averaged embedding included
    log_temperature: jax.Array  # one alpha for all tasks
    temperature_optimizer: Any
    entropy: jax.Array  # [num_tasks], H_i of Eq. 4
    statistics: RunningStatistics
    key: jax.Array


# Copied from brc_sac_continuous.py
class Agent(NamedTuple):
    """The functions of one agent, see make_agent."""

    init: Callable
    act: Callable  # this one and the next three are compiled
    act_deterministic: Callable
    value: Callable
    update: Callable
    embed: Callable  # from here on for diagnostics and transfer
    td_target: Callable
    critic_loss: Callable
    actor_loss: Callable


# Copied from brc_sac_continuous.py
def make_agent(
    args: Args, num_tasks: int, observation_dim: int, action_dim: int, action_dims=None, use_embedding=None
) -> Agent:
    """The agent as pure functions of AgentState. One task takes the same path, without embedding or extra heads.

    action_dims: the tasks' own action sizes (default: action_dim for all). Entropy counts, and its target is set by,
    the dimensions that a task has; those added by padding would otherwise hold entropy that its real actions lack.
    use_embedding: whether inputs hold a task embedding (default: with several tasks, unless they have heads; transfer
    gives one task an embedding, too). All batches are as Batch says, below.
    """
    if use_embedding is None:
        use_embedding = num_tasks > 1 and args.task_conditioning == "embedding"
    num_heads = num_tasks if num_tasks > 1 and args.task_conditioning == "heads" else 1
    categorical = args.critic_loss == "ce"
    own_dims = jnp.array(action_dims or [action_dim] * num_tasks)
    action_mask = (jnp.arange(action_dim) < own_dims[:, None]).astype(jnp.float32)  # [num_tasks, |A|]
    target_entropy = -own_dims / 2 if args.target_entropy is None else jnp.full(num_tasks, args.target_entropy)
    atoms = jnp.linspace(args.v_min, args.v_max, args.num_atoms)  # Eq. 1
    actor_network = Actor(args.actor_width, args.actor_depth, action_dim, num_heads)
    critic_outputs_dim = args.num_atoms if categorical else 1
    backbone = {"bronet": BroNet, "simba": SimBa, "mlp": MLP}[args.critic_arch]
    dtype = jnp.bfloat16 if args.dtype == "bfloat16" else None
    critic_network = Critic(backbone, args.critic_width, args.critic_depth, critic_outputs_dim, num_heads, dtype)
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
        log_temperature = jnp.log(jnp.float32(args.initial_temperature))
        return AgentState(
            actor, actor_optimizer.init(actor), critic, critic_optimizer.init(critic), jax.tree.map(jnp.copy, critic),
            log_temperature, temperature_optimizer.init(log_temperature), jnp.zeros(num_tasks),
            RunningStatistics(jnp.zeros(()), jnp.zeros(observation_dim), jnp.ones(observation_dim)), key,
        )  # fmt: skip

    def embed(critic, task_ids):
        """Unit-norm task embeddings (C.4), [..., embedding_size]."""
        embedding = embedding_network.apply(critic["embedding"], task_ids)
        order = 1 if args.embedding_norm == "l1" else 2
        return embedding / jnp.linalg.norm(embedding, ord=order, axis=-1, keepdims=True)

    def policy(actor, critic, observations, task_ids):
        """Mean, log standard deviation and action mask, each [batch, |A|]. The embedding is the critic's, without
        gradient: only the critic's loss trains it (Section 3, C.4)."""
        if use_embedding:
            observations = jnp.concatenate([observations, jax.lax.stop_gradient(embed(critic, task_ids))], axis=-1)
        return *actor_network.apply(actor, observations, task_ids), action_mask[task_ids]

    def critic_outputs(critic, statistics, observations, actions, task_ids):
        """Outputs of every critic, [num_critics, batch, num_atoms or 1]."""
        if args.critic_arch == "simba":
            observations = (observations - statistics.mean) / jnp.sqrt(statistics.variance + 1e-8)
        inputs = [observations, actions] + ([embed(critic, task_ids)] if use_embedding else [])
        apply = jax.vmap(critic_network.apply, in_axes=(0, None, None))
        return apply(critic["ensemble"], jnp.concatenate(inputs, axis=-1), task_ids)

    def q_values(outputs):
        """Expected return, mean over critics (C.1): [num_critics, batch, ...] to [batch]."""
        values = (nn.softmax(outputs) * atoms).sum(-1) if categorical else outputs.squeeze(-1)
        return values.mean(0)

    def reward_scale(state, max_return):
        """V_max / (Gbar_i + lambda_i) for each task (Eq. 3, 4).

        H_i is negative where the policy reaches its target entropy -|A|/2, and Eq. 4 as printed could flip the sign of
        Eq. 3; hence |H_i|. As Gbar_i >= |r|, a normalized reward never exceeds V_max. A soft return can, unlike what
        C.2 says: lambda_i is in units of reward, but the entropy bonus joins the target after the scaling. The
        projection clips the excess.
        """
        if not args.normalize_returns:
            return jnp.ones(num_tasks)
        temperature = jnp.exp(state.log_temperature)
        entropy = jnp.abs(state.entropy) if args.entropy_correction == "empirical" else own_dims / 4
        return args.v_max / jnp.maximum(max_return + temperature * entropy / (1 - args.discount), MIN_SCALE)

    def td_target(state, batch, max_return, key):
        """Target distribution [batch, num_atoms] (C.2, with the entropy term of B's soft value), or target value
        [batch] with MSE, and normalized rewards. The policy takes the online embedding, the target critic its own."""
        next_observations, task_ids = batch.next_observations, batch.task_ids
        rewards = batch.rewards * reward_scale(state, max_return)[task_ids]
        discounts = args.discount * (1 - batch.terminated)
        next_policy = policy(state.actor, state.critic, next_observations, task_ids)
        next_actions, next_log_probs = sample_action(key, *next_policy)
        outputs = critic_outputs(state.target_critic, state.statistics, next_observations, next_actions, task_ids)
        entropy_bonus = -jnp.exp(state.log_temperature) * next_log_probs
        if not categorical:
            return rewards + discounts * (q_values(outputs) + entropy_bonus), rewards
        target_atoms = rewards[:, None] + discounts[:, None] * (atoms + entropy_bonus[:, None])
        return categorical_projection(nn.softmax(outputs).mean(0), target_atoms, args.v_min, args.v_max), rewards

    def critic_loss(critic, state, batch, target):
        """Cross-entropy with the target distribution, or squared error; mean over the batch, sum over critics."""
        outputs = critic_outputs(critic, state.statistics, batch.observations, batch.actions, batch.task_ids)
        if categorical:
            return -(target * nn.log_softmax(outputs)).sum(-1).mean(-1).sum()
        return ((outputs.squeeze(-1) - target) ** 2).mean(-1).sum()

    def actor_loss(actor, state, batch, key):
        """Soft policy improvement, alpha log pi - Q, and the log-densities [batch]."""
        actions, log_probs = sample_action(key, *policy(actor, state.critic, batch.observations, batch.task_ids))
        q = q_values(critic_outputs(state.critic, state.statistics, batch.observations, actions, batch.task_ids))
        return (jnp.exp(state.log_temperature) * log_probs - q).mean(), log_probs

    def update_statistics(statistics, observations):
        """Chan et al.'s parallel mean and variance."""
        count = statistics.count + len(observations)
        delta = observations.mean(0) - statistics.mean
        mean = statistics.mean + delta * len(observations) / count
        squares = statistics.variance * statistics.count + observations.var(0) * len(observations)
        squares += delta**2 * statistics.count * len(observations) / count
        return RunningStatistics(count, mean, squares / count)

    def update_once(state: AgentState, batch: Batch, max_return: jax.Array):
        """Critic, target critic, actor, temperature, in this order."""
        key, critic_key, actor_key = jax.random.split(state.key, 3)
        state = state._replace(key=key)
        if args.critic_arch == "simba":
            state = state._replace(statistics=update_statistics(state.statistics, batch.observations))

        target, rewards = td_target(state, batch, max_return, critic_key)
        critic_loss_value, critic_gradient = jax.value_and_grad(critic_loss)(state.critic, state, batch, target)
        changes, opt_state = critic_optimizer.update(critic_gradient, state.critic_optimizer, state.critic)
        critic = optax.apply_updates(state.critic, changes)
        target_critic = optax.incremental_update(critic, state.target_critic, args.polyak_tau)
        state = state._replace(critic=critic, critic_optimizer=opt_state, target_critic=target_critic)

        actor_value_and_grad = jax.value_and_grad(actor_loss, has_aux=True)
        (actor_loss_value, log_probs), actor_gradient = actor_value_and_grad(state.actor, state, batch, actor_key)
        changes, opt_state = actor_optimizer.update(actor_gradient, state.actor_optimizer, state.actor)
        state = state._replace(actor=optax.apply_updates(state.actor, changes), actor_optimizer=opt_state)

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
        q = (target * atoms).sum(-1) if categorical else target
        metrics = {
            "losses/critic": critic_loss_value, "losses/actor": actor_loss_value,
            "losses/temperature": temperature_loss, "gradient_norms/critic": optax.tree.norm(critic_gradient),
            "gradient_norms/actor": optax.tree.norm(actor_gradient), "policy/entropy": entropy,
            "policy/temperature": jnp.exp(state.log_temperature), "q/target_mean": q.mean(), "q/target_min": q.min(),
            "q/target_max": q.max(), "rewards/normalized_mean": rewards.mean(),
            "rewards/normalized_max_abs": jnp.abs(rewards).max(),
        }  # fmt: skip
        return state, metrics

    def update(state: AgentState, batches: Batch, max_return: jax.Array):
        """The utd updates of one vector step, one compiled call, and the last one's metrics. batches: [utd, batch_size,
        ...]; max_return: Gbar_i."""
        for i in range(args.utd):  # unrolled: XLA's CPU backend runs the body of a loop on one thread
            state, metrics = update_once(state, jax.tree.map(lambda x: x[i], batches), max_return)  # noqa: B023
        return state, metrics

    def act(actor, critic, key, step, observations, task_ids):
        """Sampled actions [batch, |A|]."""
        return sample_action(jax.random.fold_in(key, step), *policy(actor, critic, observations, task_ids))[0]

    def act_deterministic(actor, critic, observations, task_ids):
        mean, _, mask = policy(actor, critic, observations, task_ids)
        return jnp.tanh(mean) * mask

    def value(state: AgentState, observations, max_return):
        """Critic's value of one observation per task at the policy's mean action, in units of reward, [tasks].

        C.2 says "critic output" and not how it is scaled back. By Gbar_i / V_max and clipped (a scalar critic has no
        bounds), the tail of a return never exceeds Gbar_i. Scaled back by (Gbar_i + lambda_i) / V_max, every truncation
        could raise Gbar_i, which never falls, by about lambda_i: on dmc/dog-walk it ran away.
        """
        task_ids = jnp.arange(len(observations))
        actions = act_deterministic(state.actor, state.critic, observations, task_ids)
        q = q_values(critic_outputs(state.critic, state.statistics, observations, actions, task_ids))
        return jnp.clip(q / args.v_max, -1, 1) * max_return if args.normalize_returns else q

    return Agent(
        init, jax.jit(act), jax.jit(act_deterministic), jax.jit(value), jax.jit(update, donate_argnums=0), embed,
        td_target, critic_loss, actor_loss,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- replay


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


# Copied from brc_sac_continuous.py
class Replay:
    """A ring of slots per task, [num_tasks, capacity + 1], all tasks in step, that stores every observation once. The
    slot at `head` waits for its action."""

    def __init__(self, num_tasks: int, capacity: int, observation_dim: int, action_dim: int):
        self.slots = np.zeros((num_tasks, capacity + 1), record_type(observation_dim, action_dim))
        self.inserted = 0

    @property
    def head(self) -> int:
        return self.inserted % self.slots.shape[1]

    @property
    def size(self) -> int:
        return min(self.inserted, self.slots.shape[1] - 1)

    def start(self, observations: np.ndarray) -> None:
        """First observations [num_tasks, |S|]; after a resume, the interrupted episodes end unlearned at `head`."""
        if self.inserted:
            self.advance()
        self.slots["observation"][:, self.head] = observations

    def advance(self) -> None:
        self.inserted += 1
        self.slots["valid"][:, self.head] = False

    def insert(self, actions, rewards, terminated, valid, next_observations) -> None:
        """One step of every task, [num_tasks, ...]; valid is False where this step was a reset."""
        values = {"action": actions, "reward": rewards, "terminated": terminated, "valid": valid}
        for name, value in values.items():
            self.slots[name][:, self.head] = value
        self.advance()
        self.slots["observation"][:, self.head] = next_observations

    def sample(self, rng: np.random.Generator, utd: int, batch_size: int) -> Batch:
        """Uniform over the stored transitions of all tasks."""
        (num_tasks, ring), shape = self.slots.shape, (utd, batch_size)
        task_ids = rng.integers(num_tasks, size=shape, dtype=np.int32)
        slots = (self.head - rng.integers(1, self.size + 1, size=shape)) % ring
        while not (valid := self.slots["valid"][task_ids, slots]).all():
            redrawn = int((~valid).sum())
            task_ids[~valid] = rng.integers(num_tasks, size=redrawn)
            slots[~valid] = (self.head - rng.integers(1, self.size + 1, size=redrawn)) % ring
        return self.gather(task_ids, slots)

    def gather(self, task_ids: np.ndarray, slots: np.ndarray) -> Batch:
        """The transitions that begin in the given slots of the given tasks, both [...]."""
        ring, flat = self.slots.shape[1], self.slots.reshape(-1)
        now, following = task_ids * ring + slots, task_ids * ring + (slots + 1) % ring
        return Batch(
            flat["observation"][now], flat["action"][now], flat["reward"][now], flat["terminated"][now],
            flat["observation"][following], task_ids,
        )  # fmt: skip


def sample(
    rng, online: Replay, prior: Replay | None, num_prior: int, utd: int, batch_size: int, one_task: bool
) -> Batch:
    """Batches [utd, batch_size, ...]: num_prior rows of `prior`, with task ids 1, 2, ... (0 with one_task), if there is
    one, the others of the new task, id 0."""
    if prior is None:
        return online.sample(rng, utd, batch_size)
    batch, earlier = online.sample(rng, utd, batch_size - num_prior), prior.sample(rng, utd, num_prior)
    earlier = earlier._replace(task_ids=(earlier.task_ids + 1) * (not one_task))
    return Batch(*(np.concatenate(leaves, axis=1) for leaves in zip(earlier, batch, strict=True)))


def prior_rows(args: Args, rng: np.random.Generator, prior_size: int, new_size: int) -> int:
    """How many rows of a batch are of prior tasks: the given share, or as many as chance gives where all transitions
    are drawn alike. (Their mean, rounded, would be the whole batch while the new task has few.)"""
    if args.prior_fraction is None:
        return int(rng.binomial(args.batch_size, prior_size / (prior_size + new_size)))
    return round(args.batch_size * args.prior_fraction)


def all_transitions(replay: Replay, rows: int | None = None) -> tuple[Batch, int]:
    """Every transition of the new task and their number. With `rows`, padded to [rows, ...] by repetition, so that one
    compilation serves while transitions come in."""
    slots = np.flatnonzero(replay.slots["valid"][0])
    taken = np.resize(slots, rows or len(slots))
    return replay.gather(np.zeros(len(taken), np.int32), taken), len(slots)


# ------------------------------------------------------------------------------------------------- the pretrained agent


class Pretrained(NamedTuple):
    """A multi-task run of brc_sac_continuous.py."""

    directory: Path
    step: int  # of the checkpoint
    info: SimpleNamespace  # env_info of args.json: task_names; observation_dim, action_dim of the widest; action_dims
    settings: SimpleNamespace  # what make_agent takes as arguments in this run, see merged_settings
    state: AgentState
    embeddings: np.ndarray  # [num_tasks, embedding_size], of unit norm
    max_return: np.ndarray  # [num_tasks], Gbar_i
    replay: Replay | None  # with --protocol data


def merged_settings(args: Args, saved: dict) -> SimpleNamespace:
    """Arguments of make_agent: of this run's those that have a value, else the pretrained run's. So its networks, atoms
    and variant of the paper stay, and learning is this run's. The pretrained target entropy was for other tasks."""
    given = {name: value for name, value in asdict(args).items() if value is not None}
    return SimpleNamespace(**{"dtype": "float32", **saved, **given, "target_entropy": args.target_entropy})


def read_arguments(args: Args) -> dict:
    """args.json of --pretrained, before anything is made. Raises UserError unless it is a multi-task run of
    brc_sac_continuous.py with a checkpoint and what the protocol needs."""
    directory, needed = Path(args.pretrained), {"task_conditioning": "embedding"}
    if args.protocol == "embedding" or (args.protocol, args.embedding_init) == ("model", "best"):
        needed["critic_loss"] = "ce"  # TD(e) compares distributions
    try:
        saved = json.loads((directory / "args.json").read_text())
        if (script := saved["script"]) != "brc_sac_continuous":
            raise UserError(f"--pretrained {directory}: that run was made by {script}, not by brc_sac_continuous")
        info, settings = SimpleNamespace(**saved["env_info"]), merged_settings(args, saved)
        # raises AttributeError if an argument is missing
        make_agent(settings, len(info.task_names), info.observation_dim, info.action_dim, info.action_dims)
        unfit = [name for name, value in needed.items() if saved[name] != value]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--pretrained {directory}: no run of brc_sac_continuous.py there ({error})") from error
    if len(info.task_names) < 2:
        (task,) = info.task_names
        raise UserError(f"--pretrained {directory}: that run has one task, {task}; transfer needs several")
    if unfit:
        has, needs = (", ".join(f"--{k.replace('_', '-')} {v[k]}" for k in unfit) for v in (saved, needed))
        what = args.protocol + " --embedding-init best" * (args.protocol == "model" and "critic_loss" in unfit)
        raise UserError(f"--pretrained {directory}: that run has {has}; --protocol {what} needs {needs}")
    if not checkpoint_steps(directory):
        raise UserError(f"--pretrained {directory}: that run has no checkpoint yet")
    return saved


def load_pretrained(args: Args, saved: dict) -> Pretrained:
    """Newest undamaged checkpoint of --pretrained and, for --protocol data, its replay. saved: see read_arguments.
    Raises UserError if there is none."""
    directory, info = Path(args.pretrained), SimpleNamespace(**saved["env_info"])
    settings = merged_settings(args, saved)
    num_tasks, sizes = len(info.task_names), (info.observation_dim, info.action_dim)
    agent, replay = make_agent(settings, num_tasks, *sizes, info.action_dims), None
    if args.protocol == "data" and not args.play:
        replay = Replay(num_tasks, min(saved["buffer_size"], max(saved["total_timesteps"], 1) + 1000), *sizes)
    try:
        state, counters = load_checkpoint(directory, agent.init(0), replay, read_only=True)
    except UserError as error:
        raise UserError(f"--pretrained {directory}: none of its checkpoints can be used ({error})") from error
    if run_dir := args.play or args.resume:
        before = json.loads((Path(run_dir) / "args.json").read_text())
        another = f"--pretrained {directory}: not the run from which {run_dir} started"
        if before.get("pretrained_tasks", info.task_names) != info.task_names:
            raise UserError(f"{another}; it has other tasks")
        crc = embedding_checksum(state)
        if before.get("pretrained_step") == counters["step"] and before.get("pretrained_crc32", crc) != crc:
            raise UserError(f"{another}; it has other weights")
        if args.protocol in ("embedding", "data") and before["pretrained_step"] != counters["step"]:
            gone_on = f"{directory} has gone on from step {before['pretrained_step']} to {counters['step']}"
            if args.resume and args.protocol == "embedding":
                raise UserError(f"{gone_on}: its agent is no longer the one that {run_dir} tries; start a new run")
            print(f"warning: {gone_on}", file=sys.stderr)
    embeddings = np.asarray(agent.embed(state.critic, np.arange(num_tasks)))
    # with a larger gamma returns grow by so much at most, if rewards are steady
    longer = max(1, (1 - saved["discount"]) / (1 - settings.discount))
    max_return = np.float32(counters["max_return"]) * np.float32(longer)
    return Pretrained(directory, counters["step"], info, settings, state, embeddings, max_return, replay)


def target_envs(
    args: Args, task: str, info: SimpleNamespace, num_envs: int, seed: int, workers: "EnvWorkers"
) -> "ParallelEnvs":
    """num_envs copies of a new task, padded to the pretrained agent's sizes."""
    envs = ParallelEnvs([task], num_envs, seed, args.env_backend, workers)
    envs.observation_dim, envs.action_dim = info.observation_dim, info.action_dim
    envs.action_mask = np.arange(envs.action_dim) < np.array(envs.action_dims)[:, None]
    return envs


def target_information(args: Args, tasks: list[str], info: SimpleNamespace) -> dict:
    """env_info of args.json. Makes every task once, so that one that cannot be made, or is larger than the pretrained
    agent, is refused before anything is loaded."""
    envs = ParallelEnvs(tasks, 1, args.seed, args.env_backend, EnvWorkers(args.env_workers, args.env_timeout))
    envs.close()
    largest = {"observation_dim": info.observation_dim, "action_dim": info.action_dim}
    for name, limit in largest.items():
        for task, size in zip(tasks, getattr(envs, f"{name}s"), strict=True):
            if size > limit:
                what = name.removesuffix("_dim")
                raise UserError(f"{task} has {size} {what}s, the pretrained agent of {args.pretrained} only {limit}")
    return {**envs.information(), **largest}


def load_embedding(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A tuned embedding. Raises UserError if the file is damaged."""
    try:
        embedding = np.load(path).astype(np.float32)  # refuses pickled objects
        if embedding.shape != shape or not np.isfinite(embedding).all():
            raise ValueError(f"it must hold {shape} finite numbers")
    except Exception as error:  # a damaged header is parsed as Python, with errors of many kinds
        raise UserError(f"{path} is damaged ({describe(error)}); restore it, or tune it in a new run") from error
    return embedding


def embedding_table(embedding: np.ndarray) -> dict:
    """Parameters of nn.Embed with one row."""
    return {"params": {"embedding": jnp.asarray(embedding)[None]}}


def embedding_checksum(state: AgentState) -> int:
    """Tells pretrained agents apart, and says of a copy that it is the same one."""
    return zlib.crc32(np.asarray(state.critic["embedding"]["params"]["embedding"]))


def with_embedding(state: AgentState, table: dict) -> AgentState:
    """`state` with this embedding in critic and target critic."""
    critics = {name: {**getattr(state, name), "embedding": table} for name in ("critic", "target_critic")}
    return state._replace(**critics)


def candidates(pretrained: Pretrained) -> list[tuple[AgentState, np.ndarray]]:
    """The frozen agent with each pretrained embedding and its task's H, and the Gbar [1] that divides rewards."""
    state, found = pretrained.state, []
    for task, embedding in enumerate(pretrained.embeddings):
        own = state._replace(entropy=state.entropy[task : task + 1])
        found.append((with_embedding(own, embedding_table(embedding)), pretrained.max_return[task : task + 1]))
    return found


def start_from_pretrained(args: Args, pretrained: Pretrained, fresh: AgentState, embedding: np.ndarray) -> AgentState:
    """Model transfer: `fresh` with the pretrained networks and temperature, the given embedding and, with
    --load-optimizer, the optimizers' moments; the new embedding's are the mean over the pretrained rows. H_i is the new
    task's and starts at zero. The embedding's parameters are shorter than pretraining's rows, so it turns faster than
    those did (as long as they are, it learned no better: benchmark/results/README.md)."""
    old = pretrained.state
    networks = {name: getattr(old, name) for name in ("actor", "critic", "target_critic", "statistics")}
    state = with_embedding(fresh._replace(**networks), embedding_table(embedding))
    if args.initial_temperature is None:
        state = state._replace(log_temperature=old.log_temperature)
    if args.load_optimizer:
        adam, *rest = old.critic_optimizer
        mean = lambda moments: jax.tree.map(lambda rows: rows.mean(0, keepdims=True), moments["embedding"])  # noqa: E731
        adam = adam._replace(mu={**adam.mu, "embedding": mean(adam.mu)}, nu={**adam.nu, "embedding": mean(adam.nu)})
        state = state._replace(
            actor_optimizer=old.actor_optimizer, critic_optimizer=(adam, *rest),
            temperature_optimizer=old.temperature_optimizer,
        )  # fmt: skip
    return jax.tree.map(jnp.copy, state)  # update() donates each buffer once; with_embedding put one in two places


# ---------------------------------------------------------------------------------- embedding of a new task, all frozen

MIN_SEGMENT = 25  # steps that an embedding acts at least, so that it has a chance to succeed


@partial(jax.jit, static_argnums=0)
def td_divergence(agent: Agent, state: AgentState, batch: Batch, count: int, max_return: jax.Array) -> jax.Array:
    """TD(e) of the top of the file, a scalar; e is the embedding in `state`, and its gradient is that of p_k, not of y.
    batch: [rows, ...] of the new task, of which only the first `count` count; max_return: [1], Gbar of e's task. The
    fixed key gives every e the same noise."""
    num_critics = len(jax.tree.leaves(state.critic["ensemble"])[0])

    def of_one(transition: Batch, key: jax.Array) -> jax.Array:  # critic_loss is a mean, which cannot leave rows out
        row = jax.tree.map(lambda x: x[None], transition)
        target = jax.lax.stop_gradient(agent.td_target(state, row, max_return, key)[0])
        entropy = -jax.scipy.special.xlogy(target, target).sum()
        return agent.critic_loss(state.critic, state, row, target) - num_critics * entropy

    number = len(batch.rewards)
    td = jax.vmap(of_one)(batch, jax.random.split(jax.random.PRNGKey(0), number))
    return jnp.where(jnp.arange(number) < count, td, 0).sum() / count


@partial(jax.jit, static_argnums=(0, 1))
def tuning_step(agent: Agent, learning_rate: float, state: AgentState, optimizer_state, batch: Batch, max_return):
    """One gradient step on the embedding in `state`; returns state, optimizer_state and the TD(e) before it."""

    def loss(table):
        return td_divergence(agent, with_embedding(state, table), batch, len(batch.rewards), max_return)

    table = state.critic["embedding"]
    value, gradient = jax.value_and_grad(loss)(table)
    step, optimizer_state = optax.adam(learning_rate).update(gradient, optimizer_state)
    return with_embedding(state, optax.apply_updates(table, step)), optimizer_state, value


def tuned_embedding(args: Args, agent: Agent, state: AgentState, max_return: np.ndarray, batch: Batch, stop: list):
    """The embedding with the lowest TD(e) on the way of gradient descent from that of `state`, cut when `stop` fills;
    everything else in `state` stays as it is. Returns the state with it, and TD(e) before and after."""
    optimizer_state, history = optax.adam(args.embedding_lr).init(state.critic["embedding"]), []
    best = state
    for _ in range(args.embedding_updates + 1):
        tried = state
        state, optimizer_state, td = tuning_step(agent, args.embedding_lr, state, optimizer_state, batch, max_return)
        history.append(float(td))
        if history[-1] == min(history):
            best = tried
        if stop:
            break
    return best, history[0], min(history)


def explore_embeddings(
    args: Args, agent: Agent, pretrained: Pretrained, envs, replay: Replay, run: "Run", normalizer: ReturnNormalizer
) -> list[int]:
    """Collects --adaptation-transitions of the new task in segments, each acted by another pretrained embedding.

    Where the budget is too small for all embeddings, the next to act is the one with the lowest TD(e) on what there is.
    Returns the indices of all pretrained embeddings, best first: those that succeeded in their segment, then the
    others, also those that never acted; by TD(e) each. (Mean rewards say less: benchmark/results/README.md.) Of
    --protocol embedding nothing if the run is stopped: it keeps nothing of an unfinished task.
    """
    states = candidates(pretrained)

    def td(i: int) -> float:
        """TD(e_i) on the transitions so far."""
        seen = all_transitions(replay, args.adaptation_transitions)
        return float(td_divergence(agent, states[i][0], *seen, states[i][1]))

    segments = max(1, min(len(states), args.adaptation_transitions // MIN_SEGMENT))
    ends = np.linspace(0, args.adaptation_transitions, segments + 1).astype(int)
    key, task_ids, successes = jax.random.PRNGKey(args.seed), np.zeros(1, np.int32), {}
    for segment, (start, end) in enumerate(itertools.pairwise(ends)):
        untried = [i for i in range(len(states)) if i not in successes]
        if segment == 0:  # nothing is known yet: the embedding nearest to the mean of all
            distance = np.linalg.norm(pretrained.embeddings - pretrained.embeddings.mean(0), axis=1)
            index = int(distance.argmin())
        elif len(untried) == segments - segment:
            index = untried[0]  # all will have their turn
        else:
            index = min(untried, key=td)
        state, _ = states[index]
        observations, step, successes[index] = envs.reset(), start, 0.0
        replay.start(observations)
        normalizer.episodes[0] = []
        while step < end:
            if run.stop and args.protocol == "embedding":
                return []
            actions = np.asarray(agent.act(state.actor, state.critic, key, step, observations, task_ids))
            envs.send(actions)
            observations, rewards, terminated, truncated, valid, success = envs.recv()
            replay.insert(actions, rewards, terminated, valid, observations)
            bootstrap = None
            if pretrained.settings.truncation_bootstrap == "critic" and truncated.any():
                bootstrap = np.asarray(agent.value(state, observations, normalizer.max_return))
            normalizer.update(rewards, terminated, truncated, valid, bootstrap)
            if valid[0]:
                step += 1
                successes[index] = np.fmax(successes[index], success[0])  # NaN where the task reports none
                run.advance(0)
    return sorted(range(len(states)), key=lambda i: (-successes.get(i, 0.0), td(i)))


# ---------------------------------------------------------------------------------------------------------------- main


def main(args: Args) -> None:
    """Transfers one pretrained agent to the tasks of `args`; everything it writes is in its run directory."""
    tasks, _ = resolve_tasks(args.suite, args.env_ids)
    check_together(args, tasks)
    args.batch_size = args.batch_size or BATCH_SIZES[args.prior_learner]
    transfer, total = learn, args.total_timesteps
    if args.protocol == "embedding":
        transfer, total = adapt_embeddings, len(tasks) * args.adaptation_transitions * (total > 0)
    with Run(args, args.suite or tasks[0], total, experiment=f"{args.exp_name}-{args.protocol}") as run:
        saved = read_arguments(args)
        env_info = target_information(args, tasks, SimpleNamespace(**saved["env_info"]))
        pretrained = load_pretrained(args, saved)
        args.discount = pretrained.settings.discount
        state = pretrained.state
        if known := ", ".join(task for task in tasks if task in pretrained.info.task_names):
            print(f"warning: {known} is no new task: {pretrained.directory} was pretrained on it", file=sys.stderr)
        print(f"pretrained: {len(pretrained.embeddings)} tasks, step {pretrained.step:,} of {pretrained.directory}")
        print(f"parameters: {parameter_count([state.critic, state.target_critic]):,} in critics and targets, "
              f"{parameter_count(state.actor):,} in the actor")  # fmt: skip
        source = {"pretrained_step": pretrained.step, "pretrained_tasks": pretrained.info.task_names,
                  "pretrained_crc32": embedding_checksum(state)}  # fmt: skip
        transfer(args, pretrained, tasks, run, {"env_info": env_info, **source})


def learn(args: Args, pretrained: Pretrained, tasks: list[str], run: "Run", information: dict) -> None:
    """--protocol model, data and scratch: one learner on one new task, as in brc_sac_continuous.py. The new task has
    number 0. With --prior-learner multi-task those of prior data have 1, 2, ... and the Gbar_i of pretraining; else
    they are 0, too, and Gbar starts from the largest of pretraining."""
    env_seed, eval_seed = run.seeds()
    workers = EnvWorkers(args.env_workers, args.env_timeout, run.environment_failed, run.stop)
    envs = target_envs(args, tasks[0], pretrained.info, 1, env_seed, workers)
    sizes, settings, prior = (envs.observation_dim, envs.action_dim), pretrained.settings, pretrained.replay
    action_dims, prior_max_return = list(envs.action_dims), np.zeros(0, np.float32)
    prior_size = int(prior.slots["valid"].sum()) if prior else 0
    one_task = args.prior_learner == "single-task"
    if args.protocol == "data" and not one_task:
        action_dims, prior_max_return = action_dims + pretrained.info.action_dims, pretrained.max_return
    use_embedding = args.protocol == "model" or len(action_dims) > 1
    agent = make_agent(settings, len(action_dims), *sizes, action_dims, use_embedding)
    replay = Replay(1, min(args.buffer_size, args.total_timesteps + 1000), *sizes)
    normalizer = ReturnNormalizer(1, args.discount)
    if args.protocol == "data" and one_task:
        normalizer.max_return[0] = pretrained.max_return.max()
    rng = np.random.default_rng(args.seed)
    state, saved = run.restore(agent.init(args.seed), replay)
    if saved:
        normalizer.max_return, rng.bit_generator.state = np.float32(saved["max_return"]), saved["rng"]
    run.start(**information)
    if args.total_timesteps == 0:
        return envs.close()
    if args.protocol == "model" and not saved:
        embedding = starting_embedding(args, agent, pretrained, envs, replay, rng, run, normalizer)
        state = start_from_pretrained(args, pretrained, state, embedding)
    eval_envs = target_envs(args, tasks[0], pretrained.info, eval_copies(1, args.eval_episodes), eval_seed, workers)
    task_ids, act_key, metrics = jnp.zeros(1, jnp.int32), jax.random.PRNGKey(args.seed + 1), {}
    observations, batches, rng_state = envs.reset(), None, rng.bit_generator.state
    replay.start(observations)
    normalizer.episodes[0] = []

    def draw() -> Batch:
        num_prior = prior_rows(args, rng, prior_size, replay.size)
        return sample(rng, replay, prior, num_prior, args.utd, args.batch_size, one_task)

    while True:
        if run.evaluation_due():
            act = partial(agent.act_deterministic, state.actor, state.critic)
            evaluated = run.log_evaluation(evaluate(act, eval_envs, args.eval_episodes, run.stop))
            if evaluated and args.capture_video:
                record_videos(act, envs, run)
        if run.checkpoint_due():
            run.save(state, replay, max_return=normalizer.max_return.tolist(), rng=rng_state)
        if run.evaluation_due():
            continue  # still due: an environment failed and cut it
        if run.over():
            break

        # 1. act, the pretrained policy from the start, a fresh one after some random steps; and update
        learning = run.step >= args.learning_starts
        if learning or args.protocol == "model":
            actions = agent.act(state.actor, state.critic, act_key, run.step, observations, task_ids)
        else:
            actions = rng.uniform(-1, 1, (1, envs.action_dim)).astype(np.float32) * envs.action_mask
        if learning:
            batches = draw() if batches is None else batches
            max_return = np.concatenate([normalizer.max_return, prior_max_return])
            state, metrics = agent.update(state, batches, max_return)
        actions = np.asarray(actions)
        envs.send(actions)
        # 2. meanwhile draw the next step's batches, without this step's transition, and move them to the device
        rng_state = rng.bit_generator.state  # saved: a resumed run draws on from here
        if learning:
            batches = jax.device_put(draw())
        # 3. receive, store, update Gbar
        observations, rewards, terminated, truncated, valid, _ = envs.recv()
        replay.insert(actions, rewards, terminated, valid, observations)
        bootstrap = None
        if settings.truncation_bootstrap == "critic" and truncated.any():
            bootstrap = np.asarray(agent.value(state, observations, normalizer.max_return))
        normalizer.update(rewards, terminated, truncated, valid, bootstrap)
        run.advance(updates=args.utd if learning else 0)
        if run.log_due():
            run.log({**metrics, **envs.last_returns, **normalizer.named(tasks)})

    run.finish()
    envs.close()
    eval_envs.close()


def starting_embedding(
    args: Args, agent: Agent, pretrained: Pretrained, envs, replay, rng, run: "Run", normalizer: ReturnNormalizer
) -> np.ndarray:
    """--embedding-init of model transfer. `best` spends steps of the run, whose transitions stay in `replay` and whose
    returns in `normalizer`."""
    if args.embedding_init == "mean":
        return pretrained.embeddings.mean(0)
    if args.embedding_init == "random":
        return pretrained.embeddings[rng.integers(len(pretrained.embeddings))]
    best = explore_embeddings(args, agent, pretrained, envs, replay, run, normalizer)[0]
    tqdm.write(f"best embedding after {run.step} transitions: {pretrained.info.task_names[best]}")
    return pretrained.embeddings[best]


def adapt_embeddings(args: Args, pretrained: Pretrained, tasks: list[str], run: "Run", information: dict) -> None:
    """--protocol embedding: for every new task, the embeddings of the top of the file, evaluated.

    Writes embedding.csv (all of them, and the transitions that each took), eval.csv (the tuned one),
    embeddings/<task>.npy (the tuned one, [embedding_size]) and, with --heatmap, heatmap.csv and heatmap.png. A task's
    rows are written when it is finished, so a resumed run goes on with the next. --play evaluates the tuned embeddings
    of the finished tasks.
    """
    tables, transitions = read_tables(run.directory), args.adaptation_transitions
    finished = {row["target"] for row in tables["embedding.csv"]}
    if args.play:
        tasks, tables, finished = [task for task in tasks if task in finished], {name: [] for name in tables}, set()
        if not tasks:
            raise UserError(f"--play {args.play}: no embedding is tuned there yet; wait for one")
    run.step, run.last_evaluation = len(finished) * transitions, transitions  # so that all rows of eval.csv are kept
    run.start(**information)
    if run.total == 0:
        return
    tables["eval.csv"] = [row for row in run.curve if row["task"] in finished]
    if tables["eval.csv"]:
        run.started -= float(tables["eval.csv"][-1]["wall_time"] or 0)
    sizes = pretrained.info.observation_dim, pretrained.info.action_dim
    # an agent for each of the tasks' own action sizes, compiled once
    agent_for = cache(lambda own_dims: make_agent(pretrained.settings, 1, *sizes, own_dims, use_embedding=True))
    for number, task in enumerate(tasks):
        if task in finished:
            continue
        env_seed, eval_seed, choice_seed = np.random.SeedSequence([args.seed, number]).generate_state(3).tolist()
        workers = EnvWorkers(args.env_workers, args.env_timeout, run.environment_failed, run.stop)
        envs = target_envs(args, task, pretrained.info, 1, env_seed, workers)
        eval_envs = target_envs(args, task, pretrained.info, eval_copies(1, args.eval_episodes), eval_seed, workers)
        agent = agent_for(tuple(envs.action_dims))
        evaluated = {}  # by embedding, as the heat map holds some of the others too
        path = run.directory / "embeddings" / f"{file_name(task)}.npy"
        if args.play:
            embedding = load_embedding(path, pretrained.embeddings.shape[1:])
            states = {("tuned", path.name): with_embedding(pretrained.state, embedding_table(embedding))}
        else:
            states = infer_embeddings(args, agent, pretrained, envs, np.random.default_rng(choice_seed), run)
        stopped = f"stopped; continue with --resume {run.directory}"
        if not states:
            return tqdm.write(stopped)
        for (method, source), state in states.items():
            act = partial(agent.act_deterministic, state.actor, state.critic)
            key = method if method in ("tuned", "mean") else source
            for _ in range(Worker.max_failures):
                if rows := evaluated.get(key) or evaluate(act, eval_envs, args.eval_episodes, run.stop):
                    break
                if run.stop:  # else an environment failed: once more, from the start
                    return tqdm.write(stopped)
            else:
                cut = f"{Worker.max_failures} evaluations of {task}, each cut by an environment that failed"
                raise WorkerFailure(cut)
            evaluated[key] = rows
            about = {"target": task, "method": method, "embedding": source}
            about["transitions"] = transitions if method in ("selected", "tuned") else 0
            about |= {name: value for name, value in rows[0].items() if name != "task"}
            tables["heatmap.csv" if method == "heatmap" else "embedding.csv"].append(about)
            if method == "tuned":
                counts = {"step": transitions, "updates": args.embedding_updates}
                tables["eval.csv"].append({**counts, "wall_time": round(time.monotonic() - run.started, 2), **rows[0]})
                embedding, tuned_act = agent.embed(state.critic, np.zeros(1, np.int32))[0], act
            which = f"{method}/{source}" if method == "heatmap" else method
            run.scalars({f"eval/{which}/{task}": about["return"]}, transitions)
        if args.heatmap and not args.play:
            rows = [row for row in tables["heatmap.csv"] if row["target"] == task]
            measure = "success" if rows[0]["score"] == "" else "score"
            best = max(rows, key=lambda row: (row[measure] or 0, row["return"]))
            tables["embedding.csv"].append({**best, "method": "oracle"})
        envs.close()
        eval_envs.close()
        if not args.play:
            path.parent.mkdir(exist_ok=True)
            save_array(path, embedding)
            write_tables(run.directory, tables)
        if args.capture_video:
            record_videos(tuned_act, envs, run)  # which makes environments of its own
    run.bar.close()
    if tables["heatmap.csv"]:
        draw_heatmap(tables["heatmap.csv"], pretrained.info.task_names, tasks, run.directory / "heatmap.png")
    width = max(map(len, tasks))
    print(f"{'target':<{width}} {'method':<9} {'return':>10} {'success':>8} {'score':>7}  embedding")
    for row in tables["embedding.csv"]:
        values = f"{float(row['return']):>10.1f} {row['success']:>8} {row['score']:>7}"
        print(f"{row['target']:<{width}} {row['method']:<9} {values}  {row['embedding']}")


def infer_embeddings(
    args: Args, agent: Agent, pretrained: Pretrained, envs: "ParallelEnvs", rng: np.random.Generator, run: "Run"
) -> dict[tuple[str, str], AgentState]:
    """(method, where its embedding comes from): the frozen agent with that embedding; nothing if the run is stopped."""
    names, states, transitions = pretrained.info.task_names, candidates(pretrained), args.adaptation_transitions
    replay = Replay(1, 2 * transitions + 100, envs.observation_dim, envs.action_dim)
    normalizer = ReturnNormalizer(1, args.discount)  # of the new task; TD(e_j) takes each e_j's own
    order = explore_embeddings(args, agent, pretrained, envs, replay, run, normalizer)
    if not order:
        return {}
    selected = order[0]
    batch, _ = all_transitions(replay)
    tuned, before, after = tuned_embedding(args, agent, *states[selected], batch, run.stop)
    task, random = envs.tasks[0], int(rng.integers(len(names)))
    tqdm.write(f"{task}: {transitions} transitions; selected {names[selected]}, TD {before:.4f}; tuned to {after:.4f}")
    for method, td in (("selected", before), ("tuned", after)):
        run.scalars({f"td_divergence/{method}/{task}": td}, transitions)
    found = {
        ("selected", names[selected]): states[selected][0], ("tuned", names[selected]): tuned,
        ("random", names[random]): states[random][0],
        ("mean", "all"): with_embedding(pretrained.state, embedding_table(pretrained.embeddings.mean(0))),
    }  # fmt: skip
    if args.heatmap:
        found |= {("heatmap", name): state for name, (state, _) in zip(names, states, strict=True)}
    return found


# --------------------------------------------------------------------------------------- tables of embedding adaptation


TABLE_COLUMNS = ("target", "method", "embedding", "transitions", "episodes", "return", "success", "score")


def read_tables(directory: Path) -> dict[str, list[dict]]:
    """Rows of finished tasks, those in embedding.csv, which is written last; none of eval.csv, which part 3 reads. A
    spreadsheet may have put in a byte order mark and other separators. Raises UserError for other changes."""
    tables = {"heatmap.csv": [], "eval.csv": [], "embedding.csv": []}
    for path in (directory / "heatmap.csv", directory / "embedding.csv"):
        text = path.read_text(encoding="utf-8-sig", errors="replace") if path.exists() else ""
        separator = max(",;\t", key=text.partition("\n")[0].count)
        try:
            for row in csv.DictReader(io.StringIO(text, newline=""), delimiter=separator):
                if set(row) != set(TABLE_COLUMNS) or None in row.values():
                    raise ValueError(f"its columns must be {', '.join(TABLE_COLUMNS)}")
                values = {name: row[name].strip().replace(",", ".") for name in TABLE_COLUMNS}
                for number in (values["return"], values["success"] or 0, values["score"] or 0):
                    float(number)
                tables[path.name].append(values)
        except (ValueError, csv.Error) as error:
            way_out = "restore it, or move it away to go on without it"
            raise UserError(f"{path} was changed and cannot be read ({error}); {way_out}") from error
    finished = {row["target"] for row in tables["embedding.csv"]}
    return {name: [row for row in rows if row["target"] in finished] for name, rows in tables.items()}


def write_tables(directory: Path, tables: dict[str, list[dict]]) -> None:
    for name, rows in tables.items():
        if rows:
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
            replace_file(directory / name, text.getvalue())


def draw_heatmap(rows: list[dict], sources: list[str], targets: list[str], path: Path) -> None:
    """Figure 24: score (return where a task has none) of every pretrained embedding on every new task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    values = {(row["embedding"], row["target"]): float(row["score"] if row["score"] != "" else row["return"])
              for row in rows}  # fmt: skip
    # NaN: of tasks finished before heatmap.csv was moved away
    matrix = np.array([[values.get((source, target), np.nan) for target in targets] for source in sources])
    figure, axes = plt.subplots(figsize=(2.5 + 0.7 * len(targets), 1.5 + 0.35 * len(sources)), layout="constrained")
    image = axes.imshow(matrix, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(targets)), targets, rotation=30, ha="right")
    axes.set_yticks(range(len(sources)), sources)
    axes.set_xlabel("new task")
    axes.set_ylabel("pretrained embedding")
    if matrix.size <= 400:
        middle = (np.nanmin(matrix) + np.nanmax(matrix)) / 2
        for (i, j), value in np.ndenumerate(matrix):
            axes.text(j, i, f"{value:.2g}", ha="center", va="center", color="white" if value < middle else "black")
    figure.colorbar(image, label="score" if all(row["score"] != "" for row in rows) else "score or return")
    figure.savefig(path, dpi=150)
    plt.close(figure)


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
