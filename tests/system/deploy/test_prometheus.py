"""What deploy/prometheus ships: read, checked and tested by Prometheus' own tools."""

import json
import re
import shutil

import pytest

from support.processes import directory
from support.prometheus import FILES, RULES, Prometheus, promtool

TESTS = sorted(path.name for path in (RULES / "tests").iterdir())


@pytest.fixture(scope="module")
def groups(prometheus_release):
    """All rule groups, as a server has read them."""
    server = Prometheus(release=prometheus_release).ready()
    yield {group["file"].rpartition("/")[2]: group for group in server.api("rules")["groups"]}
    server.kill()


@pytest.fixture(scope="module")
def alerts(groups):
    return {rule["name"]: rule for group in groups.values() for rule in group["rules"] if rule["type"] == "alerting"}


@pytest.mark.parametrize("name", sorted(path.name for path in RULES.glob("prometheus*.yml")))
def test_config(prometheus_release, name):
    """The examples are valid, and so are the rules they name: all that there are."""
    done = promtool(prometheus_release, "check", "config", name, cwd=RULES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line.removeprefix("Checking ") for line in done.stdout.splitlines() if "Checking" in line} == {name, *FILES}


def test_rules(prometheus_release):
    done = promtool(prometheus_release, "check", "rules", "--lint-fatal", *FILES, cwd=RULES)
    assert done.returncode == 0, done.stdout + done.stderr
    done = promtool(prometheus_release, "test", "rules", *(f"tests/{name}" for name in TESTS), cwd=RULES)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_firing_and_not_firing(prometheus_release, groups, alerts):
    """By mutation: alerts that never fire fail their tests, each by name, and so do those that fire when they need not."""

    def failing(mutate):
        home = directory("rules")
        shutil.copytree(RULES / "tests", home / "tests")
        for name, group in groups.items():
            rules = [
                {"record": rule["name"], "expr": rule["query"]}
                if rule["type"] == "recording"
                else {"alert": rule["name"], "labels": rule["labels"], "annotations": rule["annotations"], **mutate(rule)}
                for rule in group["rules"]
            ]
            (home / name).write_text(json.dumps({"groups": [{"name": group["name"], "rules": rules}]}))
        done = promtool(prometheus_release, "test", "rules", *TESTS, cwd=home / "tests")
        return set(re.findall(r"alertname: (\w+), time", done.stdout + done.stderr))

    def same(rule):
        return {"expr": rule["query"], "for": f"{rule['duration']}s"}

    def mute(rule):
        return {**same(rule), "expr": f"({rule['query']}) unless on () vector(1)"}

    def shrill(rule):
        """There is one more alert where there was none; cases that expect an alert still get it alone."""
        return {**same(rule), "expr": f"({rule['query']}) or on () vector(1)"}

    assert failing(same) == set()
    assert set(alerts) - failing(mute) == set()
    assert set(alerts) - failing(shrill) == set()


def test_annotations_and_runbook(alerts):
    """Each alert has a summary, a description, a severity, and a runbook entry with what to do; no entry lacks an alert."""
    entries = dict(re.findall(r"^### (\w+)$(.*?)(?=^##|\Z)", (RULES / "RUNBOOK.md").read_text(), re.M | re.S))
    assert set(entries) == set(alerts)
    for name, rule in alerts.items():
        annotations = rule["annotations"]
        assert set(annotations) == {"summary", "description", "runbook_url"}, name
        assert annotations["runbook_url"].endswith(f"/flower-exporter#{name.lower()}")
        assert rule["labels"]["severity"] in ("warning", "critical"), name
        assert "**Means**" in entries[name] and "**Look at**" in entries[name] and "**do**" in entries[name].lower()
