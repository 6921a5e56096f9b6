"""The openpi protocol in front of a real gateway and policy server: stock client, ours, refusals, hostile bytes."""

import asyncio
import contextlib
import subprocess
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager

import msgpack
import numpy as np
import pytest
from omegaconf import OmegaConf
from serving_samples import body, connected, running
from stock_openpi import StockClient, pack
from tiny import HORIZON, SPEC, tiny_config
from websockets.exceptions import ConnectionClosed, InvalidStatus

from openpi_client.websocket_client_policy import PolicyServerError, WebsocketClientPolicy
from serl_launcher.run.paths import RunPaths
from serl_launcher.serving.openpi_server import OpenpiServer, OpenpiSettings, decode
from serl_launcher.supervisor.roles import roles_for
from serl_robot_infra import openpi_policy
from serl_transport.contract.errors import NotReady


@contextmanager
def openpi(run_dir, **changes):
    """The server in a thread; the port."""
    cfg = tiny_config(**{f"serving__openpi_{key}": value for key, value in {"port": 0, **changes}.items()})
    server = OpenpiServer(OpenpiSettings.of(cfg), SPEC, "t", RunPaths(run_dir))
    ready, box = threading.Event(), []

    async def serve():
        async with server.listening() as listening:
            stop = asyncio.Event()
            box.extend([asyncio.get_running_loop(), stop, listening.sockets[0].getsockname()[1]])
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(10)
    try:
        yield box[2]
    finally:
        box[0].call_soon_threadsafe(box[1].set)
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    with running(run_dir) as (gateway, server):
        yield run_dir, gateway, server


def images(seed=0):
    return body(seed)["observation"]["images"]


STATE = np.float32([0.1, 0.2, 0.3])


def test_a_stock_client_gets_the_actions_that_an_actor_gets(lab):
    run_dir, gateway, _ = lab
    with openpi(run_dir) as port, connected(gateway) as actor:
        client = StockClient(port)
        assert client.metadata["task"] == SPEC.to_dict() or client.metadata["task"]["name"] == "tiny"
        observation = {"images": images(), "state": STATE, "prompt": SPEC.prompt, "seed": 3}
        answer = client.infer(observation)
        want = actor.infer({"observation": {"images": images(), "state": STATE}, "prompt": SPEC.prompt, "seed": 3})
        np.testing.assert_allclose(answer["actions"], want["actions"], atol=1e-6)
        assert answer["actions"].shape == (HORIZON, 2)
        assert answer["policy_version"] == 0
        assert answer["server_timing"]["infer_ms"] > 0
        assert "prev_total_ms" in client.infer(observation)["server_timing"]
        client.socket.close()


def test_our_client_gets_actions_too(lab):
    with openpi(lab[0]) as port:
        policy = WebsocketClientPolicy(port=port)
        assert policy.metadata["server"] == "flowserl"
        assert policy.infer({"images": images(), "state": STATE})["actions"].shape == (HORIZON, 2)
        policy.close()


def test_an_actor_with_policy_openpi_gets_what_an_actor_gets(lab):
    run_dir, gateway, _ = lab
    with openpi(run_dir) as port, connected(gateway) as actor:
        asked = {
            "observation": {"images": images(), "state": STATE},
            "prompt": SPEC.prompt,
            "seed": 3,
            "min_version": 0,
        }
        want = actor.infer(asked)
        for run, version in (("t", 0), ("another", -1)):  # a version of another run means nothing here
            policy = openpi_policy.OpenpiPolicy(
                openpi_policy.OpenpiSettings.of({"port": port}, SPEC), SPEC, run=run, guided=True
            )
            answer = policy.infer(asked)
            np.testing.assert_allclose(answer["actions"], want["actions"], atol=1e-6)
            assert answer["policy_version"] == version
            policy.close()
        policy = openpi_policy.OpenpiPolicy(
            openpi_policy.OpenpiSettings.of({"port": port}, SPEC), SPEC, run="t", guided=False
        )
        with pytest.raises(NotReady, match="version"):
            policy.infer({**asked, "min_version": 99})
        assert policy.infer(asked)["policy_version"] == 0  # on the same connection
        policy.close()


@pytest.mark.parametrize(
    "layout",
    [
        lambda i, s: {"observation": {"images": i, "state": s}},
        lambda i, s: {"images": {c: np.moveaxis(x, 2, 0) for c, x in i.items()}, "state": s.astype(np.float64)},
        lambda i, s: {"observation/front": i["front"], "observation/wrist": i["wrist"], "observation/state": s},
        lambda i, s: {f"observation.images.{c}": x / np.float32(255) for c, x in i.items()} | {"observation.state": s},
        lambda i, s: {"observation/image": i["front"], "observation/wrist": i["wrist"], "observation/joints": s},
    ],
)
def test_layouts_of_observations_mean_the_same(lab, layout):
    keys = {"front": "observation/image", "state": "observation/joints"}
    with openpi(lab[0], keys=keys) as port:
        client = StockClient(port)
        answer = client.infer(layout(images(), STATE) | {"prompt": SPEC.prompt, "seed": 3})
        want = client.infer({"images": images(), "state": STATE, "prompt": SPEC.prompt, "seed": 3})
        np.testing.assert_allclose(answer["actions"], want["actions"], atol=1e-4)
        client.socket.close()


def test_images_of_another_size_are_resized(lab):
    with openpi(lab[0]) as port:
        client = StockClient(port)
        big = {c: np.zeros((48, 64, 3), np.uint8) for c in SPEC.cameras}
        assert client.infer({"images": big, "state": STATE})["actions"].shape == (HORIZON, 2)
        client.socket.close()


def test_mistakes_are_said_in_words_and_the_connection_lives(lab):
    with openpi(lab[0]) as port:
        client = StockClient(port)
        for change, message in (
            ({"images": {}}, "schema_mismatch: no array for camera 'front'; tried observation/images/front"),
            ({"state": np.zeros(9, np.float32)}, "schema_mismatch: state: expected 3 numbers, got shape \\[9\\]"),
            ({"state": np.full(3, np.nan, np.float32)}, "schema_mismatch"),
            ({"min_version": 5}, "not_ready: policy version 5"),
            ({"samples": 0}, "schema_mismatch: infer: samples"),
        ):
            with pytest.raises(RuntimeError, match=message) as error:
                client.infer({"images": images(), "state": STATE} | change)
            assert "Traceback" not in str(error.value)
            assert ".py" not in str(error.value)
        assert "actions" in client.infer({"images": images(), "state": STATE})
        client.socket.close()


HOSTILE = [
    msgpack.packb({b"a": {b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": "|O", b"shape": [1]}}),
    msgpack.packb({b"a": {b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": "<f4", b"shape": [-1]}}),
    msgpack.packb({b"a": {b"__ndarray__": True, b"data": b"", b"dtype": "<f4", b"shape": [2**62]}}),
    msgpack.packb({b"a": {b"__ndarray__": True, b"data": 7, b"dtype": "<f4", b"shape": [1]}}),
    msgpack.packb({b"a": {b"__ndarray__": True}}),
    msgpack.packb({b"a": {b"__npgeneric__": True, b"data": "x", b"dtype": "|V8"}}),
    msgpack.packb([1, 2]),
    b"\xc1" * 50,
    b"\x91" * 5000,
    b"",
    "text",
]


MAP, BYTES = b"\x80", b"\xc4\x00"
BOMBS = {  # of as many bytes as a message may have: before, each was decoded to its end
    "empty maps": b"\x81\xa1a\xdd" + (4_000_000).to_bytes(4, "big") + MAP * 4_000_000,
    "maps in lists": b"\x81\xa1a\xdc\x03\xe8" + (b"\xdc\x03\xe8" + MAP * 1000) * 1000,
    "numbers": b"\x81\xa1a\xdd" + (4_000_000).to_bytes(4, "big") + b"\1" * 4_000_000,
    "arrays of nothing": b"\x81\xa1a\xdc\xff\xff"
    + msgpack.packb({b"__ndarray__": True, b"data": b"", b"dtype": "<f4", b"shape": [0]}) * 65535,
    "extensions": b"\x81\xa1a\xdc\x27\x0f" + b"\xd4\x01\x00" * 9999,
    "a dtype of a million fields": msgpack.packb(
        {b"a": {b"__ndarray__": True, b"data": b"", b"dtype": "f4," * 1_000_000, b"shape": [0]}}
    ),
    "a shape of many dims": msgpack.packb(
        {b"a": {b"__ndarray__": True, b"data": b"", b"dtype": "<f4", b"shape": [0] * 9000}}
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_message_of_too_many_elements_is_refused_early(name):
    assert len(BOMBS[name]) < OpenpiSettings.of(tiny_config(serving__openpi_port=0)).max_bytes
    with pytest.raises(ValueError, match=r"more than 10000 elements|exceeds max_|a dtype is a text|a shape holds"):
        decode(BOMBS[name])


def test_an_honest_client_is_answered_beside_one_that_sends_bombs(lab):
    """Sixteen at a time: each costs its connection, and none the honest client's."""
    with openpi(lab[0]) as port:
        honest, stop, refused = StockClient(port), threading.Event(), []

        def attack(message):
            while not stop.is_set():
                client = StockClient(port)
                with contextlib.suppress(ConnectionClosed):
                    client.socket.send(message)
                    refused.append(client.socket.recv(timeout=30))
                client.socket.close()

        attackers = [threading.Thread(target=attack, args=(message,)) for message in BOMBS.values()]
        for attacker in attackers:
            attacker.start()
        try:
            while len(refused) < 2 * len(BOMBS):
                assert "actions" in honest.infer({"images": images(), "state": STATE})
        finally:
            stop.set()
            for attacker in attackers:
                attacker.join(30)
        assert {message.partition(":")[0] for message in refused} == {"bad_frame"}
        honest.socket.close()


def test_the_largest_message_is_what_the_task_needs_unless_it_is_said(lab, caplog):
    settings = OpenpiSettings.of(tiny_config(serving__openpi_port=0))
    assert settings.max_bytes == (1 << 20) + 4 * (2 * 3 * 640 * 480 + 3)
    assert OpenpiSettings.of(tiny_config(serving__openpi_port=0, serving__openpi_max_mb=64)).max_bytes == 64 << 20
    with pytest.raises(ValueError, match=r"serving.openpi_max_mb: expected a number from 0\.001 to 1024, got 'big'"):
        OpenpiSettings.of(tiny_config(serving__openpi_port=0, serving__openpi_max_mb="big"))
    with openpi(lab[0]) as port:
        client = StockClient(port)
        vga = {camera: np.zeros((480, 640, 3), np.float32) for camera in SPEC.cameras}
        assert client.infer({"images": vga, "state": STATE})["actions"].shape == (HORIZON, 2)
        with contextlib.suppress(ConnectionClosed):  # it may be told while it is still sending
            client.socket.send(b"\0" * (26 << 20))
        with pytest.raises(ConnectionClosed, match="1009"):
            client.socket.recv(timeout=10)
    assert f"sent more than {settings.max_bytes} bytes (serving.openpi_max_mb)" in caplog.text


def test_clients_that_come_at_once_are_bounded_too(lab):
    """All pass the door before the first is counted."""
    with openpi(lab[0], max_clients=2) as port:
        barrier, results = threading.Barrier(8), []

        def come():
            barrier.wait()
            try:
                client = StockClient(port)
                results.append(client)
            except (InvalidStatus, ConnectionClosed) as refusal:
                results.append(str(refusal))

        comers = [threading.Thread(target=come) for _ in range(8)]
        for comer in comers:
            comer.start()
        for comer in comers:
            comer.join(20)
        served = [client for client in results if isinstance(client, StockClient)]
        assert len(served) == 2
        assert len(results) == 8
        for client in served:
            client.socket.close()


@pytest.mark.parametrize("message", HOSTILE)
def test_hostile_messages_close_their_connection_and_nothing_else(lab, message):
    with openpi(lab[0]) as port:
        bystander, client = StockClient(port), StockClient(port)
        client.socket.send(message)
        assert client.socket.recv(timeout=10).startswith("bad_frame: ")
        with pytest.raises(ConnectionClosed):
            client.socket.recv(timeout=10)
        assert "actions" in bystander.infer({"images": images(), "state": STATE})
        bystander.socket.close()


def test_seeded_noise_is_decoded_or_refused_and_never_anything_else():
    rng = np.random.default_rng(20261121)
    good = pack({"images": {"front": np.zeros((4, 4, 3), np.uint8)}, "state": STATE, "n": np.float32(1)})
    for _ in range(3000):
        damaged = bytearray(good)
        for position in rng.integers(0, len(damaged), rng.integers(1, 6)):
            damaged[position] = rng.integers(0, 256)
        cut = bytes(damaged[: rng.integers(0, len(damaged) + 1)])
        try:
            assert isinstance(decode(cut), dict)
        except ValueError:
            continue


def test_a_message_above_the_limit_is_cut_off(lab):
    with openpi(lab[0], max_mb=1) as port:
        client = StockClient(port)
        client.socket.send(b"\0" * (2 << 20))
        with pytest.raises(ConnectionClosed, match="1009"):
            client.socket.recv(timeout=10)


def test_the_token_is_asked_for_and_health_is_not(lab):
    with openpi(lab[0], token="s3cret") as port:
        for key in (None, "wrong", "s3cret2", ""):
            with pytest.raises(InvalidStatus, match="401"):
                StockClient(port, key)
        with pytest.raises(PolicyServerError, match="401"):
            WebsocketClientPolicy(port=port)
        for client in (StockClient(port, "s3cret").socket, WebsocketClientPolicy(port=port, api_key="s3cret")):
            client.close()
        bearer = urllib.request.Request(f"http://127.0.0.1:{port}/", headers={"Authorization": "Bearer s3cret"})
        with pytest.raises(urllib.error.HTTPError) as error:  # let in, and told that it is no websocket
            urllib.request.urlopen(bearer, timeout=10)
        assert error.value.code == 426
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=10) as reply:
            assert (reply.status, reply.read()) == (200, b"OK\n")


def test_the_number_of_clients_is_bounded(lab):
    with openpi(lab[0], max_clients=1) as port:
        first = StockClient(port)
        with pytest.raises(InvalidStatus, match="503"):
            StockClient(port)
        first.socket.close()


def test_tls(lab, tmp_path):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert], capture_output=True,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("no openssl on this machine to make a certificate")
    with openpi(lab[0], tls_cert=str(cert), tls_key=str(key)) as port:
        policy = WebsocketClientPolicy("wss://127.0.0.1", port, ca_file=str(cert))
        assert policy.infer({"images": images(), "state": STATE})["actions"].shape == (HORIZON, 2)
        policy.close()
        with pytest.raises(PolicyServerError, match="certificate"):
            WebsocketClientPolicy("wss://127.0.0.1", port)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"serving__openpi_host": "0.0.0.0"}, "serving.openpi_host=0.0.0.0 lets anyone .* set serving.openpi_token"),
        ({"serving__openpi_tls_cert": "/x"}, "expected both or none"),
        ({"serving__openpi_keys": {"frnt": "a"}}, "openpi_keys.frnt: expected one of front, state, wrist"),
        ({"serving__openpi_token": "schlüssel"}, "openpi_token: expected ASCII"),
        ({"serving__openpi_token": "env:NOT_SET"}, "openpi_token=env:NOT_SET: the environment has no NOT_SET"),
        (
            {"serving__openpi_tls_cert": __file__, "serving__openpi_tls_key": "/etc/passwd"},
            "tls_key: .* read by others",
        ),
    ],
)
def test_mistakes_in_the_config_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        OpenpiSettings.of(tiny_config(serving__openpi_port=0, **change))


def test_the_role_runs_only_where_a_port_is_given(tmp_path):
    cfg = tiny_config()
    assert "openpi" not in [role.name for role in roles_for(cfg, RunPaths(tmp_path), [])]
    OmegaConf.update(cfg, "serving.openpi_port", 8000)
    (role,) = [role for role in roles_for(cfg, RunPaths(tmp_path), []) if role.name == "openpi"]
    assert role.argv[1:] == ("-m", "serl_launcher.serving.openpi_server", str(tmp_path))
