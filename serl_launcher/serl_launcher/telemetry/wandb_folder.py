"""What W&B gets of a run: rows, episodes, videos and policies, read from the run folder. Called by wandb_process.

    metrics/trainer.jsonl ─▶ a history row per optimizer step      videos/*.mp4 ─▶ `videos`
    episodes.jsonl ─▶ the table `episodes`, in increments           params/, best/ ─▶ artifacts that inference can use

metrics/wandb_state.json says what W&B has, so that the next start goes on there and catches up with what W&B missed.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from serl_config.clock import steady_time
from serl_config.secrets import without_secrets
from serl_launcher.run.files import read_json, write_json, write_sealed
from serl_launcher.run.paths import RunPaths
from serl_launcher.run.record import EXPORTED_ORIGIN, origin_of
from serl_launcher.run.tail import Tail
from serl_launcher.run.versions import KEPT, PublishedVersion, file_path, versions_told, write_entry

COLUMNS = (
    "ordinal", "episode_id", "stage", "mode", "seed", "success", "return", "n_ticks", "interventions",
    "policy_version_last", "seconds", "truncated_by", "actor", "drivers", "judge",
)  # fmt: skip
VIDEOS = 8  # a look: a folder of old ones goes up bit by bit
ARTIFACT_S = 600.0  # between two uploads of the newest policy while the run goes on
AFTER_A_CRASH = 1000  # history rows by which a state that was not saved at the end may lag


@dataclass(slots=True)
class Taken:
    """What W&B has of the run."""

    step: int = -1  # the newest trainer step
    row: int = 0  # number of the next history row; W&B drops rows whose number goes back
    episodes: int = -1  # newest journal ordinal in the table
    videos: list[str] = field(default_factory=list)  # names of files
    newest: int = 0  # policy version
    best: int = 0  # trainer step of the best policy
    ended: bool = True  # saved at the end of a process


class WatchedFolder:
    """run: of wandb; config: of the run, without secrets. `uploads`: has a policy been handed to a server?"""

    def __init__(self, run: Any, paths: RunPaths, config: Mapping[str, Any]) -> None:
        self._run, self._paths, self._config = run, paths, config
        self._file = paths.metrics / "wandb_state.json"
        self._taken = Taken(**(read_json(self._file) or {}))
        self._taken.row = max(self._taken.row + (0 if self._taken.ended else AFTER_A_CRASH), run.step)
        if not run.resumed:  # offline each process writes the table from its beginning
            self._taken.episodes = -1
        self._rows, self._ledger = Tail(paths.metrics / "trainer.jsonl"), Tail(paths.episodes)
        self._table: Any = None
        self._offline = bool(run.offline)
        self._artifacts = bool((config.get("telemetry") or {}).get("artifacts", True))
        self._artifact_at = time.monotonic()
        self._again, self._began = False, steady_time()  # is it said that steps are done again
        self.uploads = False

    def look(self, over: bool) -> None:
        """Hand over what is new. over: this is the last look."""
        before = asdict(self._taken)
        self._log_rows()
        self._log_episodes()
        self._log_videos(over)
        if self._artifacts:
            self._log_policies(over)
        self._taken.ended = over
        if asdict(self._taken) != before:
            write_json(self._file, asdict(self._taken))

    def _log(self, row: Mapping[str, Any]) -> None:
        self._run.log(dict(row), step=self._taken.row)
        self._taken.row += 1

    def _log_rows(self) -> None:
        while (lines := self._rows.read()[1]) != []:
            for line in lines:
                step = line.get("step")
                if not isinstance(step, int) or step <= self._taken.step:
                    self._say_again(line)
                    continue
                numbers = {k: v for k, v in line.items() if v is not None and k not in ("step", "time", "stage")}
                self._log({"trainer/step": step, "stage": line.get("stage"), "_timestamp": line.get("time"), **numbers})
                self._taken.step = step

    def _say_again(self, line: Mapping[str, Any]) -> None:
        if not self._again and line.get("time", 0.0) > self._began:
            self._again = True
            print(f"W&B has steps up to {self._taken.step} already and keeps them as they are", flush=True)

    def _log_episodes(self) -> None:
        import wandb

        lines = [line for line in self._ledger.read()[1] if line.get("ordinal", -1) > self._taken.episodes]
        if not lines:
            return
        if self._table is None:
            self._table = wandb.Table(columns=list(COLUMNS), log_mode="INCREMENTAL", allow_mixed_types=True)
        for line in lines:
            line = line | {"drivers": ", ".join(line.get("drivers") or ())}
            self._table.add_data(*(line.get(name) for name in COLUMNS))
        self._log({"trainer/step": max(self._taken.step, 0), "episodes": self._table})
        self._taken.episodes = lines[-1]["ordinal"]

    def _log_videos(self, over: bool) -> None:
        import wandb

        known = set(self._taken.videos)
        found = [p for p in self._paths.videos.glob("*.mp4") if p.name not in known and p.name[0] != "."]
        new = sorted(found, key=lambda path: path.stat().st_mtime_ns)[: None if over else VIDEOS]
        if new:
            videos = [wandb.Video(str(path), format="mp4", caption=path.stem) for path in new]
            self._log({"trainer/step": max(self._taken.step, 0), "videos": videos})
            self._taken.videos += [path.name for path in new]

    def _log_policies(self, over: bool) -> None:
        """The best policy when there is another one, the newest now and then and at the end; offline, where every one
        stays on this disk, at the end alone.
        """
        waits = self._offline or time.monotonic() - self._artifact_at < ARTIFACT_S
        if waits and not over:
            return
        newest, best = PublishedVersion.read(self._paths.params), self._best()
        if newest is None:
            return
        both = best is not None and best[1].step == newest.step
        alone = best is not None and not both and best[1].step != self._taken.best
        if best is not None and alone and self._upload(*best, ["best"]):
            self._taken.best = best[1].step
        due = alone or newest.version > self._taken.newest  # the last one to go up is W&B's latest
        if due and self._upload(self._paths.params, newest, ["latest", *(["best"] if both else [])]):
            self._taken.newest = newest.version
            self._taken.best = newest.step if both else self._taken.best
        self._artifact_at = time.monotonic()

    def _best(self) -> tuple[Path, PublishedVersion] | None:
        """Folder and entry of the best evaluated version, or of fine-tuning's lowest held-out loss."""
        if (entry := PublishedVersion.read(folder := self._paths.root / "best")) is not None:
            return folder, entry
        kept = read_json(self._paths.params / KEPT)
        entry = versions_told(self._paths.params).get(kept["version"]) if kept and kept.get("version") else None
        return (self._paths.params, entry) if entry is not None else None

    def _upload(self, folder: Path, entry: PublishedVersion, aliases: list[str]) -> bool:
        """An artifact that `checkpoint_path=` and tools/export_checkpoint.py read as a run folder; False: not now."""
        import wandb

        if shutil.disk_usage(self._paths.metrics).free < 2 * entry.bytes + (1 << 30):
            print(f"W&B gets no policy version {entry.version}: the disk has no room for a copy", flush=True)
            return False
        artifact = wandb.Artifact(
            f"{self._run.project}-{self._config['policy']['name']}",
            model_type(self._config["policy"]["name"]),
            metadata={"run": self._paths.root.name, "step": entry.step, "version": entry.version},
        )
        with tempfile.TemporaryDirectory(dir=self._paths.metrics) as place:
            try:
                write_small_run(self._paths, folder, entry, Path(place))
            except FileNotFoundError:  # a newer version took its place
                return False
            artifact.add_dir(place, skip_cache=True)
        self._run.log_artifact(artifact, aliases=[*aliases, f"step-{entry.step}", f"run-{self._run.id}"])
        self.uploads |= not self._offline
        return True


def model_type(policy: str) -> str:
    """pi0-model for PI0 and PI0.5, gr00t-model for every GR00T, <name>-model for another one."""
    families = {"pi0": "pi0-model", "groot": "gr00t-model"}
    return next((kind for name, kind in families.items() if policy.startswith(name)), f"{policy}-model")


def write_small_run(paths: RunPaths, folder: Path, entry: PublishedVersion, place: Path) -> None:
    """What inference needs of a version, as a run folder: no optimizer, no secret. FileNotFoundError: it is gone."""
    params = RunPaths(place).params
    params.mkdir()
    os.link(folder / entry.file, file_path(params, entry.version))
    write_entry(params, entry)
    origin = origin_of(paths, entry.step, entry.version, entry.time)
    write_sealed(place / EXPORTED_ORIGIN, origin, indent=1)
    config = without_secrets(yaml.safe_load(paths.config.read_text(encoding="utf-8")))
    RunPaths(place).config.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    if (modality := paths.root / "modality.json").is_file():
        shutil.copyfile(modality, place / modality.name)
