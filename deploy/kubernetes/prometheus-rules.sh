#!/bin/sh
# The rules and alerts of ../prometheus as PrometheusRules of the Prometheus operator, on standard output:
#   deploy/kubernetes/prometheus-rules.sh | kubectl apply -n monitoring -f -
# kube-prometheus-stack takes only those with the label `release`, unless told otherwise:
#   deploy/kubernetes/prometheus-rules.sh release=kube-prometheus-stack | kubectl apply -n monitoring -f -
set -eu
cd "$(dirname "$0")/../prometheus"
label=${1:-app.kubernetes.io/name=flower-exporter}
case $label in
    ?*=?*) ;;
    *) echo "prometheus-rules.sh: $label: expected a label as in release=kube-prometheus-stack" >&2; exit 2 ;;
esac
for file in flower.rules.yml flower.alerts.yml flower-self.alerts.yml; do
    [ -r "$file" ] || { echo "prometheus-rules.sh: no $file in $PWD" >&2; exit 2; }
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
