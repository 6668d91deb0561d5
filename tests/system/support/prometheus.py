"""A Prometheus server, and the queries that a Grafana panel sends to it."""

import json
import math
import re
import subprocess
import urllib.error
import urllib.parse
import urllib.request

from . import releases
from .processes import ROOT, Process, directory, free_port, wait_until

RULES = ROOT / "deploy/prometheus"
FILES = ["flower.rules.yml", "flower.alerts.yml", "flower-self.alerts.yml"]


def seconds(duration):
    """The seconds of a duration such as 1m30s."""
    return sum(int(number) * {"s": 1, "m": 60, "h": 3600}[unit] for number, unit in re.findall(r"(\d+)([smh])", duration))


def promtool(release, *arguments, **options):
    """The finished run of a release's `promtool`."""
    command = [str(part) for part in release.command("promtool", *arguments)]
    return subprocess.run(command, text=True, capture_output=True, timeout=60, **options)


class Prometheus(Process):
    """Scrapes these local ports and evaluates the shipped rules, both once in every `interval`."""

    def __init__(
        self, ports=(), rules=FILES, job="flower-exporter", release=None, features=(), scrape=None, web_config=None, interval="1s"
    ):
        release = release or releases.own("prometheus")
        self.port = free_port()
        home = directory("prometheus")
        config = home / "prometheus.yml"
        targets = [{"targets": [f"127.0.0.1:{port}" for port in ports]}]
        scrape = {"job_name": job, "static_configs": targets, **(scrape or {})}
        config.write_text(
            json.dumps(
                {
                    "global": {"scrape_interval": interval, "evaluation_interval": interval},
                    "rule_files": [str(RULES / name) for name in rules],
                    "scrape_configs": [scrape],
                }
            )
        )
        super().__init__(
            "prometheus",
            release.command(
                "prometheus",
                f"--config.file={config}",
                f"--storage.tsdb.path={home / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{self.port}",
                *([f"--enable-feature={','.join(features)}"] if features else []),
                *([f"--web.config.file={web_config}"] if web_config else []),
            ),
            cwd=home,
        )

    def ready(self):
        def answers():
            assert self.running, self.log()
            try:
                return self.get("/-/ready")
            except OSError:
                return False

        wait_until(answers, 30, lambda: f"prometheus is ready\n{self.log()}")
        return self

    def get(self, path, **parameters):
        url = f"http://127.0.0.1:{self.port}{path}?{urllib.parse.urlencode(parameters, doseq=True)}"
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.read()

    def api(self, path, **parameters):
        try:
            return json.loads(self.get(f"/api/v1/{path}", **parameters))["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {parameters}: {error.read().decode()}") from error

    def instant(self, query, at=None):
        """[(labels, value)], without NaN."""
        found = self.api("query", query=query, **({"time": at} if at else {}))["result"]
        return [
            (series["metric"], value) for series in found if not math.isnan(value := float(series["value"][1]))
        ]

    def wait_for_value(self, query, value, deadline=20):
        """Waits until the first series of the query has this value."""
        wait_until(lambda: [found for _, found in self.instant(query)[:1]] == [value], deadline, f"{query} is {value}")

    def range(self, query, start, end, step=1):
        """[(labels, [values])], without NaN and without series that contain only NaN."""
        found = self.api("query_range", query=query, start=start, end=end, step=step)["result"]
        series = [
            (one["metric"], [value for _, text in one["values"] if not math.isnan(value := float(text))])
            for one in found
        ]
        return [(labels, values) for labels, values in series if values]

    def label_values(self, query, start, end):
        """The result of a variable's query `label_values(SELECTOR, LABEL)`."""
        selector, label = re.fullmatch(r"label_values\((.*), *(\w+)\)", query).groups()
        return self.api(f"label/{label}/values", **{"match[]": selector}, start=start, end=end)

    def rules(self):
        """Every rule of every file, as Prometheus has loaded it."""
        return [rule for group in self.api("rules")["groups"] for rule in group["rules"]]
