"""Start timestamps, the protobuf exposition, `metrics.zero_first` and `metrics.created`, with real Prometheus servers."""

import gzip
import re
import time

import pytest

from support import events as ev
from support.exposition import EVENTS, RUNTIME, parse_openmetrics, parse_text
from support.flower_reference import Flower
from support.processes import wait_until
from support.protobuf import families

PROTOBUF = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited"
FAILED = f'{EVENTS}{{type="task-failed",task="rare"}}'
UNUSUAL = 'quo"te back\\slash new\nline räkna'


def failures(number, start=0):
    """Runs of the task `rare` that fail."""
    return [
        event
        for n in range(start, start + number)
        for event in (ev.received(f"f{n}", name="rare"), ev.started(f"f{n}"), ev.failed(f"f{n}"))
    ]


def protobuf(exporter, **headers):
    status, found, body = exporter.request(headers={"Accept": PROTOBUF, **headers})
    assert status == 200 and found["Content-Type"].replace(" ", "") == PROTOBUF
    return gzip.decompress(body) if found["Content-Encoding"] == "gzip" else body


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_protobuf_has_the_samples_of_the_text(services, shared_redis, encoding):
    """Of the six metrics and of the exporter's own, with HELP and TYPE."""
    harness = services.harness(shared_redis, {"metrics": {"self_metrics": True}})
    harness.publish(ev.heartbeat(UNUSUAL, active=2), ev.received(worker=UNUSUAL, name=UNUSUAL), ev.started(worker=UNUSUAL, at=1))
    harness.publish(*(ev.succeeded(str(n), runtime=n / 4) for n in range(1, 60)))
    decoded, text = families(protobuf(harness.exporter, **{"Accept-Encoding": encoding})), harness.exporter.text()
    expected = {key: value for key, value in parse_text(text).items() if key[0].startswith("flower_") and "scrape" not in key[0]}
    for name, (help_text, kind, metrics) in decoded.items():
        assert f"# HELP {name} {help_text}\n# TYPE {name} {kind}\n" in text
        for labels, value, start in metrics:
            assert (start is not None) == (kind != "gauge")
            samples = {name: value}
            if kind == "histogram":
                count, total, buckets = value
                samples = {f"{name}_count": count, f"{name}_sum": total}
                assert list(buckets) == sorted(buckets) and len(buckets) > 5
            for sample, number in samples.items():
                key = sample, frozenset(labels.items())
                if key in expected:
                    assert expected.pop(key) == number, key
    left = {key for key in expected if not key[0].endswith("_bucket")}
    assert left == set()


def test_start_timestamp_is_just_before_the_first_event(services, shared_redis):
    """And it survives with saved state."""
    harness = services.harness(shared_redis)
    before = time.time()
    harness.publish(ev.succeeded("1", runtime=2))
    after = time.time()
    time.sleep(1)
    harness.publish(ev.succeeded("2", runtime=2))
    decoded = families(protobuf(harness.exporter))
    for name in (EVENTS, RUNTIME):
        [(_, _, start)] = [metric for metric in decoded[name][2] if metric[0]["worker"] == ev.W]
        assert before - 0.01 <= start <= after


def test_start_timestamps_survive_a_restart(services, shared_redis, tmp_path):
    state = {"persistent": True, "db": str(tmp_path / "state")}
    harness = services.harness(shared_redis, {"state": state})
    harness.publish(ev.succeeded("1", runtime=2))
    first = families(protobuf(harness.exporter))
    harness.exporter.terminate()
    exporter = services.exporter(shared_redis, {"state": state, "events": {"exchange": harness.exchange}})
    second = families(protobuf(exporter))
    starts = [
        {tuple(sorted(labels.items())): start for labels, _, start in decoded[name][2]}
        for decoded in (first, second)
        for name in (EVENTS, RUNTIME)
    ]
    assert starts[:2] == starts[2:] and all(starts)


@pytest.mark.every_release
def test_prometheus_counts_the_first_events(scraped, prometheus_release):
    """Without a start timestamp, the first sample of 7 is an increase of 0."""
    if prometheus_release.version.startswith("2."):
        pytest.skip("Prometheus 2.42 has no start timestamps")
    harness, prometheus = scraped(prometheus_release, features=["created-timestamp-zero-ingestion"])
    harness.publish(*failures(7))
    prometheus.wait_for_value(FAILED, 7)
    wait_until(lambda: prometheus.instant(f"increase({FAILED}[1m])")[0][1] >= 7, 20, "an increase of 7")
    assert prometheus.instant(f"max_over_time({FAILED}[1m]) - min_over_time({FAILED}[1m])")[0][1] == 7


@pytest.mark.every_release
def test_zero_first_shows_every_event_to_any_scraper(scraped, prometheus_release):
    """No flag: the last sample minus the first one is exactly the number of events."""
    harness, prometheus = scraped(prometheus_release, {"metrics": {"zero_first": "2s"}})
    harness.publish(*failures(5), ev.succeeded("s", name="rare", runtime=0.5))
    prometheus.wait_for_value(FAILED, 5)
    difference = f"max_over_time({FAILED}[1m]) - min_over_time({FAILED}[1m])"
    assert prometheus.instant(difference)[0][1] == 5
    assert 5 <= prometheus.instant(f"increase({FAILED}[1m])")[0][1] < 60
    buckets = f'{RUNTIME}_bucket{{task="rare",le="0.5"}}'
    assert prometheus.instant(f"max_over_time({buckets}[1m]) - min_over_time({buckets}[1m])")[0][1] == 1


@pytest.mark.every_release
def test_zero_first_counts_across_a_restart_without_saved_state(services, scraped, prometheus_release):
    """5 before, 2 after: `increase()` is 7, within its own extrapolation."""
    harness, prometheus = scraped(prometheus_release, {"metrics": {"zero_first": "2s"}})
    harness.publish(*failures(5))
    prometheus.wait_for_value(FAILED, 5)
    settings, port = harness.exporter.settings, harness.exporter.port
    harness.exporter.kill()
    harness.exporter = services.exporter(None, settings, ready=False)
    harness.exporter.port = port
    harness.exporter.ready()
    harness.publish(*failures(2, 5))
    prometheus.wait_for_value(FAILED, 2)
    samples = prometheus.api("query", query=f"{FAILED}[2m]")["result"][0]["values"]
    values = [float(value) for _, value in samples]
    resets = sum(earlier for earlier, later in zip(values, values[1:], strict=False) if later < earlier)
    assert values[-1] + resets - values[0] == 7, values


def test_zero_first_is_in_every_format(services, shared_redis):
    """Gauges, and what was counted before, show their values."""
    harness = services.harness(shared_redis, {"metrics": {"zero_first": "3s"}})
    harness.publish(ev.heartbeat(active=2), ev.received("a"), ev.succeeded("a", runtime=2))
    texts = [harness.exporter.text(), harness.exporter.request(headers={"Accept": "application/openmetrics-text"})[2].decode()]
    for text in texts:
        assert re.search(r'^flower_events_total{.*"task-received".*} 0$', text, re.M)
        assert re.search(r"^flower_task_runtime_seconds_sum{.*} 0$", text, re.M)
        assert re.search(rf'^flower_worker_online{{worker="{ev.W}"}} 1$', text, re.M)
    assert {value for labels, value, _ in families(protobuf(harness.exporter))[EVENTS][2]} == {0}
    harness.exporter.wait_for(lambda m: m.events("received") == 1 and m.total(f"{RUNTIME}_sum") == 2, 10)


def test_zero_first_delays_the_purge(services, shared_redis):
    """Otherwise no scrape would see the events of a short-lived worker."""
    state = {"purge_offline_workers": "1s", "worker_timeout": "1s"}
    harness = services.harness(shared_redis, {"metrics": {"zero_first": "4s"}, "state": state})
    harness.publish(ev.received("a"), ev.offline())
    began = time.monotonic()
    harness.exporter.wait_for(lambda m: m.events("received") == 1, 10, "the value is shown")
    assert time.monotonic() - began > 2
    harness.exporter.wait_for(lambda m: m.total(EVENTS) == 0, 15, "and then it is purged")


def test_zero_first_loses_nothing_when_the_exporter_stops(services, shared_redis, tmp_path):
    settings = {"metrics": {"zero_first": "1h"}, "state": {"persistent": True, "db": str(tmp_path / "state")}}
    harness = services.harness(shared_redis, settings)
    harness.publish(ev.received("a"))
    assert harness.metrics().events("received") == 0
    harness.exporter.terminate()
    exporter = services.exporter(shared_redis, {**settings, "events": {"exchange": harness.exchange}})
    assert exporter.metrics().events("received") == 1, "restored series show their values"


def test_created_samples_are_those_of_flower(services, shared_redis):
    """In the text a gauge family each, with Flower's names, labels, HELP and TYPE."""
    items = [ev.received("a"), ev.started("a", at=1), ev.succeeded("a", at=2, runtime=1.5)]
    harness = services.harness(shared_redis, {"metrics": {"created": True}})
    before = time.time()
    harness.publish(*items)
    flower, text = Flower().feed(items).text(), harness.exporter.text()

    def created(text):
        lines = [line for line in text.splitlines() if "_created" in line and ev.W not in line or f'"{ev.W}"' in line and "_created" in line]
        return sorted(re.sub(r"} \S+$", "}", line) for line in lines if "marker" not in line)

    assert created(text) == created(flower) != []
    for value in re.findall(rf'_created{{.*"{ev.W}"}} (\S+)$', text, re.M):
        assert before - 1 <= float(value) <= time.time()
    body = harness.exporter.request(headers={"Accept": "application/openmetrics-text"})[2].decode()
    samples = parse_openmetrics(body)
    assert {name for name, _ in samples if name.endswith("_created")} == {"flower_events_created", f"{RUNTIME}_created"}


def test_metrics_are_unchanged_by_default(services, shared_redis):
    """No `_created`, and values from the first event on."""
    harness = services.harness(shared_redis)
    harness.publish(ev.received("a"))
    assert "_created" not in harness.exporter.text()
    assert harness.metrics().events("received") == 1
