"""The dashboard in deploy/grafana as Grafana shows it: its queries with the chosen variables, and its transformations."""

import json
import math
import re

from .processes import ROOT

GRAFANA = ROOT / "deploy/grafana"
FILE = GRAFANA / "flower-exporter.json"
DASHBOARD = json.loads(FILE.read_text())
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
ANNOTATIONS = {annotation["name"]: annotation for annotation in DASHBOARD["annotations"]["list"]}
PANELS = {panel["title"]: panel for panel in DASHBOARD["panels"] if panel["type"] != "row"}

OPERATORS = {"+": lambda left, right: left + right, "/": lambda left, right: left / right if right else math.nan}


def row(title):
    """The titles of the panels in this row."""
    titles, inside = [], False
    for panel in DASHBOARD["panels"]:
        if panel["type"] == "row":
            inside = panel["title"] == title
        elif inside:
            titles.append(panel["title"])
    return titles


class Viewer:
    """A dashboard open over `server`, from `start` to `end`. `window` is `$__rate_interval`."""

    def __init__(self, server, start, end, window="4s", histogram="classic", **chosen):
        self.server, self.start, self.end = server, start, end
        [kind] = [option["value"] for option in VARIABLES["histogram"]["options"] if option["text"] == histogram]
        self.values = {"__range": f"{end - start}s", "__from": str(1000 * start), "__rate_interval": window, "histogram": kind}
        for name in ("broker", "worker", "task"):
            self.values[name] = self.choice(chosen[name]) if name in chosen else VARIABLES[name]["allValue"]

    @staticmethod
    def choice(values):
        """The text that Grafana inserts into a Prometheus query for a variable with several values."""
        escaped = [re.sub(r"[$^*{}\[\]'+?.()|]", r"\\\\\g<0>", value.replace("\\", "\\\\\\\\")) for value in values]
        return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"

    def fill(self, query):
        return re.sub(r"\$(\w+)", lambda found: self.values[found[1]], query)

    def query(self, query, instant=False):
        """[(labels, [values])], without NaN."""
        if instant:
            return [(labels, [value]) for labels, value in self.server.instant(self.fill(query), self.end)]
        return self.server.range(self.fill(query), self.start, self.end)

    def options(self, variable):
        """What a variable offers."""
        return set(self.server.label_values(self.fill(VARIABLES[variable]["query"]["query"]), self.start, self.end))

    def panel(self, title, label, reduce=lambda values: values[-1]):
        """The result of each query: {value of the label: last value}."""
        results = [self.query(target["expr"], target["instant"]) for target in PANELS[title]["targets"]]
        found = [{labels.get(label): reduce(values) for labels, values in series} for series in results]
        assert list(map(len, found)) == list(map(len, results)), f"{title}: several series for one {label}"
        return found

    def only(self, title, label, **options):
        """The result of a panel with one query."""
        [found] = self.panel(title, label, **options)
        return found

    def table(self, title):
        """The rows of a panel with transformations, as {column: value}; NaN is left out."""
        panel, rows = PANELS[title], {}
        for target in panel["targets"]:
            for labels, [value] in self.query(target["expr"], instant=True):
                rows.setdefault(tuple(sorted(labels.items())), {**labels})[f"Value #{target['refId']}"] = value
        for step in panel["transformations"]:
            for fields in rows.values():
                TRANSFORMATIONS[step["id"]](fields, step["options"])
        return list(rows.values())

    def number(self, title):
        """What a stat panel shows: a number, or None for "no data"."""
        panel = PANELS[title]
        if "transformations" not in panel:
            return self.only(title, None).get(None)
        column = panel["options"]["reduceOptions"]["fields"].strip("/^$")
        return next((fields.get(column) for fields in self.table(title)), None)

    def annotations(self, name):
        """[(labels, [times in seconds])]."""
        annotation, query = ANNOTATIONS[name], self.fill(ANNOTATIONS[name]["expr"])
        found = self.server.api("query_range", query=query, start=self.start, end=self.end, step=1)["result"]
        if annotation.get("useValueForTime"):
            return [(one["metric"], sorted({float(text) / 1000 for _, text in one["values"]})) for one in found]
        return [(one["metric"], [time for time, text in one["values"] if float(text) > 0]) for one in found]

    def exemplars(self, title):
        """{task id: value} of the queries of this panel that ask for exemplars."""
        queries = [self.fill(target["expr"]) for target in PANELS[title]["targets"] if target.get("exemplar")]
        found = [
            exemplar
            for query in queries
            for series in self.server.api("query_exemplars", query=query, start=self.start, end=self.end)
            for exemplar in series["exemplars"]
        ]
        return {exemplar["labels"]["task_id"]: float(exemplar["value"]) for exemplar in found}

    def missing(self):
        """Queries of panels without data, or without a label of their legend: {panel: [queries]}."""
        missing = {}
        for title, panel in PANELS.items():
            for target in panel["targets"]:
                found = self.query(target["expr"], target["instant"])
                legend = set(re.findall(r"{{(\w+)}}", target["legendFormat"])) - {"broker"}
                if not found or not all(legend <= set(labels) for labels, _ in found):
                    missing.setdefault(title, []).append(target["expr"])
        return missing


def calculate(fields, options):
    """Grafana leaves the fields unchanged if an operand is missing."""
    left, right = (fields.get(options["binary"][side]) for side in ("left", "right"))
    if left is not None and right is not None:
        result = OPERATORS[options["binary"]["operator"]](left, right)
        if not math.isnan(result):
            fields[options["alias"]] = result


def organize(fields, options):
    kept = {name: value for name, value in fields.items() if not options["excludeByName"].get(name)}
    fields.clear()
    fields.update((options["renameByName"].get(name, name), value) for name, value in kept.items())


#: `merge` joins the queries' results by their labels, which `Viewer.table` has done before the first step.
TRANSFORMATIONS = {"merge": lambda fields, options: None, "calculateField": calculate, "organize": organize}
