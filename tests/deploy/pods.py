"""What every pod in deploy/ has to be."""

from __future__ import annotations

from typing import Any


def check_restricted(pod: dict[str, Any]) -> None:
    """Fails unless a pod keeps the restricted pod security standard and names its resources."""
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 2000
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert {"requests", "limits"} <= set(container["resources"])
        assert "memory" in container["resources"]["limits"]
    assert {kind for volume in pod.get("volumes", []) for kind in volume} <= {
        "name",
        "emptyDir",
        "persistentVolumeClaim",
        "secret",
    }
