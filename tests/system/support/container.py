"""The container image, built by podman on base images that contain this machine's own files, since none can be pulled."""

import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

from .exporter import Exporter
from .processes import ROOT, Process, directory, free_port, reaper

CONTAINERFILE = ROOT / "deploy/container/Containerfile"

#: The dynamic loader is the only program that the runtime base has to run.
LOADER = "/lib64/ld-linux-x86-64.so.2" if os.uname().machine == "x86_64" else "/lib/ld-linux-aarch64.so.1"

#: Podman raises limits, which not every machine lets root do.
RUN = ["--network", "host", "--no-healthcheck", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"]


def output(*argv):
    return subprocess.run(argv, cwd=ROOT, check=True, capture_output=True, text=True).stdout


class Podman:
    """A podman with a separate store that is deleted after the tests."""

    def __init__(self):
        self.home = directory("podman")
        self.env = {"TMPDIR": str(self.home)}
        self.options = ["podman", "--root", self.home / "store", "--runroot", self.home / "run"]
        # crun does not support hybrid cgroups.
        self.options += ["--tmpdir", self.home / "tmp", "--storage-driver", "overlay", "--runtime", "runc"]
        self.options += ["--cgroup-manager", "cgroupfs", "--log-level", "error"]

    def run(self, *args, deadline=30):
        """The finished command."""
        argv, env = [*map(str, [*self.options, *args])], {**os.environ, **self.env}
        return subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=deadline)

    def __call__(self, *args):
        """The command's output; it must succeed."""
        done = self.run(*args)
        assert done.returncode == 0, f"podman {args[0]}: {done.stderr}"
        return done.stdout

    def build(self, name, file, context, *options, deadline=60):
        """Builds an image from this Containerfile. Its commands run in a chroot, which works where containers do not."""
        options = ["--isolation", "chroot", "--format", "docker", "--tag", name, "--file", file, *options]
        build = Process("podman-build", [*self.options, "build", *options, context], env=self.env)
        code = build.wait(deadline)
        build.kill()
        assert code == 0, build.log()

    def base(self, name, tree, *lines):
        (tree.parent / f"{name}.Containerfile").write_text("\n".join(["FROM scratch", "COPY . /", *lines]))
        self.build(name, tree.parent / f"{name}.Containerfile", tree)

    def runtime_base(self):
        """The same Debian files as distroless/cc: C library, libgcc_s and certificates, but no shell."""
        tree = self.home / "runtime"
        architecture = output("dpkg", "--print-architecture").strip()
        packages = [f"{package}:{architecture}" for package in ("libc6", "libgcc-s1")]
        files = [Path(line) for line in output("dpkg-query", "-L", *packages).splitlines() if line.startswith("/")]
        for file in [*files, Path("/etc/ssl/certs/ca-certificates.crt")]:
            if file.is_file():
                copy = tree / file.relative_to("/")
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, copy, follow_symlinks=False)
        (tree / "var/lib").mkdir(parents=True)
        (tree / "etc/passwd").write_text("root:x:0:0::/root:/sbin/nologin\nnonroot:x:65532:65532::/:/sbin/nologin\n")
        self.base("runtime", tree)

    def build_base(self):
        """The image that `cargo` runs in, and the mounts that provide this machine's compiler and Rust.

        Dependencies that are already built come from target/ through an overlay. The exporter itself is compiled
        again without optimization, to save time.
        """
        tree = self.home / "build"
        for name in ("bin", "lib", "lib64", "sbin"):
            (tree / "usr").mkdir(parents=True, exist_ok=True)
            (tree / name).symlink_to(f"usr/{name}")
        (tree / "tmp").mkdir()
        cargo = Path(os.environ.get("CARGO_HOME") or Path.home() / ".cargo")
        rust = output("rustc", "--print", "sysroot").strip()
        config = tree / cargo.relative_to("/") / "config.toml"
        config.parent.mkdir(parents=True)
        config.write_text("[profile.dev.package.flower-exporter]\nopt-level = 0\ndebug = false\n")
        paths = f"PATH={rust}/bin:/usr/bin:/bin CARGO_HOME={cargo} CARGO_TARGET_DIR={ROOT / 'target'}"
        self.base("build", tree, f"ENV {paths} CARGO_NET_OFFLINE=true")
        system = ["/usr/bin", "/usr/lib", "/usr/lib64", "/usr/include", "/etc/alternatives", rust]
        mounts = [f"{path}:{path}:ro" for path in system if os.path.exists(path)]
        mounts += [f"{path}:{path}:O" for path in (cargo / "registry", ROOT / "target")]
        return [part for mount in mounts for part in ("--volume", mount)]

    def unavailable(self):
        """The reason why this machine cannot build and run containers, or None. Builds the runtime base."""
        if os.geteuid() != 0:
            return "not root: only root can mount the files that the image is built from"
        if not shutil.which("rustc"):
            return "no Rust toolchain"
        if (done := self.run("info")).returncode != 0:
            return f"podman does not work here: {done.stderr.strip()}"
        self.runtime_base()
        done = self.run("run", "--rm", *RUN, "--read-only", "--cap-drop", "all", "runtime", LOADER, "--version")
        return None if done.returncode == 0 else f"podman cannot run containers here: {done.stderr.strip()}"

    def image(self, **arguments):
        """Builds the shipped image from the shipped Containerfile."""
        arguments = {"BUILD_IMAGE": "localhost/build", "BASE_IMAGE": "localhost/runtime", "PROFILE": "dev", **arguments}
        options = [part for key, value in arguments.items() for part in ("--build-arg", f"{key}={value}")]
        self.build("flower-exporter", CONTAINERFILE, ROOT, *options, *self.build_base(), deadline=240)

    def close(self):
        """Removes all containers and mounts, also those of a failed build."""
        self.run("rm", "--all", "--force", "--time", "0")
        mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        for path in reversed([path for path in mounted if path.startswith(f"{self.home}/")]):
            subprocess.run(["umount", path], check=True)

    def inspect(self, name):
        return json.loads(self("inspect", name))[0]

    def files(self, image):
        """All files of an image by path."""
        archive = self.home / f"{image}.tar"
        self("create", "--name", f"{image}-files", image, "nothing")
        self("export", "--output", archive, f"{image}-files")
        self("rm", f"{image}-files")
        with tarfile.open(archive) as content:
            return {member.name: member for member in content if member.name != "."}


class Container(Exporter):
    """The exporter in a container, started as documented and configured by environment variables."""

    def __init__(self, podman, broker, settings=None, *, volumes=()):
        self.podman, self.port, self.inner = podman, free_port(), None
        self.container = f"exporter-{self.port}"
        settings = {"BROKER__URL": broker.url, "HTTP__LISTEN": f"127.0.0.1:{self.port}", **(settings or {})}
        options = [*RUN, "--read-only", "--cap-drop", "all", "--security-opt", "no-new-privileges", "--rm"]
        options += [part for key, value in settings.items() for part in ("--env", f"FLOWER_EXPORTER_{key}={value}")]
        options += [part for volume in volumes for part in ("--volume", volume)]
        argv = [*podman.options, "run", "--name", self.container, *options, "flower-exporter"]
        Process.__init__(self, "container", argv, env=podman.env)

    def ready(self, deadline=20):
        super().ready(deadline)
        self.inner = self.podman.inspect(self.container)["State"]["Pid"]
        assert self.inner
        reaper.send(f"+ {self.inner}")
        return self

    def execute(self, *argv):
        return self.podman.run("exec", self.container, *argv)

    def terminate(self, number=None):
        """Runs `podman stop`, which sends the image's stop signal: exit code 0 before podman would send SIGKILL."""
        if self.running:
            self.podman("stop", "--time", "5", self.container)
            assert self.wait(10) == 0, self.log()
        assert "panicked" not in self.log(), self.log()

    def kill(self):
        self.podman.run("rm", "--force", "--ignore", "--time", "0", self.container)
        super().kill()
        if self.inner:
            reaper.send(f"- {self.inner}")
