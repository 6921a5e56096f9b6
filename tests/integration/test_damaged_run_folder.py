"""Every file of a run folder, damaged in every way: the learner goes on and says so, or ends with one line.

The roles are opened in this process, on a copy of a folder that real roles made (damage_rig).
"""

import json
import logging
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from damage_rig import DAMAGES, ROLES, Opened, copy_of, files_of, make_run, open_role, run_config, serving

from serl_launcher.run.versions import highest_number

# Which roles open a file; the first part of its path that is named here counts. The supervisor always comes first.
READERS = {
    "journal": ("gateway", "exporter"),
    "params": ("gateway", "policy", "trainer"),
    "checkpoints": ("gateway", "trainer"),
    "dataset": ("exporter",),
    "dataset.lock": ("exporter",),
    "quarantine.jsonl": ("exporter",),
    "exporter.attempt": ("exporter",),
    "dataset_status.json": ("gateway", "exporter"),
    "acceptance.jsonl": ("trainer",),
    "metrics": ("trainer",),
    "config.yaml": (),
    "spool": ("robot",),
    "estop": ("robot",),
    "reward": ("reward",),
    "relabelled.json": ("gateway",),
    "acts.jsonl": ("gateway", "trainer"),
    "acts.mark": ("gateway",),
    "stage_progress.json": ("gateway", "trainer"),
}
# Files that nothing of the run depends on: whatever lies there is written again, and need not be named.
OF_NO_CONSEQUENCE = (".lock", "lock", "dataset.lock", "session", "status.json", "dataset_status.json", "episodes.jsonl",
                     "trainer.jsonl", "gateway.log", "trainer.exit", "latest.json", "info.json", "stats.json",
                     "tasks.parquet", "durable", "exporter.attempt", "robot.acknowledged.jsonl")  # fmt: skip
# The state of a run: what the default suite damages, in the ways that reading alone does not notice.
QUICK = ("params/v000003.", "params/latest.json", "params/kept.json", "checkpoints/step_000004/", "acts.",
         "stage_progress.json", "relabelled.json", "ticket.secret", "quarantine.jsonl")  # fmt: skip
QUICK_DAMAGES = ("empty", "flipped")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def expected(run, tmp_path_factory) -> dict[str, list[Opened]]:
    """Role -> what it finds in the whole folder; then, where the newest may be damaged, what the one before is."""
    whole = copy_of(run, tmp_path_factory.mktemp("expected"))
    found = {name: [open_role(name, whole)] for name in ROLES}
    assert all(opened.found for [opened] in found.values()), found
    before = copy_of(run, tmp_path_factory.mktemp("before"))
    shutil.rmtree(max(before.glob("checkpoints/step_*")))
    for path in (*before.glob("params/v000003.*"), before / "params" / "latest.json"):
        path.unlink()
    for name in ("policy", "trainer", "gateway"):
        found[name].append(open_role(name, before))
    return found


def readers(file: str) -> tuple[str, ...]:
    return ("supervisor", *READERS.get(file.split("/")[0], ("gateway",)))


def judge(name: str, file: str, opened: Opened, expected: list[Opened], said: str, root: Path) -> list[str]:
    """What is wrong with how a role took the damage; empty when it did as it must."""
    leaf = Path(file).name
    if opened.found is None:
        named = leaf in opened.line or (file.startswith("journal/") and "journal" in opened.line)
        return [] if named and "\n" not in opened.line.strip() else [f"ended with {opened.line!r}"]
    whole, *before = (one.found for one in expected)
    wrong = []
    for key, value in opened.found.items():
        if value == whole[key]:
            continue
        if key == "problems":
            wrong.append(f"the dataset is not the journal's: {value}")
        elif key == "paused":
            wrong += [] if value else ["a pause was forgotten"]
        elif key == "version" and name == "trainer":
            wrong.append(f"version {value}, told was {whole[key]}")
        elif key == "serves":
            wrong += [] if value is False else ["a damaged version counts as served"]
        elif key in ("secret", "quarantined"):
            pass  # made anew, or found out again; named below
        elif key == "state":
            wrong.append(f"taken for {value}")
        elif key == "items":  # of the spool: nothing has a copy of them
            wrong += [] if set(value) < set(whole[key]) else ["an item is another one"]
        elif not any(value == one[key] for one in before):
            wrong.append(f"{key} is {value}, expected {whole[key]} or what was before")
        if leaf not in said:
            wrong.append(f"{key} changed, and nothing names {leaf}: {said[-300:]}")
    if leaf not in said and leaf not in OF_NO_CONSEQUENCE and whole != opened.found:
        wrong.append("nothing names it")
    return wrong


def look(run: Path, file: str, damage: str, expected, folder: Path, caplog, capsys) -> list[str]:
    """One cell of the matrix."""
    root = copy_of(run, folder)
    DAMAGES[damage](root / file)
    caplog.clear()
    problems = []
    for name in readers(file):
        try:
            opened = open_role(name, root)
        except Exception as crash:  # the matrix is told whole: one crash must not hide the other cells
            problems.append(f"{file} {damage}: {name} crashed: {type(crash).__name__}: {crash}")
            break
        said = caplog.text + capsys.readouterr().out
        problems += [
            f"{file} {damage}: {name}: {wrong}" for wrong in judge(name, file, opened, expected[name], said, root)
        ]
        if opened.found is None:
            break
    if file.startswith("params/"):
        assert highest_number(root / "params") >= 3
    shutil.rmtree(folder)
    return problems


def cells(run: Path, quick: bool) -> list[tuple[str, str]]:
    """Files and damages."""
    both = [(file, damage) for file in files_of(run) for damage in DAMAGES]
    chosen = [(f, d) for f, d in both if f.startswith(QUICK) and d in QUICK_DAMAGES]
    return chosen if quick else [cell for cell in both if cell not in chosen]


@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["state", "all"])
def test_a_damaged_file_is_named_or_ends_in_one_line_and_nothing_is_taken_for_another(
    run, expected, quick, tmp_path, caplog, capsys
):
    caplog.set_level(logging.INFO)
    problems = []
    for number, (file, damage) in enumerate(cells(run, quick)):
        problems += look(run, file, damage, expected, tmp_path / str(number), caplog, capsys)
    assert problems == [], "\n".join(problems)


def test_what_has_no_whole_predecessor_ends_the_trainer_with_one_line(run, tmp_path):
    """All of them zeroed: nothing is trained from scratch in their place."""
    root = copy_of(run, tmp_path)
    for path in root.glob("checkpoints/*/optimizer.pt"):
        DAMAGES["zeroed"](path)
    opened = open_role("trainer", root)
    assert opened.found is None
    assert "no checkpoint in" in opened.line
    assert "step_000002/optimizer.pt is damaged" in opened.line
    shutil.rmtree(root / "checkpoints")
    for path in root.glob("params/*.safetensors"):
        DAMAGES["zeroed"](path)
    opened = open_role("trainer", root)
    assert opened.found is None
    assert "and there is no checkpoint to go on from" in opened.line


def test_a_folder_of_an_older_release_is_read(run, expected, tmp_path):
    """No checksums, no entry beside each version: sizes, and the sha256 in latest.json."""
    root = copy_of(run, tmp_path)
    for path in [*root.glob("params/v*.json")]:
        path.unlink()
    documents = ["params/latest.json", "params/kept.json", "acts.mark", "stage_progress.json", "relabelled.json"]
    for path in [*map(root.joinpath, documents), *root.glob("checkpoints/*/manifest.json")]:
        body = json.loads(path.read_text())
        new = ("crc32", "sha256") if path.name == "manifest.json" else ("crc32",)
        path.write_text(json.dumps({key: value for key, value in body.items() if key not in new}))
    for name in ("gateway", "trainer", "policy"):
        assert open_role(name, root) == expected[name][0]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("module", "files", "damage", "code"),
    [
        ("gateway", "relabelled.json", "flipped", 2),
        ("learner", "checkpoints/step_*/manifest.json", "empty", 2),
        ("learner", "checkpoints/step_000004/tensors.safetensors", "zeroed", 0),
        ("exporter", "dataset/data/chunk-000/file-000.parquet", "flipped", 0),
    ],
)
def test_a_role_as_a_process_goes_on_or_ends_with_one_line(run, tmp_path, module, files, damage, code):
    root = copy_of(run, tmp_path)
    damaged = sorted(root.glob(files))
    for path in damaged:
        DAMAGES[damage](path)
    argv = [sys.executable, "-m", f"serl_launcher.{module}", str(root), *(["--once"] if module == "exporter" else [])]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1")
    with serving(run_config(root.parent), root) if module == "learner" else nullcontext():
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    assert "Traceback" not in said
    assert damaged[-1].name in said or damaged[-1].stem in said
