"""Renders the results as Markdown."""

import os
import platform
import re
import subprocess
import time
from pathlib import Path

from support.exporter import BINARY

from subjects import SUBJECTS, median

RATIOS = [("flower", "ours"), ("celery-exporter", "ours"), ("ours", "bare"), ("ours", "floor")]
#: Names in the headings of the ratios.
SHORT = {"ours": "exporter", "bare": "baseline"}
#: (measure, key, format, whether a ratio is meaningful)
ROWS = [
    ("CPU per event, 5,000 events/s, µs", "trickle", "{:.2f}", True),
    ("CPU per event, full backlog, µs", "backlog", "{:.2f}", True),
    ("CPU when idle, ms/s", "idle cpu", lambda value: f"{1000 * value:.2f}", False),
    ("wake-ups when idle, per second", "idle wake-ups", "{:.1f}", False),
    ("highest rate without loss, events/s", "rate", "{:,.0f}", True),
    ("counted of a burst of 80,000", "burst", "{:.1%}", False),
    ("start to first scrape, ms", "start", lambda value: f"{1000 * value:.0f}", True),
    ("memory idle, MiB", "memory idle", "{:.1f}", True),
    ("… after these events, MiB", "memory after", "{:.1f}", True),
    ("… peak, with a backlog, MiB", "memory peak", "{:.1f}", True),
    ("… peak, with scrapes, MiB", "memory scraped", "{:.1f}", True),
    ("tasks held at the default limit", "crowd", "{:,.0f}", False),
    ("… memory, MiB", "crowded memory", "{:.1f}", True),
    ("… CPU per event, full backlog, µs", "crowded", "{:.2f}", True),
    *(
        row
        for kind in ("plain", "gzip")
        for row in [
            (f"scrape, {kind}, ms", f"{kind} time", lambda value: f"{1000 * value:,.1f}", True),
            ("… CPU, ms", f"{kind} cpu", lambda value: f"{1000 * value:,.1f}", True),
            ("… size, KiB", f"{kind} size", lambda value: f"{value / 1024:,.0f}", True),
        ]
    ),
]


def table(title, results):
    names = [*results]
    ratios = [pair for pair in RATIOS if set(pair) <= set(names)]
    titles = [SUBJECTS[name].title for name in names]
    titles += [" ÷ ".join(SHORT.get(name, name) for name in pair) for pair in ratios]
    lines = [f"## {title}\n", row(["", *titles]), row(["---", *["---:"] * len(titles)])]
    counted = [
        f"{result['counted'][0]:,} of {result['sent'][0]:,}" if "sent" in result else "–" for result in results.values()
    ]
    lines.append(row(["events counted of events sent", *counted, *[""] * len(ratios)]))
    for label, key, form, comparable in ROWS:
        if not any(result.get(key) for result in results.values()):
            continue
        write = form.format if isinstance(form, str) else form
        cells = [cell(results[name].get(key), write) for name in names]
        cells = ["≥ " * bool(results[name].get(f"{key} capped")) + text for name, text in zip(names, cells)]
        lines.append(row([label, *cells, *(ratio(results, key, *pair) if comparable else "" for pair in ratios)]))
    return "\n".join(lines) + "\n"


def cell(values, write):
    """The median, and the range if the values differ; or the error."""
    if isinstance(values, str):
        return values
    values = [value for value in values or () if value is not None]
    if not values:
        return "–"
    text = write(median(values))
    low, high = write(min(values)), write(max(values))
    return text if low == high else f"{text} ({low} to {high})"


def ratio(results, key, name, base):
    if base == "floor" and key not in ("trickle", "backlog", "crowded"):
        return ""
    value, reference = (median(results[which].get(key) or ()) for which in (name, base))
    if not value or not reference:
        return ""
    return f"{value / reference:.3g}" if value >= reference else f"1/{reference / value:.3g}"


def row(cells):
    return f"| {' | '.join(cells)} |"


def output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
    except OSError:
        return ""


def head(title):
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    memory = int(re.search(r"\d+", Path("/proc/meminfo").read_text())[0]) / 2**20
    system = platform.freedesktop_os_release()["PRETTY_NAME"]
    exporter = output(str(BINARY), "--version").split("\n")[0]
    redis = re.search(r"v=(\S+)", output("redis-server", "--version"))[1]
    rabbitmq = output("dpkg-query", "-W", "-f", "${Version}", "rabbitmq-server")
    return f"""# {title}

- {time.strftime("%Y-%m-%d %H:%M %Z")}, `{os.environ.get("COMMAND", "")}`
- {cpu}, {os.cpu_count()} cores, {memory:.0f} GiB; load {os.getloadavg()[0]:.1f} before the run
- {system}, Linux {platform.release()}; Redis {redis}, RabbitMQ {rabbitmq}, Python {platform.python_version()}
- {exporter}, {Path(BINARY).stat().st_size / 1e6:.1f} MB

"""


def method(rounds):
    return f"""CPU: user and system time of all threads of the process, minus its idle usage.
Medians, with the range in brackets; {rounds} round(s).
Events arrive in batches of six: sent, received, started and succeeded for every task.
"""


def save(text):
    """Writes benches/RESULTS.md, replacing the section with the same title."""
    path = Path(__file__).resolve().parents[1] / "RESULTS.md"
    title, old = text.split("\n", 1)[0], path.read_text() if path.exists() else ""
    sections = [section for section in re.split(r"^(?=# )", old, flags=re.M) if section]
    places = [place for place, section in enumerate(sections) if section.split("\n", 1)[0] == title]
    if places:
        sections[places[0]] = text
    else:
        sections.append(text)
    path.write_text("\n".join(section.strip() + "\n" for section in sections))


def tail(notes):
    lines = "\n".join(f"- {note}" for note in notes)
    return f"""## Notes

{lines}
- CPU, full backlog: the process is stopped by a signal, the broker receives tens of thousands of events, and the
  process continues.
- Idle: for 60 s, from 30 s after the start, without any worker.
- The floor does only what no exporter can avoid: it receives, decodes base64 on Redis, and looks up each event's task in
  a table of 100,000. On RabbitMQ, it receives with lapin, like the exporter.
- The highest rate is sustained for several seconds: every event is counted, and processing ends within 0.3 s plus a
  tenth of that time. A subject that failed is restarted first.
- Celery's event state, in Flower and celery-exporter, keeps the latest events in a list, four for each task that it
  may hold. Once the list is full, it removes the oldest event from the front, so a longer run costs Flower more per
  event.
- Flower does not support gzip. Its queue on RabbitMQ, like that of celery-exporter, drops messages after 5 s. When
  Redis disconnects it for lagging 32 MB behind, Flower reconnects and loses the events in between; celery-exporter
  exits.
- celery-exporter asks all workers for their queues in every scrape, and waits a second for each of two replies. Its
  event state holds 10,000 tasks. It names a worker by the part after the @, creates every counter for every label
  set, and does not support gzip.
"""
