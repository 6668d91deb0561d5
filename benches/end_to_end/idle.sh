#!/usr/bin/env bash
# Measures what an idle exporter costs, on Redis and RabbitMQ: benches/end_to_end/idle.sh --help
set -euo pipefail
command="benches/end_to_end/idle.sh${*:+ $*}"
. "$(dirname "${BASH_SOURCE[0]}")/prepare.sh"
COMMAND=$command exec "$python" -B "$here/idle.py" "$@"
