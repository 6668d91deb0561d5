"""The files of deploy/prometheus, loaded, checked and tested by Prometheus' own tools."""

import json
import re
import shutil

import pytest

from support.processes import ROOT, directory
from support.prometheus import FILES, RULES, Prometheus, promtool



def rule_tests(release):
    """The test files that a release can read: native histograms are new in Prometheus 3."""
    names = sorted(path.name for path in (RULES / "tests").iterdir())
    return [name for name in names if name != "native.test.yml" or not release.version.startswith("2.")]


@pytest.fixture(scope="module")
def groups(prometheus_release):
    """All rule groups, as a server has loaded them."""
    server = Prometheus(release=prometheus_release).ready()
    yield {group["file"].rpartition("/")[2]: group for group in server.api("rules")["groups"]}
    server.kill()


@pytest.fixture(scope="module")
def alerts(groups):
    return {rule["name"]: rule for group in groups.values() for rule in group["rules"] if rule["type"] == "alerting"}


@pytest.mark.parametrize("name", sorted(path.name for path in RULES.glob("prometheus*.yml")))
def test_example_configs_are_valid(prometheus_release, name):
    """They include all rule files, which are also valid."""
    done = promtool(prometheus_release, "check", "config", name, cwd=RULES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line.removeprefix("Checking ") for line in done.stdout.splitlines() if "Checking" in line} == {name, *FILES}


def test_rules_pass_promtool(prometheus_release):
    done = promtool(prometheus_release, "check", "rules", "--lint-fatal", *FILES, cwd=RULES)
    assert done.returncode == 0, done.stdout + done.stderr
    done = promtool(prometheus_release, "test", "rules", *(f"tests/{name}" for name in rule_tests(prometheus_release)), cwd=RULES)
    assert done.returncode == 0, done.stdout + done.stderr


def test_expressions_are_short_and_plain(groups):
    """Nothing reconstructs the first events of a series: `metrics.zero_first` or start timestamps make them visible."""
    for rule in (rule for group in groups.values() for rule in group["rules"]):
        assert len(rule["query"]) <= 400, rule["name"]
        assert "unless flower_events_total offset" not in rule["query"] and "up offset" not in rule["query"]


def test_every_alert_is_tested_firing_and_not_firing(prometheus_release, groups, alerts):
    """By mutation: an alert that never fires fails its tests, and so does an alert that always fires."""

    def failing(mutate):
        home = directory("rules")
        shutil.copytree(RULES / "tests", home / "tests")
        for name, group in groups.items():
            rules = [
                {"record": rule["name"], "expr": rule["query"], "labels": rule.get("labels", {})}
                if rule["type"] == "recording"
                else {"alert": rule["name"], "labels": rule["labels"], "annotations": rule["annotations"], **mutate(rule)}
                for rule in group["rules"]
            ]
            (home / name).write_text(json.dumps({"groups": [{"name": group["name"], "rules": rules}]}))
        done = promtool(prometheus_release, "test", "rules", *rule_tests(prometheus_release), cwd=home / "tests")
        return set(re.findall(r"alertname: (\w+), time", done.stdout + done.stderr))

    def same(rule):
        return {"expr": rule["query"], "for": f"{rule['duration']}s"}

    def never_firing(rule):
        return {**same(rule), "expr": f"({rule['query']}) unless on () vector(1)"}

    def always_firing(rule):
        """Adds an alert to cases that expect none. Cases that expect an alert are not changed."""
        return {**same(rule), "expr": f"({rule['query']}) or on () vector(1)"}

    assert failing(same) == set()
    assert set(alerts) - failing(never_firing) == set()
    assert set(alerts) - failing(always_firing) == set()


def test_every_alert_has_annotations_and_a_runbook_entry(alerts):
    """Each alert has a summary, a description, a severity and a runbook entry with a remedy. Each entry has an alert."""
    runbook = (ROOT / "docs/alerting.md").read_text().split("\n## Runbook\n")[1]
    entries = dict(re.findall(r"^### (\w+)$(.*?)(?=^##|\Z)", runbook, re.M | re.S))
    assert set(entries) == set(alerts)
    for name, rule in alerts.items():
        annotations = rule["annotations"]
        assert set(annotations) == {"summary", "description", "dashboard_url", "runbook_url"}, name
        assert annotations["runbook_url"].endswith(f"/flower-exporter#{name.lower()}")
        assert rule["labels"]["severity"] in ("warning", "critical"), name
        assert "**Means**" in entries[name] and "**Look at**" in entries[name] and "**do**" in entries[name].lower()
