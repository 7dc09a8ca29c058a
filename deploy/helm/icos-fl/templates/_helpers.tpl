{{- define "icos-fl.selector" -}}
app.kubernetes.io/name: icos-fl
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- /* ROOT COMPONENT [more] */}}
{{- define "icos-fl.labels" -}}
{{ include "icos-fl.selector" . }}
app.kubernetes.io/part-of: icos-fl
app.kubernetes.io/managed-by: {{ (index . 0).Release.Service }}
helm.sh/chart: {{ printf "%s-%s" (index . 0).Chart.Name (index . 0).Chart.Version }}
{{- end }}

{{- define "icos-fl.metadata" -}}
metadata:
  name: {{ (index . 0).Release.Name }}-{{ index . 1 }}
  namespace: {{ (index . 0).Release.Namespace }}
  labels:
    {{- include "icos-fl.labels" . | nindent 4 }}
{{- end }}

{{- /* What every pod has. Without links, as Kubernetes would set names such as ICOS_FL_GATEWAY_SERVICE_HOST, which services refuse. */}}
{{- define "icos-fl.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: 60
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with (index . 0).Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with (index . 1).nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with (index . 1).priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with (index . 1).tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* What every container has. ROOT IMAGE NAME */}}
{{- define "icos-fl.container" -}}
name: {{ index . 2 }}
image: {{ printf "%s/%s:%s" (index . 0).Values.images.prefix (index . 1) (get (index . 0).Values.images.tags (index . 1)) | quote }}
imagePullPolicy: {{ (index . 0).Values.images.pullPolicy }}
terminationMessagePolicy: FallbackToLogsOnError
securityContext:
  allowPrivilegeEscalation: false
  capabilities: {drop: [ALL]}
  readOnlyRootFilesystem: true
resources: {{- toYaml (get (index . 0).Values.resources (index . 2)) | nindent 2 }}
{{- end }}

{{- /* By commands, as what listens on loopback cannot be reached by the kubelet. ALIVE READY */}}
{{- define "icos-fl.probes" -}}
startupProbe:
  exec: {command: {{ toJson (index . 0) }}}
  periodSeconds: 2
  timeoutSeconds: 5
  failureThreshold: 90
livenessProbe:
  exec: {command: {{ toJson (index . 0) }}}
  periodSeconds: 20
  timeoutSeconds: 5
readinessProbe:
  exec: {command: {{ toJson (index . 1) }}}
  periodSeconds: 10
  timeoutSeconds: 5
{{- end }}

{{- /* URL [URL]: is it alive, and is it ready? */}}
{{- define "icos-fl.health" -}}
{{ include "icos-fl.probes" (list (list "icos-fl-health" (first .)) (list "icos-fl-health" (last .))) }}
{{- end }}

{{- /* The operator's settings of a service. ROOT PREFIX */}}
{{- define "icos-fl.settings" -}}
{{- $prefix := index . 1 }}
{{- range $name, $value := (index . 0).Values.settings }}
{{- if hasPrefix $prefix $name }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end }}
{{- end }}

{{- /* Where metrics and health are served. ROOT VARIABLE PORT */}}
{{- define "icos-fl.metrics" -}}
- {name: {{ index . 1 }}_METRICS_ADDRESS, value: "{{ ternary "0.0.0.0" "127.0.0.1" (index . 0).Values.metrics.enabled }}:{{ index . 2 }}"}
{{- end }}

{{- /* ROOT NAME PORT */}}
{{- define "icos-fl.metrics-port" -}}
{{- if (index . 0).Values.metrics.enabled }}
- {name: {{ index . 1 }}, containerPort: {{ index . 2 }}}
{{- end }}
{{- end }}

{{- /* Files of a Secret, with which others than our images' user can do nothing. SECRET FILE… */}}
{{- define "icos-fl.secret" -}}
secret:
  secretName: {{ first . }}
  defaultMode: 0440
  items:
    {{- range rest . }}
    - {key: {{ . }}, path: {{ . }}}
    {{- end }}
{{- end }}

{{- define "icos-fl.gateway-port" -}}
{{ .Values.gateway | splitList ":" | last | int }}
{{- end }}

{{- define "icos-fl.update" -}}
type: RollingUpdate
rollingUpdate: {maxUnavailable: {{ .Values.node.maxUnavailable }}}
{{- end }}

{{- /* A pod is started anew when its configuration changes. */}}
{{- define "icos-fl.configured" -}}
icos-fl/configuration: {{ printf "%s%s" .Values.bridgeConfig .Values.expectations | sha256sum }}
{{- end }}

{{- /* NAME STORAGE */}}
{{- define "icos-fl.claim" -}}
- metadata:
    name: {{ index . 0 }}
  spec:
    accessModes: [ReadWriteOnce]
    {{- with (index . 1).className }}
    storageClassName: {{ . }}
    {{- end }}
    resources: {requests: {storage: {{ (index . 1).size }}}}
{{- end }}
