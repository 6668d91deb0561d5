#!/usr/bin/env bash
# Runs all tests: tests/run.sh [pytest arguments, for example: -k parity --parity-seeds 100, or broker/test_tls.py].
# Without root and packaging tools: tests/run.sh -m "not packaging".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null

tests/setup.sh
echo "== library, unit and documentation tests"
cargo test --locked
echo "== system tests: real brokers, real workers, and Flower for comparison"
cargo build --locked
cd tests/system
exec ../../target/test-env/flower/bin/python -B -m pytest "$@"
