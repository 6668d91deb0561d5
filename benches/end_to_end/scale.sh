#!/usr/bin/env bash
# Measures what a large Celery deployment costs a real Prometheus, with several settings: benches/end_to_end/scale.sh --help
set -euo pipefail
command="benches/end_to_end/scale.sh${*:+ $*}"
. "$(dirname "${BASH_SOURCE[0]}")/prepare.sh"
COMMAND=$command exec "$python" -B "$here/scale.py" "$@"
