"""Trains the authors' released learner on our environments, for comparison with brc_sac_continuous.py.

  git clone https://github.com/naumix/BiggerRegularizedCategorical released && git -C released checkout eec512f
  pip install --no-deps distrax==0.1.9 tfp-nightly==0.26.0.dev20261027 chex==0.1.92 toolz decorator six gast
  python benchmark/released_code.py released --variant released-code --env-ids metaworld/reach --critic-width 128

The first argument is a copy of the released code, the others are those of brc_sac_continuous.py. Agent, replay and
reward normalization are the released ones, called as its train.py calls them; environments, evaluation and the run
directory are ours, so that nothing else differs. Its batches are drawn from NumPy's global generator. A stopped run
cannot be resumed, and every episode has to end by truncation, at the same step in all tasks, as those of Meta-World or
of DMC do.
"""

import sys
from pathlib import Path

import gymnasium as gym
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from launch import exit_with  # noqa: E402

import brc_sac_continuous as sac  # noqa: E402

FIXED = {  # what the released code has no argument for
    **sac.RELEASED_CODE, "critic_arch": "bronet", "critic_depth": 2, "actor_depth": 1, "critic_loss": "ce",
    "normalize_returns": True, "task_conditioning": "embedding", "weight_decay": 1e-4, "v_min": -10.0, "v_max": 10.0,
    "num_atoms": 101, "num_critics": 2, "dtype": "float32", "resume": None, "play": None, "save_replay": False,
    "capture_video": False, "log_task_statistics": False,
}  # fmt: skip


def train(code: Path, args: sac.Args) -> None:
    """One run of the released learner. Raises UserError for arguments that it does not know, ImportError without it."""
    for name, value in FIXED.items():
        if getattr(args, name) != value:
            flag = f"--{name.replace('_', '-')}"
            raise sac.UserError(f"the released code knows no other {flag} than {value}")
    sys.path.insert(0, str(code.resolve()))
    from jaxrl.agent.brc_learner import BRC, _sample_actions, build_actor_input
    from jaxrl.normalizer import RewardNormalizer
    from jaxrl.replay_buffer import ParallelReplayBuffer

    tasks, steps = sac.resolve_tasks(args.suite, args.env_ids)
    args.total_timesteps = steps if args.total_timesteps is None else args.total_timesteps
    if args.total_timesteps == 0:
        raise sac.UserError("--total-timesteps 0: this script does nothing but train")
    args.batch_size = args.batch_size or (1024 if len(tasks) > 1 else 256)
    args.exp_name = "released-code"
    with sac.Run(args, args.suite or tasks[0], args.total_timesteps) as run:
        env_seed, eval_seed = run.seeds()
        workers = sac.EnvWorkers(args.env_workers, args.env_timeout, run.environment_failed)
        envs = sac.ParallelEnvs(tasks, 1, env_seed, args.env_backend, workers)
        copies = sac.eval_copies(len(tasks), args.eval_episodes)
        eval_envs = sac.ParallelEnvs(tasks, copies, eval_seed, args.env_backend, workers)
        run.start(env_info=envs.information())
        np.random.seed(args.seed)  # noqa: NPY002, its replay's generator
        rng = np.random.default_rng(args.seed)
        observations, dims = envs.reset(), (envs.observation_dim, envs.action_dim)
        agent = BRC(
            args.seed, observations[:1], np.zeros((1, dims[1]), np.float32), len(tasks), args.embedding_size,
            actor_lr=args.actor_lr, critic_lr=args.critic_lr, temp_lr=args.temperature_lr, discount=args.discount,
            tau=args.polyak_tau, target_entropy=args.target_entropy, init_temperature=args.initial_temperature,
            updates_per_step=args.utd, width_critic=args.critic_width, width_actor=args.actor_width,
        )  # fmt: skip
        space = gym.spaces.Box(-np.inf, np.inf, (len(tasks), dims[0]), np.float32)
        replay = ParallelReplayBuffer(space, dims[1], min(args.buffer_size, args.total_timesteps), len(tasks))
        normalizer = RewardNormalizer(len(tasks), agent.target_entropy, agent.discount)

        def act(observations, task_ids):
            inputs = build_actor_input(agent.critic, observations, task_ids, agent.multitask)
            return np.clip(_sample_actions(agent.rng, agent.actor, inputs, 0.0)[1], -1, 1)

        while True:
            if run.evaluation_due():
                run.log_evaluation(sac.evaluate(act, eval_envs, args.eval_episodes, run.stop))
            if run.over():
                break
            learning = run.step >= args.learning_starts
            if learning:
                actions = agent.sample_actions(observations)
            else:
                actions = rng.uniform(-1, 1, (len(tasks), dims[1])).astype(np.float32)
            envs.send(actions)
            before, (observations, rewards, terminated, truncated, valid, _) = observations, envs.recv()
            if terminated.any() or valid.any() != valid.all():
                raise sac.UserError("episodes must end by truncation, in all tasks at once; choose tasks of one length")
            if valid.all():
                normalizer.update(rewards, terminated, truncated)
                replay.insert(before, actions, rewards, np.ones(len(tasks)), observations)
            if learning:
                batches = normalizer.normalize(replay.sample(args.batch_size, args.utd), agent.get_temperature())
                agent.update(batches, args.utd, run.step)
            run.advance(updates=args.utd if learning else 0)
        run.finish()
        envs.close()
        eval_envs.close()


def main(argv: list[str]) -> int:
    if not argv or argv[0].startswith("-"):
        print(__doc__, end="")
        return 0 if argv[:1] in (["-h"], ["--help"]) else 2
    if not (Path(argv[0]) / "jaxrl").is_dir():
        print(f"error: {argv[0]} is no copy of the released code: it has no jaxrl/", file=sys.stderr)
        return 2
    try:
        train(Path(argv[0]), sac.parse_args(argv[1:]))
    except (sac.UserError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    exit_with(lambda: main(sys.argv[1:]))
