"""The fields of KubeRay's objects that deploy/ uses, as JSON Schema. Others are errors, as they would be in a cluster.

Written after `RayJobSpec` and `RayClusterSpec` of ray-project/kuberay, ray-operator/apis/ray/v1/rayjob_types.go and
raycluster_types.go. Pod templates are Kubernetes' own: their schema is that of a PodTemplate.
"""

from __future__ import annotations

from typing import Any

_TEXT = {"type": "string", "minLength": 1}
_COUNT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_YES_OR_NO = {"type": "boolean"}
_OBJECT = {"type": "object"}
_START_PARAMETERS = {"type": "object", "additionalProperties": {"type": "string"}}  # numbers are an error


def _fields(required: tuple[str, ...] = (), /, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


_AUTOSCALER = _fields(
    idleTimeoutSeconds=_COUNT,
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    resources=_OBJECT,
    securityContext=_OBJECT,
)
_HEAD = _fields(("rayStartParams", "template"), rayStartParams=_START_PARAMETERS, template=_OBJECT)
_WORKERS = _fields(
    ("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
    groupName=_TEXT,
    replicas=_COUNT,
    minReplicas=_COUNT,
    maxReplicas=_COUNT,
    rayStartParams=_START_PARAMETERS,
    template=_OBJECT,
)
_CLUSTER = _fields(
    ("headGroupSpec",),
    rayVersion=_TEXT,
    enableInTreeAutoscaling=_YES_OR_NO,
    autoscalerOptions=_AUTOSCALER,
    headGroupSpec=_HEAD,
    workerGroupSpecs={"type": "array", "items": _WORKERS, "minItems": 1},
)
_JOB = _fields(
    ("entrypoint", "rayClusterSpec"),
    entrypoint=_TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
    backoffLimit=_COUNT,
    shutdownAfterJobFinishes=_YES_OR_NO,
    ttlSecondsAfterFinished=_COUNT,
    rayClusterSpec=_CLUSTER,
)
RAY_JOB = _fields(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=_OBJECT,
    spec=_JOB,
)
