"""The resources of a process: memory, CPU, descriptors and threads."""

import os
import re
from pathlib import Path

MIB = 1 << 20


def peak_memory(exporter):
    """The peak resident memory in bytes."""
    status = Path(f"/proc/{exporter.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10


def cpu_seconds(exporter):
    fields = Path(f"/proc/{exporter.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def descriptors_and_threads(exporter):
    """The numbers of open descriptors and threads."""
    return len(os.listdir(f"/proc/{exporter.pid}/fd")), len(os.listdir(f"/proc/{exporter.pid}/task"))
