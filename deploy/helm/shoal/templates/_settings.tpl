{{/* Expert groups g0, g1, ... as a list of {name, pool}. */}}
{{- define "shoal.groups" -}}
{{- $index := 0 -}}
{{- $groups := list -}}
{{- range $pool := .Values.expertGroups -}}
{{- range until (int $pool.count) -}}
{{- $groups = append $groups (dict "name" (printf "g%d" $index) "pool" $pool) -}}
{{- $index = add1 $index -}}
{{- end -}}
{{- end -}}
{{- toYaml $groups -}}
{{- end }}

{{/* Whole cores that every pod of a list of pools has: the controller, which hands the number out, sees only its own. */}}
{{- define "shoal.threads" -}}
{{- $threads := 1024 -}}
{{- range . -}}
{{- $cpu := default "1" .resources.requests.cpu | toString -}}
{{- $cores := ternary (div (trimSuffix "m" $cpu | int) 1000) (floor (float64 $cpu) | int) (hasSuffix "m" $cpu) -}}
{{- $threads = min $threads (max 1 $cores) -}}
{{- end -}}
{{- $threads -}}
{{- end }}

{{/* The settings file of `shoal controller`. */}}
{{- define "shoal.settings" -}}
{{- $routers := 0 -}}
{{- range .Values.routers }}{{ $routers = add $routers (int .replicas) }}{{ end -}}
{{- $cards := 0 -}}
{{- range concat .Values.routers .Values.expertGroups }}{{ $cards = add $cards (int (default 0 .gpus)) }}{{ end -}}
{{- $groups := include "shoal.groups" . | fromYamlArray -}}
{{- $settings := deepCopy .Values.settings -}}
{{- $_ := set $settings "checkpoint" (include "shoal.checkpoint" .) -}}
{{- if .Values.model.name }}{{ $_ := set $settings "model_name" .Values.model.name }}{{ end -}}
{{- $_ := set $settings "groups" (len $groups) -}}
{{- $_ := set $settings "replicas" (int (first .Values.expertGroups).minReplicas) -}}
{{- $_ := set $settings "routers" $routers -}}
{{- $_ := set $settings "host" "0.0.0.0" -}}
{{- $_ := set $settings "port" (int .Values.service.port) -}}
{{- $_ := set $settings "device" (ternary "cuda" "cpu" (gt (int $cards) 0)) -}}
{{- $_ := set $settings "address" (printf "%s-head-svc.%s.svc:6379" (include "shoal.fullname" .) .Release.Namespace) -}}
{{- $_ := set $settings "admin_host" "0.0.0.0" -}}
{{- $_ := set $settings "admin_port" 8001 -}}
{{- $_ := set $settings "kubernetes_cluster" (include "shoal.fullname" .) -}}
{{- $_ := set $settings "kubernetes_namespace" .Release.Namespace -}}
{{- $_ := set $settings "kubernetes_lease" (printf "%s-controller" (include "shoal.fullname" .)) -}}
{{- $_ := set $settings "kubernetes_scaling" .Values.scaling.mode -}}
{{- $_ := set $settings "kubernetes_gpus_per_pod" (ternary 1 0 (gt (int $cards) 0)) -}}
{{- if not (hasKey $settings "start_timeout_s") }}{{ $_ := set $settings "start_timeout_s" (int .Values.startupTimeoutSeconds) }}{{ end -}}
{{- if eq .Values.tls.mode "insecure" -}}
{{- $_ := set $settings "insecure_cluster_network" true -}}
{{- else -}}
{{- $_ := set $settings "cluster_tls_dir" "/etc/shoal/tls" -}}
{{- end -}}
{{- if .Values.tls.apiSecret -}}
{{- $_ := set $settings "tls_cert" "/etc/shoal/api-tls/tls.crt" -}}
{{- $_ := set $settings "tls_key" "/etc/shoal/api-tls/tls.key" -}}
{{- end -}}
{{- if .Values.apiKeys.existingSecret -}}
{{- $_ := set $settings "keys_file" "/etc/shoal/keys/keys.json" -}}
{{- else -}}
{{- $_ := set $settings "auth" false -}}
{{- end -}}
{{- if not (hasKey $settings "expert_threads") }}{{ $_ := set $settings "expert_threads" (include "shoal.threads" .Values.expertGroups | int) }}{{ end -}}
{{- if not (hasKey $settings "router_threads") }}{{ $_ := set $settings "router_threads" (include "shoal.threads" .Values.routers | int) }}{{ end -}}
{{- if .Values.scaling.byLoad -}}
{{- $rules := dict -}}
{{- range $groups }}{{ $_ := set $rules .name (dict "min" (int .pool.minReplicas) "max" (int .pool.maxReplicas)) }}{{ end -}}
{{- $_ := set $settings "autoscale" (merge (default dict $settings.autoscale) $rules) -}}
{{- end -}}
{{- toYaml $settings -}}
{{- end }}

{{/* What the HTTP front reads, which is on the head. */}}
{{- define "shoal.headMounts" -}}
{{- if .Values.apiKeys.existingSecret }}
- {name: api-keys, mountPath: /etc/shoal/keys, readOnly: true}
{{- end }}
{{- if .Values.tls.apiSecret }}
- {name: api-tls, mountPath: /etc/shoal/api-tls, readOnly: true}
{{- end }}
{{- end }}

{{- define "shoal.headVolumes" -}}
{{- with .Values.apiKeys.existingSecret }}
- name: api-keys
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- with .Values.tls.apiSecret }}
- name: api-tls
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- end }}
