# shellcheck shell=bash
# Sourced by run.sh and growth.sh: installs and builds what they need. With nothing to do it takes a second.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
env=$root/target/bench-env
python=$root/target/test-env/flower/bin/python # Flower 2.2.0, and what the support of the tests needs
exec </dev/null

die() { echo "$*" >&2; exit 1; }

command -v cargo >/dev/null || die "no cargo: install a Rust toolchain, https://rustup.rs"
"$root/tests/setup.sh"

# celery-exporter's requirements contradict Flower's: an environment of its own. The bound on Python is its packager's.
stamp=$( { "$python" --version; cat "$here/requirements.txt"; } | sha256sum | cut -c1-64)
if [ "$(cat "$env/stamp" 2>/dev/null)" != "$stamp" ]; then
    echo "celery-exporter: $env"
    rm -rf "$env"
    /usr/bin/python3 -m venv "$env"
    "$env/bin/python" -m pip --disable-pip-version-check --quiet install --no-deps --ignore-requires-python \
        -r "$here/requirements.txt" || die "pip could not install it; is the package index reachable?"
    echo "$stamp" > "$env/stamp"
fi

build() { nice cargo build --quiet --release --locked "$@"; }
if [ -z "${FLOWER_EXPORTER_BIN:-}" ]; then
    echo "building flower-exporter (some minutes the first time)"
    build --manifest-path "$root/Cargo.toml" --target-dir "$root/target"
    export FLOWER_EXPORTER_BIN=$root/target/release/flower-exporter
fi
echo "building the bare loop"
build --manifest-path "$here/bare/Cargo.toml" --target-dir "$root/target/bench-bare"
