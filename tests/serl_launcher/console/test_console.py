"""The console's server on a real gateway: who gets in, what a page is told, what a person's act does."""

import asyncio
import json
import ssl
import stat
import subprocess

import aiohttp
import keygen
import pytest
from gateway_samples import serving
from omegaconf import OmegaConf

from serl_launcher.console.alarms import alarms
from serl_launcher.console.app import Console
from serl_launcher.console.curves import of_episodes, of_metrics, thinned
from serl_launcher.console.door import Door
from serl_launcher.console.feed import Feed
from serl_launcher.console.operator import ConsoleOperator
from serl_launcher.run import console as place_of
from serl_launcher.run.acts import ActsLedger
from serl_launcher.run.console import ConsolePlace, check_console, lay_out
from serl_launcher.run.paths import RunPaths
from serl_launcher.run.tail import Tail
from serl_transport.config import TrainerConfig
from serl_transport.contract.errors import Refused, Unauthorized

KEYS = {"port": "auto", "host": "127.0.0.1", "hosts": [], "name": "console", "tls_cert": None, "tls_key": None}


def config(**changes):
    return OmegaConf.create({"port": 5588, "broadcast_port": 5589, "insecure": False, "console": {**KEYS, **changes}})


def episode(ordinal, **changes):
    row = {"ordinal": ordinal, "episode_id": f"online-{ordinal}", "mode": "online", "stage": "online", "n_ticks": 20,
           "success": True, "actor": "a", "return": 1.0, "interventions": 0, "policy_version_last": 3,
           "truncated_by": None, "whole": True, "end_time": 1.0}  # fmt: skip
    return json.dumps(row | changes) + "\n"


@pytest.fixture
def paths(tmp_path):
    paths = RunPaths(tmp_path / "run")
    paths.root.mkdir()
    return paths


def test_the_word_is_private_and_kept_and_a_taken_port_is_passed_over(paths):
    first = lay_out(config(), paths)
    file = paths.root / "console.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert first.url == f"http://127.0.0.1:{first.port}/?t={first.token}"
    assert first.token not in repr(first)
    assert lay_out(config(), paths) == first == place_of.read(paths)
    with place_of._bound("127.0.0.1", first.port) as taken:
        taken.listen()
        assert lay_out(config(), paths).port != first.port
        with pytest.raises(ValueError, match=rf"console\.port={first.port} on 127.0.0.1: address already in use"):
            lay_out(config(port=first.port), paths)
    file.chmod(0o644)
    with pytest.raises(ValueError, match="can be read by others"):
        place_of.read(paths)
    assert lay_out(config(), paths).token != first.token  # others may have read it
    assert lay_out(config(port=None), paths) is None


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"port": 5588}, "console.port and port are both 5588"),
        ({"port": "some"}, "console.port: expected a whole number"),
        ({"host": "0.0.0.0"}, "give console.tls_cert and console.tls_key, or insecure=true"),
        ({"tls_key": "x"}, "expected both or none"),
        ({"name": "../x"}, "console.name: expected a name"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_its_key(changes, why):
    with pytest.raises(ValueError, match=why):
        check_console(config(**changes))


def test_names_and_origins(monkeypatch):
    monkeypatch.setattr("serl_launcher.console.door.socket.gethostname", lambda: "Lab-PC")
    door = Door(ConsolePlace("127.0.0.1", 5592, "word", False), ["lab.example"])
    ours = ["127.0.0.1:5592", "localhost:9000", "[::1]:5592", "192.168.1.7:5592", "lab-pc:5592", "LAB.example"]
    assert [host for host in ours if not door.is_our_name(host)] == []
    strangers = ["evil.example:5592", "127.0.0.1.evil.example", "", None, "[::1", "localhost.evil"]
    assert [host for host in strangers if door.is_our_name(host)] == []
    assert door.is_from_our_page({"Host": "localhost:5592", "Origin": "http://localhost:5592"})
    for origin in ({}, {"Origin": "null"}, {"Origin": "http://evil.example"}, {"Origin": "https://localhost:5592"}):
        assert not door.is_from_our_page({"Host": "localhost:5592", **origin})
    assert door.opens("word")
    assert not any(door.opens(word) for word in (None, "", "wor", "wörd"))


def test_a_file_that_grows_or_is_replaced_is_read_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    tail = Tail(path)
    assert tail.read() == (False, [])
    path.write_text('{"n": 1}\ntorn\n{"n": 2')
    assert tail.read() == (True, [{"n": 1}])
    with path.open("a") as file:
        file.write("}\n")
    assert tail.read() == (False, [{"n": 2}])
    path.with_suffix(".new").write_text('{"n": 3}\n')
    path.with_suffix(".new").replace(path)
    assert tail.read() == (True, [{"n": 3}])


def test_a_page_gets_what_has_changed_and_nothing_twice(paths):
    feed = Feed(paths)
    assert feed.since(0) == (0, {})
    paths.episodes.write_text(episode(0) + episode(1, interventions=5) + '{"ordinal": "x"}\n')
    paths.status.write_text(json.dumps({"run": "t", "time": 1, "troubles": {"trainer": "ended"}}))
    paths.videos.mkdir()
    (paths.videos / "online-1-success.mp4").touch()
    feed.look()
    number, news = feed.since(0)
    assert [(row["n"], row["video"], row["accepted"]) for row in news["rows"]] == [(0, False, None), (1, True, None)]
    assert news["alarms"] == [{"who": "trainer", "text": "ended"}]
    assert news["curves"]["success"][-1][:2] == [1, 0.5]
    assert feed.videos == {"online-1": "online-1-success.mp4"}
    feed.look()
    assert feed.since(number)[1] == {}
    paths.acceptance.write_text(json.dumps({"ordinal": 0, "accepted": False, "reason": "short", "rule": "R"}) + "\n")
    paths.metrics.mkdir()
    (paths.metrics / "trainer.jsonl").write_text('{"step": 1, "losses/flow": 0.5, "replay/chunks": 7}\n')
    ActsLedger(paths.root).append({"act": "verdict", "episode_id": "online-1", "word": "failure"}, by="ann")
    feed.look()
    number, news = feed.since(number)
    assert [(row["n"], row["accepted"], row["reason"]) for row in news["rows"]] == [
        (0, False, "short"),
        (1, None, None),
    ]
    assert news["rows"][1]["word"] == {"success": False, "use": None, "by": "ann"}
    assert news["acts"][0]["text"] == "verdict episode_id online-1 word failure"
    assert news["losses"] == {"losses/flow": [[1, 0.5]]}
    assert news["metrics"]["replay/chunks"] == 7


def test_what_may_be_changed_comes_with_its_value_of_now_its_range_and_who_changed_it(paths):
    rule = {"_target_": "x.Rule", "min_return": 0.5, "require_success": True, "mask_before_takeover": None, "mine": "a"}
    stages = [{"name": "sft", "mode": "train", "steps": 9}, {"name": "online", "mode": "online", "steps": 50}]
    run = {"algo": {"rule": rule, "min_accepted": 3}, "trainer": {"rollback_margin": 0.2}, "rollout": {"rate_hz": None},
           "task": {"spec": {"control_hz": 10}}, "schedule": {"stages": stages}}  # fmt: skip
    act = {"act": "set", "key": "algo.rule.min_return", "value": 0.8, "was": 0.5}
    ActsLedger(paths.root).append(act, by="ann")
    paths.status.write_text(json.dumps({"run": "t", "stage": {"index": 1}}))
    feed = Feed(paths, run)
    feed.look()
    rows = {row["key"]: row for row in feed.since(0)[1]["controls"]}
    assert not {"algo.rule._target_", "schedule.stages.sft.steps"} & rows.keys()  # sft is over
    told = rows["algo.rule.min_return"]
    assert (told["value"], told["was"], told["kind"], told["unit"], told["by"]) == (0.8, 0.5, "number", "return", "ann")
    kinds = {key.rpartition(".")[2]: (row["kind"], row.get("low"), row.get("high")) for key, row in rows.items()}
    assert kinds["require_success"] == ("flag", None, None)
    assert kinds["rollback_margin"] == ("number", 0, 1)
    assert kinds["rate_hz"] == ("number", 0.001, 10)
    assert kinds["steps"][:2] == ("whole", 1)
    assert kinds["mine"] == ("text", None, None)
    assert rows["trainer.rollback_margin"]["null"] == "never"
    number = feed.since(0)[0]
    feed.look()
    assert feed.since(number)[1] == {}


def test_a_silent_gateway_becomes_an_alarm_and_a_console_that_slept_accuses_nobody(paths, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("serl_launcher.console.feed.time.monotonic", lambda: clock[0])
    feed = Feed(paths)
    paths.status.write_text('{"run": "t"}')
    for seconds in (1, 3600, 1, 1):
        clock[0] += seconds
        feed.look()
    assert feed.since(0)[1]["alarms"] == []  # 4 s at most that it knows of
    clock[0] += 2
    feed.look()
    assert feed.since(0)[1]["alarms"] == [{"who": "gateway", "text": "silent for 6 s: nothing here is news"}]


def test_alarms():
    actors = {
        "a": {"trouble": "e-stop pressed", "last_seen_s": 0.2},
        "b": {"trouble": None, "last_seen_s": 9.0},
        "b2": {"trouble": "waiting for the operator: no gamepad", "last_seen_s": 0.2},
        "c": {"left": "done", "last_seen_s": 99.0},
    }
    status = {
        "storage": "the disk is full",
        "trainer": {"waits": "room"},
        "troubles": {"policy": "x"},
        "actors": actors,
    }
    assert [f"{alarm['who']} {alarm['text']}" for alarm in alarms(status, 0.0)] == [
        "disk the disk is full", "trainer room", "policy x", "a e-stop pressed", "b silent for 9 s", "c has left: done",
        "b2 waiting for the operator: no gamepad",
    ]  # fmt: skip
    assert [alarm["who"] for alarm in alarms(status, 0.0) if alarm.get("asks")] == ["b2"]
    assert "c" not in [alarm["who"] for alarm in alarms(status | {"done": True}, 0.0)]
    assert alarms({}, 0.0)[0]["text"] == "has told nothing yet"


def test_curves_are_of_whole_online_episodes_and_thin():
    rows = [{"mode": "online", "whole": k != 3, "ok": k % 2 == 0, "help": k == 2, "ret": k, "n": k} for k in range(4)]
    rows.append(rows[0] | {"mode": "demo"})
    curves = of_episodes(rows)
    # 0: success. 1: failure. 2: success with help, which is none of the policy's. 3 was cut.
    assert [point[:2] for point in curves["success"]] == [[0, 1.0], [1, 0.5], [2, 0.3333]]
    assert curves["help"] == [[0, 0.0], [1, 0.0], [2, 0.3333]]
    assert curves["return"][-1] == [2, 1.0]
    assert of_metrics([{"step": 2, "losses/a": 1, "stage": "x"}, {"step": 4, "losses/a": None}]) == {
        "losses/a": [[2, 1]]
    }
    line = thinned([[k, k] for k in range(1001)])
    assert len(line) <= 240
    assert line[-1][0] == 1000


async def asked(gateway, paths, talk):
    """`talk(session, url, place)` with a console of this gateway."""
    cfg = config()
    place = lay_out(cfg, paths)
    operator = ConsoleOperator("console", "127.0.0.1", TrainerConfig(gateway.port, gateway.broadcast_port))
    async with Console(cfg, paths, place, operator).listening() as tasks:
        jar = aiohttp.CookieJar(unsafe=True)  # of an address rather than a name
        async with aiohttp.ClientSession(cookie_jar=jar) as session:
            await talk(session, f"http://127.0.0.1:{place.port}", place)
        assert not any(task.done() for task in tasks)


def on_a_gateway(paths, talk):
    with serving(paths.root) as gateway:
        asyncio.run(asked(gateway, paths, talk))


def test_without_the_word_nothing_is_seen_and_with_it_the_cookie_is_ours_alone(paths):
    async def talk(session, url, place):
        for path in ("/", "/?t=wrong", "/page/app.js", "/video/x", "/ws", "/nothing"):
            async with session.get(url + path) as answer:
                assert (answer.status, "lacks its word" in await answer.text()) == (403, True), path
        async with session.get(place.url) as answer:
            assert "<title>FlowSERL console" in await answer.text()
            cookie = answer.headers["Set-Cookie"]
            assert "HttpOnly" in cookie
            assert "SameSite=Strict" in cookie
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        async with session.get(f"{url}/page/drive.js") as answer:
            assert answer.content_type == "text/javascript"
        async with session.get(f"{url}/page/..%2Fapp.py") as answer:
            assert answer.status == 404
        async with session.get(f"{url}/video/..%2Fx") as answer:
            assert (answer.status, await answer.text()) == (404, "no such episode")
        async with session.get(url, headers={"Host": "evil.example"}) as answer:
            assert answer.status == 403
        for origin in ({}, {"Origin": "http://evil.example"}):
            async with session.post(f"{url}/act", json={}, headers=origin) as answer:
                assert answer.status == 403
            with pytest.raises(aiohttp.WSServerHandshakeError):
                await session.ws_connect(f"{url}/ws", headers=origin)

    on_a_gateway(paths, talk)


def test_an_act_reaches_the_gateway_and_a_refusal_the_person(paths):
    async def talk(session, url, place):
        await session.get(place.url)

        async def act(**body):
            async with session.post(f"{url}/act", json=body, headers={"Origin": url}) as answer:
                return answer.status, await answer.json()

        status, told = await act(request="pause", payload={}, person="ann")
        assert (status, told["reply"]["operator"]["paused"]) == (200, True)
        assert told["reply"]["act"]["by"] == "ann (console)"
        status, told = await act(request="fly", payload={}, person="ann")
        assert status == 409
        assert "no request 'fly'" in told["error"]
        status, told = await act(request="drive", payload={"actor": "a", "page": "p", "frame": None}, person="ann")
        assert "a listens to no page" in told["error"]
        assert (await act(request="pause", payload={}))[0] == 400  # by whom?
        async with session.ws_connect(f"{url}/ws", headers={"Origin": url}) as socket:
            await socket.send_str("not json")  # is passed over
            body = {"drive": {"actor": "a", "person": "ann", "frame": {"seq": 1, "echo": 0}}}
            await socket.send_json(body)
            while "beat" not in (news := await socket.receive_json(timeout=10)):
                pass
            assert news["beat"] == {"error": "a listens to no page: start that actor with operator=browser"}

    on_a_gateway(paths, talk)


def test_a_console_without_a_key_may_only_look(tmp_path):
    operator = ConsoleOperator("console", "127.0.0.1", TrainerConfig(1, 2, keys_dir=str(tmp_path)))
    with pytest.raises(Refused, match=r"this console may only look: no key file .*console\.secret"):
        operator.request("pause", {})


def test_with_a_certificate_the_page_is_https_and_its_cookie_secure(paths, tmp_path):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert], capture_output=True,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("no openssl on this machine to make a certificate")
    key.chmod(0o600)

    async def talk():
        cfg = config(tls_cert=str(cert), tls_key=str(key))
        place = lay_out(cfg, paths)
        operator = ConsoleOperator("console", "127.0.0.1", TrainerConfig(1, 2))
        trusted = ssl.create_default_context(cafile=str(cert))
        async with Console(cfg, paths, place, operator).listening(), aiohttp.ClientSession() as session:
            async with session.get(place.url, ssl=trusted) as answer:
                assert answer.status == 200
                assert "Secure" in answer.headers["Set-Cookie"]
            plain = place.url.replace("https", "http")
            with pytest.raises(aiohttp.ClientError):
                await session.get(plain)

    asyncio.run(talk())


def test_with_keys_the_console_acts_by_its_own(paths, tmp_path):
    keys = tmp_path / "keys"
    assert keygen.main([str(keys), "--operator", "console", "--actor", "robot-1"]) == 0
    with serving(paths.root, security={"keys_dir": str(keys), "allow_list": None}) as gateway:
        ports = TrainerConfig(gateway.port, gateway.broadcast_port, keys_dir=str(keys))
        operator = ConsoleOperator("console", "127.0.0.1", ports)
        assert operator.request("pause", {"person": "ann"})["act"]["by"] == "ann (console)"
        operator.close()
        robot = ConsoleOperator("robot-1", "127.0.0.1", ports)
        with pytest.raises(Unauthorized):
            robot.request("resume", {"person": "ann"})
        robot.close()
