"""A simple model of task states, with which the exporter must agree on any stream."""

from collections import Counter

ENDS = {"succeeded", "failed", "retried", "rejected", "cancelled", "revoked"}


class Task:
    name, eta, received, entry, run, last, end = "", None, None, None, None, None, None


class Model:
    def __init__(self):
        self.tasks = {}
        self.times = {}
        self.offline = set()
        self.processed = {}
        self.last_start = {}
        self.idle_at = {}

    def feed(self, events):
        for event in events:
            group, _, kind = event["type"].partition("-")
            worker, at = event["hostname"], event["timestamp"]
            if group == "worker":
                self.worker(kind, worker, event)
                continue
            task = self.tasks.setdefault(event["uuid"], Task())
            if kind in ("sent", "received"):
                task.name, task.eta = event["name"], event["eta"]
            if kind == "received":
                self.received(task, worker, at)
            elif kind == "started":
                self.started(task, worker, at)
            elif kind in ENDS:
                task.end = worker, at
                self.ended(task, worker, entry_first=kind == "revoked" and not event["terminated"])
        return self

    def received(self, task, worker, at):
        if task.last and task.last[0] == worker and at <= task.last[1]:
            return
        task.received, task.entry = (worker, at), None
        if not task.eta and worker not in self.offline:
            task.entry = worker, task.name

    def started(self, task, worker, at):
        if task.end and task.end[0] == worker and at <= task.end[1]:
            if not task.run:
                task.last = worker, at
            return
        if task.entry and task.entry[0] == worker:
            task.entry = None
        self.close(task)
        pair = None
        if not task.eta and task.received and task.received[0] == worker:
            pair = worker, task.name
            self.times[pair] = max(0, at - task.received[1])
            self.last_start[worker] = at
            self.idle_at[worker] = min(self.idle_at.get(worker, 0), at)
        task.run, task.last = (worker, pair, at), (worker, at)

    def ended(self, task, worker, entry_first):
        run, entry = task.run and task.run[0] == worker, task.entry and task.entry[0] == worker
        if run and not (entry_first and entry):
            self.close(task)
        elif entry:
            task.entry = None

    def close(self, task):
        if task.run and task.run[1]:
            worker, pair, started = task.run
            if started >= self.idle_at.get(worker, 0):
                self.times[pair] = 0
        task.run = None

    def worker(self, kind, worker, event):
        processed = event["processed"]
        restarted = kind == "online" or kind == "heartbeat" and processed < self.processed.get(worker, 0)
        if restarted or kind == "offline":
            for task in self.tasks.values():
                if task.entry and task.entry[0] == worker:
                    task.entry = None
        if restarted:
            self.idle_at[worker] = max(self.idle_at.get(worker, 0), event["timestamp"])
        if kind == "heartbeat" and event["active"] == 0 and event["timestamp"] > self.last_start.get(worker, float("inf")):
            # It executes nothing, so every run that began before has ended.
            self.idle_at[worker] = event["timestamp"]
            self.last_start.pop(worker)
            restarted = True
        if restarted:
            self.times.update({pair: 0 for pair in self.times if pair[0] == worker})
        if kind == "offline":
            self.offline.add(worker)
        else:
            self.offline.discard(worker)
            self.processed[worker] = processed

    def gauges(self):
        """All gauges that are not 0, named as by `Samples.short`."""
        prefetched = Counter(("prefetched", *task.entry) for task in self.tasks.values() if task.entry)
        return {**prefetched, **{("prefetch time", *pair): value for pair, value in self.times.items() if value}}
