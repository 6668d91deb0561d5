"""`metrics.worker_groups`: workers that share the series of their tasks."""

import re

import pytest

from support import events as ev
from support.exposition import EVENTS, EXECUTING, ONLINE, PREFETCH_TIME, PREFETCHED, RUNTIME

GROUPS = {"metrics": {"worker_groups": ["web=celery@web-*|celery@api-*", "clients=gen*@*", "all=*"]}}
LIMITS = {"metrics": {"max_label_sets": 1_000_000}, "state": {"max_workers": 100_000}}
ALL = {**LIMITS, "metrics": {**LIMITS["metrics"], "worker_groups": ["all=*"]}}


def run(uuid, worker, name, runtime):
    """A run with a runtime that a binary fraction represents exactly, and a task that stays prefetched."""
    return [
        ev.received(uuid, worker, name=name),
        ev.started(uuid, worker, at=1),
        ev.succeeded(uuid, worker, at=2, runtime=runtime),
        ev.received(f"{uuid}+", worker, at=2, name=name),
    ]


def deployment(number, workers=200, tasks=10):
    """A batch of events for each worker, whose hostname has not occurred before."""
    return [
        [ev.online(worker)]
        + [
            event
            for task in range(tasks)
            for event in run(f"{number}-{n}-{task}", worker, f"task{task}", (n + task) % 64 / 32 + 1 / 32)
        ]
        for n in range(workers)
        for worker in [f"celery@pod-{number}-{n}"]
    ]


def sums(samples):
    """The sums over the workers of the counters, the histograms and the prefetched tasks."""
    result = {}
    for (name, labels), value in samples.items():
        if name not in (ONLINE, EXECUTING, PREFETCH_TIME):
            key = name, frozenset(item for item in labels if item[0] != "worker")
            result[key] = result.get(key, 0) + value
    return result


def task_series(samples):
    return {key for key in samples if any(label == "task" for label, _ in key[1])}


def test_first_match_decides(services, broker):
    """Online and executing keep the hostnames. Sums, prefetched tasks and clients are those of the group."""
    harness = services.harness(broker, GROUPS)
    samples = harness.publish(
        ev.heartbeat("celery@web-1", active=3),
        *run("a", "celery@web-1", "t", 0.5),
        *run("b", "celery@api-x", "t", 2.0),
        *run("c", "web", "t", 1.0),
        ev.sent("d", "gen17@host", name="t"),
        ev.received("e", "other@host", name="t"),
    )
    short = samples.short()
    assert {key[1] for key in short if key[0] not in ("online", "executing")} == {"web", "clients", "all"}
    assert short["events", "web", "received", "t"] == 6 and short["runtimes", "web", "t"] == 3
    assert samples.one(f"{RUNTIME}_sum", task="t", worker="web") == 3.5, "a hostname that equals the name is in the group"
    assert short["events", "all", "received", "t"] == 1
    assert short["events", "clients", "sent", "t"] == 1
    assert short["executing", "celery@web-1"] == 3 and short["online", "celery@web-1"] == 1
    assert samples.labels("worker") == {"web", "clients", "all", "celery@web-1"}


def test_renamed_workers_add_no_series(services, shared_redis):
    """200 workers in five deployments, without a purge: the sums equal those without a group, sample for sample."""
    grouped = services.harness(shared_redis, ALL)
    ungrouped = services.harness(shared_redis, LIMITS)
    series = []
    for number in range(5):
        samples = [harness.publish(*deployment(number), deadline=60) for harness in (grouped, ungrouped)]
        series.append([task_series(each) for each in samples])
        assert sums(samples[0]) == sums(samples[1])
        assert samples[0].one(PREFETCHED, task="task3", worker="all") == 200 * (number + 1)
        assert samples[0].total(ONLINE) == samples[1].total(ONLINE) == 200 * (number + 1)
    assert all(each[0] == series[0][0] for each in series), "the same series throughout"
    assert [len(each[1]) for each in series] == [len(series[0][1]) * count for count in range(1, 6)]
    assert len(series[0][0]) * 200 == len(series[0][1])


def test_a_member_takes_back_only_its_own(services, shared_redis):
    """When it restarts, stops or is purged. Counters and histograms do not fall."""
    state = {"worker_timeout": "1h", "purge_offline_workers": "1s"}
    harness = services.harness(shared_redis, {**GROUPS, "state": state})
    one, other = "celery@web-1", "celery@web-2"

    def gauges(*events):
        samples = harness.publish(*events)
        return [samples.one(family, task="t", worker="web") for family in (PREFETCH_TIME, PREFETCHED)]

    assert gauges(ev.online(one), ev.online(other), *run("a", one, "t", 0.5), *run("b", other, "t", 0.5)) == [0, 2]
    waiting = [ev.received("c", one, name="t"), ev.received("d", other, name="t")]
    assert gauges(ev.started("a+", one, at=4), ev.started("b+", other, at=9), *waiting) == [7, 2]
    assert gauges(ev.online(one, at=11)) == [7, 1]
    assert gauges(ev.received("e", one, at=12, name="t")) == [7, 2]
    assert gauges(ev.offline(one, at=13)) == [7, 1]

    def assert_kept(*expected):
        assert gauges() == list(expected)
        samples = harness.metrics()
        assert samples.one(EVENTS, task="t", type="task-received", worker="web") == 7
        assert samples.one(f"{RUNTIME}_count", task="t", worker="web") == 2

    harness.exporter.wait_for(lambda m: m.one(ONLINE, worker=one) is None, 20, f"{one} is purged")
    assert_kept(7, 1)
    harness.publish(ev.offline(other, at=14))
    harness.exporter.wait_for(lambda m: m.one(ONLINE, worker=other) is None, 20, f"{other} is purged")
    assert_kept(0, 0)


def test_saved_state_continues_and_changed_groups_start_empty(services, shared_redis, tmp_path):
    state = {"persistent": True, "db": str(tmp_path / "state")}
    harness = services.harness(shared_redis, {**GROUPS, "state": state})
    before = harness.publish(ev.heartbeat("celery@web-1", active=1), *run("a", "celery@web-1", "t", 0.5))
    harness.exporter.terminate()

    def restart(groups):
        settings = {"events": {"exchange": harness.exchange}, "state": state, "metrics": {"worker_groups": groups}}
        exporter = services.exporter(shared_redis, settings)
        samples = exporter.metrics().without_marker()
        log = exporter.log()
        exporter.terminate()
        return samples, log

    after, log = restart(GROUPS["metrics"]["worker_groups"])
    assert sums(after) == {**sums(before), (PREFETCHED, frozenset({("task", "t")})): 0}
    assert "worker_groups" not in log
    after, log = restart(["everyone=*"])
    assert not task_series(after) and after.one(EXECUTING, worker="celery@web-1") == 1
    assert len(re.findall(r"WARN.*metrics\.worker_groups differ", log)) == 1
    assert "worker_groups" not in restart(["everyone=*"])[1]


@pytest.mark.every_release
def test_prometheus_stores_one_series_for_all_deployments(scraped, prometheus_release):
    harness, prometheus = scraped(prometheus_release, ALL)
    for number in range(3):
        samples = harness.publish(*deployment(number, workers=20, tasks=2))
        prometheus.wait_for_value(f'{EVENTS}{{task="task1",type="task-received"}}', 40 * (number + 1))
    assert prometheus.instant('count(last_over_time({task!=""}[5m]))')[0][1] == len(task_series(samples))
    assert prometheus.instant(f"count(last_over_time({ONLINE}[5m]))")[0][1] == 60 + 1
