"""Keys, roles and replays over real sockets: who gets in, who may do what, and what happens when the door breaks."""

import os
import stat
import subprocess
import time

import pytest
import zmq

from serl_transport import TrainerClient, TrainerConfig, TrainerServer
from serl_transport.connection.replay_guard import WINDOW, Boots, ReplayWindow
from serl_transport.contract.errors import ServerSilent, Unauthorized
from serl_transport.security.allow_list import AllowList, read_allow_list
from serl_transport.security.keys import ClientKeys, KeyPair, ServerKeys, write_pair
from serl_transport.wire.codec import pack
from serl_transport.wire.envelope import Envelope


@pytest.fixture
def keys(tmp_path):
    """A folder with keys of the learner, one of each role, and a stranger who is not listed."""
    folder = tmp_path / "keys"
    folder.mkdir()
    lines = []
    for role, name in (
        ("", "learner"),
        ("actor", "robot-1"),
        ("operator", "alice"),
        ("follower", "host-1"),
        ("", "stranger"),
    ):
        pair = KeyPair.new()
        write_pair(folder, name, pair)
        lines += [f"{role} {name} {pair.public.decode()}\n"] if role else []
    (folder / "allow_list").write_text("# comment\n\n" + "".join(lines))
    return folder


@pytest.fixture
def locked(serve, keys):
    """A server with keys that answers `status` and the operators' requests."""
    return serve(
        config={"keys_dir": str(keys), "request_types": ["status", "pause", "stop"]},
        request_callback=lambda kind, payload: {"did": kind},
        handlers={"data": lambda peer, envelope, body: {"duplicate": False}},
    )


def eventually(condition, what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.02)


def test_an_actor_pushes_and_asks_but_does_not_steer(locked, connect):
    client = connect(locked, "robot-1")
    client.send_item({"x": 1})
    assert client.flush(10)
    assert client.request("status") == {"did": "status"}
    with pytest.raises(Unauthorized, match="expected an operator's key, 'robot-1' has role actor"):
        client.request("stop")
    assert connect(locked, "alice", role="operator").request("stop") == {"did": "stop"}


def test_a_follower_reads_and_does_nothing_else(locked, connect):
    follower = connect(locked, "host-1", role="follower")
    assert follower.request("status") == {"did": "status"}
    for ask in ("stop", "next_episode", "params", "acts"):
        with pytest.raises(Unauthorized, match=r"'host-1' has role follower|expected an operator's key"):
            follower.request(ask)
    with pytest.raises(Unauthorized, match="'host-1' has role follower"):
        follower.infer({})
    for name, role in (("robot-1", "actor"), ("alice", "operator")):
        client = connect(locked, name, role=role)
        for ask in ("follow", "file"):
            with pytest.raises(Unauthorized, match=f"{ask}: expected a follower's key, '{name}' has role {role}"):
                client.request(ask)


def test_the_notify_port_is_guarded_too(locked, connect):
    heard = []
    connect(locked, "robot-1").on_notify(heard.append)
    plain = zmq.Context()
    spy = plain.socket(zmq.SUB)
    spy.subscribe(b"")
    spy.connect(f"tcp://127.0.0.1:{locked.config.broadcast_port}")
    deadline = time.monotonic() + 20
    while not heard:
        assert time.monotonic() < deadline
        locked.notify({"topic": "x"})
        time.sleep(0.05)
    assert not spy.poll(300)
    plain.destroy(linger=0)


def test_a_revoked_key_hears_no_notification_and_the_others_go_on(locked, keys, connect, caplog):
    """Seen at the socket: the client of the revoked key still wants to hear, and its SUB connects again and again."""
    heard: dict[str, list] = {"robot-1": [], "alice": []}
    connect(locked, "robot-1").on_notify(heard["robot-1"].append)
    connect(locked, "alice", role="operator").on_notify(heard["alice"].append)

    def both_hear() -> bool:
        locked.notify({"topic": "x"})
        return all(heard.values())

    eventually(both_hear, "both heard a notification")
    kept = [line for line in (keys / "allow_list").read_text().splitlines() if "robot-1" not in line]
    (keys / "allow_list").write_text("\n".join(kept) + "\n")
    eventually(lambda: "every listener of notifications has to connect again" in caplog.text, "the key was revoked")
    heard["robot-1"].clear()
    heard["alice"].clear()

    def alice_hears() -> bool:
        locked.notify({"topic": "secret"})
        return len(heard["alice"]) >= 20  # long after both have tried to come back

    eventually(alice_hears, "the other listener came back by itself")
    assert not any(body["topic"] == "secret" for body in heard["robot-1"])


def test_a_changed_line_that_revokes_nobody_disturbs_nobody(locked, keys, connect, caplog):
    with (keys / "allow_list").open("a") as file:
        file.write(f"actor robot-9 {KeyPair.new().public.decode()}\n")
    eventually(lambda: len(locked.authenticator._allow_list._entries) == 3, "the new line was read")
    assert "has to connect again" not in caplog.text


def test_the_notify_port_is_tried_again_until_it_is_free(serve, caplog):
    server = serve()
    port = server.config.broadcast_port
    rival = zmq.Context()
    taken = rival.socket(zmq.PUB)

    def steal() -> None:
        server._publisher._socket.close()
        while True:  # libzmq lets go of a port a moment after the close
            try:
                taken.bind(f"tcp://127.0.0.1:{port}")
                break
            except zmq.ZMQError:
                time.sleep(0.01)
        server._publisher._bind_again(0.0)

    server.call_soon(steal)
    eventually(lambda: "nobody is notified: cannot listen on" in caplog.text, "the lost port is told")
    rival.destroy(linger=0)
    eventually(lambda: not server._publisher._socket.closed, "the port was bound again")


def test_strangers_are_told_that_their_key_is_not_listed(locked, connect):
    with pytest.raises(Unauthorized, match="not in the learner's allow-list"):
        connect(locked, "stranger", wait_for_server=False)
    assert locked.router.counters["hello"] == 0


def test_a_client_without_keys_is_told_what_is_missing(locked, connect):
    ports = TrainerConfig(locked.config.port_number, locked.config.broadcast_port)
    with pytest.raises(Unauthorized, match=r"wants keys: give security\.keys_dir"):
        connect(ports, "robot-1", wait_for_server=False)


def test_a_client_with_keys_is_told_that_the_learner_takes_none(serve, keys):
    server = serve()
    ports = TrainerConfig(server.config.port_number, server.config.broadcast_port, keys_dir=str(keys))
    with pytest.raises(Unauthorized, match="takes no keys"):
        TrainerClient("robot-1", "127.0.0.1", ports, wait_for_server=False)


def test_another_learner_cannot_pose_as_ours(locked, keys, tmp_path):
    fake = tmp_path / "fake"
    fake.mkdir()
    write_pair(fake, "learner", KeyPair.new())
    (fake / "robot-1.secret").write_bytes((keys / "robot-1.secret").read_bytes())
    (fake / "robot-1.secret").chmod(0o600)
    ports = TrainerConfig(locked.config.port_number, locked.config.broadcast_port, keys_dir=str(fake))
    with pytest.raises((ServerSilent, Unauthorized)):
        TrainerClient("robot-1", "127.0.0.1", ports, wait_for_server=False, timeout_ms=1500)


def test_a_key_speaks_for_its_own_name_only(locked, keys, connect):
    (keys / "robot-2.secret").write_bytes((keys / "robot-1.secret").read_bytes())
    (keys / "robot-2.secret").chmod(0o600)
    with pytest.raises(Unauthorized, match="this key belongs to 'robot-1', not to 'robot-2'"):
        connect(locked, "robot-2", wait_for_server=False)


def test_a_line_taken_out_ends_a_running_connections_rights(locked, keys, connect):
    client = connect(locked, "robot-1")
    assert client.request("status")
    kept = [line for line in (keys / "allow_list").read_text().splitlines() if "robot-1" not in line]
    (keys / "allow_list").write_text("\n".join(kept) + "\n")

    def refused() -> bool:
        try:
            client.request("status")
        except Unauthorized:
            return True
        return False

    eventually(refused, "the revoked key was refused")


def test_a_broken_allow_list_admits_nobody(keys, caplog):
    allowed = AllowList(keys / "allow_list")
    robot = ClientKeys.load(keys, "robot-1").pair.public
    assert allowed.lookup(robot).role == "actor"
    (keys / "allow_list").write_text("root everything\n")
    eventually(lambda: allowed.lookup(robot) is None, "the broken list was noticed")
    assert "line 1: expected 'role name public-key'" in caplog.text


def test_a_dead_authenticator_closes_the_sockets(locked, connect):
    client = connect(locked, "robot-1")
    locked.call_soon(locked.authenticator.socket.close)
    eventually(lambda: locked.router.socket.closed, "the guarded socket was closed")
    assert locked.failure == "the authenticator failed"
    with pytest.raises((ServerSilent, Unauthorized)):
        client.request("status", timeout_ms=500)


def test_without_a_handler_nobody_gets_in(keys):
    """The guarded socket itself fails closed, whatever becomes of the handler."""
    from serl_transport.security import auth
    from serl_transport.wire.codec import DEFAULT_LIMITS

    context = zmq.Context()
    server, client = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    auth.configure(server, DEFAULT_LIMITS, ServerKeys.load(keys))
    port = server.bind_to_random_port("tcp://127.0.0.1")
    auth.configure(client, DEFAULT_LIMITS, ClientKeys.load(keys, "robot-1"))
    client.connect(f"tcp://127.0.0.1:{port}")
    client.send(b"x")
    assert not server.poll(700)
    context.destroy(linger=0)


def test_open_binds_need_keys_or_the_word_insecure(keys):
    server = TrainerServer(TrainerConfig(0, 0, bind_host="0.0.0.0", keys_dir=str(keys)))
    server.stop()
    with pytest.raises(ValueError, match=r"tools/keygen\.py"):
        TrainerServer(TrainerConfig(0, 0, bind_host="0.0.0.0"))


def test_key_files_are_checked(keys, tmp_path):
    with pytest.raises(ValueError, match=r"no key file .*bob\.secret"):
        ClientKeys.load(keys, "bob")
    (keys / "robot-1.secret").chmod(0o644)
    with pytest.raises(ValueError, match="can be read by others"):
        ClientKeys.load(keys, "robot-1")
    (keys / "learner.public").write_text("public short\n")
    with pytest.raises(ValueError, match="expected a key of 40 Z85 characters, got 5"):
        ClientKeys.load(keys, "alice")
    mixed = tmp_path / "mixed.secret"
    one, two = KeyPair.new(), KeyPair.new()
    mixed.write_text(f"public {one.public.decode()}\nsecret {two.secret.decode()}\n")
    mixed.chmod(0o600)
    (tmp_path / "learner.secret").write_bytes(mixed.read_bytes())
    (tmp_path / "learner.secret").chmod(0o600)
    with pytest.raises(ValueError, match="belongs to another secret"):
        ServerKeys.load(tmp_path)


@pytest.mark.parametrize(
    ("place", "mode", "message"),
    [
        ("robot-1.secret", 0o620, r"robot-1.secret can be read by others \(mode 0620\): chmod 600 "),
        ("learner.public", 0o664, r"learner.public can be written by others \(mode 0664\): chmod go-w "),
        ("", 0o777, r"keys can be written by others \(mode 0777\): chmod go-w "),
        ("", 0o1775, r"keys can be written by others \(mode 1775\): chmod go-w "),
    ],
)
def test_key_files_that_others_can_change_are_refused_with_the_chmod_that_mends_it(keys, place, mode, message):
    where = keys / place
    ClientKeys.load(keys, "robot-1")
    before = stat.S_IMODE(where.stat().st_mode)
    where.chmod(mode)
    with pytest.raises(ValueError, match=message) as refusal:
        ClientKeys.load(keys, "robot-1")
    said = str(refusal.value).partition("): ")[2].split(",")[0].split()
    assert said[0] == "chmod"
    assert subprocess.run(said, check=False).returncode == 0
    ClientKeys.load(keys, "robot-1")
    where.chmod(before)


@pytest.mark.parametrize("place", ["allow_list", ""])
def test_an_allow_list_that_others_can_change_admits_nobody(keys, place, caplog):
    allowed = AllowList(keys / "allow_list")
    robot = ClientKeys.load(keys, "robot-1").pair.public
    (keys / place).chmod(0o775)
    (keys / "allow_list").touch()
    eventually(lambda: allowed.lookup(robot) is None, "the mode was noticed")
    assert "can be written by others (mode 0775): chmod go-w" in caplog.text
    with pytest.raises(ValueError, match="can be written by others"):
        AllowList(keys / "allow_list")
    (keys / place).chmod(0o755)
    (keys / "allow_list").touch()
    eventually(lambda: allowed.lookup(robot) is not None, "mended, it admits again")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("admin bob {key}", "line 1: expected role actor, operator or follower, got 'admin'"),
        ("actor bob", "got 2 words"),
        ("actor bob {key}\nactor eve {key}", "line 2: this key is listed already, as 'bob'"),
        ("actor bob " + "x" * 39, "got 39 characters"),
        ("actor bob " + "#" * 40, "expected a key of 40 Z85 characters"),  # each five say more than 32 bits
    ],
)
def test_allow_lists_name_the_wrong_line(tmp_path, text, complaint):
    (tmp_path / "list").write_text(text.format(key=KeyPair.new().public.decode()))
    with pytest.raises(ValueError, match=complaint):
        read_allow_list(tmp_path / "list")


def test_a_request_is_not_replayed(serve):
    calls = []
    server = serve(handlers={"request": lambda peer, envelope, body: calls.append(envelope.request_id) or {}})
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.connect(f"tcp://127.0.0.1:{server.config.port_number}")

    def ask(envelope: Envelope, body: dict) -> Envelope:
        dealer.send_multipart([envelope.to_frame(), *pack(body)])
        assert dealer.poll(10_000)
        return Envelope.from_frame(dealer.recv_multipart()[0])

    limits = {key: 1 for key in ("header_bytes", "frame_bytes", "total_bytes", "frames", "depth", "rank")}
    hello = {"version": server.config.version, "limits": limits, "spec": None}
    assert ask(Envelope("hello", "a", "b1", request_id=1), hello).error is None
    old = Envelope("request", "a", "b1", request_id=2, target="x")
    assert ask(old, {}).error is None
    assert ask(old, {}).error == ("refused", "message 2 of this connection was handled before: nothing is replayed")
    assert calls == [2]
    context.destroy(linger=0)


def test_boots_and_windows():
    boots = Boots()
    assert [boots.enter("a", b) for b in ("1", "1", "2", "2", "1")] == [True, True, True, True, False]
    assert boots.enter("b", "1")
    window = ReplayWindow()
    assert [window.accept(i) for i in (5, 3, 5, 3, 4, 6)] == [True, True, False, False, True, True]
    assert window.accept(6 + WINDOW)
    assert not window.accept(6)
    assert window.accept(7)
    assert window.accept(10**9)
    assert not window.accept(7)


def test_keygen_writes_private_files_and_overwrites_nothing(tmp_path, capsys):
    import keygen

    folder = tmp_path / "k"
    old = os.umask(0)
    try:
        assert keygen.main([str(folder), "--actor", "robot-1", "--operator", "alice"]) == 0
    finally:
        os.umask(old)
    said = capsys.readouterr().out
    assert "security.keys_dir" in said
    for name in ("learner", "robot-1", "alice"):
        assert stat.S_IMODE((folder / f"{name}.secret").stat().st_mode) == 0o600
    assert {entry.name: entry.role for entry in read_allow_list(folder / "allow_list").values()} == {
        "robot-1": "actor", "alice": "operator"}  # fmt: skip
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert keygen.main([str(folder), "--actor", "robot-1"]) == 2
    assert keygen.main([str(folder), "--actor", "../x"]) == 2
    assert "has keys in" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert keygen.main([str(folder), "--actor", "robot-2"]) == 0
    assert (folder / "learner.secret").read_bytes() == before["learner.secret"]
    assert len(read_allow_list(folder / "allow_list")) == 3
