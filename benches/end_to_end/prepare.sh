# shellcheck shell=bash
# Sourced by run.sh, growth.sh and idle.sh. Installs and builds what they need; takes a second if everything is up to date.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
env=$root/target/bench-env
python=$root/target/test-env/flower/bin/python # Flower 2.2.0, and the dependencies of tests/support
exec </dev/null

die() { echo "$*" >&2; exit 1; }

command -v cargo >/dev/null || die "cargo not found: install a Rust toolchain from https://rustup.rs"
"$root/tests/setup.sh"

# A separate environment, because celery-exporter's requirements conflict with Flower's. Only celery-exporter's packaging
# restricts the Python version, so pip ignores it.
stamp=$( { "$python" --version; cat "$here/requirements.txt"; } | sha256sum | cut -c1-64)
if [ "$(cat "$env/stamp" 2>/dev/null)" != "$stamp" ]; then
    echo "celery-exporter: $env"
    rm -rf "$env"
    /usr/bin/python3 -m venv "$env"
    "$env/bin/python" -m pip --disable-pip-version-check --quiet install --no-deps --ignore-requires-python \
        -r "$here/requirements.txt" || die "pip failed to install celery-exporter; is the package index reachable?"
    echo "$stamp" > "$env/stamp"
fi

build() { nice cargo build --quiet --release --locked "$@"; }
if [ -z "${FLOWER_EXPORTER_BIN:-}" ]; then
    echo "building flower-exporter (several minutes the first time)"
    build --manifest-path "$root/Cargo.toml" --target-dir "$root/target"
    export FLOWER_EXPORTER_BIN=$root/target/release/flower-exporter
fi
echo "building the baseline consumer"
build --manifest-path "$here/bare/Cargo.toml" --target-dir "$root/target/bench-bare"
