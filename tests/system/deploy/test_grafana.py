"""The dashboard in deploy/grafana: each of its queries is sent to a real Prometheus, and compared with what happened."""

import collections
import json
import re
import time
from functools import partial

import grafana_foundation_sdk.cog.plugins as plugins
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from support import events as ev
from support.exporter import CLEAN
from support.exposition import EVENTS, ONLINE, PREFETCH_TIME
from support.grafana import ANNOTATIONS, DASHBOARD, FILE, GRAFANA, PANELS, VARIABLES, Viewer, row
from support.processes import TEST_ENV, Process, free_port, wait_until
from support.prometheus import Prometheus
from support.worker import client

#: The queries of the dashboard and the alerts that are published with Flower.
SELECTED = 'worker=~"$worker", task=~"$task"'
FLOWER_QUERIES = [
    'count(flower_worker_online{worker=~"$worker"} == 1) or vector(0)',
    'count(flower_worker_online{worker=~"$worker"} == 0) or vector(0)',
    f'sum(increase(flower_events_total{{{SELECTED}, type=~"task-(succeeded|failed)"}}[$__range])) or vector(0)',
    f'sum(increase(flower_events_total{{{SELECTED}, type="task-failed"}}[$__range])) or vector(0)',
    'flower_worker_number_of_currently_executing_tasks{worker=~"$worker"}',
    *(
        f"sum by (worker) (increase(flower_events_total{{{SELECTED}, type{kind}}}[$__rate_interval]))"
        for kind in ('=~"task-(succeeded|failed)"', '="task-failed"', '="task-retried"')
    ),
    f"sum by (worker) (flower_worker_prefetched_tasks{{{SELECTED}}})",
    f"avg by (task) (flower_task_prefetch_time_seconds{{{SELECTED}}})",
    f"sum by (task) (rate(flower_task_runtime_seconds_sum{{{SELECTED}}}[$__rate_interval])) / clamp_min("
    f"sum by (task) (rate(flower_task_runtime_seconds_count{{{SELECTED}}}[$__rate_interval])), 0.000000001)",
    "histogram_quantile(0.95, sum by (le, task) "
    f"(rate(flower_task_runtime_seconds_bucket{{{SELECTED}}}[$__rate_interval])))",
    "flower_worker_online",
    '(sum(avg_over_time(flower_events_total{type="task-failed"}[15m])) by (task) / '
    'sum(avg_over_time(flower_events_total{type=~"task-failed|task-succeeded"}[15m])) by (task)) * 100',
    "sum(avg_over_time(flower_task_prefetch_time_seconds[15m])) by (task, worker)",
]

#: What one load causes: {task: {column of the table: events}}, half of them at each worker. A retry succeeds at the second
#: attempt. Celery sends both task-rejected and task-failed for a task that raises Reject.
LOAD = {
    "add": {"Succeeded": 30, "Revoked": 2},
    "nap": {"Succeeded": 6},
    "fail": {"Failed": 6},
    "retry": {"Succeeded": 4, "Retried": 4},
    "reject": {"Rejected": 2, "Failed": 2},
}
ARGUMENTS = {"add": (1, 2), "nap": (0.3,)}
OUTCOMES = ("Succeeded", "Failed", "Retried", "Revoked", "Rejected")

METRICS = {"self_metrics": True, "zero_first": "2s", "exemplars": True, "native_histogram_bucket_factor": 1.1}
SETTINGS = {"events": {"enable_interval": "500ms"}, "broker": {"reconnect_backoff_max": "500ms"}, "metrics": METRICS}
TOP = [title for title in row("Overview") if title != "Exporter"]


class Scene:
    """Two workers on one Redis, and everything that receives their events. `broker` is the label of the exporters:

    main: two replicas, the second one behind a proxy; cut: behind the same proxy; grouped: with a group of workers;
    calm: receives only what the test publishes; wrong: on a database without workers; down: no process.
    Flower is scraped by another Prometheus, in the job flower and without the label.
    """

    def __init__(self, services, redis, release):
        self.services, self.redis, self.release = services, redis, release
        self.queues = ["first", "second"]
        self.workers = [services.worker(redis, args=["-Q", queue]) for queue in self.queues]
        self.proxy = services.proxy(redis)
        self.main = [self.exporter(redis), self.exporter(self.proxy)]
        self.cut, self.grouped = self.exporter(self.proxy), self.exporter(redis, worker_groups=["pool=*@tests"])
        wrong = services.exporter(None, {**SETTINGS, "broker": {"url": re.sub(r"/\d+$", "/9", redis.url)}})
        self.calm = services.harness(redis, {"metrics": METRICS, "state": {"worker_timeout": "10m"}})
        exporters = {"cut": self.cut, "grouped": self.grouped, "calm": self.calm.exporter, "wrong": wrong}
        self.ports = {"main": [exporter.port for exporter in self.main], "down": [free_port()]}
        self.ports |= {broker: [exporter.port] for broker, exporter in exporters.items()}
        self.start_servers(self.start_flower())
        self.wait_for_workers()
        self.start, self.end = self.now(), None

    def exporter(self, broker, **metrics):
        return self.services.exporter(broker, {**SETTINGS, "metrics": {**METRICS, **metrics}}, ready=False)

    def start_flower(self):
        port = free_port()
        options = ["--address=127.0.0.1", f"--port={port}"]
        command = [TEST_ENV / "flower/bin/celery", "-b", self.redis.url, "flower", *options]
        self.services.callback(Process("flower", command, env=CLEAN).kill)
        return port

    def start_servers(self, flower_port):
        """Prometheus 3 has both kinds of histograms. 2.42 has one kind, so that it needs a second server."""
        has_both = not self.release.version.startswith("2.")
        targets = [
            {"targets": [f"127.0.0.1:{port}" for port in ports], "labels": {"broker": broker}}
            for broker, ports in self.ports.items()
        ]
        scrape = {"static_configs": targets, **({"always_scrape_classic_histograms": True} if has_both else {})}
        features = ["exemplar-storage", *(["native-histograms"] if has_both else [])]
        self.server = self.native = self.prometheus(rules=[], scrape=scrape, features=features)
        if not has_both:
            main = {"static_configs": targets[:1]}
            self.native = self.prometheus(rules=[], scrape=main, features=["native-histograms"])
        self.flower = self.prometheus([flower_port], job="flower")
        self.servers = [server.ready() for server in {self.server, self.native, self.flower}]

    def prometheus(self, *arguments, **options):
        server = Prometheus(*arguments, release=self.release, **options)
        self.services.callback(server.kill)
        return server

    def wait_for_workers(self):
        for worker in self.workers:
            worker.ready()
            wait_until(lambda worker=worker: "enabled by remote" in worker.log(), 20, worker.log)
        for server, receivers in ((self.server, 4), (self.native, 2), (self.flower, 1)):
            self.until(f'count({ONLINE}{{broker!="calm"}} == 1) >= {2 * receivers}', server)

    def until(self, query, server=None):
        """Waits until the query returns a series."""
        server = server or self.server
        wait_until(lambda: server.instant(query), 30, lambda: state(server, query))

    def now(self):
        """The time, after every server has scraped every exporter again: no sample is still on its way."""
        now = int(time.time()) + 1
        for server in self.servers:
            self.until(f"min(timestamp(up)) > {now}", server)
        return now

    def load(self, number):
        """Sends the tasks of LOAD for the `number`-th time, and waits until every server has scraped all outcomes."""
        with client(self.redis, task_send_sent_event=True) as app:
            later = [app.send_task("add", (1, 2), countdown=3, queue=queue).id for queue in self.queues]
            for name, outcomes in LOAD.items():
                for n in range(outcomes.get("Succeeded", 0) + outcomes.get("Failed", 0)):
                    app.send_task(name, ARGUMENTS.get(name, ()), queue=self.queues[n % 2])
            for uuid in later:
                wait_until(lambda uuid=uuid: f"[{uuid}] received" in self.worker_logs(), 20, f"{uuid} is received")
            app.control.revoke(later)
            for outcome in OUTCOMES:
                count = number * sum(outcomes.get(outcome, 0) for outcomes in LOAD.values())
                series = f'flower_events_total{{type="task-{outcome.lower()}",broker!="calm"}}'
                for server in self.servers:
                    self.until(f"min(sum by (job,instance) ({series})) == {count}", server)

    def worker_logs(self):
        return "".join(worker.log() for worker in self.workers)

    def runs(self):
        """{task id: (task, runtime)} of the runs that succeeded, as the workers measured them."""
        found = re.findall(r"Task (\w+)\[(\S+)\] succeeded in ([\d.e-]+)s", self.worker_logs())
        return {uuid: (name, float(text)) for name, uuid, text in found}

    def view(self, broker, server=None, start=None, **options):
        """The dashboard for the exporters of one broker (None: without a choice), from the first load to `end` or now."""
        chosen = {"broker": [broker]} if broker else {}
        end = self.end or int(time.time()) + 1
        return Viewer(server or self.server, start or self.start, end, **chosen, **options)


def state(server, query):
    selector = '{__name__=~"up|flower_events_total|flower_worker_.*|flower_exporter_broker_connected"}'
    return "\n".join([query, *(f"{labels}: {value}" for labels, value in server.instant(selector))])


def increase(samples, start, end, native=False):
    """(what the samples say, what `increase()` extrapolates from them by the formula of Prometheus).

    Before the first sample, it stops where a counter would be 0. For native histograms, most releases do not stop there.
    """
    times, values = zip(*((at, float(text)) for at, text in samples), strict=True)
    counted, sampled = values[-1] - values[0], times[-1] - times[0]
    assert list(values) == sorted(values), "a counter does not decrease"
    if not counted:
        return 0, 0
    average = sampled / (len(times) - 1)
    before, after = (gap if gap < 1.1 * average else average / 2 for gap in (times[0] - start, end - times[-1]))
    before = before if native else min(before, sampled * values[0] / counted)
    return counted, counted * (sampled + before + after) / sampled


def increases(viewer, selector, native=False):
    """[(labels, events by the samples, events by `increase()`)] of each series in the time range of the viewer."""
    query = viewer.fill(f"{selector}[$__range]")
    found = viewer.server.api("query", query=query, time=viewer.end)["result"]
    period = viewer.start, viewer.end
    return [(one["metric"], *increase(one["values"], *period, native)) for one in found if len(one["values"]) > 1]


class Counted:
    """The counts in the time range of a viewer, from the raw samples in its Prometheus.

    events: {(task, outcome): (events by the samples, events by `increase()`)}, with replicas counted once.
    """

    def __init__(self, viewer, native=False):
        self.series = increases(viewer, f'{EVENTS}{{broker=~"$broker",worker=~"$worker"}}', native)
        once, self.events = {}, collections.defaultdict(lambda: (0, 0))
        for labels, *numbers in self.series:
            key = labels["worker"], labels["task"], labels["type"].removeprefix("task-").capitalize()
            once[key] = max(once.get(key, (0, 0)), tuple(numbers))
        for (_, task, outcome), numbers in once.items():
            self.events[task, outcome] = tuple(map(sum, zip(self.events[task, outcome], numbers, strict=True)))

    def shown(self, task, *outcomes):
        return sum(self.events[task, outcome][1] for outcome in outcomes)

    def finished(self, task):
        return self.shown(task, "Succeeded", "Failed")

    def failure_ratio(self):
        """A ratio does not depend on the number of replicas."""
        totals = collections.Counter()
        for labels, _, shown in self.series:
            totals[labels["type"]] += shown
        return totals["task-failed"] / (totals["task-failed"] + totals["task-succeeded"])

    def extrapolation(self):
        """The largest factor by which `increase()` exceeds the samples."""
        return max(shown / counted for _, counted, shown in self.series if counted)


def check_counts(viewer, loads):
    """The stats, the table and the rates. With a rate window of the whole time range, a rate is an increase per second."""
    counted, seconds = Counted(viewer), viewer.end - viewer.start
    viewer.values["__rate_interval"] = viewer.values["__range"]
    cells = [(task, outcome) for task in LOAD for outcome in OUTCOMES]
    truth = {(task, outcome): loads * LOAD[task].get(outcome, 0) for task, outcome in cells}
    assert {cell: counted.events[cell][0] for cell in cells} == truth
    table = {fields["Task"]: fields for fields in viewer.table("Tasks")}
    assert {(task, outcome): table[task][outcome] for task in table for outcome in OUTCOMES} == pytest.approx(
        {cell: counted.shown(*cell) for cell in cells}
    )
    for task, fields in table.items():
        finished = counted.finished(task)
        ratio = counted.shown(task, "Succeeded") / finished if finished else None
        assert fields.get("Success ratio") == (pytest.approx(ratio) if finished else None), task
    assert viewer.number("Failure ratio") == pytest.approx(counted.failure_ratio())
    finished = {task: counted.finished(task) / seconds for task in LOAD}
    assert viewer.number("Finished tasks") == pytest.approx(sum(finished.values()))
    assert viewer.only("Finished tasks, by task", "task") == pytest.approx(finished)
    assert viewer.only("Failed tasks, by task", "task") == pytest.approx(
        {task: counted.shown(task, "Failed") / seconds for task in ("fail", "reject")}
    )
    types = viewer.only("Events, by type", "type")
    for outcome in OUTCOMES:
        assert types[f"task-{outcome.lower()}"] * seconds == pytest.approx(sum(counted.shown(task, outcome) for task in LOAD))


def check_runtimes(viewer, histogram, runs):
    """Quantiles are in the right bucket. Averages are exact up to the extrapolation, which differs between workers."""
    viewer.values["__rate_interval"] = viewer.values["__range"]
    extrapolation = Counted(viewer, native=histogram == "native").extrapolation()
    naps = sorted(runtime for name, runtime in runs if name == "nap")
    lower, upper = (0.25, 0.5) if histogram == "classic" else (naps[0] / 2**0.125, naps[-1] * 2**0.125)
    assert lower < naps[0] * 2**0.125 and naps[-1] <= upper
    table = {fields["Task"]: fields for fields in viewer.table("Tasks")}
    p50, p95, p99 = (found[None] for found in viewer.panel("Runtime", None))
    quantiles = {
        "Runtime p95": viewer.number("Runtime p95"),
        "Runtime p95 of nap": table["nap"]["Runtime p95"],
        "Runtime p95, by task": viewer.only("Runtime p95, by task", "task")["nap"],
        "Runtime, p95": p95,
        "Runtime, p99": p99,
        **viewer.only("Runtime p95, by worker", "worker"),
    }
    assert {name: value for name, value in quantiles.items() if not lower < value <= upper} == {}
    assert p50 < 0.25, "more than half of the tasks only add"
    for task in ("add", "nap", "retry"):
        runtimes = [runtime for name, runtime in runs if name == task]
        average = sum(runtimes) / len(runtimes)
        assert average / extrapolation <= table[task]["Average runtime"] <= average * extrapolation, task
    assert "Average runtime" not in table["fail"], "no data"


def check_heat_map(viewer, native, runs):
    """The number of runs. Replicas are counted once, but not in native histograms."""
    for each in (viewer, native):
        each.values["__rate_interval"] = each.values["__range"]
    seconds, finished = viewer.end - viewer.start, sum(Counted(viewer).shown(task, "Succeeded") for task in LOAD)
    assert viewer.only("Runtime heat map", "le")["+Inf"] == pytest.approx(finished / seconds)
    [target] = PANELS["Runtime heat map"]["targets"]
    [(_, count)] = native.server.instant(f"histogram_count({native.fill(target['expr'])})", native.end)
    assert 2 * len(runs) <= count * seconds <= 2 * len(runs) * Counted(native, native=True).extrapolation()


def top_row(viewer):
    """{title: number} of the stats that have a number."""
    return {title: number for title in TOP if (number := viewer.number(title)) is not None}


def check_variables(scene):
    hostnames, tasks = {worker.hostname for worker in scene.workers}, set(LOAD)
    assert scene.view(None).options("broker") == {"main", "cut", "grouped", "calm", "wrong", "down"}
    assert scene.view("main").options("worker") == hostnames, "clients, which send task-sent, are not offered"
    assert scene.view("grouped").options("worker") == {*hostnames, "pool"}
    assert scene.view("main").options("task") == scene.view("grouped").options("task") == tasks
    assert scene.view("wrong").options("worker") == scene.view("wrong").options("task") == set()


def check_selection(scene):
    """A worker, a task, and a group of workers, which has task panels but no worker panels."""
    first, second = (worker.hostname for worker in scene.workers)
    one = scene.view("main", worker=[first], task=["add", "nap", "a.(b)"])
    assert one.number("Workers online") == 1 and one.number("Failure ratio") == 0
    assert {fields["Task"] for fields in one.table("Tasks")} <= {"add", "nap"}
    check_counts(scene.view("grouped", worker=["pool"]), 2)
    group = top_row(scene.view("grouped", worker=["pool"]))
    assert group.keys() == {"Finished tasks", "Failure ratio", "Runtime p95", "Prefetched"}
    hosts = top_row(scene.view("grouped", worker=[first, second]))
    assert hosts.keys() == {"Workers online", "Workers offline", "Executing"}


def check_unknown(scene):
    """Where nothing is known, there is no number: without an exporter, while it is down, and on a wrong database."""
    for broker, exporter in [("nowhere", None), ("down", 0), ("wrong", 1)]:
        viewer = scene.view(broker)
        assert (broker, viewer.number("Exporter"), top_row(viewer), viewer.table("Tasks")) == (broker, exporter, {}, [])
    assert [*scene.view("nowhere").missing()] == [*PANELS]


def check_gauges(scene):
    """Numbers that only gauges have, exactly. Before a task has finished, the failure ratio is unknown, and then it is 0."""
    worker, other = ev.W, "other@tests"
    scene.calm.publish(ev.heartbeat(active=3), ev.online(other), ev.offline(other))
    scene.calm.publish(ev.received("a"), ev.received("b"), ev.received("c", name="nap"), ev.started("a", at=7))
    scene.until(f'{PREFETCH_TIME}{{broker="calm",task="add"}} == 7')
    view = partial(scene.view, "calm", worker=[worker, other])
    viewer = view()
    assert top_row(viewer) == {"Workers online": 1, "Workers offline": 1, "Executing": 3, "Prefetched": 2}
    assert viewer.number("Exporter") == 1
    found = {title: viewer.only(title, "worker") for title in row("Workers")}
    assert list(found["Workers"]) == [other, worker], "offline workers come first"
    assert found["Workers"] == found["Online, by worker"] == {worker: 1, other: 0}
    assert found["Executing, by worker"][worker] == 3 and found["Prefetched, by worker"] == {worker: 2}
    assert found["Prefetch time, by worker"] == {worker: 7} and found["Failed tasks, by worker"] == {}
    scene.calm.publish(ev.succeeded("a", at=9, runtime=2))
    wait_until(lambda: view().number("Failure ratio") == 0, 20, lambda: view().table("Failure ratio"))
    assert 1 < view().number("Runtime p95") <= 2.5


def check_outage(scene):
    """Two of the exporters lose their broker. One is a replica of main, where nothing changes. The other one is alone."""
    whole, replica = (f"127.0.0.1:{exporter.port}" for exporter in scene.main)
    scene.end, before = None, int(time.time())
    scene.proxy.refuse()
    scene.proxy.cut()
    scene.until('flower_exporter_broker_connected{broker="cut"} == 0')
    scene.until('flower_exporter_broker_connected{broker="main"} == 0')
    cut, main = scene.view("cut"), scene.view("main")
    assert scene.server.instant(f'{ONLINE}{{broker="cut"}} == 1'), "the gauges have not changed"
    assert (cut.number("Exporter"), top_row(cut)) == (0, {})
    latest = scene.view("cut", start=cut.end)
    lines = [*row("Workers"), "Finished tasks, by task", "Failed tasks, by task", "Events, by type"]
    assert [title for title in lines if any(latest.query(target["expr"]) for target in PANELS[title]["targets"])] == []
    assert (main.number("Exporter"), main.number("Workers online"), [*top_row(main)]) == (1, 2, TOP)
    assert main.only("Connected", "instance") == {whole: 1, replica: 0}
    wait_until(lambda: scene.view("main").only("Clock paused", "instance")[replica] > 0.9, 20, "the clock is paused")
    assert scene.view("main").only("Clock paused", "instance")[whole] == 0
    scene.proxy.resume()
    scene.until('count(flower_exporter_gaps_total{broker=~"main|cut",cause="disconnected"} == 1) == 2')
    scene.end = scene.now()
    check_losses(scene.view("main"), scene.main[1].metrics(), (whole, replica), before)


def check_losses(viewer, metrics, ports, before):
    """The replica was disconnected once, and this was a loss."""
    whole, replica = ports
    for title, name in [("Disconnects", "broker_disconnects_total"), ("Losses", "gaps_total")]:
        assert metrics.total(f"flower_exporter_{name}") == 1
        [(_, counted, shown)] = [one for one in increases(viewer, f'flower_exporter_{name}{{instance="{replica}"}}') if one[1]]
        assert (counted, viewer.only(title, "instance")) == (1, pytest.approx({whole: 0, replica: shown}))
    [target] = PANELS["Losses, by cause"]["targets"]
    causes = {(labels["instance"], labels["cause"]): max(values) for labels, values in viewer.query(target["expr"])}
    assert len(causes) == 2 * 7 and [key for key, most in causes.items() if most] == [(replica, "disconnected")]
    [(labels, times)] = viewer.annotations("Losses")
    assert (labels["cause"], labels["instance"]) == ("disconnected", replica)
    assert before < times[0] <= times[-1] <= viewer.end


def check_health(scene):
    """The other panels about the exporters, against what an exporter itself shows."""
    viewer, exporter = scene.view("calm"), scene.calm.exporter
    metrics, instance = exporter.metrics(), f"127.0.0.1:{exporter.port}"
    assert viewer.only("Up", "instance") == viewer.only("Connected", "instance") == {instance: 1}
    assert scene.view("down").only("Up", "instance").keys() == {f"127.0.0.1:{port}" for port in scene.ports["down"]}
    assert viewer.only("Buffer, of its limit", "instance") == {instance: 0}
    memory = metrics.total("process_resident_memory_bytes")
    assert viewer.only("Memory", "instance") == {instance: pytest.approx(memory, rel=0.2)}
    [lag] = viewer.only("Event lag", "instance").values()
    assert lag == pytest.approx(time.time() - ev.BASE, abs=30)


def check_restart(scene):
    """An annotation marks the time of each start in the time range."""

    def starts(start=None):
        found = scene.view("grouped", start=start).annotations("Exporter starts")
        return [(labels["instance"], at) for labels, times in found for at in times]

    assert starts() == [] and len(starts(scene.start - 60)) == 1
    exporter, scene.end = scene.grouped, None
    exporter.terminate()
    began = time.time()
    scene.services.exporter(None, exporter.settings, ready=False)
    wait_until(starts, 20, "the start is marked")
    assert starts() == [(f"127.0.0.1:{exporter.port}", pytest.approx(began, abs=2))]


def check_exemplars(viewer, runs):
    """The dots on the runtime panel are runs, with the runtimes that the workers measured."""
    found = viewer.exemplars("Runtime")
    assert found and found == {uuid: pytest.approx(runs[uuid][1]) for uuid in found}
    assert any(runtime > 0.25 for runtime in found.values()), "one of nap"


def check_flower(scene, start, runs):
    """Flower has no metrics about itself, and no 0 in front of a new series: only the second load is in the time range."""
    viewer = scene.view(None, scene.flower, start)
    own = {"Connected", "Clock paused", "Disconnects", "Losses", "Losses, by cause", "Buffer, of its limit", "Event lag"}
    assert viewer.missing().keys() == own
    assert (viewer.number("Exporter"), viewer.number("Workers online")) == (1, 2)
    check_counts(viewer, 1)
    check_runtimes(viewer, "classic", runs)
    assert len(scene.view(None, scene.flower, scene.start - 60).annotations("Exporter starts")) == 1
    assert viewer.options("worker") == {worker.hostname for worker in scene.workers}
    wait_until(lambda: not [*unhealthy_rules(scene.flower)], 20, lambda: [*unhealthy_rules(scene.flower)])


def test_numbers_are_what_happened(services, redis, prometheus_release):
    """Every query of the dashboard, in each situation, against the truth that the test produces."""
    scene = Scene(services, redis, prometheus_release)
    check_gauges(scene)
    scene.load(1)
    earlier, between = scene.runs(), scene.now()
    scene.load(2)
    scene.end, runs = scene.now(), scene.runs()

    main = scene.view("main")
    assert main.missing() == {}
    assert [query for query in FLOWER_QUERIES if not main.query(query)] == []
    assert (main.number("Workers online"), main.number("Workers offline")) == (2, 0)
    check_exemplars(main, runs)
    check_counts(main, 2)
    check_runtimes(main, "classic", runs.values())
    native = scene.view("main", scene.native, histogram="native")
    check_runtimes(native, "native", runs.values())
    check_heat_map(main, native, runs)

    check_variables(scene)
    check_selection(scene)
    check_unknown(scene)
    check_health(scene)
    check_flower(scene, between, [run for uuid, run in runs.items() if uuid not in earlier])
    check_outage(scene)
    check_restart(scene)


#: Recording rules without data if no worker is offline, and on Flower's metrics.
MAY_BE_EMPTY = {"broker_worker:flower_worker_offline:2m", "instance:flower_exporter_missed_events:estimate10m"}


def unhealthy_rules(server):
    """Rules with an error, and recording rules without data."""
    for rule in server.rules():
        empty = rule["type"] == "recording" and rule["name"] not in MAY_BE_EMPTY and not server.instant(rule["name"])
        if rule["health"] != "ok" or empty:
            yield {key: rule.get(key) for key in ("name", "health", "lastError")}


def test_expressions_are_short_and_plain():
    """Nothing replaces a missing value by 0, and nothing corrects `increase()`."""
    targets = [target["expr"] for panel in PANELS.values() for target in panel["targets"]]
    variables = [variable["query"]["query"] for variable in VARIABLES.values() if variable["type"] == "query"]
    for expression in [*targets, *variables, *(annotation["expr"] for annotation in ANNOTATIONS.values())]:
        assert len(expression) <= 250, expression
        assert not re.search(r"vector\(|offset|absent", expression), expression


def test_dashboard_is_complete():
    """It has ids, variables, units, descriptions and thresholds, and the file has a stable format."""
    assert FILE.read_text() == json.dumps(DASHBOARD, indent=2, ensure_ascii=False) + "\n"
    assert "__inputs" not in DASHBOARD and DASHBOARD["id"] is None and DASHBOARD["uid"] == "flower-exporter"
    assert list(VARIABLES) == ["datasource", "broker", "worker", "task", "histogram"]
    assert VARIABLES["datasource"]["type"] == "datasource"
    assert all(VARIABLES[name]["multi"] and VARIABLES[name]["includeAll"] for name in ("broker", "worker", "task"))
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    titles = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    assert len(set(ids)) == len(ids) and len(set(titles)) == len(titles)
    datasource = {"type": "prometheus", "uid": "${datasource}"}
    for title, panel in PANELS.items():
        defaults = panel["fieldConfig"]["defaults"]
        assert panel["description"] and defaults["unit"] and defaults["thresholds"], title
        for source in [panel, *panel["targets"]]:
            assert source["datasource"] == datasource, title
        selected = ("broker",) if title == "Exporter" or title in row("Exporter") else ("broker", "worker")
        for target in panel["targets"]:
            assert all(f'{name}=~"${name}"' in target["expr"] for name in selected), target["expr"]
    for annotation in ANNOTATIONS.values():
        assert annotation["datasource"] == datasource and annotation["enable"] and "{{instance}}" in annotation["textFormat"]


def test_panels_do_not_overlap():
    used = set()
    for panel in DASHBOARD["panels"]:
        position = panel["gridPos"]
        cells = {(position["x"] + x, position["y"] + y) for x in range(position["w"]) for y in range(position["h"])}
        assert not cells & used and max(cells)[0] < 24, panel["title"]
        used |= cells


def test_unknown_is_gray():
    """Stats and tables show "no data" in gray. Stats show the present: the last value of a range may be an hour old."""
    gray = {"type": "special", "options": {"match": "null+nan", "result": {"color": "gray", "index": 0, "text": "no data"}}}
    for title, panel in PANELS.items():
        if panel["type"] in ("stat", "table"):
            defaults = panel["fieldConfig"]["defaults"]
            assert gray in defaults["mappings"] and defaults["noValue"] == "no data", title
            assert all(target["instant"] for target in panel["targets"]), title


def test_runtime_panel_has_exemplars():
    assert [target["refId"] for target in PANELS["Runtime"]["targets"] if target.get("exemplar")] == ["B"]


def test_links_set_a_variable_and_keep_the_rest():
    """Links of tasks, in the table and in lines, and of workers, in tiles and lines."""
    [task] = [
        entry["value"]
        for override in PANELS["Tasks"]["fieldConfig"]["overrides"]
        for entry in override["properties"]
        if override["matcher"]["options"] == "Task" and entry["id"] == "links"
    ]
    found = [(task, "task", "__value.raw")]
    for title in PANELS:
        if title == "Workers" or title.endswith((", by task", ", by worker")):
            name = "task" if title.endswith("task") else "worker"
            found.append((PANELS[title]["fieldConfig"]["defaults"]["links"], name, f"__field.labels.{name}"))
    assert len(found) == 11
    for links, name, value in found:
        [link] = links
        path, _, query = link["url"].partition("?")
        kept = {f"${{{other}:queryparam}}" for other in VARIABLES if other != name}
        assert path == f"/d/{DASHBOARD['uid']}" and link["title"] == f"Show only this {name}"
        assert set(query.split("&")) == {"${__url_time_range}", *kept, f"var-{name}=${{{value}:percentencode}}"}


def differing_paths(written, read, path=""):
    """The paths where Grafana's parsed value differs from the file."""
    if isinstance(written, dict) and isinstance(read, dict):
        return [found for key in written for found in differing_paths(written[key], read.get(key), f"{path}.{key}")]
    if isinstance(written, list) and isinstance(read, list) and len(written) == len(read):
        return [found for item, other in zip(written, read) for found in differing_paths(item, other, f"{path}[]")]
    return [] if written == read else [path]


def test_dashboard_matches_grafanas_schema():
    """Grafana's own library drops fields that are unknown or of a wrong type. It drops none of the dashboard."""

    def dropped(dashboard):
        read = JSONEncoder(sort_keys=True).encode(Dashboard.from_json(dashboard))
        return set(differing_paths(dashboard, json.loads(read)))

    plugins.register_default_plugins()
    # Written by Grafana, or read by its Prometheus data source: this release of the library lacks them.
    annotations = {f".annotations.list[].{name}" for name in ("titleFormat", "textFormat", "useValueForTime")}
    unknown = {".templating.list[].definition", *annotations}
    assert dropped(DASHBOARD) == unknown
    wrong = json.loads(FILE.read_text())
    wrong["panels"][1]["fieldConfig"]["defaults"]["decimal"] = 1
    wrong["panels"][2]["options"]["graphMod"] = "area"
    assert len(dropped(wrong)) == len(unknown) + 2


def test_provisioning_examples():
    """The examples have the structure that Grafana reads, and the values that the dashboard needs."""
    [source] = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert source["type"] == "prometheus" and source["jsonData"]["timeInterval"]
    [provider] = yaml.safe_load((GRAFANA / "provisioning/dashboards/flower-exporter.yml").read_text())["providers"]
    assert provider["type"] == "file" and provider["options"]["path"]
