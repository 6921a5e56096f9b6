"""tools/bootstrap.sh in a small checkout: the stamp, the repair, the search for a Python, the messages.

The interpreter and uv of the fake environment write down what they were asked to do; the script itself is the real one.
A whole install is what a fresh clone does before it can run this test.
"""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

UV = """#!/usr/bin/env bash
echo "uv $*" >> "$(dirname "$0")/../../calls"
[[ $1 == --version ]] && echo "uv 0.13.8"
[[ -e "$(dirname "$0")/../../break" && $1 != --version ]] && { echo "no network" >&2; exit 1; }
exit 0
"""
PYTHON = """#!/usr/bin/env bash
echo "python $*" >> "$(dirname "$0")/../../calls"
[[ -e "$(dirname "$0")/../../break" && $* == *"-m pip install"* ]] && exit 1
[[ -e "$(dirname "$0")/../../torn" && $* == *compile_imports* ]] && { echo "No module named torch" >&2; exit 1; }
exit 0
"""


class Clone:
    """A checkout with an environment that is complete but for the stamp."""

    def __init__(self, source: Path, root: Path) -> None:
        self.root, self.venv = root, root / ".venv"
        packages = (
            "flowserl_cli",
            "packages/serl-config",
            "packages/serl-transport",
            "packages/openpi-client",
        )
        for name in (*packages, "serl_robot_infra", "serl_launcher"):
            (root / name).mkdir(parents=True)
            shutil.copy(source / name / "pyproject.toml", root / name)
        (root / "tools").mkdir()
        shutil.copy(source / "tools" / "bootstrap.sh", root / "tools")
        (root / "requirements").mkdir()
        for kind in ("actor", "lerobot", "learner"):
            (root / "requirements" / f"{kind}.txt").write_text(f"# {kind}\n")
        with (root / "requirements" / "learner.txt").open("a") as file:
            file.write("torch==2.0.0 \\\n    --hash=sha256:0\ntorchvision==0.5.0 \\\n")
        (self.venv / "bin").mkdir(parents=True)
        # torch there: the disk is asked for a repair's space only
        (self.venv / "lib" / "python3.12" / "site-packages" / "torch").mkdir(parents=True)
        for name, text in (("uv", UV), ("python", PYTHON)):
            (self.venv / "bin" / name).write_text(text)
            (self.venv / "bin" / name).chmod(0o755)

    def bootstrap(self, kind: str = "learner", **env: str) -> subprocess.CompletedProcess:
        command = ["bash", str(self.root / "tools" / "bootstrap.sh"), kind]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=60)

    def calls(self) -> str:
        """What was asked of python and uv since the last look."""
        path = self.root / "calls"
        text = path.read_text() if path.exists() else ""
        path.unlink(missing_ok=True)
        return text

    def stamp(self, kind: str) -> Path:
        return self.venv / f".flowserl-{kind}"


@pytest.fixture
def clone(repo_root, tmp_path):
    return Clone(repo_root, tmp_path / "clone")


def test_an_install_is_stamped_and_the_next_call_does_nothing(clone):
    first = clone.bootstrap()
    assert first.returncode == 0, first.stderr
    calls = clone.calls()
    assert f"uv pip install --require-hashes -r {clone.root}/requirements/learner.txt" in calls
    assert calls.count(" -e ") == 6
    assert f"python {clone.root}/tools/compile_imports.py learner" in calls
    began = time.monotonic()
    second = clone.bootstrap()
    assert (second.returncode, second.stdout, second.stderr, clone.calls()) == (0, "", "", "")
    assert time.monotonic() - began < 5


def test_a_robot_host_installs_no_launcher(clone):
    assert clone.bootstrap("actor").returncode == 0
    calls = clone.calls()
    assert "requirements/actor.txt" in calls
    assert "serl_launcher" not in calls
    assert clone.stamp("actor").exists()
    assert not clone.stamp("learner").exists()


def test_a_learner_environment_serves_an_actor(clone):
    clone.bootstrap("learner")
    clone.calls()
    done = clone.bootstrap("actor")
    assert (done.returncode, clone.calls()) == (0, "")


def test_a_robot_host_with_lerobots_drivers_gets_torchs_cpu_build_first(clone):
    python = clone.venv / "bin" / "python"
    python.write_text(PYTHON.replace("exit 0", "[[ $* == *torch.__version__* ]] && exit 1\nexit 0"))
    assert clone.bootstrap("lerobot").returncode == 0
    calls = clone.calls()
    torch = calls.index("uv pip install --torch-backend cpu --no-deps torch==2.0.0 torchvision==0.5.0")
    rest = calls.index(f"uv pip install --require-hashes --no-deps -r {clone.root}/requirements/lerobot.txt")
    assert torch < rest
    assert "serl_launcher" not in calls
    done = clone.bootstrap("actor")  # what run_actor.sh asks for
    assert (done.returncode, clone.calls(), clone.stamp("lerobot").exists()) == (0, "", True)


def test_a_torch_that_is_there_is_kept(clone):
    assert clone.bootstrap("lerobot").returncode == 0
    assert "--torch-backend" not in clone.calls()


def test_an_actor_environment_is_completed_for_a_learner(clone):
    clone.bootstrap("actor")
    clone.calls()
    clone.bootstrap("learner")
    assert "requirements/learner.txt" in clone.calls()


@pytest.mark.parametrize("name", ["requirements/learner.txt", "serl_launcher/pyproject.toml", "tools/bootstrap.sh"])
def test_a_changed_input_installs_again(clone, name):
    clone.bootstrap()
    clone.calls()
    with (clone.root / name).open("a") as file:
        file.write("\n# changed\n")
    clone.bootstrap()
    assert "uv pip install" in clone.calls()


def test_a_moved_checkout_installs_again(clone, tmp_path):
    # Editable members name their place.
    clone.bootstrap()
    clone.root.rename(tmp_path / "moved")
    clone.root, clone.venv = tmp_path / "moved", tmp_path / "moved" / ".venv"
    clone.calls()
    clone.bootstrap()
    assert f"-e {tmp_path}/moved/serl_launcher" in clone.calls()


def test_a_failed_install_says_so_and_is_repaired_by_the_next_call(clone):
    clone.bootstrap()
    (clone.root / "requirements" / "learner.txt").write_text("# new\n")
    (clone.root / "break").touch()
    broken = clone.bootstrap()
    assert broken.returncode == 2
    assert "could not install requirements/learner.txt" in broken.stderr
    assert "no network" in broken.stderr
    assert not clone.stamp("learner").exists()
    assert "-m pip install" in clone.calls()  # the second try, for mirrors that only pip knows
    (clone.root / "break").unlink()
    assert clone.bootstrap().returncode == 0
    assert clone.stamp("learner").exists()


def test_an_environment_that_does_not_import_is_no_environment(clone):
    (clone.root / "torn").touch()
    done = clone.bootstrap()
    assert done.returncode == 2
    assert "No module named torch" in done.stderr
    assert "does not import" in done.stderr
    assert not clone.stamp("learner").exists()


def test_two_at_once_install_once(clone):
    (clone.venv / "bin" / "uv").write_text(UV.replace("exit 0", "[[ $1 == pip ]] && sleep 0.5\nexit 0"))
    command = ["bash", str(clone.root / "tools" / "bootstrap.sh"), "learner"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    texts = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert clone.calls().count("--require-hashes") == 1
    assert sum("waiting for it" in text for text in texts) == 1


def bare_path(folder: Path, *extra: tuple[str, str]) -> str:
    """A PATH with the usual tools but no Python and no uv, and `extra` scripts."""
    folder.mkdir()
    for tool in ("bash", "cat", "cut", "sha256sum", "df", "awk", "dirname", "rm", "mv", "tr", "grep", "flock", "env"):
        (folder / tool).symlink_to(shutil.which(tool))
    for name, text in extra:
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return str(folder)


def test_without_python_it_says_how_to_get_one(clone, tmp_path):
    shutil.rmtree(clone.venv)
    old = ("python3", "#!/usr/bin/env bash\nexit 1\n")  # such as a 3.10
    done = clone.bootstrap(PATH=bare_path(tmp_path / "bin", old), HOME=str(tmp_path), PYENV_ROOT=str(tmp_path))
    assert done.returncode == 2
    for words in ("needs Python 3.12", "sudo apt install python3.12", "pyenv install 3.12", "uv python install 3.12"):
        assert words in done.stderr
    assert f"{tmp_path}/bin/python3" in done.stderr


@pytest.mark.parametrize("place", ["pyenv", "named"])
def test_a_python_off_the_path_is_found(clone, tmp_path, place):
    shutil.rmtree(clone.venv)
    found = tmp_path / "pyenv" / "versions" / "3.12.9" / "bin" / "python"
    found.parent.mkdir(parents=True)
    # Answers as a usable 3.12, then ends the script before a real environment is made.
    found.write_text('#!/bin/bash\n[[ $1 == -c ]] && { echo "$0"; exit 0; }\nexit 1\n')
    found.chmod(0o755)
    env = {"PATH": bare_path(tmp_path / "bin"), "HOME": str(tmp_path), "PYENV_ROOT": str(tmp_path / "nowhere")}
    env |= {"PYENV_ROOT": str(tmp_path / "pyenv")} if place == "pyenv" else {"FLOWSERL_PYTHON": str(found)}
    done = clone.bootstrap(**env)
    assert done.returncode == 2
    assert f"making .venv with {found}" in done.stderr
    assert "could not make" in done.stderr


def test_an_unknown_environment_is_refused(clone):
    done = clone.bootstrap("robot")
    assert done.returncode == 2
    assert "expected learner, actor or lerobot" in done.stderr


def test_a_full_disk_is_said_first(clone, tmp_path):
    small = ("df", "#!/usr/bin/env bash\necho head; echo '/dev/x 100 90 2048 99% /'\n")
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / small[0]).write_text(small[1])
    (folder / small[0]).chmod(0o755)
    done = clone.bootstrap(PATH=f"{folder}:{os.environ['PATH']}")
    assert done.returncode == 2
    assert "only 2 MB are free" in done.stderr
    assert clone.calls() == ""
