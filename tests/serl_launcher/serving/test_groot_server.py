"""GR00T's ZMQ protocol in front of a real gateway and policy server: stock clients of both generations, refusals."""

import asyncio
import json
import threading
from contextlib import contextmanager

import msgpack
import numpy as np
import pytest
import zmq
from omegaconf import OmegaConf
from serving_samples import body, connected, running, wait_for
from stock_groot import StockClient, pack, unpack
from tiny import HORIZON, SPEC, tiny_config

from serl_launcher.run.files import write_json
from serl_launcher.run.paths import RunPaths
from serl_launcher.serving.groot_keys import question
from serl_launcher.serving.groot_server import GrootServer, GrootSettings
from serl_launcher.supervisor.roles import roles_for
from serl_robot_infra.groot_policy import GrootPolicy
from serl_robot_infra.groot_policy import GrootSettings as ActorSettings

STATE = np.float32([0.1, 0.2, 0.3])
PROMPT = "annotation.human.task_description"
MODALITY = {
    "state": {"arm": {"start": 0, "end": 2}, "gripper": {"start": 2, "end": 3}},
    "action": {"arm": {"start": 0, "end": 1}, "gripper": {"start": 1, "end": 2}},
    "video": {"front": {"original_key": "observation.images.front"}, "wrist": {}},
    "annotation": {"human.task_description": {}},
}


@contextmanager
def groot(run_dir, **changes):
    """The server in a thread; the port."""
    cfg = tiny_config(**{f"serving__groot_{key}": value for key, value in {"port": 0, **changes}.items()})
    server = GrootServer(GrootSettings.of(cfg), SPEC, RunPaths(run_dir))
    ready, box = threading.Event(), []

    async def serve():
        async with server.listening() as (port, _):
            box.extend([asyncio.get_running_loop(), asyncio.Event(), port])
            ready.set()
            await box[1].wait()

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
    """A run's folder whose gateway and policy server work, with its modality.json."""
    run_dir = tmp_path_factory.mktemp("run")
    (run_dir / "modality.json").write_text(json.dumps(MODALITY))
    with running(run_dir) as (gateway, _):
        chunk = wait_for(lambda: gateway.forwarder.to_status().get("chunk"))
        write_json(RunPaths(run_dir).status, {"serving": {"chunk": chunk}})  # a run's gateway does so every second
        with connected(gateway) as actor:
            yield run_dir, actor


@pytest.fixture(scope="module")
def port(lab):
    with groot(lab[0], modality=str(lab[0] / "modality.json")) as port:
        yield port


@pytest.fixture
def client(port):
    client = StockClient(port)
    yield client
    client.close()


def images(seed=0):
    return body(seed)["observation"]["images"]


def nested(*seeds, text=SPEC.prompt):
    """An observation of N1.6 and later, a row for each seed."""
    rows = [images(seed) for seed in seeds]
    state = np.stack([STATE + np.float32(0.1 * row) for row in range(len(seeds))])[:, None]
    return {
        "video": {camera: np.stack([row[camera] for row in rows])[:, None] for camera in SPEC.cameras},
        "state": {"arm": state[..., :2].copy(), "gripper": state[..., 2:].copy()},
        "language": {PROMPT: [[text]] * len(rows)},
    }


def flat(batched=False):
    """An observation as N1.5's robot scripts make it; batched: as N1.6's simulations do."""
    observation = {f"video.{camera}": image[None] for camera, image in images().items()}
    observation |= {"state.arm": STATE[None, :2].astype(np.float64), "state.gripper": STATE[None, 2:]}
    if batched:
        observation = {key: value[None] for key, value in observation.items()}
    return observation | {PROMPT: [SPEC.prompt]}


def as_an_actor(actor, seed, state=STATE):
    question = {"observation": {"images": images(seed), "state": state}, "prompt": SPEC.prompt, "seed": 5 + seed}
    return actor.infer(question)["actions"]


def test_a_client_of_n1_7_gets_the_actions_that_an_actor_gets(lab, client):
    action, info = client.get_action(nested(0), {"seed": 5})
    want = as_an_actor(lab[1], 0)
    assert {name: part.shape for name, part in action.items()} == {"arm": (1, HORIZON, 1), "gripper": (1, HORIZON, 1)}
    assert all(part.dtype == np.float32 for part in action.values())
    np.testing.assert_allclose(np.concatenate([action["arm"][0], action["gripper"][0]], 1), want, atol=1e-6)
    assert info["policy_version"] == 0


def test_rows_of_a_batch_are_questions_of_their_own(lab, client):
    action, _ = client.get_action(nested(0, 1), {"seed": 5})
    for row in range(2):
        want = as_an_actor(lab[1], row, STATE + np.float32(0.1 * row))
        np.testing.assert_allclose(action["arm"][row, :, 0], want[:, 0], atol=1e-6)


def test_a_client_of_n1_5_gets_its_own_form(client):
    action = client.get_action_n1_5(flat())
    assert {name: part.shape for name, part in action.items()} == {
        "action.arm": (HORIZON, 1),
        "action.gripper": (HORIZON, 1),
    }
    batched = {key: value[None] if isinstance(value, np.ndarray) else value for key, value in flat().items()}
    assert client.get_action_n1_5(batched)["action.arm"].shape == (1, HORIZON, 1)


def test_a_simulation_s_flat_keys_are_answered_with_flat_ones(client):
    action, _ = client.get_action(flat(batched=True))
    assert {name: part.shape for name, part in action.items()} == {
        "action.arm": (1, HORIZON, 1),
        "action.gripper": (1, HORIZON, 1),
    }


def test_the_other_endpoints(client):
    assert client.call("ping") == {"status": "ok", "message": "Server is running"}
    assert client.call("reset", {"options": None}) == {}
    configs = client.call("get_modality_config")
    assert {name: config.modality_keys for name, config in configs.items()} == {
        "video": ["front", "wrist"],
        "state": ["arm", "gripper"],
        "action": ["arm", "gripper"],
        "language": [PROMPT],
    }
    assert configs["action"].delta_indices == list(range(HORIZON))
    assert not configs["video"].as_text
    with pytest.raises(RuntimeError, match="kill is refused"):
        client.call("kill")
    assert client.call("ping")["status"] == "ok"


def test_n1_5_s_form_of_the_modality_config_and_the_names_without_a_modality_json(lab):
    with groot(lab[0], generation="n1_5") as port:
        client = StockClient(port)
        configs = client.call("get_modality_config")
        assert configs["video"].modality_keys == ["video.front", "video.wrist"]
        assert configs["state"].modality_keys == ["state.all"]
        client.close()


@pytest.mark.parametrize("n1_5", [False, True])
def test_our_actor_speaks_it_too(lab, n1_5):
    with groot(lab[0], generation="n1_5" if n1_5 else "n1_7") as port:
        policy = GrootPolicy(ActorSettings.of({"port": port}, SPEC), SPEC, guided=False)
        observation = {"images": images(), "state": STATE}
        assert policy.infer({"observation": observation, "prompt": SPEC.prompt})["actions"].shape == (HORIZON, 2)
        policy.close()


def changed(**sections):
    observation = nested(0)
    return {name: entries | sections.get(name, {}) for name, entries in observation.items()}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"observation": {"video": {}}}, r"schema_mismatch: no array 'state\.arm'; the observation has \[\]"),
        ({"observation": {"video": {}, "state": []}}, r"observation\.state: expected a map, got list"),
        ({"observation": 3}, r"schema_mismatch: observation: expected a map, got int"),
        (None, r"schema_mismatch: data: expected a map, got NoneType"),
        ({"observation": changed(state={"arm": np.zeros((1, 1, 5), np.float32)})},
         r"state\.arm: expected 2 numbers, got float32\[5\]"),
        ({"observation": changed(state={"arm": np.zeros((1, 2, 2), np.float32)})},
         r"state\.arm: expected \[batch, 1 tick, …\] with 1 dims behind it, got shape \[1, 2, 2\]"),
        ({"observation": changed(state={"arm": np.full((1, 1, 2), np.nan, np.float32)})}, r"schema_mismatch: .*nan"),
        ({"observation": changed(video={"front": np.zeros((1, 32, 32, 3), np.uint8)})}, r"video\.front: expected \[b"),
        ({"observation": changed(video={"front": np.full((1, 1, 32, 32, 3), 2.0, np.float32)})},
         r"camera 'front': expected float in \[0, 1\]"),
        ({"observation": changed(language={PROMPT: [["a"], ["b"]]})}, r"language: expected one text for each of 1 obs"),
        ({"observation": changed(language={PROMPT: [[""]]})}, r"schema_mismatch: infer: prompt"),
    ],
)  # fmt: skip
def test_mistakes_are_answered_in_a_line_and_the_client_goes_on(client, data, message):
    with pytest.raises(RuntimeError, match=message) as error:
        client.call("get_action", data)
    assert "\n" not in str(error.value)
    assert "Traceback" not in str(error.value)
    assert client.call("ping")["status"] == "ok"


def test_an_unknown_endpoint_and_bytes_that_are_no_message(client):
    with pytest.raises(
        RuntimeError, match=r"endpoint: expected one of ping, get_action, reset, get_modality_config, got 'x'"
    ):
        client.call("x")
    for raw, told in (
        (b"\xc1", "not msgpack"),
        (b"", "incomplete input"),
        (msgpack.packb([1]), "expected a map, got list"),
    ):
        client.socket.send(raw)
        with pytest.raises(RuntimeError, match=told):
            client.receive()
    assert client.call("ping")["status"] == "ok"


def test_a_message_above_the_limit_is_told_and_a_far_larger_one_cut_off(lab, caplog):
    with groot(lab[0], max_mb=0.1) as port:
        client, bystander = StockClient(port), StockClient(port)
        client.socket.send(pack({"endpoint": "ping", "x": np.zeros(200_000, np.uint8)}))
        with pytest.raises(RuntimeError, match=r"a message of \d+ bytes, expected at most 104857"):
            client.receive()
        assert "(serving.groot_max_mb)" in caplog.text
        client.socket.send(b"\0" * (1 << 20))
        assert not client.socket.poll(500)
        assert bystander.call("ping")["status"] == "ok"
        client.close()
        bystander.close()


def test_clients_that_are_silent_or_never_read_hold_nobody_up(port, client):
    idle, half = StockClient(port), StockClient(port)
    half.socket.send(pack({"endpoint": "get_action", "data": {"observation": nested(0), "options": None}}))
    flood = zmq.Context()
    dealer = flood.socket(zmq.DEALER)
    dealer.connect(f"tcp://127.0.0.1:{port}")
    question = pack({"endpoint": "get_action", "data": {"observation": nested(0), "options": None}})
    for _ in range(30):  # it does not wait for its answers
        dealer.send_multipart([b"", question])
    dealer.send_multipart([b"no delimiter"])
    assert client.get_action(nested(0))[0]["arm"].shape == (1, HORIZON, 1)
    told = []
    while dealer.poll(1000):
        told.append(unpack(dealer.recv_multipart()[-1]))
    errors = {answer["error"] for answer in told if isinstance(answer, dict)}
    assert "one question at a time: the last one is not answered yet" in errors
    assert "bad_frame: expected one message of a REQ socket" in errors
    flood.destroy(linger=0)
    idle.close()
    half.close()


def test_the_token_is_asked_for(lab):
    with groot(lab[0], token="s3cret") as port:
        for token in (None, "wrong", "s3cret2"):
            client = StockClient(port, token)
            with pytest.raises(RuntimeError, match="Unauthorized: Invalid API token"):
                client.call("ping")
            client.close()
        client = StockClient(port, "s3cret")
        assert client.call("ping")["status"] == "ok"
        client.close()


def test_without_a_policy_server_the_config_is_not_ready_and_actions_time_out(tmp_path):
    with groot(tmp_path, timeout_s=0.3) as port:
        client = StockClient(port)
        with pytest.raises(RuntimeError, match="not_ready: no policy server is running yet"):
            client.call("get_modality_config")
        observation = nested(0) | {"state": {"all": STATE[None, None]}}
        with pytest.raises(RuntimeError, match=r"server_silent: no answer from the gateway within 0\.3 s"):
            client.get_action(observation)
        client.close()


def test_an_instruction_may_have_another_key_or_be_left_to_the_task():
    layout = GrootSettings.of(tiny_config(serving__groot_port=0)).layout
    observation = nested(0, text="lift") | {"state": {"all": STATE[None, None]}}
    for key in ("task", "annotation.human.coarse_action", "annotation.human.validity"):
        asked = question({"observation": observation | {"language": {key: [["lift"]]}}}, SPEC, layout)
        assert asked.bodies[0]["prompt"] == "lift"
    assert "prompt" not in question({"observation": observation | {"language": {}}}, SPEC, layout).bodies[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"host": "0.0.0.0"}, r"serving\.groot_host=0\.0\.0\.0 lets anyone .* set serving\.groot_token"),
        ({"token": "env:NOT_SET"}, r"groot_token=env:NOT_SET: the environment has no NOT_SET"),
        ({"generation": "n2"}, r"serving\.groot_generation: expected n1_7 or n1_5, got 'n2'"),
        ({"modality": "/nowhere"}, r"serving\.groot_modality=/nowhere: No such file"),
        ({"max_mb": "big"}, r"serving\.groot_max_mb: expected a number from 0\.001 to 1024, got 'big'"),
    ],
)
def test_mistakes_in_the_config_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        GrootSettings.of(tiny_config(serving__groot_port=0, **{f"serving__groot_{k}": v for k, v in change.items()}))


def test_a_modality_json_without_one_of_the_task_s_cameras_is_refused(tmp_path):
    path = tmp_path / "modality.json"
    path.write_text(json.dumps(MODALITY | {"video": {"front": {}}}))
    with pytest.raises(ValueError, match=r"serving\.groot_modality: video has no entry for the task's camera 'wrist'"):
        GrootSettings.of(tiny_config(serving__groot_port=0, serving__groot_modality=str(path)))


def test_the_role_runs_only_where_a_port_is_given(tmp_path):
    cfg = tiny_config()
    assert "groot" not in [role.name for role in roles_for(cfg, RunPaths(tmp_path), [])]
    OmegaConf.update(cfg, "serving.groot_port", 5555)
    (role,) = [role for role in roles_for(cfg, RunPaths(tmp_path), []) if role.name == "groot"]
    assert role.argv[1:] == ("-m", "serl_launcher.serving.groot_server", str(tmp_path))
