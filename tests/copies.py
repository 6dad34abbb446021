"""Several copies of a task in the test's own process, as envpool has them in its pool."""

import numpy as np


class Copies:
    """num_envs copies of one task, stepped as a worker process steps its own: see EnvPoolTask."""

    def __init__(self, brc, task: str, num_envs: int, number: int):
        self.brc, self.envs = brc, [brc.WorkerEnv(task, seed) for seed in range(num_envs)]
        space = self.envs[0].env
        self.task_numbers, self.num_envs = [number], num_envs
        self.observation_dims = [space.observation_space.shape[0]]
        self.action_dims = [getattr(space.action_space, "n", None) or space.action_space.shape[0]]

    def send(self, actions, rows):
        self.results = []
        for i, row in enumerate(rows):
            *step, info = self.envs[row].step(None if actions is None else actions[i])
            self.results.append((*step, self.brc.reported(info), False))

    def recv(self):
        return self.brc.Results(*map(np.array, zip(*self.results, strict=True)))

    def close(self):
        pass


def local_envs(brc, tasks: list[str], copies: tuple[int, ...]):
    """ParallelEnvs of so many copies of each task."""

    class Local(brc.ParallelEnvs):
        def make_pools(self, *_):
            return [Copies(brc, task, copies[number], number) for number, task in enumerate(self.tasks)]

    return Local(tasks, 1, 0, "auto")
