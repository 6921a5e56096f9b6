"""From a dataset that was downloaded to a run that learns online, without a demonstration recorded; real processes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from whole_run import Run, check

from serl_launcher.datasets.dataset import Dataset

NAMES = {"front": "overhead", "wrist": "hand"}


def published_elsewhere(dataset: Path, folder: Path) -> Path:
    """The same episodes by LeRobot's own writer: other cameras, another size, another text."""
    from lerobot.datasets import LeRobotDataset

    rows = (data := Dataset(dataset)).rows(data.spec())
    picture = {"dtype": "image", "shape": (96, 96, 3), "names": ["height", "width", "channels"]}
    features = {f"observation.images.{name}": picture for name in NAMES.values()}
    for key, names in (("observation.state", rows.state_names), ("action", rows.action_names)):
        features[key] = {"dtype": "float32", "shape": (len(names),), "names": names}
    new = LeRobotDataset.create("someone/pick", fps=10, features=features, root=folder, use_videos=False)
    for episode in rows.episodes:
        for row in range(episode.first, episode.end):
            frame = {"observation.state": rows.state[row], "action": rows.action[row], "task": "lift the block"}
            for camera, image in rows.images([row]).items():
                large = np.asarray(Image.fromarray(image[0]).resize((96, 96)))
                frame[f"observation.images.{NAMES[camera]}"] = large
            new.add_frame(frame)
        new.save_episode()
    new.finalize()
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_downloaded_dataset_takes_the_place_of_demonstrations(tmp_path, free_ports):
    for name in ("lab", "new"):
        (tmp_path / name).mkdir()
    words = ["schedule=data_collection", "schedule.stages.0.episodes=4"]
    with Run(tmp_path / "lab", free_ports, *words, stages_of_its_own=True) as lab:
        lab.end()
    folder = published_elsewhere(lab.folder / "dataset", tmp_path / "someone")
    mapping = f"{{source: {folder}, cameras: {{front: overhead, wrist: hand}}}}"
    with Run(tmp_path / "new", free_ports, f"demos=[{mapping}]") as run:
        run.wait_for(lambda status: status["trainer"]["step"] >= 10, 300)
        run.process.terminate()  # a second start imports nothing, and goes on
        run.process.wait(120)
    text = run.text()
    assert "4 episodes to import" in text
    assert "camera 'front': pictures are resized from 96×96 to 64×64" in text
    with Run(tmp_path / "new", free_ports, f"demos=[{mapping}]") as run:
        summary = run.end(400)
    assert "nothing to import, 4 are here already" in run.text()
    stages = {stage["name"]: stage for stage in summary["stages"]}
    assert stages["demos"]["episodes"] == 4
    ledger = [json.loads(line) for line in (run.folder / "episodes.jsonl").read_text().splitlines()]
    demos = [row for row in ledger if row["mode"] == "demo"]
    assert {row["actor"] for row in demos} == {"demos-someone"}, "no demonstration was recorded here"
    assert len(demos) == 4
    assert summary["accepted_episodes"] >= 4
    assert "nothing lost" in check(run.folder)
