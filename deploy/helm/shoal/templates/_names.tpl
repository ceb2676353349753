{{/* Names and labels. */}}

{{- define "shoal.fullname" -}}
{{- $chart := default .Chart.Name .Values.nameOverride -}}
{{- $name := ternary .Release.Name (printf "%s-%s" .Release.Name $chart) (contains $chart .Release.Name) -}}
{{- $name = default $name .Values.fullnameOverride -}}
{{- if gt (len $name) 40 -}}
{{- fail (printf "the name %q has %d characters, of which KubeRay leaves room for 40: set fullnameOverride" $name (len $name)) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
{{- fail (printf "the name %q must begin with a letter and hold lower-case letters, digits and dashes: set fullnameOverride" $name) -}}
{{- end -}}
{{- $name -}}
{{- end }}

{{- define "shoal.selector" -}}
app.kubernetes.io/name: shoal
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "shoal.labels" -}}
{{ include "shoal.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "shoal.image" -}}
{{- $gpus := 0 -}}
{{- range concat .Values.routers .Values.expertGroups }}{{ $gpus = add $gpus (default 0 .gpus) }}{{ end -}}
{{- $tag := default (printf "%s%s" .Chart.AppVersion (ternary "-cuda" "" (gt $gpus 0))) .Values.image.tag -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository $tag -}}
{{- end -}}
{{- end }}

{{/* The Secret with the admin API's token. */}}
{{- define "shoal.adminSecret" -}}
{{- default (printf "%s-admin" (include "shoal.fullname" .)) .Values.controller.adminTokenSecret -}}
{{- end }}

{{/* The Secret with the cluster's certificate; "" without encryption. */}}
{{- define "shoal.tlsSecret" -}}
{{- if eq .Values.tls.mode "secret" -}}
{{- required "tls.mode secret needs tls.existingSecret: the name of a Secret with tls.crt, tls.key and ca.crt (`shoal certs` makes one)" .Values.tls.existingSecret -}}
{{- else if eq .Values.tls.mode "certManager" -}}
{{- include "shoal.fullname" . }}-tls
{{- end -}}
{{- end }}

{{- define "shoal.checkpoint" -}}
{{- if eq .Values.cache.type "image" -}}/opt/shoal/deploy/demo/checkpoint{{- else -}}/models/{{ .Values.model.folder }}{{- end -}}
{{- end }}
