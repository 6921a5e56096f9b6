"""Ports of a run, who holds one that is taken, loopback, and whether the learner's name resolves. For doctor.host.

Nothing is sent to a learner: whether it answers is tools/check_robot.py's question.
"""

import contextlib
import os
import socket
import threading
from collections.abc import Mapping
from pathlib import Path

from serl_robot_infra.check.report import Report
from serl_transport.connection.reach import resolved
from serl_transport.security.auth import is_loopback

LISTENING = "0A"  # of the state in /proc/net/tcp


def check_ports(report: Report, host: str, ports: Mapping[str, int]) -> None:
    """Each can be bound here; of one that cannot, who holds it."""
    for key, port in ports.items():
        if problem := bind_problem(host, port):
            holder = holder_of(port)
            by = f", held by {holder}" if holder else ", the holder is another user's or another container's"
            fix = (
                f"stop it (bash start.sh --stop, or kill {holder.split()[-1] if holder else '<pid>'}), or {key}=<free>"
            )
            report.warn(f"port {port}", f"{key} on {host}: {problem}{by if 'in use' in problem else ''}", fix)
        else:
            report.ok(f"port {port}", f"{key} is free on {host}")


def bind_problem(host: str, port: int) -> str:
    """Why nothing can listen there; empty where it can."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return ""


def holder_of(port: int) -> str | None:
    """`python3 pid 4711` of who listens on a port, by /proc; None where it is not this user's to see."""
    inodes = {inode for table in ("tcp", "tcp6") for inode in _listening(Path("/proc/net") / table, port)}
    for process in Path("/proc").iterdir() if inodes else ():
        if not process.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(descriptor).removeprefix("socket:[").rstrip("]") in inodes:
                        return f"{(process / 'comm').read_text().strip()} pid {process.name}"
    return None


def _listening(path: Path, port: int) -> list[str]:
    """Inodes of the sockets that listen on a port."""
    try:
        lines = path.read_text().splitlines()[1:]
    except OSError:
        return []
    cells = [line.split() for line in lines]
    return [row[9] for row in cells if row[3] == LISTENING and int(row[1].rpartition(":")[2], 16) == port]


def check_loopback(report: Report) -> None:
    """A byte goes round on 127.0.0.1, and `localhost` means it."""
    try:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen(1)
            server.settimeout(2.0)
            thread = threading.Thread(target=_echo, args=(server,), daemon=True)
            thread.start()
            with socket.create_connection(server.getsockname(), timeout=2.0) as client:
                client.sendall(b"x")
                came = client.recv(1)
            thread.join(2.0)
    except OSError as error:
        fix = "ip link set lo up; a firewall rule that drops lo"
        report.fail("loopback", f"127.0.0.1 does not work: {error}", fix)
        return
    if came != b"x":
        report.fail("loopback", "a byte sent over 127.0.0.1 did not come back", "a firewall rule on lo")
        return
    try:
        entries = resolved("localhost", 1)
    except OSError as error:
        report.warn("loopback", f"127.0.0.1 works, but {error}", "add `127.0.0.1 localhost` to /etc/hosts")
        return
    strange = [entry[4][0] for entry in entries if not is_loopback(str(entry[4][0]))]
    if strange:
        report.warn("loopback", f"localhost means {strange[0]}", "mend /etc/hosts: 127.0.0.1 localhost")
    else:
        report.ok("loopback", "a byte went round on 127.0.0.1")


def _echo(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection, _ = server.accept()
        with connection:
            connection.sendall(connection.recv(1))


def check_learner_name(report: Report, host: str | None) -> None:
    """The name that ip= gives resolves; whether the learner answers there is not asked."""
    if host is None:
        return
    try:
        address = resolved(host, 1)[0][4][0]
    except OSError as error:
        report.fail("learner's name", str(error), "ip=<its address>, or its name in /etc/hosts")
        return
    report.ok("learner's name", f"ip={host} is {address}; tools/check_robot.py asks whether a learner answers")
