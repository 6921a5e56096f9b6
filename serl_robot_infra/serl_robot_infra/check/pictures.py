"""What is wrong with a camera's pictures: black, one colour, frozen, too few, or another camera's.

Called by `robot.check` with what `looking.watch` saw. The first check of a task keeps a picture of each camera
(`<runs_dir>/.check_robot/<task>/<camera>.png`); later ones are compared with it, and `--remember` takes the new ones.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from serl_robot_infra.check.looking import CameraWatch, Observed, thumbnail
from serl_robot_infra.check.report import Report

_DARK, _FLAT = 5.0, 1.5  # grey level of 255; standard deviation over the picture
_ENOUGH = 0.8  # of the control rate
_ALIKE, _CLEARLY = 0.5, 0.2  # correlation of two pictures of one place; by how much another one must be better


def check_pictures(report: Report, observed: Observed, robot: bool) -> None:
    """One finding for each camera. robot: False for a simulation, whose picture stands while nothing moves."""
    for name, camera in observed.cameras.items():
        _check_picture(report, name, camera, observed, robot)


def _check_picture(report: Report, name: str, camera: CameraWatch, observed: Observed, robot: bool) -> None:
    check, image = f"camera {name}", camera.last
    if image is None:
        report.fail(check, "no picture", "its cable, its device in the task's yaml, another process that holds it")
        return
    rate = camera.new / observed.seconds if observed.seconds else 0.0
    report.figures[f"{check}, new pictures per second"] = rate
    size = f"{image.shape[0]}×{image.shape[1]}"
    if image.mean() < _DARK:
        report.fail(check, f"{size}, black (mean {image.mean():.1f} of 255)", "take its cap off; light; its exposure")
    elif image.std() < _FLAT:
        report.fail(check, f"{size}, one colour (mean {image.mean():.0f} of 255)", "its lens, exposure, pixel format")
    elif robot and camera.pictures > 1 and camera.new == 1:
        report.fail(check, f"{size}, frozen: the same to the bit for {observed.seconds:.1f} s",
                    "plug it in anew; the driver hands out an old picture")  # fmt: skip
    elif robot and rate < _ENOUGH * min(observed.rate_hz, observed.reached_hz):
        report.warn(check, f"{size}, {rate:.1f} new pictures a second for {observed.reached_hz:.1f} ticks",
                    "the policy sees some twice: raise its fps, or lower task.spec.control_hz")  # fmt: skip
    else:
        report.ok(check, f"{size}, {rate:.1f} new pictures a second" if robot else f"{size}, a simulation's")


def save_pictures(observed: Observed, folder: Path) -> list[Path]:
    """`<folder>/<camera>.png` of the newest pictures. OSError where the disk takes none."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, camera in observed.cameras.items():
        if camera.last is not None:
            paths.append(folder / f"{name}.png")
            Image.fromarray(camera.last).save(paths[-1])
    return paths


def check_places(report: Report, observed: Observed, folder: Path, pictures: Path, remember: bool) -> None:
    """Is each camera the one that it was? Compares with the pictures in `folder`, or keeps the new ones there."""
    known = {name: path for name in observed.cameras if (path := folder / f"{name}.png").is_file()}
    if remember or not known:
        save_pictures(observed, folder)
        report.skip("right cameras", f"these pictures are what later checks compare with: {folder}; look at them")
        return
    before = {name: thumbnail(np.asarray(Image.open(path).convert("RGB"))) for name, path in known.items()}
    for name, camera in observed.cameras.items():
        if name in before and camera.last is not None:
            _check_place(report, name, camera.mean, before, f"{pictures}/{name}.png", f"{folder}/{name}.png")


def _check_place(
    report: Report, name: str, now: np.ndarray, before: Mapping[str, np.ndarray], new: str, old: str
) -> None:
    check = f"place of {name}"
    own = alike(now, before[name])
    others = {other: alike(now, picture) for other, picture in before.items() if other != name}
    best = max(others, key=lambda other: others[other], default=None)
    if best is not None and others[best] > max(_ALIKE, own + _CLEARLY):
        report.fail(check, f"it shows what {best} showed (likeness {others[best]:.2f}, its own {own:.2f})",
                    f"swap the two in task.env, or their cables; compare {new} and {old}")  # fmt: skip
    elif own < _ALIKE:
        report.warn(check, f"unlike its saved picture (likeness {own:.2f}): moved, or another scene or pose",
                    f"compare {new} and {old}; --remember takes the new ones")  # fmt: skip
    else:
        report.ok(check, f"as it was (likeness {own:.2f})")


def alike(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of two grey pictures of one size, −1 to 1: no brightness or contrast counts."""
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / scale if scale else 0.0
