#!/usr/bin/env bash
# Builds the Debian package: deploy/debian/build.sh [CARGO_PROFILE]. The default profile is release.
# The last line of output is the path of the package.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec </dev/null
profile=${1:-release}
made=target/debian-assets

say() { printf '== %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
need() { command -v "$1" >/dev/null || die "$1 is missing: $2"; }
need cargo "install a Rust toolchain from https://rustup.rs"
need cargo-deb "cargo install --locked cargo-deb"
need dpkg-shlibdeps "apt-get install dpkg-dev"

say "building the binary ($profile; a cold release build takes minutes)"
cargo build --locked --profile "$profile"
say "generating the manual page and shell completions"
cargo run --quiet --locked --example manual -- "$made"
# With the systemd unit, the URL comes from a separate file, which would override a URL set here.
grep -q '^# url = ' flower-exporter.toml.example || die "flower-exporter.toml.example: no line starts with '# url = '"
sed 's|^# url = .*|# Set in /etc/flower-exporter/broker-url, which the systemd unit passes as a credential.|' \
    flower-exporter.toml.example > "$made/flower-exporter.toml"
say "building the package"
cargo deb --locked --no-build --profile "$profile"
