"""`metrics.exemplars`: the id of the task behind a bucket or a failure, in a real Prometheus."""

import re
import time
import uuid

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from support import events as ev
from support.exposition import EVENTS, RUNTIME
from support.processes import wait_until
from support.protobuf import exemplar, exemplars, metrics

SETTINGS = {"metrics": {"exemplars": True}}
PROTOBUF = {"Accept": "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited"}
OPENMETRICS = {"Accept": "application/openmetrics-text;version=1.0.0"}


def openmetrics(exporter):
    """{(name, le or type): (task id, value, time)} of the samples with an exemplar."""
    found = {}
    for family in text_string_to_metric_families(exporter.request(headers=OPENMETRICS)[2].decode()):
        for sample in family.samples:
            if sample.exemplar:
                assert set(sample.exemplar.labels) == {"task_id"}
                key = sample.name, sample.labels.get("le") or sample.labels.get("type")
                found[key] = sample.exemplar.labels["task_id"], sample.exemplar.value, float(sample.exemplar.timestamp)
    return found


def test_last_task_of_each_bucket_and_failure(services, shared_redis):
    """An unusual id is escaped, and one that is too long is left out."""
    harness = services.harness(shared_redis, SETTINGS)
    first, last, slow = (str(uuid.uuid4()) for _ in range(3))
    unusual = 'back\\\n算'
    before = time.time()
    harness.publish(
        ev.succeeded(first, runtime=0.3), ev.succeeded(last, runtime=0.4), ev.succeeded(unusual, runtime=0.02),
        ev.succeeded(slow, runtime=100), ev.succeeded("x" * 200, runtime=0.03), ev.failed(first), ev.failed("f" * 122),
    )
    after = time.time()
    found = openmetrics(harness.exporter)
    assert {key: value[:2] for key, value in found.items()} == {
        (f"{RUNTIME}_bucket", "0.5"): (last, 0.4),
        (f"{RUNTIME}_bucket", "0.025"): (unusual, 0.02),
        (f"{RUNTIME}_bucket", "+Inf"): (slow, 100),
        (EVENTS, "task-failed"): (first, 1),
    }
    assert all(before - 0.01 <= at <= after for _, _, at in found.values())
    body = harness.exporter.request(headers=PROTOBUF)[2]
    [(_, histogram)] = metrics(body, RUNTIME)
    by_bound = {bound: ({"task_id": id}, value, at) for (name, bound), (id, value, at) in
                ((key, value) for key, value in found.items() if key[0] != EVENTS)}
    in_protobuf = {str(bound).replace("inf", "+Inf"): value for bound, value in exemplars(histogram).items()}
    assert in_protobuf == by_bound
    failures = {labels["type"]: exemplar(counter, 2) for labels, counter in metrics(body, EVENTS) if exemplar(counter, 2)}
    assert failures == {"task-failed": ({"task_id": first}, 1, found[EVENTS, "task-failed"][2])}


def test_ids_are_escaped(services, shared_redis):
    """As OpenMetrics requires. Python's parser cannot read an escaped quote in an exemplar, and Prometheus keeps the escapes."""
    harness = services.harness(shared_redis, SETTINGS)
    harness.publish(ev.failed('quo"te\\\n算'))
    body = harness.exporter.request(headers=OPENMETRICS)[2].decode()
    assert re.search(r'^flower_events_total{.*} 1 # {task_id="quo\\"te\\\\\\n算"} 1 \d+(\.\d+)?$', body, re.M)


def test_text_has_none_and_they_are_off_by_default(services, shared_redis):
    harness = services.harness(shared_redis, SETTINGS)
    harness.publish(ev.failed("a"), ev.succeeded("b", runtime=1))
    assert "task_id" not in harness.exporter.text()
    plain = services.harness(shared_redis)
    plain.publish(ev.failed("a"), ev.succeeded("b", runtime=1))
    assert openmetrics(plain.exporter) == {} and openmetrics(harness.exporter)


def test_zero_first_shows_no_exemplar_of_what_is_not_counted(services, shared_redis):
    harness = services.harness(shared_redis, {"metrics": {"exemplars": True, "zero_first": "3s"}})
    harness.publish(ev.failed("a"), ev.succeeded("b", runtime=1))
    assert openmetrics(harness.exporter) == {}
    wait_until(lambda: len(openmetrics(harness.exporter)) == 2, 20, "both exemplars are shown")


@pytest.mark.every_release
def test_prometheus_returns_the_id(scraped, prometheus_release):
    harness, prometheus = scraped(prometheus_release, SETTINGS, ["exemplar-storage"])
    failed, slow = str(uuid.uuid4()), str(uuid.uuid4())
    harness.publish(ev.failed(failed), ev.succeeded(slow, runtime=100))

    def stored(query):
        now = time.time()
        found = prometheus.api("query_exemplars", query=query, start=now - 60, end=now + 60)
        return {(one["labels"]["task_id"], float(one["value"])) for series in found for one in series["exemplars"]}

    wait_until(lambda: stored(EVENTS) == {(failed, 1)}, 20, lambda: stored(EVENTS))
    wait_until(lambda: stored(f"{RUNTIME}_bucket") == {(slow, 100)}, 20, lambda: stored(f"{RUNTIME}_bucket"))
    assert not re.search("warn|error", prometheus.log())
