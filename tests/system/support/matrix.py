"""The table of releases and test files: how many tests of each file passed on each release, and which did not."""

import collections
import datetime
from pathlib import Path

from . import releases


class Matrix:
    """A pytest plugin that writes the table as Markdown at the end of the run."""

    def __init__(self, path):
        self.path = Path(path).resolve()
        self.cells = collections.defaultdict(collections.Counter)
        self.notes = collections.defaultdict(set)

    def pytest_runtest_logreport(self, report):
        outcome = self.outcome(report)
        if outcome is None:
            return
        file = report.nodeid.partition("::")[0].rpartition("/")[2]
        for name, release in report.user_properties:
            if name == "release":
                self.cells[file, release][outcome] += 1
                if outcome != "passed":
                    self.notes[file, outcome, reason(report)].add(release)

    @staticmethod
    def outcome(report):
        """The outcome of a test, or of its setup or teardown if that one decides."""
        if hasattr(report, "wasxfail"):
            return "expected failure" if report.skipped else "unexpected pass"
        if report.when == "call" or report.outcome != "passed":
            return report.outcome
        return None

    def pytest_sessionfinish(self):
        order = [release.title for family in ("rabbitmq", "redis", "prometheus") for release in columns(family)]
        titles = [title for title in order if any(release == title for _, release in self.cells)]
        lines = [
            f"Run on {datetime.date.today():%Y-%m-%d}. A number counts the tests that passed.",
            "",
            f"| server | {' | '.join(files := sorted({file for file, _ in self.cells}))} |",
            "| --- " * (len(files) + 1) + "|",
            *(f"| {title} | {' | '.join(self.cell(file, title) for file in files)} |" for title in titles),
        ]
        if self.notes:
            lines += ["", "What did not pass:", "", "| test file | result | reason | servers |", "| --- | --- | --- | --- |"]
        for (file, outcome, why), affected in sorted(self.notes.items()):
            servers = "; ".join(title for title in order if title in affected)
            lines.append(f"| {file} | {outcome} | {why} | {servers} |")
        self.path.write_text("\n".join(lines) + "\n")

    def cell(self, file, title):
        counts = self.cells.get((file, title))
        if not counts:
            return "–"
        others = [f"{number} {outcome}" for outcome, number in sorted(counts.items()) if outcome != "passed"]
        return ", ".join([str(counts["passed"]), *others])


def columns(family):
    found = releases.releases()[family]
    return sorted([*found, *releases.with_quorum(found)], key=lambda release: (release.product, release.number, release.quorum))


def reason(report):
    if hasattr(report, "wasxfail"):
        return report.wasxfail.removeprefix("reason: ")
    if report.skipped:
        return report.longrepr[2].removeprefix("Skipped: ")
    return (getattr(report.longrepr, "reprcrash", None) or report).message.splitlines()[0][:100].replace("|", "\\|")
