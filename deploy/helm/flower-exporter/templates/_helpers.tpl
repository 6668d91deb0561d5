{{/* The name of all objects. Kubernetes adds a hash of 11 characters to the name of a StatefulSet, in a label of at most 63. */}}
{{- define "flower-exporter.fullname" -}}
{{- $default := contains .Chart.Name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name .Chart.Name) }}
{{- .Values.fullnameOverride | default $default | trunc 52 | trimSuffix "-" }}
{{- end }}

{{/* The first label is also the job of a scrape, which the alerts expect to be flower-exporter. */}}
{{- define "flower-exporter.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "flower-exporter.podLabels" -}}
{{ include "flower-exporter.selectorLabels" . }}
app.kubernetes.io/component: exporter
app.kubernetes.io/part-of: celery
{{- with .Values.brokerLabel }}
broker: {{ . | quote }}
{{- end }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The pods do not have the last three, so that a new version of the chart alone does not restart them. */}}
{{- define "flower-exporter.labels" -}}
{{ include "flower-exporter.podLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{/* An object's metadata: (list $ SUFFIX LABELS), where both may be empty. */}}
{{- define "flower-exporter.metadata" -}}
{{- $root := index . 0 -}}
name: {{ include "flower-exporter.fullname" $root }}{{ index . 1 }}
namespace: {{ $root.Release.Namespace }}
labels:
  {{- include "flower-exporter.labels" $root | nindent 2 }}
  {{- with index . 2 }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with $root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Nested values as lines of TOML: (list PREFIX TABLE). JSON's scalars and lists are also TOML's. */}}
{{- define "flower-exporter.toml" -}}
{{- $prefix := index . 0 }}
{{- range $key, $value := index . 1 }}
{{- if kindIs "map" $value }}
{{- include "flower-exporter.toml" (list (print $prefix $key ".") $value) }}
{{- else if not (kindIs "invalid" $value) }}
{{- printf "%s%s = %s\n" $prefix $key (toJson $value) }}
{{- end }}
{{- end }}
{{- end }}

{{/* The Secret with the broker URL. Empty if the URL comes from elsewhere. */}}
{{- define "flower-exporter.brokerSecret" -}}
{{- $broker := .Values.broker }}
{{- $config := .Values.config.broker | default dict }}
{{- if gt (len (compact (list $broker.url $broker.existingSecret $broker.urlFile $config.url $config.url_file))) 1 }}
{{- fail "the broker URL has several sources: set one of broker.url, existingSecret, urlFile, config.broker.url and url_file" }}
{{- end }}
{{- if not (or $broker.urlFile $config.url $config.url_file) }}
{{- $broker.existingSecret | default (printf "%s-broker" (include "flower-exporter.fullname" .)) }}
{{- end }}
{{- end }}

{{/* The settings that the chart makes, as variables. `config` overrides them. */}}
{{- define "flower-exporter.env" -}}
{{- $settings := dict }}
{{- if .Values.broker.namedQueue }}
{{- $_ := set $settings "broker.amqp.queue" "$(POD_NAME)" }}
{{- end }}
{{- if include "flower-exporter.brokerSecret" . }}
{{- $_ := set $settings "broker.url_file" "/run/secrets/flower-exporter/url" }}
{{- else if .Values.broker.urlFile }}
{{- $_ := set $settings "broker.url_file" .Values.broker.urlFile }}
{{- end }}
{{- if .Values.persistence.enabled }}
{{- $_ := set $settings "state.persistent" "true" }}
{{- $_ := set $settings "state.db" "/var/lib/flower-exporter/state" }}
{{- end }}
{{- if .Values.webConfig.existingSecret }}
{{- $_ := set $settings "http.web_config_file" "/etc/flower-exporter-web/web-config.yml" }}
{{- end }}
{{- $config := include "flower-exporter.toml" (list "" .Values.config) | printf "\n%s" -}}
- name: POD_NAME
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
{{- range $key, $value := $settings }}
{{- if not (contains (printf "\n%s = " $key) $config) }}
- name: FLOWER_EXPORTER_{{ $key | upper | replace "." "__" }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The port of `http.listen`. */}}
{{- define "flower-exporter.port" -}}
{{- $http := .Values.config.http | default dict }}
{{- $http.listen | default "0.0.0.0:9555" | regexFind "[0-9]+$" }}
{{- end }}

{{/* A probe with its handler: (list $ PROBE PATH). */}}
{{- define "flower-exporter.probe" -}}
{{- $webConfig := (index . 0).Values.webConfig }}
{{- $probe := index . 1 }}
{{- if not (or $probe.httpGet $probe.tcpSocket $probe.exec) }}
{{- if $webConfig.clientCertificates -}}
tcpSocket:
  port: flower-metrics
{{ else -}}
httpGet:
  path: {{ index . 2 }}
  port: flower-metrics
  {{- if $webConfig.tls }}
  scheme: HTTPS
  {{- end }}
{{ end }}
{{- end }}
{{- toYaml $probe }}
{{- end }}

{{/* What a ServiceMonitor and a PodMonitor have in common in their endpoint: (list $ VALUES). */}}
{{- define "flower-exporter.endpoint" -}}
{{- $monitor := index . 1 -}}
interval: {{ $monitor.interval }}
{{- with $monitor.scrapeTimeout }}
scrapeTimeout: {{ . }}
{{- end }}
{{- if (index . 0).Values.webConfig.tls }}
scheme: https
{{- end }}
{{- with $monitor.tlsConfig }}
tlsConfig:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $monitor.basicAuth }}
basicAuth:
  {{- toYaml . | nindent 2 }}
{{- end }}
relabelings:
  - sourceLabels: [__meta_kubernetes_pod_name]
    targetLabel: instance
  {{- with $monitor.relabelings }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with $monitor.metricRelabelings }}
metricRelabelings:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
