"""A certificate authority, made with the openssl command."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

from .processes import directory

CONFIG = """
[req]
distinguished_name = dn
[dn]
[ca]
default_ca = own
[own]
database = index.txt
new_certs_dir = .
rand_serial = yes
unique_subject = no
default_md = sha256
policy = any
[any]
commonName = supplied
"""
KEY = "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"


class Authority:
    """`file` is its certificate. It issues pairs of certificate and key files that every user may read."""

    def __init__(self, name="ca"):
        self.dir = directory("certificates")
        (self.dir / "config").write_text(CONFIG)
        (self.dir / "index.txt").touch()
        self.file = self.dir / "ca.pem"
        self._openssl("req", "-x509", *KEY, "-keyout", "ca.key", "-out", self.file, "-days", 2, "-subj", f"/CN={name}",
                      "-addext", "basicConstraints=critical,CA:TRUE")

    def issue(self, name, alternative="IP:127.0.0.1,DNS:localhost", expired=False, is_ca=False):
        """The files `cert` and `key`; `both` contains the two."""
        files = SimpleNamespace(**{part: self.dir / f"{name}-{part}.pem" for part in ("cert", "key", "both")})
        self._openssl("req", *KEY, "-keyout", files.key, "-out", "request", "-subj", f"/CN={name}")
        (self.dir / "extensions").write_text(f"basicConstraints = critical,CA:{str(is_ca).upper()}\nsubjectAltName = {alternative}\n")
        end = ("-enddate", "20200102000000Z") if expired else ("-days", 2)
        self._openssl("ca", "-batch", "-notext", "-in", "request", "-out", files.cert, "-cert", self.file, "-keyfile", "ca.key",
                      "-startdate", "20200101000000Z", *end, "-extfile", "extensions")
        files.both.write_bytes(files.cert.read_bytes() + files.key.read_bytes())
        for path in vars(files).values():
            path.chmod(0o644)
        return files

    def self_signed(self, name, alternative="IP:127.0.0.1", expired=False, version=3, is_ca=True):
        """A certificate that is its own CA, as `openssl req -x509` makes it. `alternative` None: only the common name."""
        files = SimpleNamespace(cert=self.dir / f"{name}-own.pem", key=self.dir / f"{name}-own.key")
        self._openssl("req", *KEY, "-keyout", files.key, "-out", "request", "-subj", f"/CN={name}")
        names = f"subjectAltName = {alternative}\n" if alternative else ""
        (self.dir / "extensions").write_text(f"basicConstraints = critical,CA:{str(is_ca).upper()}\n{names}")
        if version == 1:
            self._run("x509", "-req", "-in", "request", "-signkey", files.key, "-out", files.cert, "-days", 2)
        else:
            end = ("-enddate", "20200102000000Z") if expired else ("-days", 2)
            self._openssl("ca", "-batch", "-notext", "-selfsign", "-in", "request", "-out", files.cert, "-keyfile", files.key,
                          "-startdate", "20200101000000Z", *end, "-extfile", "extensions")
        for path in vars(files).values():
            path.chmod(0o644)
        return files

    def _openssl(self, command, *args):
        self._run(command, "-config", "config", *args)

    def _run(self, command, *args):
        done = subprocess.run(["openssl", command, *map(str, args)], cwd=self.dir, capture_output=True, text=True,
                              stdin=subprocess.DEVNULL, timeout=30)
        assert done.returncode == 0, done.stderr


def junk(text="not PEM"):
    path = Path(directory("junk")) / "junk.pem"
    path.write_text(text)
    return path
