"""A clean Debian with systemd as its first process, in which the package is installed."""

import contextlib
import os
import subprocess
from pathlib import Path

from .exporter import Exporter
from .processes import TEST_ENV, Process, directory, wait_until

#: Created once by tests/setup.sh and never changed: each machine writes to a separate overlay.
TREE = TEST_ENV / "debian"
CGROUPS = Path("/sys/fs/cgroup")

#: All namespaces are separate, except for the network: the brokers listen on loopback.
BOOT = """
mount --make-rprivate /
mount -t tmpfs tmpfs "$HOME_DIR"
mkdir "$HOME_DIR"/upper "$HOME_DIR"/work "$HOME_DIR"/root
mount -t overlay -o lowerdir="$TREE",upperdir="$HOME_DIR"/upper,workdir="$HOME_DIR"/work overlay "$HOME_DIR"/root
cd "$HOME_DIR"/root
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount --rbind /sys sys
for group in $OWN_GROUPS; do mount --bind "$group" ."${group%/*}"; done
mount -t tmpfs -o mode=755 tmpfs dev
for node in null zero full random urandom tty; do touch dev/$node; mount --bind /dev/$node dev/$node; done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
mount -t tmpfs -o mode=755 tmpfs run
mount --bind "$SHARED" mnt
mkdir old
pivot_root . old
umount -l old
rmdir old
# systemd does this outside of containers: a child process mounts the credentials.
mount --make-rshared /
exec env -i container=tests PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --unit=basic.target
"""


def hierarchies():
    """The cgroup hierarchies: one of version 2, or those of version 1 that can be joined (cpuset cannot without processors)."""
    if (CGROUPS / "cgroup.controllers").exists():
        return [CGROUPS]
    found = (path.parent for path in CGROUPS.glob("*/cgroup.procs"))
    return [path for path in found if path.name != "cpuset" and not path.is_symlink()]


def unavailable():
    """The reason why this machine cannot run such a Debian, or an empty string."""
    if os.geteuid() != 0:
        return "not root: no mounts, no chroot"
    if not TREE.is_dir():
        return f"no {TREE}: debootstrap failed in tests/setup.sh"
    if not all(os.access(path, os.W_OK) for path in hierarchies()):
        return "cgroups cannot be created here"
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--cgroup", "--uts", "--ipc", "--fork", "true"], capture_output=True, text=True
    )
    return done.stderr.strip()


class Debian(Process):
    """A booted Debian. The directory `shared` is its /mnt."""

    def __init__(self):
        self.home, self.shared = directory("debian"), directory("shared")
        # systemd manages only these cgroups, and they are removed afterwards.
        self.groups = [path / self.home.name for path in hierarchies()]
        join = 'for group in $OWN_GROUPS; do mkdir "$group"; echo $$ > "$group"/cgroup.procs; done'
        env = {"BOOT": BOOT, "HOME_DIR": self.home, "TREE": TREE, "SHARED": self.shared}
        env["OWN_GROUPS"] = " ".join(map(str, self.groups))
        start = f'{join}; exec unshare -mpCui --fork --kill-child bash -euc "$BOOT"'
        super().__init__("debian", ["bash", "-euc", start], env=env)
        try:
            self.first = wait_until(self._first, 10, self.log)
            booted = lambda: self.run("systemctl", "is-system-running").stdout.strip() in ("running", "degraded")  # noqa: E731
            wait_until(booted, 30, lambda: f"systemd has booted\n{self.log()}")
        except BaseException:
            self.kill()
            raise

    def _first(self):
        """The pid of its systemd in the namespace of the tests."""
        assert self.running, self.log()
        for child in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if Path(f"/proc/{child}/comm").read_text() == "systemd\n":
                    return int(child)
        return None

    def run(self, *argv, deadline=60):
        """The finished command, run inside."""
        inside = ["nsenter", "-t", self.first, "-m", "-p", "-C", "-u", "-i", "env", "-i", "LC_ALL=C.UTF-8"]
        inside += ["DEBIAN_FRONTEND=noninteractive", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"]
        return subprocess.run(
            [str(part) for part in [*inside, *argv]],
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=deadline,
        )

    def __call__(self, *argv, **options):
        """The command's output; it must succeed."""
        done = self.run(*argv, **options)
        assert done.returncode == 0, f"{argv}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def put(self, path, text, mode=0o644):
        source = self.shared / "file"
        source.write_text(text)
        self("install", "-D", "-m", f"{mode:o}", "/mnt/file", path)

    def journal(self, *options):
        """The journal lines that these options select, including all that are written so far."""
        self("journalctl", "--sync")
        return self("journalctl", "--no-pager", "-o", "cat", *options)

    def kill(self):
        super().kill()
        for group in self.groups:
            wait_until(lambda: self._removed(group), 10, lambda: [*group.rglob("cgroup.procs")])  # noqa: B023

    @staticmethod
    def _removed(group):
        """Whether the cgroup is removed: exited processes leave it after a moment."""
        for folder, _, _ in os.walk(group, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        return not group.exists()


class Service(Exporter):
    """The exporter as the package's unit runs it."""

    NAME = "flower-exporter.service"

    def __init__(self, debian, port):
        self.debian, self.port = debian, port

    def show(self, *names):
        """Properties of the unit, as text."""
        shown = self.debian("systemctl", "show", *(f"--property={name}" for name in names), self.NAME)
        found = dict(line.split("=", 1) for line in shown.splitlines())
        return found[names[0]] if len(names) == 1 else [found[name] for name in names]

    @property
    def running(self):
        return self.show("ActiveState") in ("active", "activating", "reloading")

    @property
    def main(self):
        """Its pid in the namespace of the tests."""
        inside = self.show("MainPID")
        namespace = os.readlink(f"/proc/{self.debian.first}/ns/pid")
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                in_namespace = os.readlink(process / "ns/pid") == namespace
                if in_namespace and f"NSpid:\t{process.name}\t{inside}\n" in (process / "status").read_text():
                    return int(process.name)
        raise AssertionError(f"no process {inside}\n{self.log()}")

    def log(self):
        return self.debian.journal("-u", self.NAME)

    def own_lines(self, *options):
        """The journal lines of the exporter itself, without those of systemd."""
        return [line.strip() for line in self.debian.journal("-t", "flower-exporter", *options).splitlines()]
