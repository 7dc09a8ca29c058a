{{- /* The store: on loopback, as whoever reaches a port of dataClay can run code in it. Each starts when those before it are up,
and ends after those behind it. */}}
{{- define "icos-fl.store" -}}
- {{- include "icos-fl.container" (list . "timeseries-store" "kv") | nindent 2 }}
  restartPolicy: Always
  args: [serve, kv]
  env: {{- include "icos-fl.store-environment" . | nindent 4 }}
  {{- include "icos-fl.health" (list "valkey://127.0.0.1:6379") | nindent 2 }}
  volumeMounts:
    - {name: store, mountPath: /var/lib/icos-fl}
    - {name: tmp, mountPath: /tmp, subPath: kv}
- {{- include "icos-fl.container" (list . "timeseries-store" "metadata") | nindent 2 }}
  restartPolicy: Always
  args: [serve, metadata]
  env: {{- include "icos-fl.store-environment" . | nindent 4 }}
  {{- include "icos-fl.health" (list "grpc://127.0.0.1:16587/dataclay.proto.metadata.MetadataService") | nindent 2 }}
  volumeMounts:
    - {name: tmp, mountPath: /tmp, subPath: metadata}
- {{- include "icos-fl.container" (list . "timeseries-store" "backend") | nindent 2 }}
  restartPolicy: Always
  args: [serve, backend]
  env: {{- include "icos-fl.store-environment" . | nindent 4 }}
  {{- with include "icos-fl.metrics-port" (list . "metrics-store" 9464) }}
  ports: {{- trim . | nindent 4 }}
  {{- end }}
  {{- include "icos-fl.health" (list "http://127.0.0.1:9464/health") | nindent 2 }}
  volumeMounts:
    - {name: store, mountPath: /var/lib/icos-fl}
    - {name: tmp, mountPath: /tmp, subPath: backend}
- {{- include "icos-fl.container" (list . "timeseries-store" "proxy") | nindent 2 }}
  restartPolicy: Always
  args: [serve, proxy]
  env: {{- include "icos-fl.store-environment" . | nindent 4 }}
  {{- include "icos-fl.health" (list "tcp://127.0.0.1:8676") | nindent 2 }}
  volumeMounts:
    - {name: tmp, mountPath: /tmp, subPath: proxy}
{{- end }}

{{- define "icos-fl.store-environment" -}}
- {name: ICOS_FL_STORE_HOST, value: "127.0.0.1"}
{{ include "icos-fl.metrics" (list . "ICOS_FL_STORE" 9464) }}
{{- include "icos-fl.settings" (list . "ICOS_FL_STORE_") }}
{{- end }}

{{- /* Bridge, processor and forecaster. The processor of a node is for its own pod, and a shared one for those with a certificate. The
forecaster asks a processor for models of torch alone, and a shared store has no models. */}}
{{- define "icos-fl.services" -}}
- {{- include "icos-fl.container" (list . "otlp-bridge" "otlp-bridge") | nindent 2 }}
  env:
    - {name: ICOS_FL_BRIDGE_LISTEN_ADDRESS, value: "0.0.0.0:4317"}
    - {name: ICOS_FL_BRIDGE_CONFIG, value: /etc/icos-fl/bridge.yaml}
    - {name: ICOS_FL_BRIDGE_TLS__CERTIFICATE, value: /run/secrets/otlp-bridge.pem}
    - {name: ICOS_FL_BRIDGE_TLS__KEY, value: /run/secrets/otlp-bridge.key}
    - {name: ICOS_FL_BRIDGE_TLS__CLIENT_CA, value: /run/secrets/ca.pem}
    {{- include "icos-fl.metrics" (list . "ICOS_FL_BRIDGE" 9465) | nindent 4 }}
    {{- with include "icos-fl.settings" (list . "ICOS_FL_BRIDGE_") }}
{{- trim . | nindent 4 }}
    {{- end }}
  ports:
    - {name: otlp, containerPort: 4317}
    {{- with include "icos-fl.metrics-port" (list . "metrics-bridge" 9465) }}
{{- trim . | nindent 4 }}
    {{- end }}
  {{- include "icos-fl.health" (list "tcp://127.0.0.1:4317" "http://127.0.0.1:9465/health") | nindent 2 }}
  volumeMounts:
    - {name: configuration, mountPath: /etc/icos-fl, readOnly: true}
    - {name: bridge-secrets, mountPath: /run/secrets, readOnly: true}
    - {name: tmp, mountPath: /tmp, subPath: otlp-bridge}
- {{- include "icos-fl.container" (list . "processor" "processor") | nindent 2 }}
  env:
    {{- if eq .Values.node.store "own" }}
    - {name: ICOS_FL_PROCESSOR_LISTEN_ADDRESS, value: "127.0.0.1:50051"}
    {{- else }}
    - {name: ICOS_FL_PROCESSOR_LISTEN_ADDRESS, value: "0.0.0.0:50051"}
    - {name: ICOS_FL_PROCESSOR_TLS__CERTIFICATE, value: /run/secrets/processor.pem}
    - {name: ICOS_FL_PROCESSOR_TLS__KEY, value: /run/secrets/processor.key}
    - {name: ICOS_FL_PROCESSOR_TLS__CLIENT_CA, value: /run/secrets/ca.pem}
    {{- end }}
    {{- if .Values.expectations }}
    - {name: ICOS_FL_PROCESSOR_EXPECTATIONS, value: /etc/icos-fl/expectations.toml}
    {{- end }}
    {{- include "icos-fl.metrics" (list . "ICOS_FL_PROCESSOR" 9466) | nindent 4 }}
    {{- with include "icos-fl.settings" (list . "ICOS_FL_PROCESSOR_") }}
{{- trim . | nindent 4 }}
    {{- end }}
  {{- if or (ne .Values.node.store "own") .Values.metrics.enabled }}
  ports:
    {{- if ne .Values.node.store "own" }}
    - {name: processor, containerPort: 50051}
    {{- end }}
    {{- with include "icos-fl.metrics-port" (list . "metrics-proc" 9466) }}
    {{- trim . | nindent 4 }}
    {{- end }}
  {{- end }}
  {{- include "icos-fl.health" (list "tcp://127.0.0.1:50051" "http://127.0.0.1:9466/health") | nindent 2 }}
  volumeMounts:
    - {name: configuration, mountPath: /etc/icos-fl, readOnly: true}
    {{- if ne .Values.node.store "own" }}
    - {name: processor-secrets, mountPath: /run/secrets, readOnly: true}
    {{- end }}
    - {name: tmp, mountPath: /tmp, subPath: processor}
- {{- include "icos-fl.container" (list . "fl-client" "forecaster") | nindent 2 }}
  command: [icos-fl-forecaster]
  env:
    {{- if eq .Values.node.store "own" }}
    - {name: ICOS_FL_FORECASTER_PROCESSOR__ADDRESS, value: "127.0.0.1:50051"}
    {{- end }}
    - {name: ICOS_FL_FORECASTER_STATE_FOLDER, value: /var/lib/icos-fl}
    - {name: ICOS_FL_FORECASTER_PAGE_ADDRESS, value: "127.0.0.1:8089"}
    {{- if .Values.expectations }}
    - {name: ICOS_FL_FORECASTER_EXPECTATIONS, value: /etc/icos-fl/expectations.toml}
    {{- end }}
    {{- include "icos-fl.metrics" (list . "ICOS_FL_FORECASTER" 9470) | nindent 4 }}
    {{- with include "icos-fl.settings" (list . "ICOS_FL_FORECASTER_") }}
{{- trim . | nindent 4 }}
    {{- end }}
  {{- with include "icos-fl.metrics-port" (list . "metrics-fc" 9470) }}
  ports: {{- trim . | nindent 4 }}
  {{- end }}
  {{- include "icos-fl.health" (list "tcp://127.0.0.1:50052" "http://127.0.0.1:9470/health") | nindent 2 }}
  volumeMounts:
    - {name: configuration, mountPath: /etc/icos-fl, readOnly: true}
    - {name: forecaster, mountPath: /var/lib/icos-fl}
    - {name: tmp, mountPath: /tmp, subPath: forecaster}
{{- end }}
