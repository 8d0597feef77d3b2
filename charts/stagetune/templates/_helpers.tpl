{{- define "stagetune.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{- /* Room is left for the longest suffix of a Service's name, which has at most 63 characters. */ -}}
{{- define "stagetune.fullname" -}}
{{- $name := include "stagetune.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "stagetune.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "stagetune.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- /* With the component: a run may be called like the release, and its pods have the same name. */ -}}
{{- define "stagetune.selectorLabels" -}}
app.kubernetes.io/name: {{ include "stagetune.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{- /* The labels by which the operator marks the pods that it has made. */ -}}
{{- define "stagetune.trainerLabels" -}}
app.kubernetes.io/managed-by: stagetune
app.kubernetes.io/component: trainer
{{- end -}}

{{- define "stagetune.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "stagetune.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- /* Of a list: an image's values, and the tag that stands for none. */ -}}
{{- define "stagetune.image" -}}
{{- $image := index . 0 -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $image.repository (default (index . 1) $image.tag) -}}
{{- end -}}
{{- end -}}

{{- define "stagetune.progressUrl" -}}
{{- default (printf "http://%s-progress.%s.svc:8080" (include "stagetune.fullname" .) .Release.Namespace) .Values.progress.url -}}
{{- end -}}

{{- define "stagetune.pullSecretNames" -}}
{{- $names := list -}}
{{- range . }}{{ $names = append $names .name }}{{ end -}}
{{- join "," $names -}}
{{- end -}}

{{- /* What the operator does in a namespace with runs: exactly the calls of cluster.py and watches. */ -}}
{{- define "stagetune.rules" -}}
- apiGroups: [stagetune.io]
  resources: [stagedfinetunes]
  verbs: [get, list, watch]
- apiGroups: [stagetune.io]
  resources: [stagedfinetunes/status]
  verbs: [update]
# For blockOwnerDeletion in the owner references, where the cluster checks who may set it.
- apiGroups: [stagetune.io]
  resources: [stagedfinetunes/finalizers]
  verbs: [update]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [list, watch, create, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch]
- apiGroups: [""]
  resources: [configmaps, persistentvolumeclaims, services]
  verbs: [get, create]
- apiGroups: [""]
  resources: [events]
  verbs: [create]
{{- end -}}

{{- define "stagetune.subject" -}}
- kind: ServiceAccount
  name: {{ include "stagetune.serviceAccountName" . }}
  namespace: {{ .Release.Namespace }}
{{- end -}}
