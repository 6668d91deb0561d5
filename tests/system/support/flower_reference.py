"""The metrics that Flower 2.2.0's own code derives from a stream of events."""

import functools
import json
import types
from unittest import mock

import flower.events
import flower.options  # defines the bucket option
from celery.events.receiver import EventReceiver
from kombu.clocks import LamportClock
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .exposition import parse_text

MAX_TASKS = 1_000_000


class Flower:
    """Flower's EventsState with a separate registry; events pass through Celery's EventReceiver."""

    def __init__(self):
        self.registry = CollectorRegistry()
        own = functools.partial(functools.partial, registry=self.registry)
        with mock.patch.multiple(
            flower.events,
            PROMETHEUS_METRICS=None,
            PrometheusCounter=own(Counter),
            Gauge=own(Gauge),
            Histogram=own(Histogram),
        ):
            self.state = flower.events.EventsState(max_tasks_in_memory=MAX_TASKS)
        clock = LamportClock()
        receiver = types.SimpleNamespace(clock=clock, adjust_clock=clock.adjust, forward_clock=clock.forward)
        self.receive = functools.partial(EventReceiver.event_from_message, receiver)

    def feed(self, items):
        """Processes events and batches of events, and does not modify them."""
        for item in items:
            for event in item if isinstance(item, list) else [item]:
                self.state.event(self.receive(json.loads(json.dumps(event)))[1])
        return self

    def text(self):
        return generate_latest(self.registry).decode()

    def metrics(self):
        samples = parse_text(self.text())
        return type(samples)({key: value for key, value in samples.items() if not key[0].endswith("_created")})


def difference(actual, expected):
    return "\n".join(
        f"{name}{dict(labels)}: exporter {actual.get((name, labels))}, Flower {expected.get((name, labels))}"
        for name, labels in sorted({*actual, *expected}, key=str)
        if actual.get((name, labels)) != expected.get((name, labels))
    )
