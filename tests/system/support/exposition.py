"""Reads expositions with the parsers of Python's prometheus_client."""

from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families as text_families

EVENTS = "flower_events_total"
RUNTIME = "flower_task_runtime_seconds"
PREFETCH_TIME = "flower_task_prefetch_time_seconds"
PREFETCHED = "flower_worker_prefetched_tasks"
ONLINE = "flower_worker_online"
EXECUTING = "flower_worker_number_of_currently_executing_tasks"
FAMILIES = EVENTS, RUNTIME, PREFETCH_TIME, PREFETCHED, ONLINE, EXECUTING

#: The worker whose heartbeat marks the end of the published events.
MARKER = "marker@tests"


class Samples(dict):
    """{(sample name, frozenset of label items): value}"""

    def one(self, name, **labels):
        """The value of the series with exactly these labels, or None."""
        return self.get((name, frozenset(labels.items())))

    def total(self, name, **labels):
        """The sum over all series that have these labels."""
        wanted = labels.items()
        return sum(value for (sample, have), value in self.items() if sample == name and wanted <= set(have))

    def labels(self, label):
        return {value for _, have in self for key, value in have if key == label}

    def events(self, kind, worker=None, task=None):
        labels = {"worker": worker, "type": f"task-{kind}", "task": task}
        return self.total(EVENTS, **{key: value for key, value in labels.items() if value is not None})

    def without_marker(self):
        return Samples({key: value for key, value in self.items() if ("worker", MARKER) not in key[1]})

    def short(self):
        """The samples without the marker, in a short form for tests:

        ("events", worker, kind, task), ("runtimes", worker, task), ("prefetch time", worker, task),
        ("prefetched", worker, task), ("online", worker), ("executing", worker).
        """
        short = {}
        for (name, labels), value in self.items():
            get = dict(labels).get
            pair = get("worker"), get("task")
            key = {
                EVENTS: ("events", pair[0], (get("type") or "").removeprefix("task-"), pair[1]),
                f"{RUNTIME}_count": ("runtimes", *pair),
                PREFETCH_TIME: ("prefetch time", *pair),
                PREFETCHED: ("prefetched", *pair),
                ONLINE: ("online", pair[0]),
                EXECUTING: ("executing", pair[0]),
            }.get(name)
            if key and pair[0] != MARKER:
                short[key] = value
        return short


def samples(families):
    found = Samples()
    for family in families:
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, f"{key} occurs twice"
            found[key] = sample.value
    return found


def parse_text(text):
    return samples(text_families(text))


def parse_openmetrics(text):
    return samples(openmetrics_families(text))
