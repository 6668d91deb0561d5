#!/usr/bin/env bash
# Measures how the exporter's cost grows, as a table and a plot: benches/end_to_end/growth.sh --help
set -euo pipefail
command="benches/end_to_end/growth.sh${*:+ $*}"
. "$(dirname "${BASH_SOURCE[0]}")/prepare.sh"
COMMAND=$command exec "$python" -B "$here/growth.py" "$@"
