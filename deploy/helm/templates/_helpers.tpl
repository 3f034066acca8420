{{/* The text of a file of deploy/. Takes (list ROOT PATH). */}}
{{- define "foldserve.manifest" -}}
{{- $text := (index . 0).Files.Get (index . 1) -}}
{{- if not $text -}}
{{- fail (printf "%s is not in the chart, where it is a symbolic link. Some tools drop these: run `helm package deploy/helm` in a checkout and install the archive." (index . 1)) -}}
{{- end -}}
{{- $text -}}
{{- end -}}

{{/* An object as YAML, in the release's namespace and with its labels. Takes (list ROOT OBJECT). */}}
{{- define "foldserve.object" -}}
{{- $root := index . 0 -}}
{{- $labels := dict
  "app.kubernetes.io/part-of" "foldserve"
  "app.kubernetes.io/instance" $root.Release.Name
  "app.kubernetes.io/managed-by" $root.Release.Service
  "helm.sh/chart" (printf "%s-%s" $root.Chart.Name $root.Chart.Version) -}}
{{- $metadata := dict "metadata" (dict "namespace" $root.Release.Namespace "labels" $labels) -}}
{{- range $subject := (index . 1).subjects }}
{{- $_ := set $subject "namespace" $root.Release.Namespace }}
{{- end }}
---
{{ mergeOverwrite (index . 1) $metadata | toYaml }}
{{ end -}}

{{/* Manifests of deploy/k8s without a change. Takes (list ROOT PATH...). */}}
{{- define "foldserve.manifests" -}}
{{- $root := first . -}}
{{- range $path := rest . -}}
{{- range $text := splitList "\n---\n" (include "foldserve.manifest" (list $root $path)) -}}
{{- include "foldserve.object" (list $root (fromYaml $text)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* A NetworkPolicy that lets Prometheus in from its namespace. Takes (list ROOT PATH). */}}
{{- define "foldserve.networkPolicy" -}}
{{- $root := first . -}}
{{- $policy := include "foldserve.manifest" . | fromYaml -}}
{{- range $rule := $policy.spec.ingress -}}
{{- range $peer := $rule.from -}}
{{- $labels := dig "namespaceSelector" "matchLabels" dict $peer -}}
{{- if hasKey $labels "kubernetes.io/metadata.name" -}}
{{- $_ := set $labels "kubernetes.io/metadata.name" $root.Values.monitoring.namespace -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- include "foldserve.object" (list $root $policy) -}}
{{- end -}}

{{/* REPOSITORY:TAG or REPOSITORY:TAG@DIGEST. Takes (list ROOT IMAGE). */}}
{{- define "foldserve.image" -}}
{{- $image := index . 1 -}}
{{- $image.repository }}:{{ $image.tag | default (index . 0).Chart.AppVersion }}
{{- with $image.digest }}@{{ . }}{{ end -}}
{{- end -}}

{{/* Arguments of `foldserve serve`, one a line. */}}
{{- define "foldserve.args" -}}
{{- with .Values.model }}
- $(MODEL)
{{- end }}
{{- with .Values.maxModelLen }}
- --max-model-len={{ . | int64 }}
{{- end }}
- --max-queue={{ .Values.maxQueue | int64 }}
- --shutdown-timeout={{ .Values.shutdownTimeout | int64 }}
- --log-format=json
{{- range .Values.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- if .Values.apiKeys.enabled }}
- --api-keys=/run/foldserve/api-keys.toml
{{- end }}
{{- end -}}
