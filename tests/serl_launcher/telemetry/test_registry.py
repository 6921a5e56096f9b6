"""The record of a start, the run's page, the index: written as the learner's main does, read from files alone."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import runs
import torch
from history_samples import SampleRun

from serl_launcher.learner import checkpoint
from serl_launcher.run.acts import ActsLedger
from serl_launcher.run.files import write_sealed
from serl_launcher.run.parameters import publish
from serl_launcher.run.paths import RunPaths
from serl_launcher.run.record import EXPORTED_ORIGIN, note_start, origin_of, read_starts
from serl_launcher.run.revision import patch, revision
from serl_launcher.telemetry.journal_page import JournalPage, _acts
from serl_launcher.telemetry.registry import read_index, refresh, update

STAGES = [("demos", "demo"), ("sft", "train"), ("online", "online"), ("after", "eval")]
SECRET = "-".join(("s3cr3t", "4711"))  # in pieces: an uncommitted copy of this file is part of a patch


def sample(folder: Path, online: int = 12, won: int = 8) -> SampleRun:
    run = SampleRun(folder, STAGES)
    for seed in range(2):
        run.episode("demo", "demos", seed, True, help_ticks=10)
    run.train("sft", 100, 0.9)
    for index in range(online):
        helped = {"help_ticks": 4, "drivers": ["Ann", "Bo"] if index else ["Ann"], "judge": "Bo"} if index < 3 else {}
        run.episode("online", "online", 50 + index, index < won, actor="robot-1", **helped)
        run.train("online", 20, 0.3)
    run.episode("eval", "after", 1_000_000, True)
    return run


def start(folder: Path, *words: str, state: str = "new") -> dict:
    line = note_start(RunPaths(folder), "learner", ["learner=true", *words], state)
    JournalPage(RunPaths(folder), print).start()
    return line


@pytest.fixture
def run(tmp_path):
    """A run with one start, a checkpoint and a published version."""
    folder = tmp_path / "runs" / "night1"
    run = sample(folder)
    run.save()
    paths = RunPaths(folder)
    more = f"serving: {{openpi_token: {SECRET}}}\ntrainer: {{publish_period: 100}}\n"
    paths.config.write_text(paths.config.read_text() + more)
    acts = ({"act": "verdict", "episode_id": "e4", "word": "reject"},
            {"act": "set", "key": "trainer.publish_period", "value": 7, "was": 100})  # fmt: skip
    ActsLedger(folder).append(*acts, by="Eve (console)")
    start(folder, f"serving.openpi_token={SECRET}", "run=night1", f"reward={{url: 'x?{SECRET}'}}")
    tensors = {"w": torch.ones(2)}
    origin = origin_of(paths, 340, 3)
    checkpoint.save(paths.checkpoints, 340, tensors, {}, {"version": 3}, keep=2, origin=origin)
    publish(paths.params, tensors, version=3, step=340, base="b" * 64, policy="pi0_tiny", now=2e9, keep=3)
    return folder


@pytest.fixture
def checkout(tmp_path):
    """A git repository with a change, an untracked file and an ignored one."""
    root = tmp_path / "checkout"
    root.mkdir()
    (root / ".gitignore").write_text("keys/\n")
    (root / "a.py").write_text("x = 1\n")
    who = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *words], cwd=root, check=True)
    return root


def test_the_revision_names_each_changed_and_untracked_file_and_the_patch_makes_the_same_code(checkout, tmp_path):
    clean = revision(checkout)
    assert (len(clean.commit), clean.changed, clean.problem) == (40, {}, None)
    subprocess.run(["git", "clone", "-q", str(checkout), str(tmp_path / "other")], check=True)
    (checkout / "a.py").write_text("x = 2\n")
    (checkout / "new.py").write_text("y = 1\n")
    (checkout / "keys").mkdir()
    (checkout / "keys" / "robot.secret").write_text(SECRET)
    changed = revision(checkout)
    assert list(changed.changed) == ["a.py", "new.py"]
    assert changed.digest != clean.digest
    assert str(changed).endswith("+2 changed")
    assert SECRET.encode() not in patch(checkout)
    subprocess.run(["git", "apply"], cwd=tmp_path / "other", input=patch(checkout), check=True)
    assert revision(tmp_path / "other") == changed
    shutil.rmtree(checkout / ".git")
    lost = revision(checkout)
    assert lost.commit is None
    assert lost.problem.startswith("git: ")


def test_what_made_a_checkpoint_is_answered_by_a_copy_with_the_run_gone(run, tmp_path, capsys):
    copies = {
        "checkpoint": shutil.copytree(run / "checkpoints" / "step_000340", tmp_path / "elsewhere"),
        "version": Path(shutil.copy(run / "params" / "v000003.safetensors", tmp_path)),
        "run": shutil.copytree(run, tmp_path / "backup"),
    }
    export = tmp_path / "export"
    export.mkdir()
    write_sealed(export / EXPORTED_ORIGIN, origin_of(RunPaths(run), 340, 3))
    shutil.rmtree(run.parent)
    said = {}
    for name, path in {**copies, "export": export}.items():
        assert runs.main(["show", str(path)]) == 0
        said[name] = capsys.readouterr().out
    for text in said.values():
        assert "night1, id " in text
        assert "policy         version 3, trainer step 340" in text
        assert f"commit {revision().commit}" in text
    for name in ("checkpoint", "run", "export"):
        assert "15 episodes (2 demo, 12 online, 1 eval), 150 ticks" in said[name]
        assert "recorded by    actor robot-1: 12 episodes" in said[name]
        assert "operators      Ann drove in 3 episodes" in said[name]
        assert "operators      Bo drove in 2 episodes" in said[name]
        assert "operators      Bo judged 3 episodes at the robot" in said[name]
        assert "operators      Eve (console) judged 1 episodes afterwards" in said[name]
        assert "acts           Eve (console): verdict 1, set 1" in said[name]
        assert "set          trainer.publish_period=7 by Eve (console)" in said[name]
        assert "by a late one" not in said[name]
        assert "learner=true serving.openpi_token=(hidden) run=night1 reward={url: 'x?(hidden)'}" in said[name]
        assert "torch " in said[name]
    assert "every file matches its sha256" in said["checkpoint"]
    assert runs.main(["show", "--json", str(copies["checkpoint"])]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["config"]["task"] == {"name": "pick"}
    written = [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert written == [tmp_path / "backup" / "config.yaml"]


def test_changes_in_which_a_secret_stands_are_not_kept(run, checkout, monkeypatch):
    monkeypatch.setattr("serl_launcher.run.record.revision", lambda: revision(checkout))
    monkeypatch.setattr("serl_launcher.run.record.patch", lambda: patch(checkout))
    (checkout / "mine.yaml").write_text("token: hf_AbCdEfGh\n")
    kept = start(run, state="resumed")["patch"]
    assert (run / "record" / kept).stat().st_mode & 0o077 == 0
    assert b"hf_AbCdEfGh" in (run / "record" / kept).read_bytes()
    monkeypatch.setenv("HF_TOKEN", "hf_AbCdEfGh")
    (checkout / "a.py").write_text("x = 3\n")
    assert start(run, state="resumed")["patch"] is None


def test_a_damaged_checkpoint_and_a_stranger_are_refused_in_one_line(run, tmp_path, capsys):
    (run / "checkpoints" / "step_000340" / "tensors.safetensors").write_bytes(b"torn")
    (tmp_path / "empty").mkdir()
    for path, words in (
        (run / "checkpoints" / "step_000340", "tensors.safetensors is damaged"),
        (tmp_path / "empty", "it holds no record of how it was made"),
        (tmp_path / "nowhere", "no such file or folder"),
        (run / "episodes.jsonl", "expected a safetensors file"),
    ):
        assert runs.main(["show", str(path)]) == 2
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1


def test_a_person_writes_into_the_page_and_later_starts_and_stages_only_add(run):
    paths = RunPaths(run)
    page = JournalPage(paths, print)
    page.look({"stage": {"index": 0}, "done": False})
    first = paths.page.read_text()
    assert first.startswith("# night1\n")
    assert "is over" not in first
    noted = first.replace("# night1\n", "# night1\n\nThe cube was the blue one.\n") + "the gripper slips after an hour"
    paths.page.write_text(noted)
    page.look({"stage": {"index": 2}, "done": False})
    page.look({"stage": {"index": 2}, "done": False})
    config = paths.config.read_text()
    paths.config.write_text(config.replace("seed: 7", "seed: 8"))
    start(run, state="resumed")
    again = JournalPage(paths, print)
    again.look({"stage": {"index": 2}, "done": False})
    again.look({"stage": {"index": 3}, "done": True})
    again.end("complete")
    text = paths.page.read_text()
    assert text.startswith(noted)
    added = text.removeprefix(noted)
    heads = [line.rpartition(" · ")[2] for line in added.splitlines() if line.startswith("## ")]
    over = [f"stage `{name}` is over" for name, _ in STAGES]
    assert heads == [*over[:2], "start 2 (learner, resumed)", *over[2:], "ended: complete"]
    assert "- seed: 7 -> 8\n" in added
    assert "- online: 12 episodes, success 0.42 [0.19, 0.68], 120 ticks, " in added
    assert all(
        f"run {read_starts(paths)[0]['run_id']}" in line for line in added.splitlines() if line.startswith("## ")
    )


def test_a_page_that_the_disk_refuses_is_said_once_and_tried_again(run, monkeypatch):
    monkeypatch.setattr("serl_launcher.telemetry.journal_page.RETRY_S", 0.0)
    paths, said = RunPaths(run), []
    kept = paths.page.read_text()
    paths.page.unlink()
    paths.page.mkdir()
    page = JournalPage(paths, said.append)
    page.look({"stage": {"index": 1}, "done": False})
    page.look({"stage": {"index": 1}, "done": False})
    assert len(said) == 1
    assert "journal.md takes no section" in said[0]
    paths.page.rmdir()
    paths.page.write_text(kept)
    page.look({"stage": {"index": 1}, "done": False})
    assert "stage `demos` is over" in paths.page.read_text()


def test_the_index_is_rebuilt_from_the_folders_and_keeps_rows_of_those_that_are_gone(run, capsys):
    folder = run.parent
    sample(folder / "old", online=0).save()  # of an older release: no record
    (folder / "broken").mkdir()
    (folder / "broken" / "config.yaml").write_text("{")
    assert runs.main(["list", "--runs-dir", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "3 runs" in out
    assert "config.yaml cannot be read" in out
    before = {row["run"]: row for row in read_index(folder)}
    assert before["night1"]["success_rate"] == 1.0
    assert before["night1"]["commit"] == revision().commit
    assert (before["old"]["run_id"], before["old"]["episodes"]) == (None, 3)
    (folder / "index.jsonl").unlink()
    assert {row["run"]: row for row in refresh(folder)} == before
    start(run, state="resumed")
    update(run)
    assert {row["run"]: row["starts"] for row in read_index(folder)} == {"night1": 2, "old": 0, "broken": 0}
    run.rename(folder / "night1.20261130-120000")
    shutil.rmtree(folder / "old")
    refresh(folder / ".." / folder.name)  # another way to the same folder
    rows = {row["run"]: row for row in refresh(folder)}
    assert len(read_index(folder)) == 3
    assert sorted(rows) == ["broken", "night1.20261130-120000", "old"]
    assert rows["old"]["gone"] is True
    assert "gone" not in rows["night1.20261130-120000"]


def test_a_line_that_was_torn_is_passed_over_and_the_next_start_goes_on(run):
    paths = RunPaths(run)
    with paths.starts.open("a") as file:
        file.write('{"run_id": "x", "ti')
    assert start(run, state="resumed")["start"] == 2
    assert [row["start"] for row in read_starts(paths)] == [1, 2]


def test_two_runs_beside_each_other(run, tmp_path, capsys):
    other = sample(run.parent / "night2", won=11).save()
    config = RunPaths(other).config
    config.write_text(config.read_text().replace("seed: 7", "seed: 9").replace("name: pick", "name: place"))
    start(other)
    picture = tmp_path / "both.png"
    assert runs.main(["compare", str(run), str(other), "--png", str(picture)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "config: 4 keys differ" in lines
    assert "seed 7 9" in lines
    assert "task.name pick place" in lines
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert picture.stat().st_size > 10_000
    assert runs.main(["compare", str(run)]) == 2
    assert "expected two runs or more" in capsys.readouterr().err


def test_the_page_says_what_people_did_to_the_run():
    told = _acts({"acts": {"start": 2, "verdict": 3, "serve": 1, "published": 1}, "by": ["bo", "alice (console)"]})
    assert told == ["acts of bo, alice (console): verdict 3, serve 1 (tools/operate.py log, acts.jsonl)"]
    assert _acts({"acts": {"start": 2}, "by": []}) == []
