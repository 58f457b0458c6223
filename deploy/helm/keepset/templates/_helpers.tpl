{{- define "keepset.fullname" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "keepset.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "keepset.labels" -}}
{{ include "keepset.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "keepset.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "keepset.hasTables" -}}
{{- if or .Values.tables.configMap .Values.tables.persistentVolumeClaim }}yes{{ end }}
{{- end }}

{{- /* The whole configuration file. */}}
{{- define "keepset.config" -}}
listen: "unix:/run/keepset/keepset.sock"
metrics_listen: "0.0.0.0:9464"
health_listen: "0.0.0.0:9465"
{{- if include "keepset.hasTables" . }}
tables_directory: "/var/lib/keepset/tables"
{{- end }}
{{- if .Values.registry.state }}
state_directory: "/var/lib/keepset/state"
{{- end }}
table_writes: {{ .Values.registry.tableWrites }}
{{- with .Values.registry.etcd }}
{{- if .endpoints }}
etcd {
  {{- range .endpoints }}
  endpoints: {{ . | quote }}
  {{- end }}
  {{- with .prefix }}
  prefix: {{ . | quote }}
  {{- end }}
  {{- if .secret }}
  ca_file: "/etc/keepset-etcd/ca.crt"
  certificate_file: "/etc/keepset-etcd/tls.crt"
  key_file: "/etc/keepset-etcd/tls.key"
  {{- end }}
}
{{- end }}
{{- end }}
{{ .Values.config }}
{{- end }}

{{- /* Changes with the configuration, for a pod's annotation: keepsetd reads it at start only. */}}
{{- define "keepset.configDigest" -}}
{{ include "keepset.config" . | sha256sum }}
{{- end }}

{{- /* The fields of a keepsetd container that its forms share. */}}
{{- define "keepset.container" -}}
name: keepsetd
image: {{ include "keepset.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
args: ["--config", "/etc/keepset/keepsetd.conf"]
ports:
  - name: metrics
    containerPort: 9464
  - name: health
    containerPort: 9465
startupProbe:
  grpc:
    port: 9465
    service: keepset.v1.CompressionService
  periodSeconds: 1
  failureThreshold: 60
livenessProbe:
  grpc:
    port: 9465
  periodSeconds: 10
  timeoutSeconds: 2
readinessProbe:
  grpc:
    port: 9465
    service: keepset.v1.CompressionService
  periodSeconds: 5
  timeoutSeconds: 2
resources:
  {{- toYaml .Values.resources | nindent 2 }}
  {{- with .Values.resourceClaims }}
  claims:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: ["ALL"]
  seccompProfile:
    type: RuntimeDefault
volumeMounts:
  - name: keepset-config
    mountPath: /etc/keepset
    readOnly: true
  {{- if include "keepset.hasTables" . }}
  - name: keepset-tables
    mountPath: /var/lib/keepset/tables
    readOnly: true
  {{- end }}
  {{- if .Values.registry.state }}
  - name: keepset-state
    mountPath: /var/lib/keepset/state
  {{- end }}
  {{- if .Values.registry.etcd.secret }}
  - name: keepset-etcd
    mountPath: /etc/keepset-etcd
    readOnly: true
  {{- end }}
  - name: keepset-run
    mountPath: /run/keepset
{{- end }}

{{- /* An init container that stays: for another chart's initContainers, with {{ include "keepset.sidecar" .Subcharts.keepset }}. */}}
{{- define "keepset.sidecar" -}}
{{ include "keepset.container" . }}
restartPolicy: Always
{{- end }}

{{- define "keepset.configVolumes" -}}
- name: keepset-config
  configMap:
    name: {{ include "keepset.fullname" . }}
{{- if .Values.tables.configMap }}
- name: keepset-tables
  configMap:
    name: {{ .Values.tables.configMap }}
{{- else if .Values.tables.persistentVolumeClaim }}
- name: keepset-tables
  persistentVolumeClaim:
    claimName: {{ .Values.tables.persistentVolumeClaim }}
    readOnly: true
{{- end }}
{{- with .Values.registry.etcd.secret }}
- name: keepset-etcd
  secret:
    secretName: {{ . }}
    defaultMode: 0440
{{- end }}
{{- end }}

{{- /* Volumes of a pod with the sidecar; the worker mounts keepset-run at /run/keepset. */}}
{{- define "keepset.volumes" -}}
{{ include "keepset.configVolumes" . }}
{{- if .Values.registry.state }}
- name: keepset-state
  emptyDir:
    sizeLimit: 1Gi
{{- end }}
- name: keepset-run
  emptyDir:
    medium: Memory
    sizeLimit: 16Mi
{{- end }}
