"""Worker timeouts and purges. They are based on the arrival times of events, and pause during outages."""

import signal

import pytest

from support import events as ev
from support.exposition import EVENTS, EXECUTING, ONLINE, PREFETCH_TIME, PREFETCHED, RUNTIME
from support.processes import wait_until
from support.publish import Publisher

W, V = ev.W, "v@tests"


def beat(worker=W, **fields):
    """A heartbeat without its interval."""
    return ev.without(ev.heartbeat(worker, **fields), "freq")


def is_online(worker, value=1):
    return lambda samples: samples.one(ONLINE, worker=worker) == value


def busy(worker):
    """A worker with every kind of series: one task running, one prefetched, three executing."""
    return [
        beat(worker, active=3),
        ev.received(f"{worker}1", worker),
        ev.received(f"{worker}2", worker),
        ev.started(f"{worker}1", worker, at=2),
        ev.succeeded(f"{worker}0", worker, runtime=1.0),
    ]


def test_timeout_clears_gauges_and_keeps_counters(services, shared_redis):
    """Online, executing, prefetched and prefetch time become 0. Flower never resets them."""
    harness = services.harness(shared_redis, {"state": {"worker_timeout": "1s"}})
    samples = harness.publish(*busy(W))
    assert (samples.one(ONLINE, worker=W), samples.one(EXECUTING, worker=W)) == (1, 3)
    assert samples.one(PREFETCHED, worker=W, task="add") == 1 and samples.one(PREFETCH_TIME, worker=W, task="add") == 2
    after = harness.exporter.wait_for(is_online(W, 0), 3)
    assert after.one(EXECUTING, worker=W) == 0
    assert after.one(PREFETCHED, worker=W, task="add") == 0 and after.one(PREFETCH_TIME, worker=W, task="add") == 0
    assert after.total(EVENTS, worker=W) == samples.total(EVENTS, worker=W) == 4
    assert after.total(f"{RUNTIME}_count", worker=W) == 1


def test_timeout_creates_no_series(services, shared_redis):
    """A worker that never reported executing tasks has no such series after its timeout."""
    harness = services.harness(shared_redis, {"state": {"worker_timeout": "1s"}})
    harness.publish(ev.without(beat(), "active"), ev.started("x", V))
    samples = harness.exporter.wait_for(is_online(W, 0), 4)
    assert set(samples.short()) == {("online", W), ("events", V, "started", "")}


def test_timeout_is_at_least_three_heartbeat_intervals(services, shared_redis):
    """Replies to the broadcast (with an interval, but without active) do not count as periodic heartbeats."""
    harness = services.harness(shared_redis, {"state": {"worker_timeout": "1s"}})
    harness.publish(
        ev.heartbeat("slow@tests", freq=1.5),
        ev.heartbeat("quick@tests", freq=0.1),
        ev.without(ev.heartbeat("answer@tests", freq=1000), "active", "processed", "loadavg"),
    )
    samples = harness.exporter.wait_for(lambda m: is_online("quick@tests", 0)(m) and is_online("answer@tests", 0)(m), 4)
    assert is_online("slow@tests")(samples)
    harness.exporter.wait_for(is_online("slow@tests", 0), 4.5 + 2)


@pytest.mark.parametrize(
    "event",
    [
        ev.received,
        lambda **given: ev.event("custom-thing", W),
        lambda **given: ev.task("progress", "p"),
        lambda **given: ev.event("worker-thing", W),
    ],
    ids=["task event", "custom event", "user-defined task event", "other worker event"],
)
def test_any_event_restarts_the_timeout(services, shared_redis, event):
    """For a worker that is online. V sends nothing, so its timeout shows that enough time has passed, twice."""
    harness = services.harness(shared_redis, {"state": {"worker_timeout": "1500ms"}})
    for _ in range(2):
        harness.publish(beat(W), beat(V))
        wait_until(lambda: is_online(V, 0)(harness.publish(event())), 5, "V is offline")
        assert is_online(W)(harness.metrics())


def test_only_worker_events_set_online(services, shared_redis):
    """A task event of a timed-out worker is only counted. A heartbeat sets it online again."""
    harness = services.harness(shared_redis, {"state": {"worker_timeout": "700ms"}})
    harness.publish(beat())
    harness.exporter.wait_for(is_online(W, 0), 4)
    assert is_online(W, 0)(harness.publish(ev.started()))
    assert is_online(W)(harness.publish(beat()))
    harness.exporter.wait_for(is_online(W, 0), 4)
    assert is_online(W)(harness.publish(ev.online()))


def test_executing_after_worker_offline_is_cleared_by_the_timeout(services, shared_redis):
    """First it is the value of the event, and 0 after the timeout."""
    harness = services.harness(shared_redis, {"state": {"worker_timeout": "1s"}})
    samples = harness.publish(beat(active=5), ev.without(ev.offline(active=2), "freq"))
    assert samples.one(EXECUTING, worker=W) == 2 and is_online(W, 0)(samples)
    harness.exporter.wait_for(lambda m: m.one(EXECUTING, worker=W) == 0, 4)


def test_zero_disables_timeout_and_purge(services, shared_redis):
    """Another exporter with short times receives the same events and shows that enough time has passed."""
    short = services.harness(shared_redis, {"state": {"worker_timeout": "500ms", "purge_offline_workers": "1s"}})
    never = services.exporter(
        shared_redis,
        {"events": {"exchange": short.exchange}, "state": {"worker_timeout": 0, "purge_offline_workers": 0}},
    )
    short.publish(*busy(W), ev.offline(V))
    short.exporter.wait_for(lambda m: not {W, V} & m.labels("worker"), 10, "purged")
    samples = never.metrics()
    assert is_online(W)(samples) and samples.one(EXECUTING, worker=W) == 3 and is_online(V, 0)(samples)


def test_purge_removes_all_series_of_a_worker(services, shared_redis):
    """Offline workers and clients are purged from the six metrics. A worker with heartbeats stays. A worker that
    comes back starts at 0.
    """
    harness = services.harness(shared_redis, {"state": {"worker_timeout": "1s", "purge_offline_workers": "2s"}})
    harness.publish(*busy(W), *busy("gone@tests"), ev.offline("gone@tests"), ev.sent(client="gen7@client"), *busy(V))
    gone = {W, "gone@tests", "gen7@client"}
    samples = harness.metrics()
    assert gone < samples.labels("worker")

    def purged():
        harness.publisher.send(beat(V))
        return not gone & harness.metrics().labels("worker")

    wait_until(purged, 6, lambda: harness.metrics().short())
    samples = harness.metrics()
    assert is_online(V)(samples) and samples.total(EVENTS, worker=V) == 4
    samples = harness.publish(beat(), ev.started("n"))
    assert is_online(W)(samples) and samples.total(EVENTS, worker=W) == 1
    assert {key[0] for key in samples.short() if key[1] == W} == {"events", "online", "executing"}


def test_not_purged_before_purge_offline_workers(services, shared_redis):
    """Offline after the timeout, but purged only `purge_offline_workers` after its last event."""
    harness = services.harness(shared_redis, {"state": {"worker_timeout": "500ms", "purge_offline_workers": "60s"}})
    harness.publish(*busy(W), ev.offline(V))
    samples = harness.exporter.wait_for(is_online(W, 0), 4)
    assert is_online(V, 0)(samples) and samples.total(EVENTS, worker=W) == 4


def test_worker_that_stopped_on_purpose_is_purged_earlier(services, shared_redis, tmp_path):
    """`worker-offline` shortens the time, also across a restart. A worker that vanished stays."""
    state = {"worker_timeout": "1s", "purge_stopped_workers": "2s", "persistent": True, "db": str(tmp_path / "state")}
    harness = services.harness(shared_redis, {"state": state})
    harness.publish(*busy(W), *busy(V), ev.offline(V))
    assert is_online(V, 0)(harness.metrics())
    harness.exporter.wait_for(lambda m: V not in m.labels("worker") and is_online(W, 0)(m), 10)
    harness.publish(ev.offline(V))
    harness.exporter.terminate()
    restarted = services.exporter(shared_redis, {"state": state, "events": {"exchange": harness.exchange}})
    assert is_online(V, 0)(restarted.metrics())
    samples = restarted.wait_for(lambda m: V not in m.labels("worker"), 10)
    assert is_online(W, 0)(samples) and samples.total(EVENTS, worker=W) == 4


def test_timed_out_worker_can_prefetch_again(services, shared_redis):
    """Its set is cleared. The start of a task that was in the set does not make the gauge negative."""
    harness = services.harness(shared_redis, {"state": {"worker_timeout": "700ms"}})
    harness.publish(*busy(W))
    harness.exporter.wait_for(is_online(W, 0), 4)
    samples = harness.publish(ev.started(f"{W}2", at=5), beat(), ev.received("new", at=6))
    assert samples.one(PREFETCHED, worker=W, task="add") == 1


def test_outage_pauses_timeouts(services, redis):
    """No worker times out while the exporter is disconnected. Timeouts continue afterwards."""
    harness = services.harness(
        redis,
        {"state": {"worker_timeout": "1500ms", "purge_offline_workers": "2s"}, "broker": {"reconnect_backoff_max": "500ms"}},
    )
    clock = services.harness(services.redis(), {"state": {"worker_timeout": "3s"}})
    harness.publish(beat(active=2))
    clock.publish(beat(V))
    redis.stop(signal.SIGKILL)
    clock.exporter.wait_for(is_online(V, 0), 10, "twice the timeout has passed")
    samples = harness.metrics()
    assert is_online(W)(samples) and samples.one(EXECUTING, worker=W) == 2
    redis.start()
    harness.exporter.ready(10)
    assert is_online(W)(harness.metrics())
    harness.exporter.wait_for(lambda m: not is_online(W)(m), 5, "the worker times out")


def test_broker_backlog_pauses_timeouts(services, vhost):
    """The worker's events wait in the broker's queue while the exporter is stopped. The worker does not time out."""
    harness = services.harness(vhost, {"state": {"worker_timeout": "3s"}, "broker": {"amqp": {"heartbeat": "60s"}}})
    harness.publish(beat())
    harness.exporter.send(signal.SIGSTOP)
    shared = services.redis()
    clock = services.harness(shared, {"state": {"worker_timeout": "4s"}})
    clock.publish(beat(V))
    with Publisher(vhost, harness.exchange) as publisher:
        for number in range(2000):
            publisher.send([ev.received(f"{number}-{n}", V) for n in range(20)])
        publisher.send(beat())
        clock.exporter.wait_for(is_online(V, 0), 10, "more than the timeout has passed")
    harness.exporter.send(signal.SIGCONT)
    seen = []

    def caught_up():
        samples = harness.metrics()
        seen.append(samples.one(ONLINE, worker=W))
        return samples.total(EVENTS, worker=V) == 40_000

    wait_until(caught_up, 30, "the backlog is read")
    assert set(seen) == {1}, seen
