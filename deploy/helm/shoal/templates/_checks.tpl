{{/* What the schema cannot say: values that contradict each other. Included once, by the RayCluster. */}}
{{- define "shoal.checks" -}}
{{- $owned := dict
  "checkpoint" "model.folder and cache" "model_name" "model.name" "groups" "expertGroups[].count"
  "replicas" "expertGroups[].minReplicas" "routers" "routers[].replicas" "host" "service" "port" "service.port"
  "address" "the RayCluster" "admin_host" "the controller" "admin_port" "the controller" "admin_token" "controller.adminTokenSecret"
  "kubernetes_cluster" "the RayCluster" "kubernetes_namespace" "the release" "kubernetes_lease" "the release"
  "kubernetes_scaling" "scaling.mode" "kubernetes_gpus_per_pod" "the gpus of the pools"  "device" "the gpus of the pools" "cluster_tls_dir" "tls.mode"
  "insecure_cluster_network" "tls.mode" "keys_file" "apiKeys.existingSecret" "auth" "apiKeys.existingSecret" "tls_cert" "tls.apiSecret" "tls_key" "tls.apiSecret" -}}
{{- range $key, $where := $owned -}}
{{- if hasKey $.Values.settings $key -}}
{{- fail (printf "settings.%s is set by the chart, from %s" $key $where) -}}
{{- end -}}
{{- end -}}
{{- range .Values.expertGroups -}}
{{- if gt (int .minReplicas) (int .maxReplicas) -}}
{{- fail (printf "expertGroups pool %q: minReplicas %d is above maxReplicas %d" .pool (int .minReplicas) (int .maxReplicas)) -}}
{{- end -}}
{{- if ne (int .minReplicas) (int (first $.Values.expertGroups).minReplicas) -}}
{{- fail (printf "expertGroups pool %q: minReplicas %d differs from %d of the first pool; every group begins with as many (give hot groups a higher maxReplicas)" .pool (int .minReplicas) (int (first $.Values.expertGroups).minReplicas)) -}}
{{- end -}}
{{- end -}}
{{- $pools := list -}}
{{- range .Values.routers -}}
{{- if has .name $pools -}}{{- fail (printf "routers: the name %q is there twice" .name) -}}{{- end -}}
{{- if regexMatch "^g[0-9]+$" .name -}}{{- fail (printf "routers: the name %q is that of an expert group" .name) -}}{{- end -}}
{{- if and .maxReplicas (lt (int .maxReplicas) (int .replicas)) -}}
{{- fail (printf "routers %q: maxReplicas %d is below replicas %d" .name (int .maxReplicas) (int .replicas)) -}}
{{- end -}}
{{- $pools = append $pools .name -}}
{{- end -}}
{{- $drain := float64 (default 120 .Values.settings.drain_timeout_s) -}}
{{- if lt (float64 .Values.terminationGracePeriodSeconds) (addf $drain 60.0) -}}
{{- fail (printf "terminationGracePeriodSeconds %v is shorter than a drain of settings.drain_timeout_s %v and 60 s to end: pods would be killed while they drain" .Values.terminationGracePeriodSeconds $drain) -}}
{{- end -}}
{{- $gpus := int (default 0 (first .Values.expertGroups).gpus) -}}
{{- range concat .Values.routers .Values.expertGroups -}}
{{- if ne (int (default 0 .gpus)) $gpus -}}
{{- fail (printf "pool %q asks for %d cards and the first expert pool for %d: all or none compute on cards" (default .name .pool) (int (default 0 .gpus)) $gpus) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.gcsFaultTolerance.enabled (not .Values.gcsFaultTolerance.redisAddress) -}}
{{- fail "gcsFaultTolerance.enabled needs gcsFaultTolerance.redisAddress: HOST:PORT of a Redis of your own" -}}
{{- end -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.host) -}}
{{- fail "ingress.enabled needs ingress.host" -}}
{{- end -}}
{{- if and .Values.fetch.source (eq .Values.cache.type "image") -}}
{{- fail "fetch.source with cache.type image: there is nowhere to fetch to; choose pvc or hostPath" -}}
{{- end -}}
{{- if and .Values.fetch.sourceClaim (not (hasPrefix "file:///source" .Values.fetch.source)) -}}
{{- fail (printf "fetch.sourceClaim is mounted at /source: fetch.source must be file:///source/FOLDER, not %q" .Values.fetch.source) -}}
{{- end -}}
{{- if and (ne .Values.tls.mode "secret") .Values.tls.existingSecret -}}
{{- fail (printf "tls.existingSecret is not used by tls.mode %s: choose mode secret, or leave it empty" .Values.tls.mode) -}}
{{- end -}}
{{- if and (eq .Values.cache.type "pvc") (not .Values.cache.existingClaim) (not (or (has "ReadWriteMany" .Values.cache.accessModes) (has "ReadOnlyMany" .Values.cache.accessModes))) -}}
{{- fail "cache.accessModes: pods of many nodes read the claim, so it must be ReadWriteMany or ReadOnlyMany; or choose cache.type hostPath" -}}
{{- end -}}
{{- end }}
