{{- define "dvd.fullname" -}}
{{- if eq .Release.Name .Chart.Name -}}{{ .Chart.Name }}{{- else -}}
{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}{{- end -}}
{{- end -}}

{{/* Of everything. Argument: root. */}}
{{- define "dvd.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{ include "dvd.selector" . }}
{{- end -}}

{{- define "dvd.selector" -}}
app.kubernetes.io/part-of: dvd
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "dvd.image" -}}
{{- if .Values.image.digest -}}{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{- end -}}
{{- end -}}

{{- define "dvd.servedName" -}}
{{ .Values.model.servedName | default (base .Values.model.path) }}
{{- end -}}

{{- define "dvd.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "dvd.containerSecurity" -}}
allowPrivilegeEscalation: false
privileged: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* preStop, drain, and some time to end. */}}
{{- define "dvd.graceSeconds" -}}
{{ add .Values.preStopSeconds .Values.shutdownTimeout 20 }}
{{- end -}}

{{/* Where to schedule. Argument: a group. */}}
{{- define "dvd.scheduling" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end -}}

{{- define "dvd.pullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{/* What a group has: what it says itself, one level deep, and for the rest what its tier says. Arguments: the tier's
values, the group's. Not `merge`, which takes 0 and false for unsaid. */}}
{{- define "dvd.group" -}}
{{- $values := omit (deepCopy (index . 0)) "groups" }}
{{- range $name, $value := index . 1 }}
{{- if and (kindIs "map" $value) (kindIs "map" (get $values $name)) }}
{{- range $inner, $said := $value }}{{ $_ := set (get $values $name) $inner $said }}{{ end }}
{{- else }}{{ $_ := set $values $name $value }}{{ end }}
{{- end }}
{{- toYaml $values }}
{{- end -}}
