"""evaluation.csv: a row per evaluation trial, in the actor's run folder. Fed by the loop; any table program reads it.

Rows are appended, each in one write under a lock: actors of one host share the file, and a run that goes on adds to it.
"""

import csv
import fcntl
import io
import time
from pathlib import Path
from typing import IO

from serl_robot_infra.observers.base import EpisodeReport, Observer
from serl_transport.contract.schema import Observation

COLUMNS = (
    "time", "stage", "seed", "trial", "policy_version", "success", "ticks", "seconds", "return", "truncated_by",
    "success_source", "prompt", "video", "actor", "episode_id",
)  # fmt: skip


class TrialTable(Observer):
    """Writes `<run>/evaluation.csv`. ValueError: the file there has other columns.

    `trial` counts a stage's rows from 1. `seconds` is wall time from the first tick to the end. `video` is a path in
    the run folder, empty where there is none. A trial that was cut (`truncated_by` stop or discard) has a row, too.
    """

    def __init__(self, run_dir: Path):
        self._run_dir = run_dir

    def episode_ended(self, report: EpisodeReport, last_observation: Observation | None) -> None:
        """Append the row of an evaluation that had a tick."""
        if report.info.mode != "eval" or not report.ticks:
            return
        self._run_dir.mkdir(parents=True, exist_ok=True)
        with (self._run_dir / "evaluation.csv").open("a+", newline="", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            before = self._rows(file)
            trial = 1 + sum(row[1:2] == [report.info.stage] for row in before)
            rows = [self._row(report, trial)] if before else [COLUMNS, self._row(report, trial)]
            text = io.StringIO(newline="")
            csv.writer(text, lineterminator="\n").writerows(rows)
            file.write(text.getvalue())

    def _rows(self, file: IO[str]) -> list[list[str]]:
        """What is there, the header first; a line that a power cut left torn is ended."""
        file.seek(0)
        content = file.read()
        if content and not content.endswith("\n"):
            file.write("\n")
        rows = list(csv.reader(content.splitlines()))
        if rows and rows[0] != list(COLUMNS):
            raise ValueError(f"{file.name}: expected the columns {', '.join(COLUMNS)}; move that file aside")
        return rows

    def _row(self, report: EpisodeReport, trial: int) -> list[object]:
        info, outcome = report.info, report.outcome
        video = f"videos/{report.video_name}"
        return [
            time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(info.start_time)), info.stage, info.seed, trial,
            report.policy_version, int(outcome.success), report.ticks, f"{report.driven_s:.3f}",
            f"{report.return_:g}", outcome.truncated_by or "", outcome.success_source, info.prompt,
            video if (self._run_dir / video).is_file() else "", info.actor_id, info.episode_id,
        ]  # fmt: skip
