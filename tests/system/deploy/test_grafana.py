"""The dashboard in deploy/grafana: each of its queries is sent to a real Prometheus in the form that Grafana sends."""

import json
import re
import time
from functools import partial

import grafana_foundation_sdk.cog.plugins as plugins
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from support.exporter import CLEAN
from support.exposition import EXECUTING, PREFETCH_TIME, PREFETCHED
from support.processes import ROOT, TEST_ENV, Process, free_port, wait_until
from support.prometheus import Prometheus
from support.worker import client

GRAFANA = ROOT / "deploy/grafana"
FILE = GRAFANA / "flower-exporter.json"
DASHBOARD = json.loads(FILE.read_text())
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]

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


class Viewer:
    """A dashboard open over `server`, from `start` to `end`, with a scrape interval of 1 s."""

    def __init__(self, server, start, end, **chosen):
        self.server, self.start, self.end = server, start, end
        self.values = {"__range": f"{end - start}s", "__rate_interval": "4s"}
        for name in ("broker", "worker", "task"):
            self.values[name] = VARIABLES[name]["allValue"]
        self.values |= {name: self.choice(values) for name, values in chosen.items()}

    @staticmethod
    def choice(values):
        """The text that Grafana inserts into a Prometheus query for a variable with several values."""
        escaped = [re.sub(r"[$^*{}\[\]'+?.()|]", r"\\\\\g<0>", value.replace("\\", "\\\\\\\\")) for value in values]
        return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"

    def fill(self, query):
        return re.sub(r"\$(\w+)", lambda found: self.values[found[1]], query)

    def query(self, query, instant=False):
        if instant:
            return [(labels, [value]) for labels, value in self.server.instant(self.fill(query), self.end)]
        return self.server.range(self.fill(query), self.start, self.end)

    def options(self, variable):
        return self.server.label_values(self.fill(variable["query"]["query"]), self.start, self.end)

    def panel(self, title, reduce=lambda values: values[-1]):
        """The result of each query: {labels: last value}."""
        [panel] = [panel for panel in PANELS if panel["title"] == title]
        return [
            {tuple(labels.values()): reduce(values) for labels, values in self.query(target["expr"], target["instant"])}
            for target in panel["targets"]
        ]

    def missing(self):
        """Panels without data, or without a label of their legend."""
        for panel in PANELS:
            for target in panel["targets"]:
                found = self.query(target["expr"], target["instant"])
                legend = set(re.findall(r"{{(\w+)}}", target["legendFormat"])) - {"broker"}
                if not found or not all(legend <= set(labels) for labels, _ in found):
                    yield panel["title"], target["expr"], found


def start_flower(services, broker):
    port = free_port()
    options = ["--address=127.0.0.1", f"--port={port}"]
    flower = Process("flower", [TEST_ENV / "flower/bin/celery", "-b", broker.url, "flower", *options], env=CLEAN)
    services.callback(flower.kill)
    return port


def test_every_query_returns_data(services, redis, prometheus_release):
    """Every panel, variable and rule on two exporters of one broker and on Flower, and Flower's queries on the exporters.

    All tasks run after the servers have started to scrape, so that the counts are exact: first events are counted, and
    each event once although two exporters receive it.
    """
    workers = [services.worker(redis) for _ in range(2)]
    settings = {"events": {"enable_interval": "500ms"}, "metrics": {"self_metrics": True}}
    exporters = [services.exporter(redis, settings, ready=False) for _ in range(2)]
    flower = start_flower(services, redis)
    ports = [exporter.port for exporter in exporters], [flower]
    exporters_server, _ = servers = [Prometheus(these, release=prometheus_release) for these in ports]
    for server in servers:
        services.callback(server.kill)
        server.ready()
    for worker in workers:
        worker.ready()
        wait_until(lambda worker=worker: "enabled by remote" in worker.log(), 20, worker.log)

    def until(query):
        """Every server has a value other than 0."""
        for server in servers:
            wait_until(partial(holds, server, query), 20, partial(state, server, query))

    until("count(flower_worker_online == 1) == 2 * count(up == 1)")
    begin = int(time.time()) + 1
    until(f"timestamp(up) > {begin}")

    def events(kind, count):
        return f'sum(flower_events_total{{type="task-{kind}"}}) == {count} * count(up)'

    with client(redis) as app:

        def load():
            for name, arguments in [*[("add", (1, 2))] * 50, ("fail", ()), ("retry", ())]:
                app.send_task(name, arguments)
            for _ in range(8):  # more than two workers with two processes each can start
                app.send_task("nap", (2,))

        load()
        until(events("succeeded", 59))
        load()
        until(events("succeeded", 118))
        until(events("failed", 2))
        for gauge in (PREFETCHED, EXECUTING, PREFETCH_TIME):
            until(f"max(max_over_time({gauge}[5m])) > 0")

    for server in servers:
        viewer = Viewer(server, begin, int(time.time()) + 1)
        assert list(viewer.missing()) == []
        assert [set(viewer.options(VARIABLES[name])) for name in ("broker", "worker", "task")] == [
            set(),
            {worker.hostname for worker in workers},
            {"add", "nap", "fail", "retry"},
        ]
        assert viewer.panel("Workers online") == [{(): 2}]
        assert viewer.panel("Workers offline") == [{(): 0}]
        assert viewer.panel("Failure ratio") == [{(): pytest.approx(2 / 120)}]
        assert viewer.panel("Tasks by outcome") == [
            {("add",): 100, ("nap",): 16, ("fail",): 0, ("retry",): 2},
            {("add",): 0, ("nap",): 0, ("fail",): 2, ("retry",): 0},
            {("add",): 0, ("nap",): 0, ("fail",): 0, ("retry",): 2},
        ]
        [ratios] = viewer.panel("Failure ratio, by task", max)
        assert ratios == {("add",): 0, ("nap",): 0, ("fail",): 1, ("retry",): 0}
        one = Viewer(server, begin, viewer.end, worker=[workers[0].hostname], task=["add", "nap", "a.(b)"])
        assert one.panel("Workers online") == [{(): 1}]
        assert one.panel("Failure ratio") == [{(): 0}]
        assert {("add",)} <= set(one.panel("Finished tasks, by task")[0]) <= {("add",), ("nap",)}
        wait_until(lambda server=server: not [*unhealthy_rules(server)], 20, lambda server=server: [*unhealthy_rules(server)])

    viewer = Viewer(exporters_server, begin, int(time.time()) + 1)
    assert [query for query in FLOWER_QUERIES if not viewer.query(query)] == []


def holds(server, query):
    return any(value for _, value in server.instant(query))


def state(server, query):
    return "\n".join([query, *(f"{labels}: {value}" for labels, value in server.instant('{__name__=~"flower_.*", le=""}'))])


def unhealthy_rules(server):
    """Rules with an error, recording rules without data, and pending or firing alerts."""
    for rule in server.rules():
        empty = rule["type"] == "recording" and not server.instant(rule["name"])
        if rule["health"] != "ok" or empty or rule.get("state", "inactive") != "inactive":
            yield {key: rule.get(key) for key in ("name", "health", "lastError", "state", "alerts")}


def test_dashboard_is_complete():
    """It has ids, variables, units, descriptions and thresholds, and the file has a stable format."""
    assert FILE.read_text() == json.dumps(DASHBOARD, indent=2, ensure_ascii=False) + "\n"
    assert "__inputs" not in DASHBOARD and DASHBOARD["id"] is None and DASHBOARD["uid"]
    assert list(VARIABLES) == ["datasource", "broker", "worker", "task"]
    assert VARIABLES["datasource"]["type"] == "datasource"
    assert all(VARIABLES[name]["multi"] and VARIABLES[name]["includeAll"] for name in ("broker", "worker", "task"))
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    used = set()
    for panel in DASHBOARD["panels"]:
        position = panel["gridPos"]
        cells = {(position["x"] + x, position["y"] + y) for x in range(position["w"]) for y in range(position["h"])}
        assert not cells & used and max(cells)[0] < 24, panel["title"]
        used |= cells
    datasource = {"type": "prometheus", "uid": "${datasource}"}
    for panel in PANELS:
        defaults = panel["fieldConfig"]["defaults"]
        assert panel["title"] and panel["description"] and defaults["unit"] and defaults["thresholds"], panel["title"]
        assert all(source["datasource"] == datasource for source in [panel, *panel["targets"]])
        for target in panel["targets"]:
            assert all(f'{name}=~"${name}"' in target["expr"] for name in ("broker", "worker")), target["expr"]


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
    only_written_by_grafana = {".templating.list[].definition"}
    assert dropped(DASHBOARD) == only_written_by_grafana
    wrong = json.loads(FILE.read_text())
    wrong["panels"][1]["fieldConfig"]["defaults"]["decimal"] = 1
    wrong["panels"][2]["options"]["graphMod"] = "area"
    assert len(dropped(wrong)) == len(only_written_by_grafana) + 2


def test_provisioning_examples():
    """The examples have the structure that Grafana reads, and the values that the dashboard needs."""
    [source] = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert source["type"] == "prometheus" and source["jsonData"]["timeInterval"]
    [provider] = yaml.safe_load((GRAFANA / "provisioning/dashboards/flower-exporter.yml").read_text())["providers"]
    assert provider["type"] == "file" and provider["options"]["path"]
