"""Bad links through the chaos proxy: silence, slowness, resets, half-open connections, flipped bits."""

from __future__ import annotations

import random
import time

import pytest
from chaos import SEED, ChaosProxy, Weather
from rig import Windows, p99_ms, until


@pytest.fixture
def proxied(rig):
    """make(weather, **rig options) -> (rig with a running gateway, its two proxies)."""
    proxies = []

    def make(weather: Weather, **options):
        print(f"chaos seed {SEED}")
        run = rig(**options)
        run.start_gateway()
        proxies.extend(ChaosProxy(port, weather, SEED + i) for i, port in enumerate(run.ports))
        return run, proxies[-2:]

    yield make
    for proxy in proxies:
        proxy.stop()


def ports_of(proxies) -> tuple[int, int]:
    return proxies[0].port, proxies[1].port


def silent_cut(proxied, figures, seconds: float, name: str) -> None:
    weather = Weather()
    run, proxies = proxied(weather)
    actor = run.start_actor(ports=ports_of(proxies))
    run.await_acknowledged(10, 60)
    time.sleep(5)
    began = time.monotonic()
    weather.cut = True
    time.sleep(seconds)
    weather.cut = False
    ended = time.monotonic()
    before = run.report()["sent"]
    drain_s = until(lambda: run.acknowledged() >= before, 30, f"the backlog drains; {run.logs()}")
    report = run.finish(actor)
    run.stop_gateway()
    run.judge()
    acted = sum(began < at < ended for at, _ in report["periods"])
    ratio = p99_ms(report, began, ended) / p99_ms(report, 0, began)
    holds = acted >= 0.9 * seconds * run.hz and drain_s <= 5
    figures.row(
        name, "keeps acting, drained within 5 s plus backlog/bandwidth", holds,
        drain_s=round(drain_s, 2), period_p99_ratio=round(ratio, 3), backlog=max(n for _, n in report["backlog"]),
        ticks_during_cut=acted, ticks_expected=round(seconds * run.hz),
    )  # fmt: skip
    assert acted >= 0.9 * seconds * run.hz, "the actor stopped acting"
    assert drain_s <= 5.0  # plus backlog / bandwidth, which is nothing here


def test_a_silent_cut_of_15_seconds(proxied, figures):
    silent_cut(proxied, figures, 15, "cut_15s")


@pytest.mark.soak
def test_a_silent_cut_of_60_seconds(proxied, figures):
    silent_cut(proxied, figures, 60, "cut_60s")


def test_10_mbit_and_200_ms(proxied, figures):
    """2 Mbit/s of data over a slow, far link: the control period must not feel it."""
    weather = Weather()
    run, proxies = proxied(weather, pixels=64)
    actor = run.start_actor(ports=ports_of(proxies))
    run.await_acknowledged(5, 60)
    time.sleep(2)
    windows = Windows()
    for _ in range(2):
        with windows.during("calm"):
            time.sleep(4)
        weather.delay_s, weather.rate_bps = 0.2, 10e6
        with windows.during("fault"):
            time.sleep(4)
        weather.delay_s, weather.rate_bps = 0.0, 0.0
    report = run.finish(actor)
    run.stop_gateway()
    run.judge()
    ratio = windows.p99_ratio(report)
    growth = max(report["rss_mb"]) - report["rss_mb"][2]
    backlog = max(n for _, n in report["backlog"])
    figures.row(
        "slow_link", "control-period p99 ≤ 1.2 ×, bounded memory", ratio <= 1.2 and growth < 100,
        period_p99_ratio=round(ratio, 3), rss_growth_mb=round(growth, 1), backlog=backlog,
    )  # fmt: skip
    assert growth < 100
    assert backlog < 50
    assert ratio <= 1.2


def test_more_data_than_the_link_takes_fills_the_spool_and_nothing_else(proxied, figures):
    """Backpressure: 10 Mbit/s offered over 2: the spool's bound is reached and said; what was taken arrives."""
    weather = Weather(rate_bps=2e6)
    run, proxies = proxied(weather, pixels=144)
    actor = run.start_actor(ports=ports_of(proxies), spool_mb=4)
    until(lambda: (run.run / "robot-1.report.json").exists() and run.report()["spool_full"], 60, "the spool is full")
    time.sleep(2)
    weather.rate_bps = 0
    report = run.finish(actor)
    run.stop_gateway()
    counts = run.judge()
    assert counts["items in the journal"] == report["sent"]
    growth = max(report["rss_mb"]) - report["rss_mb"][2]
    figures.row(
        "overload", "backpressure is said, what was taken arrives, bounded memory", growth < 150,
        refused_by_spool=report["spool_full"], rss_growth_mb=round(growth, 1), items=report["sent"], lost=0,
    )  # fmt: skip
    assert growth < 150


def test_what_is_no_message_at_all_ends_no_link_for_good(proxied, figures):
    """libzmq does not connect again after a protocol error; the link opens a new socket."""
    run, proxies = proxied(Weather())
    actor = run.start_actor(ports=ports_of(proxies), infer_ms=300)
    run.await_acknowledged(5, 60)
    back = []
    for _ in range(2):
        before = run.report()["answers"] + sum(code == "not_ready" for *_, code in run.report()["silences"])
        for proxy in proxies:
            proxy.garble()
        time.sleep(1.0)
        back.append(1.0 + run.await_acknowledged(1, 30))
        until(lambda n=before: sum(code == "not_ready" for *_, code in run.report()["silences"]) > n + 5, 30, "answers")
    report = run.finish(actor)
    run.stop_gateway()
    counts = run.judge()
    figures.row(
        "garbled", "data back within 10 s, 0 lost", max(back) <= 10, back_s_max=round(max(back), 2),
        items=report["sent"], lost=report["sent"] - counts["items in the journal"],
    )  # fmt: skip
    assert counts["items in the journal"] == report["sent"]
    assert max(back) <= 10, back


def test_chaos(proxied, figures):
    """Twelve seconds of everything at once."""
    weather = Weather(delay_s=0.01, jitter_s=0.03, flip=0.01)
    run, proxies = proxied(weather, pixels=64)
    actor = run.start_actor(ports=ports_of(proxies), infer_ms=300)
    run.await_acknowledged(5, 60)
    rng = random.Random(SEED)
    end = time.monotonic() + 12
    done = []
    while time.monotonic() < end:
        time.sleep(rng.uniform(0.3, 1.5))
        what = rng.choice(["reset", "half_open", "cut"])
        done.append(what)
        for proxy in proxies:
            if what == "reset":
                proxy.reset_all()
            elif what == "half_open":
                proxy.half_open()
        if what == "cut":
            weather.cut = True
            time.sleep(rng.uniform(0.1, 2.5))
            weather.cut = False
    weather.flip = 0.0
    report = run.finish(actor)
    run.stop_gateway()
    counts = run.judge()
    assert counts["items in the journal"] == report["sent"]
    figures.row(
        "chaos", "0 lost, 0 duplicates", True, resets=done.count("reset"), half_open=done.count("half_open"),
        cuts=done.count("cut"), flipped_bits=sum(proxy.flips for proxy in proxies), items=report["sent"], lost=0,
        duplicates=0,
    )  # fmt: skip
