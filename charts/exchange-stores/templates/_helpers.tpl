{{- define "stores.labels" -}}
app.kubernetes.io/name: {{ .name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/part-of: exchange
{{- end }}

{{- define "stores.selector" -}}
app.kubernetes.io/name: {{ .name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- end }}

{{/* The value of a key in an existing Secret, or a new password of 40 letters: no digits, because nats-server takes
     what begins with one for a number. */}}
{{- define "stores.password" -}}
{{- $secret := lookup "v1" "Secret" .root.Release.Namespace .secret | default dict -}}
{{- $data := get $secret "data" | default dict -}}
{{- if hasKey $data .key -}}{{ get $data .key | b64dec }}{{- else -}}{{ randAlpha 40 }}{{- end -}}
{{- end }}

{{/* Pod and container settings that the Pod Security level "restricted" asks for. */}}
{{- define "stores.podSecurity" -}}
automountServiceAccountToken: false
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .user }}
  runAsGroup: {{ .user }}
  fsGroup: {{ .user }}
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* A pod does not notice a changed ConfigMap, so a change of what it is made from is a change of the pod. */}}
{{- define "stores.annotations" -}}
exchange.dev/settings: {{ printf "%s %s" .root.Chart.Version (get .root.Values .name | toJson) | sha256sum }}
{{- end }}

{{- define "stores.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "stores.volumeClaim" -}}
volumeClaimTemplates:
  - metadata: {name: data}
    spec:
      accessModes: [ReadWriteOnce]
      {{- with .root.Values.storageClassName }}
      storageClassName: {{ . }}
      {{- end }}
      resources: {requests: {storage: {{ .storage }}}}
{{- end }}

{{- define "stores.service" -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ .root.Release.Name }}-{{ .name }}
  labels: {{- include "stores.labels" . | nindent 4 }}
spec:
  selector: {{- include "stores.selector" . | nindent 4 }}
  ports:
    - {name: {{ .name }}, port: {{ .port }}, targetPort: {{ .name }}}
{{- end }}
