"""Every shape in which labs publish datasets is read as LeRobot itself reads it: pictures, numbers, chunks, texts."""

import numpy as np
import pytest
from real_shapes import SHAPES, Theirs, make

from serl_launcher.datasets.dataset import Dataset
from serl_launcher.learner.sft import Chunks

AH = 5
LARGE = {"so101": pytest.mark.slow}  # its videos take seconds to write


@pytest.mark.parametrize("shape", [pytest.param(s, id=s.name, marks=LARGE.get(s.name, ())) for s in SHAPES])
def test_rows_are_those_that_lerobot_reads(shape, tmp_path):
    folder = make(tmp_path / "set", shape, episodes=2, ticks=6)
    theirs, data = Theirs(folder, shape, AH), Dataset(folder)
    spec = data.spec()
    assert (list(spec.cameras), list(spec.state_names), list(spec.action_names)) == (
        list(shape.cameras), shape.names("state"), shape.names("action"),
    )  # fmt: skip
    assert set(spec.cameras.values()) == {shape.size}
    chunks = Chunks(data.rows(spec), AH)
    rows = [0, 3, 5, 6, 9, 12]
    assert (
        (len(chunks), [end - first for first, end in chunks.bounds]) == (len(theirs), theirs.lengths()) == (13, [6, 7])
    )
    ours, expected = chunks.collate([chunks[row] for row in rows]), theirs.batch(rows)
    for camera, seen in expected.images.items():
        np.testing.assert_array_equal(ours.images[camera], seen, camera)
        assert np.ptp(seen) > 100, "something is seen"
    for what in ("state", "action", "is_pad"):
        np.testing.assert_array_equal(getattr(ours, what), getattr(expected, what), what)
    assert ours.prompts == expected.prompts
    assert set(ours.prompts) == set(shape.tasks)
