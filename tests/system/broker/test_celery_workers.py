"""Real Celery applications: workers that send events only because the exporter enables them."""

import signal

import pytest

from support.exposition import EVENTS, EXECUTING, ONLINE, PREFETCH_TIME, PREFETCHED, RUNTIME
from support.processes import wait_until
from support.worker import MIDDLE, NEWEST, OLDEST, UNICODE, client

pytestmark = pytest.mark.every_release


def exporter_and_worker(services, broker, settings=None, **options):
    worker = services.worker(broker, **options).ready()
    exporter = services.exporter(broker, {"events": {"enable_interval": "500ms"}, **(settings or {})})
    exporter.wait_for(lambda m: m.one(ONLINE, worker=worker.hostname) == 1, 10, "the worker is online")
    wait_until(lambda: "enabled by remote" in worker.log(), 10, worker.log)
    return exporter, worker


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_all_task_outcomes_are_counted(services, broker, pool):
    """Success, failure, retry, reject, revoke, expiry, ETA and unusual names: every sample matches the tasks."""
    exporter, worker = exporter_and_worker(services, broker, pool=pool)
    host = worker.hostname
    with client(broker, task_send_sent_event=True) as app:
        for name, arguments in [
            ("add", (1, 2)),
            ("add", (3, 4)),
            ("fail", ()),
            ("retry", ()),
            ("reject", ()),
            (UNICODE, ()),
        ]:
            app.send_task(name, arguments)
        # Expired on arrival: revoked, never received. Only task-sent contains its name, and may come later.
        app.send_task("add", (1, 2), expires=-10)
        app.send_task("add", (1, 2), countdown=1)
        later = app.send_task("add", (1, 2), countdown=5)
        exporter.wait_for(lambda m: m.events("received", host, "add") == 4, 10)
        app.control.revoke(later.id)
        exporter.wait_for(
            lambda m: (
                m.events("succeeded", host, "add") == 3
                and m.events("succeeded", host, "retry") == 1
                and m.events("rejected", host) == 1
                and m.events("revoked", host) == 2
            ),
            30,
        )

        # Both processes are busy, so the other tasks are prefetched.
        for _ in range(2):
            app.send_task("nap", (6,))
        exporter.wait_for(lambda m: m.one(EXECUTING, worker=host) == 2, 10)
        for n in range(4):
            app.send_task("add", (n, n))
        samples = exporter.wait_for(lambda m: m.one(PREFETCHED, worker=host, task="add") == 4, 10)
        assert samples.one(PREFETCH_TIME, worker=host, task="nap") > 0
        assert samples.one(PREFETCHED, worker=host, task="nap") == 0

    samples = exporter.wait_for(
        lambda m: (
            m.events("succeeded", host, "add") == 7
            and m.events("succeeded", host, "nap") == 2
            and m.one(EXECUTING, worker=host) == 0
        ),
        30,
    )
    for kind, task, count in [
        ("received", "add", 8),
        ("started", "add", 7),
        ("succeeded", "add", 7),
        ("revoked", None, 2),
        ("failed", "fail", 1),
        ("received", "retry", 2),
        ("retried", "retry", 1),
        ("started", "retry", 2),
        ("rejected", "reject", 1),
        ("succeeded", UNICODE, 1),
        ("succeeded", "nap", 2),
    ]:
        assert samples.events(kind, host, task) == count, (kind, task)
    [sender] = {dict(labels)["worker"] for name, labels in samples if name == EVENTS} - {host}
    assert sender.startswith("gen") and samples.events("sent", sender, "add") == 9
    assert samples.total(EVENTS, task="") == samples.events("revoked", host, ""), "every other name is known"
    assert samples.total(PREFETCHED, worker=host) == 0
    assert samples.total(PREFETCH_TIME, worker=host) == 0
    assert samples.one(f"{RUNTIME}_count", worker=host, task="nap") == 2
    assert samples.one(f"{RUNTIME}_sum", worker=host, task="nap") >= 12
    assert samples.one(f"{RUNTIME}_bucket", worker=host, task="nap", le="2.5") == 0
    assert samples.one(f"{RUNTIME}_bucket", worker=host, task="nap", le="+Inf") == 2
    assert samples.one(f"{RUNTIME}_count", worker=host, task="add") == 7


@pytest.mark.parametrize(("pool", "version"), [("gevent", MIDDLE), ("solo", NEWEST)])
def test_pool_without_heartbeats_during_a_task(services, redis, pool, version):
    """A task that computes without yielding keeps the worker silent: docs/celery.md says to raise the timeout."""
    settings = {"state": {"worker_timeout": "3s"}}
    exporter, worker = exporter_and_worker(services, redis, settings, pool=pool, version=version)
    with client(redis) as app:
        app.send_task("compute", (10,))
    exporter.wait_for(lambda m: m.one(ONLINE, worker=worker.hostname) == 0, 20, "offline during the task")
    exporter.wait_for(lambda m: m.one(ONLINE, worker=worker.hostname) == 1, 20, "online after the task")


@pytest.mark.parametrize(
    "version, pool, task", [(NEWEST, "prefork", "ignore"), (MIDDLE, "gevent", "ignore"), (MIDDLE, "gevent", "overlong")]
)
def test_tasks_that_end_without_an_event(services, broker, version, pool, task):
    """After `raise Ignore()`, and after a hard time limit with gevent, an idle heartbeat ends the prefetch time."""
    exporter, worker = exporter_and_worker(services, broker, version=version, pool=pool)
    host = worker.hostname
    with client(broker) as app:
        app.send_task(task)
        exporter.wait_for(lambda m: m.one(PREFETCH_TIME, worker=host, task=task), 10, "the task is running")
    samples = exporter.wait_for(lambda m: m.one(PREFETCH_TIME, worker=host, task=task) == 0, 15, worker.log)
    assert {dict(labels)["type"] for name, labels in samples if name == EVENTS} == {"task-received", "task-started"}


@pytest.mark.short_form
@pytest.mark.parametrize("version", [OLDEST, MIDDLE])
def test_older_celery_versions_have_all_metrics(services, broker, version):
    """The six metrics of the oldest supported Celery, and of a version in between."""
    exporter, worker = exporter_and_worker(services, broker, version=version)
    host = worker.hostname
    with client(broker, task_send_sent_event=True) as app:
        for name, arguments in [("add", (1, 2)), ("fail", ()), ("nap", (4,)), ("nap", (4,)), (UNICODE, ())]:
            app.send_task(name, arguments)
        exporter.wait_for(lambda m: m.one(EXECUTING, worker=host) == 2, 15)
    samples = exporter.wait_for(
        lambda m: (
            m.events("succeeded", host, "nap") == 2
            and m.events("succeeded", host, UNICODE) == 1
            and m.one(EXECUTING, worker=host) == 0
        ),
        20,
    )
    assert samples.events("succeeded", host, "add") == samples.events("failed", host, "fail") == 1
    assert samples.one(f"{RUNTIME}_count", worker=host, task="nap") == 2
    assert samples.total(PREFETCHED, worker=host) == samples.total(PREFETCH_TIME, worker=host) == 0
    assert {name for name, _ in samples} >= {EVENTS, PREFETCHED, PREFETCH_TIME, ONLINE, EXECUTING, f"{RUNTIME}_sum"}


@pytest.mark.short_form
def test_all_metrics_appear_within_ten_seconds(services, broker):
    """With default settings, a worker without -E has all six metrics at most ten seconds after its first tasks."""
    worker = services.worker(broker).ready()
    exporter = services.exporter(broker)
    names = {EVENTS, f"{RUNTIME}_count", PREFETCH_TIME, PREFETCHED, ONLINE, EXECUTING}
    with client(broker) as app:

        def all_six(samples):
            app.send_task("nap", (0.01,))
            return names <= {name for name, labels in samples if ("worker", worker.hostname) in labels}

        exporter.wait_for(all_six, 10)


def test_killed_worker_goes_offline_and_is_purged(services, broker):
    """Online is 0 within worker_timeout + 2 s. Its series are purged after purge_offline_workers, and return with a heartbeat."""
    timeout, purge = 3, 6
    exporter, worker = exporter_and_worker(
        services, broker, {"state": {"worker_timeout": timeout, "purge_offline_workers": purge}}
    )
    other = services.worker(broker, args=["-Q", "other"]).ready()
    host = worker.hostname
    with client(broker) as app:
        for _ in range(4):
            app.send_task("nap", (60,))
        exporter.wait_for(
            lambda m: (
                m.one(EXECUTING, worker=host) == 2
                and m.one(PREFETCHED, worker=host, task="nap") == 2
                and m.one(ONLINE, worker=other.hostname) == 1
            ),
            15,
        )
    worker.kill()
    samples = exporter.wait_for(lambda m: m.one(ONLINE, worker=host) == 0, timeout + 2)
    assert samples.one(EXECUTING, worker=host) == 0
    assert (
        samples.one(PREFETCHED, worker=host, task="nap") == 0
        and samples.one(PREFETCH_TIME, worker=host, task="nap") == 0
    )
    assert samples.events("received", host, "nap") == 4
    samples = exporter.wait_for(lambda m: host not in m.labels("worker"), purge + 3)
    assert samples.one(ONLINE, worker=other.hostname) == 1

    services.worker(broker, hostname=host, args=["-Q", "other"])
    samples = exporter.wait_for(lambda m: m.one(ONLINE, worker=host) == 1, 20)
    assert samples.total(EVENTS, worker=host) == 0


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_warm_shutdown_counts_running_tasks(services, broker, pool):
    """Offline immediately, nothing prefetched, executing as last reported; the running tasks still finish and count."""
    exporter, worker = exporter_and_worker(services, broker, pool=pool)
    host = worker.hostname
    with client(broker) as app:
        for _ in range(5):
            app.send_task("nap", (6,))
    exporter.wait_for(
        lambda m: m.one(EXECUTING, worker=host) == 2 and m.one(PREFETCHED, worker=host, task="nap") == 3, 10
    )
    worker.send(signal.SIGTERM)
    samples = exporter.wait_for(lambda m: m.one(ONLINE, worker=host) == 0, 10)
    assert samples.one(PREFETCHED, worker=host, task="nap") == 0
    assert worker.wait(30) == 0
    samples = exporter.wait_for(lambda m: m.events("succeeded", host) == 2, 5)
    assert samples.one(PREFETCHED, worker=host, task="nap") == samples.one(PREFETCH_TIME, worker=host, task="nap") == 0
    assert samples.one(EXECUTING, worker=host) <= 2
