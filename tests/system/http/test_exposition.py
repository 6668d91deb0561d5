"""The exact text of /metrics, checked with strict parsers, Flower's own text, and a Prometheus server."""

import gzip
import re
from pathlib import Path

import pytest

from support import events as ev
from support.exposition import EXECUTING, FAMILIES, parse_openmetrics, parse_text
from support.flower_reference import Flower
from support.processes import wait_until
from support.prometheus import Prometheus, promtool

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

#: What Prometheus sends by default.
PROMETHEUS_2 = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
)

#: The expositions of `events_for_all_families`.
RECORDED = Path(__file__).with_name("recorded")

UNUSUAL = 'quo"te back\\slash new\nline räkna.算 {x="y"}'


def events_for_all_families():
    """Events for all six metrics, with unusual labels and values."""
    yield ev.heartbeat(active=3)
    for number, (worker, name) in enumerate([(ev.W, "add"), (UNUSUAL, UNUSUAL), (ev.W, UNUSUAL)]):
        yield ev.sent(f"{number}", name=name)
        yield ev.received(f"{number}", worker, name=name)
        yield ev.received(f"{number}+", worker, name=name)
        yield ev.started(f"{number}", worker, at=0.1 + number)
        yield ev.succeeded(f"{number}", worker, at=9, runtime=[1e-7, 0.30000000000000004, 12345678.9][number])
        yield ev.started(f"{number}+", worker, at=1 / 3)
    yield ev.heartbeat(UNUSUAL, active=1)
    yield ev.offline("gone@tests")


@pytest.fixture
def full(harness):
    harness.publish(*events_for_all_families())
    return harness.exporter


@pytest.fixture
def flower():
    return Flower().feed([*events_for_all_families(), ev.marker(1001)])


def lines(text):
    """The sorted lines without those that only Flower's client library adds. The order of series is not specified."""
    wanted = re.compile(rf"(?:# (?:HELP|TYPE) )?({'|'.join(FAMILIES)})(?:_bucket|_sum|_count)?[ {{]")
    return sorted(line for line in text.split("\n") if wanted.match(line))


def test_text_equals_flower_exactly(full, flower):
    """HELP, TYPE, the order of labels, escapes, the text of `le` and numbers as Python writes them."""
    actual, expected = lines(full.text()), lines(flower.text())
    numbers = re.compile(r" \S+$")
    assert [numbers.sub("", line) for line in actual] == [numbers.sub("", line) for line in expected]
    assert parse_text(full.text()) == flower.metrics()
    assert full.text().endswith("\n") and "\r" not in full.text() and "\n\n" not in full.text()


@pytest.mark.parametrize(
    "accept, kind",
    [
        (None, "text"),
        ("", "text"),
        ("*/*", "text"),
        ("text/plain", "text"),
        ("text/plain;version=0.0.4;q=0.5,*/*;q=0.1", "text"),
        ("application/json, text/html;q=0.9", "text"),
        ("application/openmetrics-text;q=0.1, text/plain", "text"),
        ("application/openmetrics-text; version=2.0.0", "text"),
        (";;q=,,\xff", "text"),
        ("application/openmetrics-text", "openmetrics"),
        (PROMETHEUS_2, "openmetrics"),
        (PROMETHEUS_3, "openmetrics"),
    ],
)
def test_default_exposition_is_the_recorded_one(full, accept, kind):
    """Byte for byte, if the scraper does not ask for protobuf: dashboards and other scrapers depend on it."""
    headers = {} if accept is None else {"Accept": accept}
    status, found, body = full.request(headers=headers)
    assert status == 200 and found["Content-Type"] == {"text": TEXT, "openmetrics": OPENMETRICS}[kind]
    assert body == (RECORDED / f"{kind}.txt").read_bytes()


def test_bucket_bounds_are_written_as_by_python(full):
    found = re.findall(r'le="([^"]*)"', full.text())
    assert found[:15] == "0.005 0.01 0.025 0.05 0.075 0.1 0.25 0.5 0.75 1.0 2.5 5.0 7.5 10.0 +Inf".split()


def test_custom_buckets(services, shared_redis):
    """The bounds of `task_runtime_metric_buckets` are written like Python floats."""
    harness = services.harness(shared_redis, {"metrics": {"task_runtime_metric_buckets": [1, 20.5, 300, 1000000]}})
    harness.publish(ev.sent(), ev.succeeded(runtime=20.5))
    found = [(le, float(number)) for le, number in re.findall(r'le="([^"]*)".*} (\S+)', harness.exporter.text())]
    assert found == [("1.0", 0), ("20.5", 1), ("300.0", 1), ("1e+06", 1), ("+Inf", 1)]


def test_families_are_contiguous(full):
    """HELP and TYPE once, then all series of the family."""
    families = [
        re.sub("_(bucket|sum|count)$", "", re.split("[ {]", line.removeprefix("# HELP ").removeprefix("# TYPE "))[0])
        for line in full.text().splitlines()
    ]
    changes = [family for family, before in zip(families, [None, *families]) if family != before]
    assert sorted(changes) == sorted(FAMILIES)


def test_accept_header_selects_the_format(full):
    for accept, expected in [
        (None, TEXT),
        ("*/*", TEXT),
        ("text/plain", TEXT),
        ("text/plain;version=0.0.4", TEXT),
        ("application/openmetrics-text", OPENMETRICS),
        ("application/openmetrics-text;version=1.0.0", OPENMETRICS),
        (
            "application/openmetrics-text; version=1.0.0; charset=utf-8, text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
            OPENMETRICS,
        ),
        ("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.75", TEXT),
        ("application/openmetrics-text;version=1.0.0;q=0.75,text/plain;version=0.0.4;q=0.5", OPENMETRICS),
        ("application/openmetrics-text;version=1.0.0;q=0,text/plain;q=0.1", TEXT),
        ("application/openmetrics-text;version=1.0.0;q=0", TEXT),
        ("text/html", TEXT),
        # Headers of Prometheus 2.42, and of 3.x with parameters that the exporter ignores.
        (
            "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
            "text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
            OPENMETRICS,
        ),
        (
            "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=1.0.0;"
            "escaping=allow-utf-8;q=0.4,*/*;q=0.1",
            OPENMETRICS,
        ),
    ]:
        status, headers, body = full.request(headers={"Accept": accept} if accept else {})
        assert (status, headers["Content-Type"]) == (200, expected), accept
        assert (body.endswith(b"# EOF\n")) == (expected is OPENMETRICS), accept


def test_openmetrics_text(full, flower):
    """The strict parser reads the same samples. The counter's family has no `_total`."""
    _, _, body = full.request(headers={"Accept": "application/openmetrics-text;version=1.0.0"})
    text = body.decode()
    assert parse_openmetrics(text) == flower.metrics()
    assert "# TYPE flower_events counter\n" in text
    assert text.count("# EOF") == 1 and text.endswith("# EOF\n")


@pytest.mark.parametrize("accept", [None, "application/openmetrics-text;version=1.0.0"])
def test_accept_encoding_selects_gzip(full, accept):
    plain = full.request(headers={"Accept": accept} if accept else {})[2]
    for coding, packed in [
        (None, False),
        ("gzip", True),
        ("gzip;q=0", False),
        ("identity", False),
        ("deflate, gzip;q=0.5", True),
        ("*;q=0", False),
        ("gzip;q=0, *", False),
        ("br", False),
        ("GZIP", True),
    ]:
        headers = {**({"Accept": accept} if accept else {}), **({"Accept-Encoding": coding} if coding else {})}
        status, got, body = full.request(headers=headers)
        assert status == 200
        assert (got["Content-Encoding"] == "gzip") == packed, coding
        assert (gzip.decompress(body) if packed else body) == plain, coding


def test_families_without_events(services, shared_redis):
    """All six metrics have HELP and TYPE, as in Flower."""
    exporter = services.exporter(shared_redis, {"events": {"exchange": "unused"}})
    assert exporter.text() == "".join(line + "\n" for line in exporter.text().splitlines() if line.startswith("#"))
    assert lines(exporter.text()) == [line for line in lines(Flower().text()) if line.startswith("#")]
    assert parse_openmetrics(exporter.request(headers={"Accept": "application/openmetrics-text"})[2].decode()) == {}


def test_promtool_accepts_the_text(full, prometheus_release):
    """`promtool check metrics` reports only Flower's own names."""
    found = promtool(prometheus_release, "check", "metrics", input=full.text())
    assert "error" not in found.stderr.lower(), found.stderr
    # Exit code 3 means lint warnings, exit code 1 an invalid exposition.
    assert found.returncode in (0, 3), found.stderr


def test_self_metrics_follow_the_six_metrics(services, shared_redis, prometheus_release):
    """flower_exporter_* and process_* are served on request, after the six metrics, and are valid in both formats."""
    harness = services.harness(shared_redis, {"metrics": {"self_metrics": True}})
    harness.publish(*events_for_all_families())
    text = harness.exporter.text()
    families = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert sorted(families[:6]) == sorted(FAMILIES)
    own = families[6:]
    assert all(name.startswith(("flower_exporter_", "process_")) for name in own)
    assert any(name.startswith("process_") for name in own)
    for about in (
        "received_messages",
        "decoded_events",
        "invalid_messages",
        "dropped_messages",
        "broker_reconnects",
        "broker_connected",
        "lag",
        "tracked_tasks",
        "tracked_workers",
        "tracked_label_sets",
        "build_info",
    ):
        assert any(name.startswith("flower_exporter_") and about in name for name in own), about
    parse_text(text)
    openmetrics = harness.exporter.request(headers={"Accept": "application/openmetrics-text;version=1.0.0"})[2].decode()
    parse_openmetrics(openmetrics)
    assert "# TYPE process_cpu_seconds counter" in openmetrics
    found = promtool(prometheus_release, "check", "metrics", input=text)
    assert found.returncode in (0, 3) and "flower_exporter" not in found.stderr, found.stderr


def test_prometheus_stores_all_samples(full, services, flower, prometheus_release):
    """A real Prometheus answers a query for each metric, including unusual labels."""
    prometheus = Prometheus([full.port], rules=(), release=prometheus_release)
    services.callback(prometheus.kill)
    prometheus.ready()
    wait_until(lambda: [1 for _, value in prometheus.instant("up") if value == 1], 60, lambda: f"up\n{prometheus.log()}")
    names = {name for name, _ in flower.metrics()}
    assert len(names) == len(FAMILIES) + 2
    for name in names:
        found = {
            frozenset((key, value) for key, value in labels.items() if key not in ("__name__", "instance", "job")): value
            for labels, value in prometheus.instant(name)
        }
        assert found == {labels: value for (sample, labels), value in flower.metrics().items() if sample == name}, name
    assert EXECUTING in names
