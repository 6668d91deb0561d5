#!/usr/bin/env bash
# Compares the exporter with Flower, celery-exporter and a baseline consumer, on Redis and RabbitMQ:
# benches/end_to_end/run.sh --help
set -euo pipefail
command="benches/end_to_end/run.sh${*:+ $*}"
. "$(dirname "${BASH_SOURCE[0]}")/prepare.sh"
COMMAND=$command exec "$python" -B "$here/bench.py" "$@"
