"""The job of deploy/k8s/ray on a cluster of this machine: python ray_job.py REQUESTS RESULTS CHECKPOINTS MODEL."""

from __future__ import annotations

import sys

import ray

from foldserve.server.api.batch import ray_job

OPTIONS = ("--dtype", "float32", "--max-model-len", "1024", "--enforce-eager", "--kv-cache-memory-bytes", "67108864")

if __name__ == "__main__":
    ray.init(num_cpus=4, include_dashboard=False)
    ray_job.main([*sys.argv[1:], "--actors", "2", "2", "--gpus", "0", "--rows", "8", *OPTIONS])
