{{- define "helios.name" -}}
{{- .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "helios.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "helios.selector" -}}
app.kubernetes.io/name: {{ include "helios.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "helios.labels" -}}
{{ include "helios.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* Whether several pods may run: they share a database and a bucket. */}}
{{- define "helios.isShared" -}}
{{- $store := get (.Values.config | default dict) "store" | default dict -}}
{{- if and .Values.database.existingSecret (get $store "blob_url") -}}yes{{- end -}}
{{- end -}}

{{/* Refuses what would lose work or could not start, with what to change. */}}
{{- define "helios.check" -}}
{{- $shared := eq (include "helios.isShared" .) "yes" -}}
{{- $scaled := or .Values.keda.enabled .Values.hpa.enabled -}}
{{- if and (not $shared) (or (gt (int .Values.replicaCount) 1) $scaled) -}}
{{- fail "several replicas need database.existingSecret (Postgres) and config.store.blob_url (a bucket)" -}}
{{- end -}}
{{- if and .Values.keda.enabled .Values.hpa.enabled -}}
{{- fail "keda and hpa would work against each other: enable one of them" -}}
{{- end -}}
{{- $engine := get (.Values.config | default dict) "engine" | default dict -}}
{{- $drain := get $engine "drain_s" | default 10 | float64 -}}
{{- if le (float64 .Values.terminationGracePeriodSeconds) (addf (float64 .Values.preStopSeconds) $drain) -}}
{{- fail (printf "terminationGracePeriodSeconds %v: must exceed preStopSeconds %v + config.engine.drain_s %v" .Values.terminationGracePeriodSeconds .Values.preStopSeconds $drain) -}}
{{- end -}}
{{- if not .Values.apiKeys.existingSecret -}}
{{- fail "apiKeys.existingSecret: the server answers others than its own machine only with API keys" -}}
{{- end -}}
{{- end -}}
