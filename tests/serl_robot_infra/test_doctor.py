"""The doctor on what is really there: ports, keys, disks, packages, devices; and as a robot host runs it."""

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import keygen
import pytest
from robot_host import ABSENT, PROGRAM

from serl_robot_infra.check.report import FAILURE, OK, SKIPPED, WARNING, Finding, Report
from serl_robot_infra.doctor import hardware
from serl_robot_infra.doctor.environment import check_environment, check_lock, check_members, pins
from serl_robot_infra.doctor.hardware import check_devices, check_gpu
from serl_robot_infra.doctor.host import ports, references
from serl_robot_infra.doctor.network import check_learner_name, check_loopback, check_ports, holder_of
from serl_robot_infra.doctor.storage import check_disk, check_keys, check_secret_files

NOBODY = 65534


@pytest.fixture
def report():
    return Report(io.StringIO())


def only(report: Report, level: str) -> Finding:
    (finding,) = report.of(level)
    return finding


def test_a_port_that_is_taken_names_who_holds_it(report):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        check_ports(report, "127.0.0.1", {"port": port})
        finding = only(report, WARNING)
        assert f"pid {os.getpid()}" in finding.says
        assert f"kill {os.getpid()}" in finding.fix
    assert holder_of(port) is None
    check_ports(report, "127.0.0.1", {"port": port})
    assert only(report, OK).says == "port is free on 127.0.0.1"


def test_loopback_and_the_learners_name(report):
    check_loopback(report)
    check_learner_name(report, "127.0.0.1")
    assert [finding.level for finding in report.findings] == [OK, OK]
    check_learner_name(report, "no-such-learner.invalid")
    assert "no-such-learner.invalid" in only(report, FAILURE).says


def test_keys_that_others_can_read_are_a_failure_with_the_chmod(report, tmp_path, capsys):
    folder = tmp_path / "keys"
    assert keygen.main([str(folder), "--actor", "robot-1"]) == 0
    check_keys(report, str(folder), "robot-1", True)
    assert [finding.level for finding in report.findings] == [OK] * 4
    (folder / "robot-1.secret").chmod(0o644)
    os.utime(folder / "learner.secret", (1e9, 1e9))
    with (folder / "allow_list").open("a") as file:
        file.write("pilot robot-2 key\n")
    report.findings.clear()
    check_keys(report, str(folder), "robot-1", True)
    assert [f"chmod 600 {folder}/robot-1.secret" in finding.fix for finding in report.of(FAILURE)].count(True) == 1
    assert any(
        "expected role actor, operator or follower, got 'pilot'" in finding.says for finding in report.of(FAILURE)
    )
    assert "days old" in only(report, WARNING).says


def test_no_keys_matter_on_a_network_alone_and_other_actors_keys_are_told(report, tmp_path, capsys):
    check_keys(report, None, "robot-1", False)
    assert only(report, OK).check == "keys"
    check_keys(report, None, "robot-1", True)
    assert "whoever reaches the learner may drive" in only(report, WARNING).says
    check_keys(report, str(tmp_path / "none"), "robot-1", True)
    assert "no such folder" in only(report, FAILURE).says
    report.findings.clear()
    assert keygen.main([str(tmp_path / "keys"), "--actor", "robot-1"]) == 0
    (tmp_path / "keys" / "learner.secret").unlink()
    check_keys(report, str(tmp_path / "keys"), "robot-2", True)
    assert "neither learner.secret nor robot-2.secret" in only(report, FAILURE).says


def test_secret_files_of_a_config(report, tmp_path):
    token = tmp_path / "token"
    token.write_text("word")
    token.chmod(0o644)
    config = {"serving": {"openpi_token": f"file:{token}", "openpi_port": 8000}, "port": 5588, "broadcast_port": 0,
              "reward": {"model": "r", "port": 5590}}  # fmt: skip
    assert ports(config) == {
        "port": 5588, "reward.port": 5590, "reward.port + 1": 5591, "serving.openpi_port": 8000,
    }  # fmt: skip
    check_secret_files(report, dict(references(config)))
    assert only(report, FAILURE).fix == f"chmod 600 {token}"
    token.chmod(0o600)
    tmp_path.chmod(0o700)
    report.findings.clear()
    check_secret_files(report, dict(references(config)))
    assert only(report, OK).check == "serving.openpi_token"


def test_a_small_disk_and_one_that_takes_no_writes(report, tmpfs):
    disk = tmpfs("size=8m")
    check_disk(report, disk / "runs", learner=False)
    assert "a run does not start below 500 MB" in only(report, FAILURE).says
    report.findings.clear()
    done = subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True)
    if done.returncode:
        pytest.skip("cannot remount here")
    check_disk(report, disk / "runs", learner=False)
    assert any("cannot be written: Read-only file system" in finding.says for finding in report.of(FAILURE))


def test_packages_against_the_lock(report, tmp_path, repo_root):
    lock = tmp_path / "learner.txt"
    lock.write_text(
        "numpy==0.1 \\\n    --hash=sha256:aa\nno-such-package==2.0 \\\n    --hash=sha256:bb\n"
        "colorama==1.0 ; sys_platform == 'win32' \\\n    --hash=sha256:cc\n"
    )
    assert pins(lock.read_text()) == {"numpy": "0.1", "no-such-package": "2.0"}
    check_lock(report, lock, "bash tools/bootstrap.sh learner")
    assert only(report, FAILURE).says == "1 of 2 are missing: no-such-package"
    assert ", locked 0.1" in only(report, WARNING).says
    report.findings.clear()
    check_members(report, tmp_path, None)
    assert len(report.of(FAILURE)) == 5  # imported from another checkout
    report.findings.clear()
    check_members(report, repo_root, None)
    assert [finding.level for finding in report.findings] == [OK, SKIPPED]


def test_a_checkout_without_an_environment_says_how_to_make_one(report, tmp_path):
    check_environment(report, tmp_path)
    assert any("bash tools/bootstrap.sh" in finding.fix for finding in report.of(FAILURE))


def test_devices_that_this_user_may_not_open_name_the_group(tmp_path, monkeypatch):
    """Asked as a user without rights, in a process of its own, since root may open everything."""
    if os.getuid():
        pytest.skip("only root can become nobody")
    device = tmp_path / "ttyUSB0"
    device.touch(0o660)
    monkeypatch.setattr(hardware, "DEVICES", {"serial ports": ((f"{tmp_path}/ttyUSB*",), "dialout", "servo buses")})
    for folder in (tmp_path, *tmp_path.parents):
        if not folder.stat().st_mode & 0o001:  # pytest's folders are its user's alone
            folder.chmod(0o755)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        mine = Report(io.StringIO())
        check_devices(mine)
        os.write(write, json.dumps([[f.level, f.check, f.fix] for f in mine.findings]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    found = [row for row in json.loads(os.read(read, 1 << 16)) if row[1] == "serial ports"]
    os.close(read)
    os.close(write)
    assert [row[0] for row in found] == [WARNING]
    assert "usermod -aG root $USER" in found[0][2]


def test_without_torch_nothing_is_said_of_cuda(report):
    check_gpu(report, has_torch=False, needed=False)
    assert only(report, SKIPPED).check == "torch"


def test_as_a_robot_host_runs_it(repo_root, tmp_path):
    """Without the learner's packages: what could not be looked at says so, and nothing ends in a traceback."""
    tool = str(repo_root / "tools/doctor.py")
    asked = [[*ABSENT, "mujoco"], [tool], ["--json", f"runs_dir={tmp_path}", "ip=10.255.1.1"]]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(asked)], capture_output=True, text=True, timeout=120, cwd=repo_root,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    code, out, err = json.loads(done.stdout)[tool]
    found = json.loads(out)
    assert (found["ready"], err) == (code == 0, "")
    skipped = {finding["check"] for finding in found["findings"] if finding["level"] == SKIPPED}
    assert {"ports", "torch", "renderer"} <= skipped
    assert {finding["check"] for finding in found["findings"] if finding["level"] == OK} >= {"python", "loopback"}
    (keys,) = [finding for finding in found["findings"] if finding["check"] == "keys"]
    assert "tools/keygen.py" in keys["fix"]
    assert all(finding["fix"] for finding in found["findings"] if finding["level"] in (FAILURE, WARNING))


def test_a_python_without_our_packages_says_how_to_get_them(repo_root):
    command = [sys.executable, "-I", "-S", str(repo_root / "tools/doctor.py"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")
    (finding,) = json.loads(done.stdout)["findings"]
    assert "bootstrap.sh" in finding["fix"]
    assert Path(sys.executable).name in finding["says"]
