"""Celery deployments with incidents, each a broker of one Prometheus server with the shipped rules. Time may run faster."""

import json
import re
import threading
import time
import tomllib
from collections import Counter

import yaml

from . import events as ev
from .exporter import merge
from .processes import ROOT, directory
from .prometheus import FILES, RULES, Prometheus, seconds

#: The scrape interval of all shipped configurations, which is also the interval of the rules.
INTERVAL = 15
#: The settings that are shipped for pods.
POD_SETTINGS = tomllib.loads((ROOT / "deploy/kubernetes/base/flower-exporter.toml").read_text())
#: The settings that depend on how fast the time runs.
DURATIONS = {"worker_timeout", "purge_stopped_workers", "zero_first", "reconnect_backoff_max"}
#: The clock of worker timeouts advances every 1.5 s, however fast the time runs.
TICK = 1.5


class Pace:
    """How much faster than the shipped rules an incident runs."""

    def __init__(self, speed):
        self.speed = speed

    def seconds(self, seconds):
        return seconds / self.speed

    def text(self, seconds):
        return f"{seconds * 1000 / self.speed:.0f}ms"

    def scaled(self, settings):
        """Settings with all durations divided."""
        return {
            table: {key: self.text(seconds(value)) if key in DURATIONS else value for key, value in keys.items()}
            for table, keys in settings.items()
        }

    def settings(self):
        """Those for pods. What the tick delays is taken from the purge, which must end before the alert."""
        settings = merge({"state": {"worker_timeout": "60s"}, "broker": {"reconnect_backoff_max": "5s"}}, POD_SETTINGS)
        settings = self.scaled(settings)
        if self.speed > 1:
            purge = seconds(POD_SETTINGS["state"]["purge_stopped_workers"]) - 2 * TICK * self.speed
            settings["state"]["purge_stopped_workers"] = self.text(purge)
        return settings

    def rules(self, files=tuple(RULES / name for name in FILES)):
        """Rules with all durations divided: in `for`, ranges, subqueries and offsets."""
        home = directory("rules")
        for path in files:
            groups = yaml.safe_load(path.read_text())
            for rule in (rule for group in groups["groups"] for rule in group["rules"]):
                rule["expr"] = re.sub(r"(?<=\[|:)[0-9][0-9ms]*(?=[\]:])|(?<=offset )\w+", self._faster, rule["expr"])
                if "for" in rule:
                    rule["for"] = re.sub(r".+", self._faster, rule["for"])
            (home / path.name).write_text(json.dumps(groups))
        return [home / path.name for path in files]

    def _faster(self, duration):
        return self.text(seconds(duration[0]))


class Monitoring:
    """A Prometheus server with the rules. Exporters are added with the labels that a stable deployment gives them."""

    def __init__(self, pace, release=None):
        self.targets = {}
        self.file = directory("targets") / "targets.json"
        self.lock = threading.Lock()
        self.write()
        files = {"static_configs": [], "file_sd_configs": [{"files": [str(self.file)], "refresh_interval": "1s"}]}
        interval = pace.text(INTERVAL)
        self.server = Prometheus(rules=pace.rules(), release=release, scrape=files, interval=interval).ready()

    def write(self):
        groups = [
            {"targets": [f"127.0.0.1:{port}"], "labels": {"broker": broker, "instance": instance}}
            for (broker, instance), port in self.targets.items()
        ]
        temporary = self.file.with_suffix(".new")
        temporary.write_text(json.dumps(groups))
        temporary.rename(self.file)

    def scrape(self, broker, instance, exporter):
        """Also after it has moved to another port."""
        with self.lock:
            self.targets[broker, instance] = exporter.port
            self.write()

    def fired(self, broker, start, end):
        """{alert: the first time at which it fired}, whatever its other labels."""
        found = {}
        for labels, values in self.samples(f'ALERTS{{alertstate="firing",broker="{broker}"}}', start, end):
            found.setdefault(labels["alertname"], []).append(values[0][0])
        return {name: min(times) for name, times in found.items()}

    def counted(self, broker, start, end):
        """{(task, type): the sum of all increases between two samples}, of the replica that counted most."""
        found = Counter()
        for labels, values in self.samples(f'flower_events_total{{broker="{broker}"}}', start, end):
            found[labels["task"], labels["type"], labels["worker"], labels["instance"]] += increase(values)
        by_worker = Counter()
        for (task, kind, worker, _), count in found.items():
            by_worker[task, kind, worker] = max(count, by_worker[task, kind, worker])
        counted = Counter()
        for (task, kind, _), count in by_worker.items():
            counted[task, kind] += count
        return counted

    def samples(self, selector, start, end):
        """[(labels, [(time, value)])]: the stored samples, without staleness markers."""
        found = self.server.api("query", query=f"{selector}[{round(1000 * (end - start))}ms]", time=end)["result"]
        return [(one["metric"], [(at, float(value)) for at, value in one["values"] if value != "NaN"]) for one in found]


def now():
    """The time for the field `at` of an event."""
    return time.time() - ev.BASE


def increase(values):
    """The sum of the increases between samples; after a restart, the whole value is one."""
    pairs = zip(values, values[1:])
    return sum(value - before if value >= before else value for (_, before), (_, value) in pairs)


class Deployment:
    """Workers that send heartbeats and run tasks at a rate. What they have sent is the truth."""

    def __init__(self, publisher, *workers):
        self.publisher, self.workers = publisher, set(workers)
        #: {(task, outcome, runtime): runs per second}
        self.rates, self.sent, self.lock = {}, Counter(), threading.Lock()
        self.numbers, self.over = iter(range(10**9)), threading.Event()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def stop(self):
        self.over.set()
        self.thread.join(20)

    def run(self, task, outcome="succeeded", runtime=0.1, count=1, worker=None):
        """Runs tasks to their end."""
        worker = worker or min(self.workers)
        for _ in range(count):
            uuid = f"{task}{next(self.numbers)}"
            at, fields = now(), {"runtime": runtime} if outcome == "succeeded" else {}
            end = getattr(ev, outcome)(uuid, worker, at, **fields)
            self.send(ev.received(uuid, worker, at, name=task), ev.started(uuid, worker, at), end)
            self.sent.update((task, f"task-{kind}") for kind in ("received", "started", outcome))

    def receive(self, worker, task, count):
        """The worker receives tasks, and does not start them."""
        for _ in range(count):
            self.send(ev.received(f"{task}{next(self.numbers)}", worker, now(), name=task))
            self.sent[task, "task-received"] += 1

    def send(self, *items):
        with self.lock:
            for item in items:
                self.publisher.send(item)

    def kill(self, *workers):
        """They send nothing any more."""
        with self.lock:
            self.workers -= set(workers)

    def _work(self):
        start, done, beat = time.monotonic(), {}, 0
        while not self.over.wait(0.1):
            elapsed = time.monotonic() - start
            if elapsed >= beat:
                beat = elapsed + 1
                for worker in sorted(self.workers):
                    self.send(ev.heartbeat(worker, now()))
            for key, rate in list(self.rates.items()):
                done.setdefault(key, elapsed * rate)
                while done[key] < elapsed * rate:
                    done[key] += 1
                    self.run(*key)
