"""What a check of the robot found: one line each on the screen as it is found, report.json at the end.

Filled by the files beside, in order; `robot.check` makes it. A failure is what a session must not begin with.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

OK, WARNING, FAILURE, SKIPPED = "ok", "warning", "FAILURE", "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """One question and its answer."""

    level: str  # ok | warning | FAILURE | skipped
    check: str  # what was looked at, such as `camera front`
    says: str  # what was seen
    fix: str = ""  # what to change, where something is to be changed


@dataclass(slots=True)
class Report:
    """The findings so far."""

    stream: TextIO  # told of each at once
    findings: list[Finding] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)  # name with its unit -> value

    def ok(self, check: str, says: str) -> None:
        """As it should be."""
        self._add(Finding(OK, check, says))

    def warn(self, check: str, says: str, fix: str) -> None:
        """A session may begin, but somebody should look at it."""
        self._add(Finding(WARNING, check, says, fix))

    def fail(self, check: str, says: str, fix: str) -> None:
        """A session must not begin."""
        self._add(Finding(FAILURE, check, says, fix))

    def skip(self, check: str, says: str) -> None:
        """Nobody looked; says why."""
        self._add(Finding(SKIPPED, check, says))

    def of(self, level: str) -> list[Finding]:
        """The findings of a level."""
        return [finding for finding in self.findings if finding.level == level]

    @property
    def exit_code(self) -> int:
        """1 where a session must not begin, else 0."""
        return 1 if self.of(FAILURE) else 0

    def verdict(self) -> str:
        """The last line."""
        counts = {level: len(self.of(level)) for level in (FAILURE, WARNING, SKIPPED)}
        told = ", ".join(f"{count} {level}" for level, count in counts.items() if count)
        return f"{'NOT READY' if self.exit_code else 'ready'}{f' ({told})' if told else ''}"

    def write(self, path: Path, more: Mapping[str, Any]) -> None:
        """report.json: `more`, then ready, findings and figures. OSError where the disk takes none."""
        content = {
            **more,
            "ready": self.exit_code == 0,
            "findings": [asdict(finding) for finding in self.findings],
            "figures": {name: round(value, 3) for name, value in self.figures.items()},
        }
        path.write_text(json.dumps(content, indent=2) + "\n")

    def _add(self, finding: Finding) -> None:
        self.findings.append(finding)
        print(f"  {finding.level:<8} {finding.check:<16} {finding.says}", file=self.stream, flush=True)
        if finding.fix:
            print(f"  {'':<8} {'':<16} -> {finding.fix}", file=self.stream, flush=True)
