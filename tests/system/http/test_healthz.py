"""/healthz: what an on-call engineer wants to know, in the form of docs/healthz.schema.json."""

import json
import signal
import time

import jsonschema
import pytest

from support import events as ev
from support.events import W
from support.processes import ROOT, directory, free_port, wait_until

SCHEMA = json.loads((ROOT / "docs/healthz.schema.json").read_text())


def healthz(exporter, ready=False):
    """The status code and the report, which is valid."""
    status, report = exporter.healthz(ready=ready)
    jsonschema.validate(report, SCHEMA)
    assert (status == 200) == (report["status"] == "ok") == (report["reason"] is None)
    return status, report


def test_connected(services, shared_redis):
    harness = services.harness(shared_redis)
    harness.publish(ev.heartbeat(), ev.heartbeat("v@tests"), ev.offline("v@tests", at=1), ev.sent())
    _, report = healthz(harness.exporter, ready=True)
    assert report["broker"]["state"] == "connected" and report["broker"]["last_error"] is None
    assert report["subscription"].startswith(f"channels /0.{harness.exchange}/* at redis://")
    assert report["events"]["total"] >= 4 and report["events"]["seconds_since_last"] < 20
    assert report["clock"] == {"state": "running", "since": None, "reason": None}
    assert report["losses"] == {} and report["saved_state"] is None and report["warnings"] == []
    marker = 1
    wait_until(lambda: healthz(harness.exporter)[1]["workers"] == {"online": 1 + marker, "offline": 1}, 5, harness.exporter.healthz)


def test_no_event_yet(services, shared_redis):
    exporter = services.exporter(shared_redis, {"events": {"exchange": "never"}})
    assert healthz(exporter)[1]["events"] == {"total": 0, "seconds_since_last": None}


def test_not_connected(services):
    """The reason and the last error are given, with masked secrets."""
    url = f"redis://:hunter2@127.0.0.1:{free_port()}/0"
    exporter = services.exporter(None, {"broker": {"url": url}}, ready=False).listening()
    wait_until(lambda: exporter.healthz()[1]["broker"]["last_error"], 5, "an error")
    status, report = healthz(exporter, ready=True)
    assert status == 503 and report["status"] == "not ready"
    assert report["reason"].startswith("not subscribed to the broker: ") and "refused" in report["reason"]
    assert "refused" in report["broker"]["last_error"]["message"]
    assert report["clock"]["state"] == "paused" and report["clock"]["reason"] == "not subscribed to the broker"
    assert report["subscription"] is None and "hunter2" not in json.dumps(report)
    assert healthz(exporter)[0] == 200


@pytest.fixture
def persistent():
    return {"state": {"persistent": True, "db": str(directory("state") / "state")}, "metrics": {"self_metrics": True}}


def test_outage_and_restart_are_losses(services, redis, persistent):
    """Each is reported once: in the log with its duration and an estimate, in /healthz, and as a counter."""
    settings = {**persistent, "broker": {"reconnect_backoff_max": "500ms"}}
    harness = services.harness(redis, settings)
    settings["events"] = {"exchange": harness.exchange}
    harness.publish(ev.heartbeat())
    start = time.monotonic()
    while time.monotonic() < start + 4:
        harness.publisher.send([ev.sent(f"{time.monotonic()}-{n}") for n in range(20)])
        time.sleep(0.1)
    redis.stop(signal.SIGKILL)
    time.sleep(2)
    redis.start()
    harness.exporter.ready(10)
    wait_until(lambda: healthz(harness.exporter)[1]["losses"], 5, harness.exporter.log)
    [(cause, loss)] = healthz(harness.exporter)[1]["losses"].items()
    assert cause == "disconnected" and loss["count"] == 1 and 1.5 < loss["seconds_without_subscription"] < 8
    assert 50 < loss["approximate_events"] < 2000
    [line] = harness.exporter.log_lines("events were missed while disconnected")
    assert "WARN" in line and "disconnected" in line and "approximate_events=" in line and "seconds=" in line
    assert harness.exporter.metrics().one("flower_exporter_gaps_total", cause="disconnected") == 1
    wait_until(lambda: healthz(harness.exporter)[1]["saved_state"]["last_save"], 5, "a save")
    harness.exporter.terminate()
    time.sleep(1.5)
    exporter = services.exporter(redis, settings)
    wait_until(lambda: "restart" in healthz(exporter)[1]["losses"], 5, exporter.log)
    assert 1 < healthz(exporter)[1]["losses"]["restart"]["seconds_without_subscription"] < 20
    assert len(exporter.log_lines("events were missed while disconnected")) == 1


@pytest.mark.every_release
@pytest.mark.short_form
def test_disconnect_at_the_output_limit_is_a_loss(services, redis, redis_release):
    """Redis disconnects a subscriber that lags. It reports this as the reason from version 7.2 on."""
    cause = "redis_output_limit" if redis_release.number >= (7, 2) else "disconnected"
    redis.client().config_set("client-output-buffer-limit", "pubsub 1mb 0 0")
    harness = services.harness(redis, {"metrics": {"self_metrics": True}, "broker": {"reconnect_backoff_max": "1s"}})
    client = redis.client()
    harness.exporter.send(signal.SIGSTOP)
    message = "x" * 14_000
    wait_until(lambda: not all(client.publish(f"/0.{harness.exchange}/x", message) for _ in range(100)), 30, "disconnected")
    harness.exporter.send(signal.SIGCONT)
    wait_until(lambda: cause in healthz(harness.exporter)[1]["losses"], 15, harness.exporter.log)
    assert harness.metrics().one("flower_exporter_gaps_total", cause=cause) == 1
    assert [line for line in harness.exporter.log_lines("events were missed") if cause in line and "WARN" in line]


def test_dropped_messages_are_a_loss(services, shared_redis):
    """They do not fit into the buffer while the ingest loop is busy with one large message."""
    harness = services.harness(shared_redis, {"events": {"buffer_max_bytes": "64KiB"}})
    big = [ev.sent(f"{n}", args="x" * 1000) for n in range(5000)]

    def lost():
        harness.publisher.send(big)
        for n in range(50):
            harness.publisher.send([ev.sent(f"s{n}", args="x" * 20_000)])
        return "buffer_full" in healthz(harness.exporter)[1]["losses"]

    wait_until(lost, 30, harness.exporter.log)
    assert healthz(harness.exporter)[1]["losses"]["buffer_full"]["approximate_events"] > 0


def test_worker_changes_are_logged(services, shared_redis):
    """One line for many: a timeout at WARN, worker-offline and a return at INFO."""
    harness = services.harness(shared_redis, {"state": {"worker_timeout": "1s"}})
    names = [f"w{n}@tests" for n in range(100)]
    harness.publish([ev.without(ev.heartbeat(name), "freq") for name in names], ev.online("v@tests"), ev.offline("v@tests", at=1))
    exporter = harness.exporter
    wait_until(lambda: exporter.log_lines("worker timed out; marked offline"), 10, exporter.log)
    [line] = exporter.log_lines("worker timed out; marked offline")
    assert "WARN" in line and "and 95 more" in line and "count=100" in line
    [line] = exporter.log_lines("worker went offline")
    assert "INFO" in line and "v@tests" in line
    harness.publish(ev.heartbeat("v@tests", at=2))
    wait_until(lambda: exporter.log_lines("worker is online again"), 5, exporter.log)
    assert "v@tests" in exporter.log_lines("worker is online again")[0]


def test_lag_is_absent_without_recent_events(services, shared_redis):
    """After a minute. Before the first event, it is absent too."""
    name = "flower_exporter_event_lag_seconds"
    idle = services.exporter(shared_redis, {"metrics": {"self_metrics": True}, "events": {"exchange": "never"}})
    harness = services.harness(shared_redis, {"metrics": {"self_metrics": True}})
    assert name not in idle.text() and name in harness.exporter.text()
    harness.publish(ev.event("worker-heartbeat", W, at=0))
    wait_until(lambda: name not in harness.exporter.text(), 60 + 10, "the lag is absent")
