"""The control loop waits for no disk: batches leave in order on a thread, and what they meet reaches the loop."""

import os
import signal
import threading
import time

import pytest
from test_adder import INFO, SPEC, observation, step

from serl_robot_infra.adder import Adder
from serl_robot_infra.observers.base import Observer
from serl_robot_infra.pacing import StopSignal
from serl_robot_infra.sender import HELD, Sender
from serl_transport.contract.errors import SpoolFull
from serl_transport.contract.schema import Episode, Outcome, StepBatch
from serl_transport.delivery.spool import DiskSpool
from serl_transport.wire import codec


class Screen(Observer):
    def __init__(self):
        self.lines = []

    def message(self, text):
        self.lines.append(text)


class Disk:
    """Takes bodies once `free` is set, or raises what it was given, as often as that."""

    def __init__(self, *errors):
        self.free, self.errors, self.bodies, self.thread = threading.Event(), list(errors), [], None
        self.free.set()

    def __call__(self, body):
        self.thread = threading.current_thread().name
        assert self.free.wait(20)
        if self.errors:
            raise self.errors.pop(0)
        self.bodies.append(body)

    @property
    def firsts(self):
        return [body["first_tick"] for body in self.bodies]


@pytest.fixture
def rig():
    senders = []

    def make(disk, batch_ticks=2):
        screen, stop = Screen(), StopSignal()
        senders.append(Sender(screen, stop))
        return Adder(disk, batch_ticks, senders[-1]), screen, stop

    yield make
    for sender in senders:
        sender.close()


def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


END = Outcome(True, "environment", None)


def test_a_hanging_disk_holds_the_loop_only_when_it_is_held_batches_behind_and_people_are_told(rig):
    disk = Disk()
    adder, screen, _ = rig(disk)
    disk.free.clear()
    adder.begin(INFO)
    for tick in range(2 * HELD + 1):
        adder.add(step(tick))  # HELD batches are held; none of these waited
    held = threading.Thread(target=lambda: [adder.add(step(tick)) for tick in range(2 * HELD + 1, 2 * HELD + 3)])
    held.start()
    until(lambda: screen.lines)
    assert screen.lines[0] == f"the spool's disk is slow: the robot holds, {HELD} step batches wait"
    assert held.is_alive()
    disk.free.set()
    held.join(10)
    assert not held.is_alive()
    adder.add(step(2 * HELD + 3, done=True))
    assert adder.end(observation(2 * HELD + 4), END)
    assert disk.thread == "sender"
    batches = [StepBatch.from_body(codec.unpack(codec.pack(body)), SPEC) for body in disk.bodies]
    states = Episode.from_batches(batches).arrays["observation.state"][:, 0]
    assert states.tolist() == list(range(2 * HELD + 5))  # whole, in order, and all there when `end` has returned


def test_a_full_spool_holds_the_robot_at_the_next_batch_and_it_goes_on_when_there_is_room(rig):
    disk = Disk(SpoolFull("the spool is full"))
    adder, screen, _ = rig(disk)
    adder.begin(INFO)
    for tick in range(3):
        adder.add(step(tick))
    until(lambda: screen.lines)
    assert screen.lines == ["the spool is full; the robot holds until the learner has taken some"]
    started = time.monotonic()
    for tick in range(3, 5):
        adder.add(step(tick))
    assert time.monotonic() - started > 0.2, "a batch was taken while the spool was full"
    adder.add(step(5, done=True))
    adder.end(observation(6), END)
    assert disk.firsts == [0, 2, 4]


def test_what_a_batch_meets_is_raised_in_the_loop_and_the_batch_is_tried_again_before_those_behind_it(rig):
    disk = Disk(OSError(5, "Input/output error"))
    adder, *_ = rig(disk)

    def drive():
        for tick in range(100):
            adder.add(step(tick))
            time.sleep(0.002)

    adder.begin(INFO)
    with pytest.raises(OSError, match="Input/output error"):
        drive()
    assert disk.bodies == []
    adder.end(observation(100), Outcome(False, "environment", "stop"))
    assert disk.firsts[0] == 0
    assert disk.bodies[-1]["final"]


def test_once_a_stop_was_asked_for_a_full_spool_ends_the_loop(rig):
    disk = Disk(*[SpoolFull("full")] * 3)
    adder, screen, stop = rig(disk)
    stop.set()
    adder.begin(INFO)
    adder.add(step(0, done=True))
    with pytest.raises(SpoolFull):
        adder.end(observation(1), END)
    assert screen.lines == []


def test_what_cannot_be_kept_at_the_end_is_counted_in_the_log(caplog):
    sender = Sender(Screen(), StopSignal())
    adder = Adder(Disk(*[OSError(28, "No space left on device")] * 9), 1, sender)
    adder.begin(INFO)
    adder.add(step(0))
    adder.add(step(1))
    sender.close()
    assert "1 step batches never reached the spool and are lost: [Errno 28] No space left on device" in caplog.text


def test_a_rescue_sends_what_is_held_and_what_is_not_full_behind_it(rig):
    disk = Disk()
    adder, *_ = rig(disk)
    disk.free.clear()
    adder.begin(INFO)
    for tick in range(5):
        adder.add(step(tick))
    threading.Timer(0.05, disk.free.set).start()
    adder.rescue()
    assert disk.firsts == [0, 2, 4]
    assert [len(body["arrays"]["action"]) for body in disk.bodies] == [2, 2, 1]


def drive_until_killed(folder, pipe):
    spool = DiskSpool(folder)
    adder = Adder(lambda body: spool.append([b"", *codec.pack(body)]), 2, Sender(Screen(), StopSignal()))
    adder.begin(INFO)
    tick = 0
    while len(spool) < 20:
        adder.add(step(tick))
        tick += 1
    os.write(pipe, b"%d" % tick)
    os.kill(os.getpid(), signal.SIGKILL)


def test_kill_9_takes_no_more_than_what_is_held(tmp_path):
    end, pipe = os.pipe()
    child = os.fork()
    if not child:
        try:
            drive_until_killed(tmp_path, pipe)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    ticks = int(os.read(end, 100))
    spool = DiskSpool(tmp_path)
    kept = [codec.unpack(spool.read(key)[1:]) for key in spool.pending()]
    assert [body["first_tick"] for body in kept] == list(range(0, 2 * len(kept), 2))  # whole ones, without a gap
    assert ticks - 2 * len(kept) <= 2 * (HELD + 1) + 2
    spool.close()
    os.close(end)
    os.close(pipe)
