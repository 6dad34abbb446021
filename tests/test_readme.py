"""README's own code: the lines that load a policy, and the three diffs, applied to the script as it stands; and that
its links lead somewhere."""

import csv
import importlib.util
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import brc_sac_continuous as brc

ROOT = Path(__file__).resolve().parents[1]
SMALL = """--critic-width 16 --critic-depth 1 --actor-width 16 --batch-size 16 --eval-episodes 1 --total-timesteps 200
--learning-starts 100""".split()
pytestmark = pytest.mark.usefixtures("own_signal_handlers")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def applied(diff: str, folder: Path):
    """The module that a diff makes of the script that it names: the old lines of a hunk stand there exactly once."""
    source, target = re.match(r"--- (\S+)\n\+\+\+ (\S+)\n", diff).groups()
    text = (ROOT / source).read_text()
    for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE)[1:]:
        old, new = ("".join(re.findall(rf"^[{signs}](.*\n)", hunk, re.MULTILINE)) for signs in (" -", " +"))
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / target).write_text(text)
    spec = importlib.util.spec_from_file_location(Path(target).stem, folder / target)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def changed(tmp_path, monkeypatch):
    """changed(name): the module of the diff that makes name.py, which worker processes find, too."""
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda name: applied(*(diff for diff in blocks("diff") if f"+++ {name}.py" in diff), tmp_path)
    for name in ("my_critic", "my_task", "my_loss"):
        sys.modules.pop(name, None)


def finished(module, tmp_path: Path, *arguments) -> tuple[Path, list[dict]]:
    """A run at small sizes, its directory and the rows of its last evaluation."""
    module.main(module.parse_args([*arguments, *SMALL, "--run-root", str(tmp_path / "runs")]))
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert f"__{module.__name__}__1__" in run_dir.name, "a copy is its own experiment"
    with (run_dir / "eval.csv").open() as file:
        return run_dir, [row for row in csv.DictReader(file) if row["step"] == "200"]


def test_another_critic_network(changed, tmp_path):
    run_dir, rows = finished(changed("my_critic"), tmp_path, "--env-ids", "metaworld/reach")
    assert len(rows) == 1 and json.loads((run_dir / "args.json").read_text())["critic_arch"] == "gated"
    assert "Gated_0" in (run_dir / "checkpoints/200/state/_METADATA").read_text()


def test_a_task_of_ones_own(changed, tmp_path):
    _, rows = finished(changed("my_task"), tmp_path, "--env-ids", "metaworld/reach", "gym/Dock-v0")
    row = rows[1]
    assert row["task"] == "gym/Dock-v0" and row["success"] in ("0.0", "1.0")
    assert -1000 < float(row["return"]) < -1
    assert float(row["score"]) == pytest.approx(1 + float(row["return"]) / 100, abs=1e-4)


def test_another_loss(changed, tmp_path):
    """Nothing to learn from where both distributions are the same, and the square of the way to another atom."""
    module = changed("my_loss")
    finished(module, tmp_path, "--env-ids", "metaworld/reach")
    agent = module.make_agent(module.Args(critic_width=16, critic_depth=1, actor_width=16), 1, 3, 2)
    state = agent.init(0)
    flat = jax.tree.map(lambda leaf: leaf * 0, state.critic)  # of which every output is a uniform distribution
    batch = module.Batch(*np.zeros((2, 4, 3), np.float32)[:1], *np.zeros((1, 4, 2), np.float32), *np.zeros((2, 4)),
                         *np.zeros((1, 4, 3), np.float32), np.zeros(4, np.int32))  # fmt: skip
    uniform, first = np.full((4, 101), 1 / 101), np.tile(np.arange(101) == 0, (4, 1))
    assert agent.critic_loss(flat, state, batch, uniform) == pytest.approx(0, abs=1e-6)
    expected = 2 * sum((1 - k / 101) ** 2 for k in range(1, 101))  # of two critics
    assert agent.critic_loss(flat, state, batch, first) == pytest.approx(expected, rel=1e-4)


def test_lines_that_load_a_policy(tmp_path, monkeypatch):
    """Word for word: a trained policy in a Gymnasium environment, of a run of two tasks with other sizes."""
    monkeypatch.chdir(tmp_path)
    brc.main(brc.parse_args(["--env-ids", "metaworld/reach", "gym/Ant-v5", *SMALL, "--run-name", "RUN"]))
    (lines,) = blocks("python")
    names = {}
    exec(lines, names)
    assert names["truncated"] and names["action"].shape == (8,) and "success" in names["info"]
    policy = names["agent"], names["state"].actor, names["state"].critic
    args = brc.parse_args(["--resume", "runs/RUN"])
    state, _ = brc.load_checkpoint(Path("runs/RUN"), brc.make_agent(args, 2, 105, 8, [4, 8]).init(5))
    action = policy[0].act_deterministic(state.actor, state.critic, names["padded"][None], np.array([0]))[0]
    np.testing.assert_array_equal(names["action"], action)


PAGES = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *(ROOT / "benchmark").rglob("*.md")))


@pytest.mark.parametrize("page", [page for page in PAGES if page != "benchmark/results/tables.md"])
def test_links_lead_somewhere(page):
    """To files of the repository and to headings, by the names that GitHub gives them."""
    for file, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", (ROOT / page).read_text()):
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), file
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings], anchor
