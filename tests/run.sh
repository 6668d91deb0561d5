#!/usr/bin/env bash
# All tests: tests/run.sh [pytest arguments, for example: -k parity --parity-seeds 100]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null

tests/setup.sh
echo "== library, unit and documentation tests"
cargo test --locked
echo "== system tests: real brokers, real workers, Flower beside us"
cargo build --locked
cd tests
exec ../target/test-env/flower/bin/python -B -m pytest "$@"
