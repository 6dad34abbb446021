"""The agent learns from pixels: a falling ball, alone and beside a mirrored game that pays a hundred times as much."""

import csv
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "brc_drq_atari.py"
CATCH, MIRRORED, CATCH3 = (f"gym/pixel_tasks:Pixel{name}-v0" for name in ("Catch", "CatchMirrored", "Catch3"))
SMALL = """--encoder-channels 2 4 8 --critic-width 128 --embedding-size 4 --batch-size 32 --utd 1 --learning-rate 2e-3
--learning-starts 200 --epsilon-decay-steps 1000 --eval-every 500 --eval-episodes 20""".split()


@pytest.fixture
def learned(learn, tmp_path):
    """learned(*arguments): mean return of each evaluation of a run, by step and task."""

    def learned(*arguments) -> dict[tuple[int, str], float]:
        learn(*arguments, "--run-root", tmp_path, "--run-name", "run")
        with (tmp_path / "run" / "eval.csv").open() as file:
            return {(int(row["step"]), row["task"]): float(row["return"]) for row in csv.DictReader(file)}

    return learned


def test_a_small_grid_is_learned_in_200_updates(learned):
    """3 x 3 cells. Whoever stays in the middle catches every third ball, which pays -1/3 a game."""
    arguments = """--encoder-channels 2 4 --critic-width 64 --batch-size 16 --utd 1 --learning-rate 3e-3
        --learning-starts 100 --epsilon-decay-steps 100 --total-timesteps 300 --eval-every 300""".split()
    returns = learned("--env-ids", CATCH3, *arguments, "--eval-episodes", 20)
    assert returns[0, CATCH3] < 0.5, "solved before learning"
    assert returns[300, CATCH3] >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_catch_is_learned(seed, learned):
    """With augmentation. A ball that may fall in seven columns: random actions catch one in seven, -0.7 a game."""
    returns = learned("--env-ids", CATCH, *SMALL, "--total-timesteps", 1500, "--seed", seed)
    assert returns[0, CATCH] < 0
    assert returns[1500, CATCH] >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_one_agent_learns_two_opposite_games(seed, learned):
    """The pictures are the same, so whoever ignores the task moves wrong in one of them; only balls in the middle
    column need no move. Rewards of 100 must not drown those of 1."""
    arguments = ["--env-ids", CATCH, MIRRORED, *SMALL, "--no-augmentation", "--total-timesteps", 3000]
    returns = learned(*arguments, "--seed", seed)
    assert returns[0, CATCH] < 0 and returns[0, MIRRORED] < 0
    assert returns[3000, CATCH] >= 0.8 and returns[3000, MIRRORED] >= 80
