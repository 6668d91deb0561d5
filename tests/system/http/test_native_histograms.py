"""`metrics.native_histogram_bucket_factor`: exponential buckets, compared with exact arithmetic, and in a real Prometheus."""

import math
import random
from collections import Counter
from decimal import Decimal, getcontext

import pytest

from support import events as ev
from support.exposition import RUNTIME
from support.protobuf import metrics, native

ACCEPT = {"Accept": "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited"}
getcontext().prec = 60


def settings(factor, **more):
    return {"metrics": {"native_histogram_bucket_factor": factor}, **more}


def upper_bound(key, schema):
    """2^(key * 2^-schema), rounded to the nearest float, which is the bound by the specification."""
    exponent = Decimal(key) * Decimal(2) ** -schema
    return Decimal(float(Decimal(2) ** exponent)) if abs(exponent) < 1000 else Decimal(2) ** exponent


def key_of(value, schema):
    """The smallest key whose upper bound is not below the value, by exact arithmetic."""
    key = math.ceil(math.log2(value) * 2**schema) - 2
    while upper_bound(key, schema) < Decimal(value):
        key += 1
    return key


def expected(values, schema):
    return dict(Counter(key_of(value, schema) for value in values))


def histogram(exporter, name="add"):
    status, _, body = exporter.request(headers=ACCEPT)
    assert status == 200
    [found] = [fields for labels, fields in metrics(body, RUNTIME) if labels["task"] == name]
    return found


def runs(values, name="add"):
    """In batches, because one message has a limit."""
    items = [item for n, value in enumerate(values) for item in (ev.received(f"{name}{n}", name=name), ev.succeeded(f"{name}{n}", runtime=value))]
    return [items[start : start + 500] for start in range(0, len(items), 500)]


@pytest.mark.parametrize("factor, schema", [(1.1, 3), (2, 0), (1.0028, 8), (20, -2), (1e9, -4)])
def test_buckets_are_those_of_the_specification(services, shared_redis, factor, schema):
    """Random runtimes, bounds and their neighbors."""
    rng = random.Random(factor)
    values = [10 ** rng.uniform(-2, 2) for _ in range(60)]
    for key in rng.sample(range(-20, 20), 10):
        bound = float(upper_bound(key, schema))
        if 1e-9 < bound < 1e9:
            values += [bound, math.nextafter(bound, 0), math.nextafter(bound, math.inf)]
    harness = services.harness(shared_redis, settings(factor))
    harness.publish(*runs(values))
    found = histogram(harness.exporter)
    assert native(found) == (schema, 2**-128, 0, expected(values, schema))
    assert found[1][0] == len(values) and len(found[3]) > 5, "the classic buckets are there, too"


def test_resolution_is_halved_beyond_160_buckets(services, shared_redis):
    """Runtimes from 1e-9 to 1e9, and beyond: nothing is lost."""
    rng = random.Random(7)
    values = [10 ** rng.uniform(-9, 9) for _ in range(3000)]
    harness = services.harness(shared_redis, settings(1.1))
    harness.publish(*runs(values), *runs([1e-40, 1e300], "other"))
    schema, threshold, zeros, buckets = native(histogram(harness.exporter))
    assert schema == 1 and zeros == 0 and len(buckets) <= 160
    assert buckets == expected(values, schema)
    assert native(histogram(harness.exporter, "other")) == (3, threshold, 1, expected([1e300], 3))


def test_native_buckets_are_only_in_protobuf_and_only_if_asked_for(services, shared_redis):
    harness = services.harness(shared_redis, settings(1.1))
    harness.publish(*runs([0.5]))
    plain = services.harness(shared_redis)
    plain.publish(*runs([0.5]))
    assert native(histogram(harness.exporter)) and native(histogram(plain.exporter)) is None
    for accept in ("text/plain", "application/openmetrics-text"):
        bodies = [each.exporter.request(headers={"Accept": accept})[2] for each in (harness, plain)]
        assert bodies[0] == bodies[1]


def test_saved_state_has_native_buckets(services, shared_redis, tmp_path):
    state = {"persistent": True, "db": str(tmp_path / "state")}
    harness = services.harness(shared_redis, settings(1.1, state=state))
    harness.publish(*runs([0.01, 0.5, 300]))
    before = histogram(harness.exporter)
    harness.exporter.terminate()
    exporter = services.exporter(shared_redis, settings(1.1, state=state, events={"exchange": harness.exchange}))
    assert histogram(exporter) == before
    exporter.terminate()
    exporter = services.exporter(shared_redis, {"state": state, "events": {"exchange": harness.exchange}})
    assert histogram(exporter)[1] == before[1] and native(histogram(exporter)) is None
    exporter.terminate()
    exporter = services.exporter(shared_redis, settings(1.1, state=state, events={"exchange": harness.exchange}))
    assert not exporter.metrics().total(f"{RUNTIME}_count")
    assert len(exporter.log_lines("metrics.native_histogram_bucket_factor was not set when the state was saved")) == 1


@pytest.mark.every_release
def test_prometheus_has_both_kinds(scraped, prometheus_release):
    """Counts and quantiles beyond the last classic bound of 10 s, where long tasks fall into +Inf."""
    has_both = not prometheus_release.version.startswith("2.")
    scrape = {"always_scrape_classic_histograms": True} if has_both else {}
    harness, prometheus = scraped(prometheus_release, settings(1.1), ["native-histograms"], scrape)
    rng = random.Random(3)
    values = sorted(60 * 2 ** rng.uniform(0, 6) for _ in range(1000))
    harness.publish(*runs(values))
    prometheus.wait_for_value(f'histogram_count({RUNTIME}{{task="add"}})', 1000)
    assert math.isclose(prometheus.instant(f'histogram_sum({RUNTIME}{{task="add"}})')[0][1], sum(values))
    for quantile in (0.1, 0.5, 0.9, 0.99):
        estimate = prometheus.instant(f'histogram_quantile({quantile}, {RUNTIME}{{task="add"}})')[0][1]
        exact = values[math.ceil(quantile * 1000) - 1]
        assert abs(key_of(estimate, 3) - key_of(exact, 3)) <= 1, (quantile, estimate, exact)
    if not has_both:
        return
    classic = f'{RUNTIME}_bucket{{task="add",le="+Inf"}} - ignoring(le) {RUNTIME}_bucket{{task="add",le="10.0"}}'
    assert prometheus.instant(classic)[0][1] == 1000, "where the classic buckets know nothing"
