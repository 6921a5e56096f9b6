"""How much experience one learner takes: 1, 4, 16, 64 actors of the default task, each as fast as it is acknowledged.

    n clients, one expert's episode over and over ─▶ gateway process: unpack, journal, fdatasync, ring ─▶ ack

Each keeps WINDOW batches on their way. Rows: transitions/s, the slowest actor against the fastest, memory and cores of
the gateway, bytes of journal per transition with pictures packed and raw, and the knee: the fewest actors that reach
90% of the most. The clients, PROCESSES processes of them, share the machine with the gateway; spools are in memory.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from floors import Peer
from rows import Row
from suites.transport import gateway_process

from serl_robot_infra.envs.pick import PickEnv
from serl_transport import TrainerClient, TrainerConfig
from serl_transport.contract.schema import EpisodeInfo, Outcome, StepBatch, TimeStep
from serl_transport.contract.specs import TaskSpec

ACTORS = (1, 4, 16, 64)
BATCH, WINDOW, PROCESSES = 10, 4, 4
KNEE = 0.9


@dataclass(frozen=True, slots=True)
class Taken:
    """What a gateway took in one measurement."""

    rate: float  # transitions/s acknowledged
    fairness: float  # of the slowest actor / of the fastest
    memory_mb: float  # the gateway's own, without the ring
    cores: float  # the gateway's CPU time / wall time
    disk_bytes: float  # of the journal, per transition


def rows(quick: bool) -> Iterator[Row]:
    """Every figure of the suite."""
    env = PickEnv()
    episode = expert_episode(env)
    seconds, found = 3.0 if quick else 20.0, {}
    for n in (1, 4) if quick else ACTORS:
        found[n] = taken = measure(n, seconds, env.spec, episode, "lossless")
        yield Row.of(f"ingest/{n}/acknowledged", taken.rate, "transitions/s")
        yield Row.of(f"ingest/{n}/slowest_of_fastest", taken.fairness, "ratio", goal=">= 0.8")
        yield Row.of(f"ingest/{n}/gateway_memory", taken.memory_mb, "MB")
        yield Row.of(f"ingest/{n}/gateway_cores", taken.cores, "cores")
        yield Row.of(f"ingest/{n}/journal/lossless", taken.disk_bytes, "bytes/transition")
    raw = measure(4, seconds, env.spec, episode, "raw")
    yield Row.of("ingest/4/acknowledged/raw", raw.rate, "transitions/s")
    yield Row.of("ingest/4/journal/raw", raw.disk_bytes, "bytes/transition")
    most = max(taken.rate for taken in found.values())
    yield Row.of("ingest/knee", min(n for n, taken in found.items() if taken.rate >= KNEE * most), "actors")


def measure(n: int, seconds: float, spec: TaskSpec, episode: list[TimeStep], pictures: str) -> Taken:
    """`n` actors on a gateway of their own, its journal in /tmp."""
    share = [n // PROCESSES + (i < n % PROCESSES) for i in range(PROCESSES)]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp")))
        ports = stack.enter_context(gateway_process(folder, spec))
        pid = int((folder / "pid").read_text())
        drivers = [
            stack.enter_context(Peer(drive, ports, spec.to_dict(), episode, 1000 * i, count, seconds, pictures))
            for i, count in enumerate(share)
            if count
        ]
        cpu = cpu_s(pid)
        for driver in drivers:
            driver.pipe.send("go")
        acknowledged = [ticks for driver in drivers for ticks in driver.pipe.recv()]
        cores, memory = (cpu_s(pid) - cpu) / seconds, anonymous_mb(pid)
        disk = sum(path.stat().st_size for path in (folder / "journal").rglob("*") if path.is_file())
    total = sum(acknowledged)
    return Taken(total / seconds, min(acknowledged) / max(acknowledged), memory, cores, disk / total)


def drive(
    pipe: Any,
    ports: tuple[int, int],
    spec_dict: dict[str, Any],
    episode: list[TimeStep],
    first: int,
    count: int,
    seconds: float,
    pictures: str,
) -> None:
    """`count` actors in this process; sends how many ticks of each were acknowledged."""
    spec = TaskSpec.from_dict(spec_dict)
    config = TrainerConfig(port_number=ports[0], broadcast_port=ports[1])
    clients = [TrainerClient(f"actor-{first + i}", "127.0.0.1", config, spec=spec, pictures=pictures)
               for i in range(count)]  # fmt: skip
    bodies, sent = batches(spec, episode), [0] * count
    pipe.send("ready")
    pipe.recv()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        free = [i for i, client in enumerate(clients) if client.backlog < WINDOW]
        for i in free:
            number, place = divmod(sent[i], len(bodies))
            client, body = clients[i], bodies[place]
            own = {"episode_id": f"{client.boot_id}-{number}", "actor_id": client.name, "boot_id": client.boot_id}
            client.send_item(body | {"episode": body["episode"] | own})
            sent[i] += 1
        if not free:
            time.sleep(0.001)
    pipe.send([BATCH * (sent[i] - client.backlog) for i, client in enumerate(clients)])
    for client in clients:
        client.stop()


def expert_episode(env: PickEnv) -> list[TimeStep]:
    """An episode of the scripted expert, cut to whole batches; its last tick ends it."""
    observation, expert, found = env.reset(0), env.expert(), []
    while len(found) < 3 * BATCH:
        action = np.asarray(expert.act(), np.float32)
        last = len(found) + 1 == 3 * BATCH
        found.append(TimeStep(observation, action, 0.0, False, last, False, False, 1, len(found)))
        observation = env.step(action).observation
    return found


def batches(spec: TaskSpec, episode: list[TimeStep]) -> list[dict[str, Any]]:
    """The episode as bodies of step batches."""
    info = EpisodeInfo("x", "a", "b", spec.name, spec.prompt, "online", "online", 1, 1e9)
    end = (episode[-1].observation, Outcome(False, "environment", "time_limit"))
    firsts = range(0, len(episode), BATCH)
    return [StepBatch.from_steps(info, at, episode[at : at + BATCH], *end * (at == firsts[-1])).to_body()
            for at in firsts]  # fmt: skip


def cpu_s(pid: int) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def anonymous_mb(pid: int) -> float:
    """Resident memory of a process without files and shared memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
