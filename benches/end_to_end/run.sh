#!/usr/bin/env bash
# The exporter beside Flower, celery-exporter and a bare loop, on Redis and RabbitMQ: benches/end_to_end/run.sh --help
set -euo pipefail
command="benches/end_to_end/run.sh${*:+ $*}"
. "$(dirname "${BASH_SOURCE[0]}")/prepare.sh"
COMMAND=$command exec "$python" -B "$here/bench.py" "$@"
