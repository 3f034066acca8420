"""Job `kernels`: Triton kernels against torch, by the checks that the tests run in Triton's interpreter."""

from __future__ import annotations

from foldserve.kernels.checks import CHECKS, check_wrong_twin, name_of
from foldserve.server.quality.gpu_check.jobs import KernelsJob, KernelsResult


def run(spec: KernelsJob) -> KernelsResult:
    failures: dict[str, str] = {}
    for check, args in CHECKS:
        try:
            check("cuda", *args)
        except Exception as error:  # the others go on
            failures[name_of(check, args)] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return KernelsResult(checks=len(CHECKS), failures=failures, catches_a_wrong_kernel=_catches())


def _catches() -> bool:
    try:
        check_wrong_twin("cuda")
    except AssertionError:
        return True
    return False
