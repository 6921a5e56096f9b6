"""A video of an episode whose actor made none: its pictures out of the run's dataset, PNG or mp4 inside."""

import av
import numpy as np
import pytest
from run_samples import SPEC, entries, episode, write_config, write_journal

from serl_launcher.console import footage
from serl_launcher.exporter.role import Exporter, ExporterOptions
from serl_launcher.run.paths import RunPaths


@pytest.mark.parametrize("video", [False, True], ids=["png", "mp4"])
def test_a_video_is_made_of_the_datasets_pictures_and_what_is_not_there_is_told(tmp_path, video, capsys):
    write_config(tmp_path)
    paths, items = RunPaths(tmp_path), [episode(k) for k in range(3)]
    paths.videos.mkdir()
    write_journal(tmp_path, entries(items))
    assert footage.main([str(tmp_path), "episode-1"]) == 2
    assert "episode-1 is not in the dataset yet" in capsys.readouterr().err
    exporter = Exporter(tmp_path, SPEC, ExporterOptions(), video=video)
    exporter.poll(flush=True)
    exporter.close()
    assert footage.main([str(tmp_path), "episode-1"]) == 0
    assert capsys.readouterr().out.strip() == "episode-1-failure.mp4"
    assert [path.name for path in paths.videos.iterdir()] == ["episode-1-failure.mp4"]
    with av.open(str(paths.videos / "episode-1-failure.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == items[1].n
    shown = {(item, tick): side_by_side(items[item], tick) for item in range(3) for tick in range(items[item].n)}
    for tick, frame in enumerate(frames):  # the pictures are noise, which an encoder blurs
        assert min(shown, key=lambda place, frame=frame: np.abs(frame - shown[place]).mean()) == (1, tick)


def side_by_side(item, tick):
    pictures = [item.arrays[f"observation.images.{name}"][tick] for name in SPEC.cameras]
    return np.hstack([footage.resized(picture) for picture in pictures]).astype(float)
