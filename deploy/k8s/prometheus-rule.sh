#!/bin/sh
# Prints the alert rules as a PrometheusRule, for clusters with the Prometheus operator:
#   deploy/k8s/prometheus-rule.sh | kubectl apply -f -
set -eu
cat <<EOF
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: foldserve
  namespace: ${NAMESPACE:-foldserve}
  labels: {app.kubernetes.io/name: foldserve}
spec:
EOF
sed 's/^/  /' "$(dirname "$0")/../prometheus/rules/foldserve.yaml"
