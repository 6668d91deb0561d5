#!/bin/sh
# Prints the rules and alerts of ../prometheus as PrometheusRule objects for the Prometheus operator:
#   deploy/kubernetes/prometheus-rules.sh | kubectl apply -n monitoring -f -
# By default, kube-prometheus-stack selects only rules labeled with its release name:
#   deploy/kubernetes/prometheus-rules.sh release=kube-prometheus-stack | kubectl apply -n monitoring -f -
set -eu
cd "$(dirname "$0")/../prometheus"
label=${1:-app.kubernetes.io/name=flower-exporter}
case $label in
    ?*=?*) ;;
    *) echo "prometheus-rules.sh: $label: expected a label as in release=kube-prometheus-stack" >&2; exit 2 ;;
esac
for file in flower.rules.yml flower.alerts.yml flower-self.alerts.yml; do
    [ -r "$file" ] || { echo "prometheus-rules.sh: $file not found in $PWD" >&2; exit 2; }
done
for file in flower.rules.yml flower.alerts.yml flower-self.alerts.yml; do
    cat <<END
---
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: ${file%.yml}
  labels:
    ${label%%=*}: "${label#*=}"
spec:
END
    sed 's/^./  &/' "$file"
done
