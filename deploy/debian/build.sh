#!/usr/bin/env bash
# Builds the Debian package: deploy/debian/build.sh [cargo profile, else release]. Its path is the last line printed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec </dev/null
profile=${1:-release}
made=target/debian-assets

say() { printf '== %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
need() { command -v "$1" >/dev/null || die "$1 is missing: $2"; }
need cargo "install a Rust toolchain, https://rustup.rs"
need cargo-deb "cargo install --locked cargo-deb"
need dpkg-shlibdeps "apt-get install dpkg-dev"

say "the binary ($profile; a cold release build takes minutes)"
cargo build --locked --profile "$profile"
say "manual page and completions"
cargo run --quiet --locked --example manual -- "$made"
# With the unit, the URL comes from a file of its own: a second place would only be overruled.
grep -q '^url = ' flower-exporter.toml.example || die "flower-exporter.toml.example: no line begins with 'url = '"
sed 's|^url = .*|# Here: in /etc/flower-exporter/broker-url, which the systemd unit hands over as a credential.|' \
    flower-exporter.toml.example > "$made/flower-exporter.toml"
say "the package"
cargo deb --locked --no-build --profile "$profile"
