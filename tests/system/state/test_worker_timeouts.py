"""Workers that fall silent, by our own clock of arrival: timeouts, purges, and what stops that clock."""

import signal

import pytest

from support import events as ev
from support.exposition import EVENTS, EXECUTING, ONLINE, PREFETCH_TIME, PREFETCHED, RUNTIME
from support.processes import wait_until
from support.publish import Publisher

W, V = ev.W, "v@tests"


def beat(worker=W, **fields):
    """A heartbeat that does not tell how often it comes."""
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


def test_silence(services, shared_redis):
    """Online 0, executing 0, prefetched 0, prefetch time 0; counters stay. Flower leaves them all for ever."""
    harness = services.harness(shared_redis, {"state": {"worker_timeout": "1s"}})
    samples = harness.publish(*busy(W))
    assert (samples.one(ONLINE, worker=W), samples.one(EXECUTING, worker=W)) == (1, 3)
    assert samples.one(PREFETCHED, worker=W, task="add") == 1 and samples.one(PREFETCH_TIME, worker=W, task="add") == 2
    after = harness.exporter.wait_for(is_online(W, 0), 3)
    assert after.one(EXECUTING, worker=W) == 0
    assert after.one(PREFETCHED, worker=W, task="add") == 0 and after.one(PREFETCH_TIME, worker=W, task="add") == 0
    assert after.total(EVENTS, worker=W) == samples.total(EVENTS, worker=W) == 4
    assert after.total(f"{RUNTIME}_count", worker=W) == 1


def test_only_series_that_exist_are_set(services, shared_redis):
    """A worker that never told what it executes has no such series after its timeout either."""
    harness = services.harness(shared_redis, {"state": {"worker_timeout": "1s"}})
    harness.publish(ev.without(beat(), "active"), ev.started("x", V))
    samples = harness.exporter.wait_for(is_online(W, 0), 4)
    assert set(samples.short()) == {("online", W), ("events", V, "started", "")}


def test_three_times_its_own_frequency(services, shared_redis):
    """If that is longer; answers to our broadcast (a frequency, but no active) are no periodic heartbeats."""
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
    "sign",
    [
        ev.received,
        lambda **given: ev.event("custom-thing", W),
        lambda **given: ev.task("progress", "p"),
        lambda **given: ev.event("worker-thing", W),
    ],
    ids=["task event", "custom event", "user-defined task event", "other worker event"],
)
def test_any_event_is_a_sign_of_life(services, shared_redis, sign):
    """Of a worker that is online. V, silent, shows that a whole timeout has passed, twice over."""
    harness = services.harness(shared_redis, {"state": {"worker_timeout": "1500ms"}})
    for _ in range(2):
        harness.publish(beat(W), beat(V))
        wait_until(lambda: is_online(V, 0)(harness.publish(sign())), 5, "V is offline")
        assert is_online(W)(harness.metrics())


def test_only_worker_events_set_online(services, shared_redis):
    """A task event of one that has timed out counts, and no more; a heartbeat brings it back."""
    harness = services.harness(shared_redis, {"state": {"worker_timeout": "700ms"}})
    harness.publish(beat())
    harness.exporter.wait_for(is_online(W, 0), 4)
    assert is_online(W, 0)(harness.publish(ev.started()))
    assert is_online(W)(harness.publish(beat()))
    harness.exporter.wait_for(is_online(W, 0), 4)
    assert is_online(W)(harness.publish(ev.online()))


def test_executing_after_worker_offline(services, shared_redis):
    """First the event's own, 0 after the timeout."""
    harness = services.harness(shared_redis, {"state": {"worker_timeout": "1s"}})
    samples = harness.publish(beat(active=5), ev.without(ev.offline(active=2), "freq"))
    assert samples.one(EXECUTING, worker=W) == 2 and is_online(W, 0)(samples)
    harness.exporter.wait_for(lambda m: m.one(EXECUTING, worker=W) == 0, 4)


def test_zero_is_never(services, shared_redis):
    """For both; another exporter on the same events, with short times, shows that time has passed."""
    short = services.harness(shared_redis, {"state": {"worker_timeout": "500ms", "purge_offline_workers": "1s"}})
    never = services.exporter(
        shared_redis,
        {"events": {"exchange": short.exchange}, "state": {"worker_timeout": 0, "purge_offline_workers": 0}},
    )
    short.publish(*busy(W), ev.offline(V))
    short.exporter.wait_for(lambda m: not {W, V} & m.labels("worker"), 10, "purged")
    samples = never.metrics()
    assert is_online(W)(samples) and samples.one(EXECUTING, worker=W) == 3 and is_online(V, 0)(samples)


def test_purge(services, shared_redis):
    """All six families lose workers that are gone, and clients; who heartbeats stays; who comes back begins anew."""
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


def test_not_purged_before_its_time(services, shared_redis):
    """Offline after the timeout, gone only `purge_offline_workers` after its last event."""
    harness = services.harness(shared_redis, {"state": {"worker_timeout": "500ms", "purge_offline_workers": "60s"}})
    harness.publish(*busy(W), ev.offline(V))
    samples = harness.exporter.wait_for(is_online(W, 0), 4)
    assert is_online(V, 0)(samples) and samples.total(EVENTS, worker=W) == 4


def test_prefetch_of_one_that_timed_out(services, shared_redis):
    """Its set was emptied: the start of what was in it does not make it negative, and it can prefetch again."""
    harness = services.harness(shared_redis, {"state": {"worker_timeout": "700ms"}})
    harness.publish(*busy(W))
    harness.exporter.wait_for(is_online(W, 0), 4)
    samples = harness.publish(ev.started(f"{W}2", at=5), beat(), ev.received("new", at=6))
    assert samples.one(PREFETCHED, worker=W, task="add") == 1


def test_an_outage_kills_nobody(services, redis):
    """The clock stands still while we are not subscribed, and goes on afterwards."""
    harness = services.harness(
        redis,
        {"state": {"worker_timeout": "1500ms", "purge_offline_workers": "2s"}, "broker": {"reconnect_max": "500ms"}},
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
    harness.exporter.wait_for(lambda m: not is_online(W)(m), 5, "and now it is silent")


def test_a_backlog_kills_nobody(services, vhost):
    """What waits for us in the broker's queue was heard in time: the exporter is stopped, not the worker."""
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
