"""Random streams through a real broker: all samples of all six families equal Flower 2.2.0's own."""

import pytest

from support.exposition import EXECUTING, FAMILIES, ONLINE
from support.flower_reference import Flower, difference
from support.streams import stream

pytestmark = [pytest.mark.every_release, pytest.mark.short_form]


def test_equals_flower(services, shared_broker, seed):
    """Every event shape, single and in batches, in an order that Flower gets right."""
    print(f"again: tests/run.sh --parity-seed {seed} state/test_flower_parity.py")
    items = stream(seed)
    harness = services.harness(shared_broker, {"state": {"worker_timeout": 0, "purge_offline_workers": 0}})
    flower = Flower().feed(items)
    ours, flowers = harness.publish(*items), flower.metrics()
    assert {name for name, _ in flowers} > {ONLINE, EXECUTING}
    assert len(flowers) > 500
    assert ours == flowers, difference(ours, flowers)
    assert {line for line in harness.exporter.text().splitlines() if line.startswith("#")} == {
        line for line in flower.text().splitlines() if line.startswith("#") and line.split()[2] in FAMILIES
    }


@pytest.fixture
def shared_broker(shared, broker_release):
    """Each stream has an exchange of its own."""
    if broker_release.family == "redis":
        return shared.get(broker_release)
    return shared.get(broker_release, "parity", lambda services: shared.get(broker_release).vhost())
