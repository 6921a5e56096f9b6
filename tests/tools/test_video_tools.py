"""merge_video and visualize_dataset on real datasets and mp4 files."""

import subprocess
import sys
from pathlib import Path

import av
import merge_video
import numpy as np
import pytest
import visualize_dataset
from PIL import Image
from run_samples import SPEC, episode

from serl_launcher.exporter.writer import DatasetWriter


@pytest.fixture(params=[False, True], ids=["png", "mp4"])
def run(tmp_path: Path, request) -> Path:
    """A run folder whose dataset holds four episodes in two commits."""
    writer = DatasetWriter(tmp_path / "dataset", SPEC, video=request.param)
    for ordinal in range(4):
        writer.add(ordinal, episode(ordinal, n=3 + ordinal, mode="eval" if ordinal == 3 else "online"))
        if ordinal % 2:
            writer.commit()
    return tmp_path


def frames(path: Path) -> list[np.ndarray]:
    return list(merge_video.read_video(path))


def solid_video(path: Path, count: int, level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), level, np.uint8))))
        container.mux(stream.encode())


def test_dataset_episodes_in_sequence(run, capsys):
    assert merge_video.main([str(run), "--dataset", "-o", str(run / "all.mp4"), "--height", "64"]) == 0
    assert "4 clips, 18 frames" in capsys.readouterr().out  # 3 + 4 + 5 + 6 ticks
    merged = frames(run / "all.mp4")
    assert len(merged) == 18
    # front 16x24 and wrist 32x32 side by side at height 32, doubled: 48 + 32 wide
    assert merged[0].shape == (64, 160, 3)


def test_every_episode_shows_its_own_frames(run):
    """Random images: a frame of another episode or tick would differ by far more than the codec does."""
    root = run / "dataset"
    for clip, index in zip(merge_video.dataset_clips(str(run), None, None), range(4), strict=True):
        wrist = np.stack(list(clip.read()))[:, :, 48:]
        expected = episode(index, n=3 + index).arrays["observation.images.wrist"][:-1]
        assert wrist.shape == expected.shape
        assert np.abs(wrist.astype(int) - expected).mean() < (60 if list(root.glob("videos/**/*.mp4")) else 0.5)


def test_a_grid_holds_the_last_frame_of_the_shorter(tmp_path):
    for name, count, level in (("a", 3, 30), ("b", 6, 220), ("c", 2, 120)):
        solid_video(tmp_path / f"run/videos/{name}.mp4", count, level)
    out = tmp_path / "grid.mp4"
    assert (
        merge_video.main([str(tmp_path / "run"), "-o", str(out), "--columns", "2", "--rows", "1", "--height", "32"])
        == 0
    )
    merged = frames(out)
    assert [frame.shape for frame in merged] == [(32, 64, 3)] * 8  # 6 frames of a and b, then 2 of c
    assert abs(int(merged[5][:, :32].mean()) - 30) < 8
    assert abs(int(merged[5][:, 32:].mean()) - 220) < 8
    assert abs(int(merged[7][:, :32].mean()) - 120) < 8
    assert merged[7][:, 32:].mean() < 8


def test_only_the_chosen_episodes(run, capsys):
    assert merge_video.main([str(run), "--dataset", "--mode", "eval", "-o", str(run / "e.mp4")]) == 0
    assert "1 clips, 6 frames" in capsys.readouterr().out
    assert merge_video.main([str(run), "--dataset", "--stage", "nothing", "-o", str(run / "e.mp4")]) == 1
    assert "no episode of" in capsys.readouterr().err


def test_a_file_for_each_episode_once(run, tmp_path, capsys):
    words = [str(run), "--dataset", "--split", "-o", str(run / "videos")]
    assert merge_video.main([*words, "--last", "2"]) == 0
    assert merge_video.main(words) == 0
    assert "wrote 2 files" in capsys.readouterr().out.splitlines()[-1]
    clips = merge_video.dataset_clips(str(run), None, None)
    files = [run / "videos" / f"{clip.name}.mp4" for clip in clips]  # as the actor would have named them
    assert [len(frames(path)) for path in files] == [3, 4, 5, 6]
    ids = [row["episode_id"] for row in merge_video.episodes(run / "dataset")]
    assert [path.stem.rpartition("-")[0] for path in files] == ids
    assert all(path.stem.endswith(("-success", "-failure")) for path in files)
    assert merge_video.main([str(run), "--split", "-o", str(run / "v")]) == 1
    assert "say --dataset" in capsys.readouterr().err


def test_mistakes_are_one_line(tmp_path, capsys):
    (tmp_path / "text.mp4").write_text("no video")
    for sources in (["nothing-here"], [str(tmp_path / "text.mp4")]):
        assert merge_video.main([*sources, "-o", str(tmp_path / "out.mp4")]) == 1
    err = capsys.readouterr().err
    assert "no mp4 files at" in err
    assert "is no video" in err
    assert not (tmp_path / "out.mp4").exists()


def test_the_ancestors_flags(tmp_path):
    for name, count in (("a", 3), ("b", 4)):
        solid_video(tmp_path / f"clips/{name}.mp4", count, 90)
    words = ["--video_folder", str(tmp_path / "clips"), "--output_path", str(tmp_path / "all.mp4"), "--fps", "25"]
    assert merge_video.main(words) == 0
    with av.open(str(tmp_path / "all.mp4")) as video:
        assert video.streams.video[0].average_rate == 25
        assert sum(1 for _ in video.decode(video=0)) == 7


def test_a_contact_sheet_has_a_row_for_each_clip_from_its_first_to_its_last_frame(tmp_path):
    path = tmp_path / "clips/ramp.mp4"
    path.parent.mkdir()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for level in range(0, 250, 50):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), level, np.uint8))))
        container.mux(stream.encode())
    solid_video(tmp_path / "clips/short.mp4", 1, 120)
    words = [str(tmp_path / "clips"), "-o", str(tmp_path / "sheet.png"), "--pictures", "3", "--height", "64"]
    assert merge_video.main(words) == 0
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * 64, 3 * 64, 3)
    below = [[float(sheet[row * 64 + 40, column * 64 + 32].mean()) for column in range(3)] for row in range(2)]
    assert np.abs(np.array(below) - [[0, 100, 200], [120, 120, 120]]).max() < 12
    assert sheet[:14, :40].max() > 200  # its name


def trials(root: Path, rows: list[tuple[int, int, int]]) -> None:
    """evaluation.csv with (policy version, seed, success); the version is the video's grey level by ten."""
    lines = ["policy_version,seed,success,video"]
    for version, seed, success in rows:
        solid_video(root / f"videos/{version}-{seed}.mp4", 2, version * 10)
        lines.append(f"{version},{seed},{success},videos/{version}-{seed}.mp4")
    (root / "evaluation.csv").write_text("\n".join(lines) + "\n")


def test_before_and_after_stand_side_by_side_by_seed(tmp_path):
    trials(tmp_path, [(3, 7, 0), (3, 8, 0), (9, 7, 1), (20, 8, 1), (20, 7, 1), (20, 9, 1)])
    clips = merge_video.before_after(str(tmp_path), dataset=False)
    assert [clip.label for clip in clips] == ["v3 seed 7 failure", "v20 seed 7 success", "v3 seed 8 failure",
                                              "v20 seed 8 success"]  # fmt: skip
    out = tmp_path / "both.mp4"
    assert merge_video.main([str(tmp_path), "-o", str(out), "--before-after", "--height", "64"]) == 0
    merged = frames(out)
    assert [frame.shape for frame in merged] == [(64, 128, 3)] * 4
    assert abs(float(merged[0][40:, :64].mean()) - 30) < 8
    assert abs(float(merged[0][40:, 64:].mean()) - 200) < 8


def test_before_and_after_of_a_dataset_or_of_one_version(tmp_path, capsys):
    writer = DatasetWriter(tmp_path / "dataset", SPEC, video=False)
    for ordinal, version in enumerate((2, 2, 5)):
        recorded = episode(ordinal, n=3, mode="eval")
        recorded.arrays["policy_version"][:] = version
        writer.add(ordinal, recorded)
    writer.commit()
    labels = [clip.label for clip in merge_video.before_after(str(tmp_path), dataset=True)]
    assert [label.split()[0] for label in labels] == ["v2", "v5"]
    trials(tmp_path, [(3, 7, 0)])
    assert merge_video.main([str(tmp_path), "-o", str(tmp_path / "x.mp4"), "--before-after"]) == 1
    assert "needs evaluations of two policy versions, got [3]" in capsys.readouterr().err


def test_the_list_of_episodes(run, capsys):
    assert visualize_dataset.main([str(run), "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == visualize_dataset.COLUMNS
    assert len(lines) == 5
    assert "time_limit" in lines[2]
    assert "episode-3" in lines[4]


def test_viewer_mistakes_are_one_line(run, capsys, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert visualize_dataset.main([str(run), "-e", "9"]) == 1
    assert "holds episodes 0 to 3" in capsys.readouterr().err
    assert visualize_dataset.main([str(run)]) == 1
    assert "use --save FILE.rrd" in capsys.readouterr().err
    assert visualize_dataset.main(["no-such-run"]) == 1
    assert "runs/no-such-run/dataset" in capsys.readouterr().err


@pytest.mark.slow
def test_lerobots_viewer_writes_an_rrd(run):
    out = run / "shown/last.rrd"
    command = [sys.executable, visualize_dataset.__file__, str(run), "-e", "-1", "--save", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert out.stat().st_size > 5_000


@pytest.mark.slow
def test_lerobots_training_takes_two_steps(run, monkeypatch):
    """The command of docs/data.md, with a smaller network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = [
        str(Path(sys.executable).parent / "lerobot-train"), "--dataset.repo_id=local/run",
        f"--dataset.root={run / 'dataset'}",
        "--policy.type=act", "--policy.pretrained_backbone_weights=null", "--policy.push_to_hub=false",
        "--policy.device=cpu", "--policy.chunk_size=4", "--policy.n_action_steps=4", "--policy.dim_model=32",
        "--policy.n_heads=2", "--policy.dim_feedforward=32", "--steps=2", "--batch_size=2", "--num_workers=0",
        "--wandb.enable=false", f"--output_dir={run / 'act'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "End of training" in done.stderr + done.stdout
    assert list((run / "act").glob("checkpoints/*/pretrained_model/model.safetensors"))
