"""Random streams through a real broker: all samples of the six metrics equal those of Flower 2.2.0."""

import pytest

from support.exposition import EXECUTING, FAMILIES, ONLINE
from support.flower_reference import Flower, difference
from support.streams import stream

pytestmark = [pytest.mark.every_release, pytest.mark.short_form]


def test_equals_flower(services, shared_broker, seed):
    """Every shape of events, single and in batches, in an order that Flower processes correctly."""
    print(f"repeat with: tests/run.sh --parity-seed {seed} state/test_flower_parity.py")
    items = stream(seed)
    harness = services.harness(shared_broker, {"state": {"worker_timeout": 0, "purge_offline_workers": 0}})
    flower = Flower().feed(items)
    actual, expected = harness.publish(*items), flower.metrics()
    assert {name for name, _ in expected} > {ONLINE, EXECUTING}
    assert len(expected) > 500
    assert actual == expected, difference(actual, expected)
    assert {line for line in harness.exporter.text().splitlines() if line.startswith("#")} == {
        line for line in flower.text().splitlines() if line.startswith("#") and line.split()[2] in FAMILIES
    }


@pytest.fixture
def shared_broker(shared, broker_release):
    """A shared broker: each stream has a separate exchange."""
    if broker_release.family == "redis":
        return shared.get(broker_release)
    return shared.get(broker_release, "parity", lambda services: shared.get(broker_release).vhost())
