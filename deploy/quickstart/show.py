"""Reads /metrics once and shows the six metrics.

    show.py URL         a compact view, redrawn in place on a terminal
    show.py URL --once  the samples as served, without the buckets; if a metric
                        is missing, prints its name and exits with code 1
"""

import re
import shutil
import signal
import sys
import time
import urllib.request
from collections import defaultdict

SERIES = [
    "flower_events_total",
    "flower_task_runtime_seconds_count",
    "flower_task_prefetch_time_seconds",
    "flower_worker_prefetched_tasks",
    "flower_worker_online",
    "flower_worker_number_of_currently_executing_tasks",
]
RUNTIME_SUM = "flower_task_runtime_seconds_sum"
SAMPLE = re.compile(r"(flower_\w+)\{(.*)\} (\S+)")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def compact(samples):
    """One line per metric and task (or worker): one value, or one per event type."""
    for name in SERIES:
        lines = defaultdict(list)
        for sample, labels, value in samples:
            if sample == name:
                kind = labels.get("type", "").removeprefix("task-")
                lines[labels.get("task", labels["worker"])].append(f"{kind} {float(value):.4g}".strip())
        yield name + ("" if lines else "  (no samples yet)")
        if name == SERIES[0]:
            yield from (f"    {key:<12} {', '.join(values)}" for key, values in sorted(lines.items()))
        elif lines:
            yield "    " + "   ".join(f"{key} {', '.join(values)}" for key, values in sorted(lines.items()))


def main(url, once):
    for end in (signal.SIGINT, signal.SIGPIPE):  # exit without a traceback
        signal.signal(end, signal.SIG_DFL)
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            found = [(line, SAMPLE.fullmatch(line)) for line in response.read().decode().splitlines()]
    except OSError as error:
        sys.exit(f"failed to read {url}: {error}")
    samples = [(m[1], dict(LABEL.findall(m[2])), m[3]) for _, m in found if m]
    if once:
        if missing := [name for name in SERIES if all(name != sample[0] for sample in samples)]:
            sys.exit("missing: " + " ".join(missing))
        print(*(line for line, m in found if m and m[1] in [*SERIES, RUNTIME_SUM]), sep="\n")
        return
    view = [f"{url}   {time.strftime('%X')}   Ctrl-C to stop", "", *compact(samples), ""]
    if sys.stdout.isatty():
        columns, rows = shutil.get_terminal_size()
        view = ["\033[H\033[J" + view[0], *(line[:columns] for line in view[1 : rows - 1])]
    print("\n".join(view), flush=True)


main(sys.argv[1], "--once" in sys.argv)
