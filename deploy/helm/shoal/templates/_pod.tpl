{{/* The parts that pods share. A worker group takes a dict. */}}

{{- define "shoal.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.securityContext.runAsUser }}
runAsGroup: {{ .Values.securityContext.runAsGroup }}
fsGroup: {{ .Values.securityContext.fsGroup }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "shoal.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "shoal.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Environment of every process. */}}
{{- define "shoal.env" -}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- {name: HOME, value: /tmp}
- {name: PYTHONUNBUFFERED, value: "1"}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
# With Ray's default, actors would end 60 s after a lost head; they serve without one.
- {name: RAY_gcs_rpc_server_reconnect_timeout_s, value: "600"}
{{- end }}

{{- define "shoal.volumes" -}}
- name: tmp
  emptyDir: {}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: 512Mi}
{{- if ne .Values.cache.type "image" }}
- name: models
  {{- if eq .Values.cache.type "hostPath" }}
  hostPath: {path: {{ .Values.cache.hostPath | quote }}, type: Directory}
  {{- else }}
  persistentVolumeClaim:
    claimName: {{ default (printf "%s-models" (include "shoal.fullname" .)) .Values.cache.existingClaim }}
  {{- end }}
{{- end }}
{{- with include "shoal.tlsSecret" . }}
- name: cluster-tls
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- end }}

{{- define "shoal.mounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: shm, mountPath: /dev/shm}
{{- if ne .Values.cache.type "image" }}
- {name: models, mountPath: /models, readOnly: true}
{{- end }}
{{- if include "shoal.tlsSecret" . }}
- {name: cluster-tls, mountPath: /etc/shoal/tls, readOnly: true}
{{- end }}
{{- end }}

{{/* Makes a pod wait until the checkpoint is complete; with hostPath it fetches what its node lacks. */}}
{{- define "shoal.fetchContainer" -}}
{{- if .Values.fetch.source }}
- name: checkpoint
  image: {{ include "shoal.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  {{- if eq .Values.cache.type "hostPath" }}
  {{- include "shoal.fetchCommand" . | nindent 2 }}
  {{- else }}
  args: [fetch, --wait, {{ include "shoal.checkpoint" . }}, --timeout, {{ .Values.startupTimeoutSeconds | quote }}]
  {{- end }}
  env:
    {{- include "shoal.env" . | nindent 4 }}
  {{- with .Values.fetch.credentials }}
  {{- if eq $.Values.cache.type "hostPath" }}
  envFrom:
    {{- range . }}
    - secretRef: {{ toJson . }}
    {{- end }}
  {{- end }}
  {{- end }}
  securityContext:
    {{- include "shoal.containerSecurity" . | nindent 4 }}
  resources:
    {{- toYaml .Values.fetch.resources | nindent 4 }}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: models, mountPath: /models{{ if ne .Values.cache.type "hostPath" }}, readOnly: true{{ end }}}
    {{- if and (eq .Values.cache.type "hostPath") .Values.fetch.sourceClaim }}
    - {name: source, mountPath: /source, readOnly: true}
    {{- end }}
{{- end }}
{{- end }}

{{- define "shoal.fetchCommand" -}}
args:
  - fetch
  - {{ .Values.fetch.source | quote }}
  - {{ include "shoal.checkpoint" . }}
  {{- if .Values.fetch.verifyDigests }}
  - --verify-digests
  {{- end }}
{{- end }}

{{- define "shoal.rayPorts" -}}
node-manager-port: "6380"
object-manager-port: "6381"
runtime-env-agent-port: "6382"
dashboard-agent-grpc-port: "6383"
dashboard-agent-listen-port: "52365"
metrics-export-port: "8080"
min-worker-port: "10002"
max-worker-port: "10999"
disable-usage-stats: "true"
{{- end }}

{{/* Ray's own agent says whether this node is well; it needs no token for that. */}}
{{- define "shoal.rayProbes" -}}
startupProbe:
  httpGet: {path: /api/local_raylet_healthz, port: 52365}
  periodSeconds: 5
  failureThreshold: 60
readinessProbe:
  httpGet: {path: /api/local_raylet_healthz, port: 52365}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 3
livenessProbe:
  httpGet: {path: /api/local_raylet_healthz, port: 52365}
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 12
{{- end }}

{{- define "shoal.workerGroup" -}}
{{- $root := .root -}}
- groupName: {{ .groupName }}
  replicas: {{ .replicas }}
  minReplicas: {{ .minReplicas }}
  maxReplicas: {{ .maxReplicas }}
  numOfHosts: 1
  {{- if eq $root.Values.scaling.mode "ray" }}
  idleTimeoutSeconds: {{ $root.Values.scaling.idleTimeoutSeconds }}
  {{- end }}
  rayStartParams:
    {{- include "shoal.rayPorts" $root | nindent 4 }}
    # Only this group's pods have it, so only its actors come here.
    resources: {{ printf "%q" (dict .rayResource 1 | toJson) | squote }}
    num-gpus: {{ default 0 .pool.gpus | quote }}
  template:
    metadata:
      labels:
        {{- include "shoal.labels" $root | nindent 8 }}
        app.kubernetes.io/component: {{ .component }}
        {{- if eq .component "expert" }}
        shoal.dev/expert-group: {{ .groupName }}
        # What may differ between two pods of a group only for as long as the controller replaces one by the other.
        shoal.dev/revision: {{ include "shoal.revision" $root }}
        {{- end }}
      {{- with .pool.podAnnotations }}
      annotations: {{- toYaml . | nindent 8 }}
      {{- end }}
    spec:
      serviceAccountName: {{ include "shoal.fullname" $root }}-ray
      automountServiceAccountToken: false
      enableServiceLinks: false
      {{- include "shoal.pullSecrets" $root | nindent 6 }}
      {{- with .pool.runtimeClassName }}
      runtimeClassName: {{ . }}
      {{- end }}
      {{- with .pool.priorityClassName }}
      priorityClassName: {{ . }}
      {{- end }}
      {{- with .pool.nodeSelector }}
      nodeSelector: {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with .pool.tolerations }}
      tolerations: {{- toYaml . | nindent 8 }}
      {{- end }}
      affinity:
        {{- if .pool.affinity }}
        {{- toYaml .pool.affinity | nindent 8 }}
        {{- else }}
        # Replicas of one group on different nodes, where there are as many.
        podAntiAffinity:
          preferredDuringSchedulingIgnoredDuringExecution:
            - weight: 100
              podAffinityTerm:
                topologyKey: kubernetes.io/hostname
                labelSelector:
                  matchLabels:
                    {{- include "shoal.selector" $root | nindent 20 }}
                    ray.io/group: {{ .groupName }}
        {{- end }}
      {{- if eq $root.Values.scaling.mode "ray" }}
      # Ray's autoscaler replaces pods: the kubelet must not restart what it gave up.
      restartPolicy: Never
      {{- end }}
      terminationGracePeriodSeconds: {{ $root.Values.terminationGracePeriodSeconds }}
      securityContext:
        {{- include "shoal.podSecurity" $root | nindent 8 }}
      {{- with include "shoal.fetchContainer" $root | trim }}
      initContainers:
        {{- . | nindent 8 }}
      {{- end }}
      containers:
        - name: ray-worker
          image: {{ include "shoal.image" $root }}
          imagePullPolicy: {{ $root.Values.image.pullPolicy }}
          env:
            {{- include "shoal.env" $root | nindent 12 }}
          ports:
            - {name: metrics, containerPort: 8080}
          lifecycle:
            preStop:
              exec:
                # Holds the pod until the controller, which sees that it is being deleted, has moved its actor away.
                command: [shoal, leave, --timeout, {{ sub $root.Values.terminationGracePeriodSeconds 60 | quote }}]
          {{- include "shoal.rayProbes" $root | nindent 10 }}
          securityContext:
            {{- include "shoal.containerSecurity" $root | nindent 12 }}
          resources:
            {{- include "shoal.poolResources" (dict "root" $root "pool" .pool) | nindent 12 }}
          volumeMounts:
            {{- include "shoal.mounts" $root | nindent 12 }}
      volumes:
        {{- include "shoal.volumes" $root | nindent 8 }}
        {{- if and $root.Values.fetch.sourceClaim (eq $root.Values.cache.type "hostPath") }}
        - name: source
          persistentVolumeClaim: {claimName: {{ $root.Values.fetch.sourceClaim }}, readOnly: true}
        {{- end }}
{{- end }}

{{/* Changes whenever expert pods have to be replaced: image, checkpoint, encryption, environment. */}}
{{- define "shoal.revision" -}}
{{- printf "%s %s %s %s %s" (include "shoal.image" .) (include "shoal.checkpoint" .) (include "shoal.env" .) (include "shoal.volumes" .) (include "shoal.mounts" .) | sha256sum | trunc 16 | quote -}}
{{- end }}

{{/* What a pool asks for, with its cards as requests and limits. */}}
{{- define "shoal.poolResources" -}}
{{- $resources := deepCopy .pool.resources -}}
{{- if gt (int (default 0 .pool.gpus)) 0 -}}
{{- range $part := list "requests" "limits" -}}
{{- $_ := set $resources $part (merge (dict $.root.Values.gpuResource ($.pool.gpus | toString)) (default dict (get $resources $part))) -}}
{{- end -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end }}
