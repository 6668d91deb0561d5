#!/usr/bin/env bash
# Measures the memory of the exporter a minute after a burst of 800,000 events: benches/end_to_end/burst.sh --help
set -euo pipefail
command="benches/end_to_end/burst.sh${*:+ $*}"
. "$(dirname "${BASH_SOURCE[0]}")/prepare.sh"
COMMAND=$command exec "$python" -B "$here/burst.py" "$@"
