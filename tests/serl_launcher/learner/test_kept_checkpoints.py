"""Which checkpoints stay: the newest, one of every so many steps, that of the best version, and what somebody reads."""

from pathlib import Path

import pytest
import torch

from serl_launcher.learner import checkpoint
from serl_launcher.learner.resume import best_step
from serl_launcher.run import checkpoints
from serl_launcher.run.checkpoints import superfluous
from serl_launcher.run.files import DamagedFileError, write_sealed
from serl_launcher.run.parameters import publish


def names(root: Path) -> list[int]:
    return [checkpoints.step_of(folder) for folder in checkpoints.folders(root)]


def save(root: Path, step: int, **keeping) -> Path:
    return checkpoint.save(root, step, {"w": torch.zeros(2)}, {}, {"counters": {"step": step}}, **keeping)


@pytest.mark.parametrize(
    ("latest", "every", "best", "stay"),
    [
        (2, None, None, [1500, 1800]),
        (1, None, 700, [600, 1800]),  # the newest one before the best version's step
        (1, None, 900, [900, 1800]),
        (1, None, 100, [1800]),  # there is none before it
        (2, 1000, None, [1200, 1500, 1800]),
        (1, 500, 300, [300, 600, 1200, 1500, 1800]),
        (0, None, None, [1800]),
    ],
)
def test_what_stays(latest, every, best, stay):
    steps = [300, 600, 900, 1200, 1500, 1800]
    gone = superfluous(steps, latest, every, best)
    assert [step for step in steps if step not in gone] == stay


def test_what_stays_for_ever_is_the_same_however_long_a_run_goes_on():
    there: list[int] = []
    for step in range(300, 9001, 300):
        there.append(step)
        gone = superfluous(there, 1, every=1000, best=750)
        there = [s for s in there if s not in gone]
    assert there == [600, 1200, 2100, 3000, 4200, 5100, 6000, 7200, 8100, 9000]


def test_a_checkpoint_that_is_read_stays_until_it_is_read_no_more(tmp_path):
    first = save(tmp_path, 1, keep=1)
    with checkpoints.reading(first):
        save(tmp_path, 2, keep=1)
        assert names(tmp_path) == [1, 2]
        assert checkpoints.problem(first) is None
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == [3]


def test_what_a_kill_left_half_written_or_half_deleted_is_removed_by_the_next_start(tmp_path):
    save(tmp_path, 2, keep=1)
    for left in (".step_000001.gone", ".step_000003.part"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "tensors.safetensors").write_bytes(b"half")
    checkpoint.finish(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000002"]


def test_the_best_version_is_known_by_its_step(tmp_path):
    assert best_step(tmp_path) is None
    params = tmp_path / "params"
    for version, step in ((1, 100), (2, 250)):
        publish(params, {"w": torch.zeros(2)}, version=version, step=step, base="", policy="p", now=0.0, keep=9)
    assert best_step(tmp_path) is None
    write_sealed(params / "kept.json", {"stage": "eval", "rate": 0.5, "version": 1, "judged": ["eval"]})
    assert best_step(tmp_path) == 100
    (params / "kept.json").write_text('{"version": 2, "crc32": 1}')
    with pytest.raises(DamagedFileError, match=r"kept\.json"):
        best_step(tmp_path)
    (tmp_path / "sft" / "best").mkdir(parents=True)
    write_sealed(tmp_path / "sft" / "best" / "best.json", {"step": 40, "loss": 0.1})
    assert best_step(tmp_path / "sft") == 40
