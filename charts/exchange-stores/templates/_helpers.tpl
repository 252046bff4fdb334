{{- define "stores.labels" -}}
app.kubernetes.io/name: {{ .name }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/part-of: exchange
{{- end }}

{{- define "stores.selector" -}}
app.kubernetes.io/name: {{ .name }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
{{- end }}

{{/* The name of the Secret of a store. */}}
{{- define "stores.secret" -}}
{{- $suffix := get (dict "database" "db" "queue" "queue" "marketData" "redis") .store -}}
{{- get .root.Values.secrets .store | default (printf "%s-%s" .root.Release.Name $suffix) -}}
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
{{- include "stores.sameVolume" . -}}
volumeClaimTemplates:
  - metadata: {name: data}
    spec:
      accessModes: [ReadWriteOnce]
      {{- with .root.Values.storageClassName }}
      storageClassName: {{ . }}
      {{- end }}
      resources: {requests: {storage: {{ .storage }}}}
{{- end }}

{{/* The API server would refuse another size, too, but not say what to do. */}}
{{- define "stores.sameVolume" -}}
{{- $set := printf "%s-%s" .root.Release.Name .name -}}
{{- $there := lookup "apps/v1" "StatefulSet" .root.Release.Namespace $set | default dict -}}
{{- range dig "spec" "volumeClaimTemplates" list $there -}}
{{- $size := dig "spec" "resources" "requests" "storage" "" . -}}
{{- if ne $size $.storage -}}
{{- fail (printf "%s.storage cannot be changed from %s to %s: leave it, or grow the PersistentVolumeClaim data-%s-0 itself, then delete the StatefulSet with `kubectl delete statefulset %s --cascade=orphan` and upgrade again" $.name $size $.storage $set $set) -}}
{{- end -}}
{{- end -}}
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
