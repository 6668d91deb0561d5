#!/usr/bin/env bash
# Runs the broker tests in full on every release of every server, and the Prometheus tests on every Prometheus, and prints
# the table of results for docs/compatibility.md: tests/matrix.sh [pytest arguments]. Takes about half an hour.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
table=$PWD/target/matrix.md
rm -f "$table"
status=0
tests/run.sh --all-servers --matrix "$table" "$@" || status=$?
cat "$table"
exit $status
