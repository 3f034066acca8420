"""A job as a user writes it: python ray_job.py REQUESTS.parquet OUTPUT CHECKPOINTS MODEL."""

from __future__ import annotations

import sys

import ray
import ray.data
from ray.data.checkpoint import CheckpointConfig

from foldserve.server.api.batch.ray import answered

OPTIONS = ("--dtype", "float32", "--max-model-len", "1024", "--enforce-eager", "--kv-cache-memory-bytes", "67108864")


def main(requests: str, output: str, checkpoints: str, model: str) -> None:
    ray.init(num_cpus=4, include_dashboard=False)
    context = ray.data.DataContext.get_current()
    context.checkpoint_config = CheckpointConfig("custom_id", checkpoints, delete_checkpoint_on_success=False)
    rows = ray.data.read_parquet(requests)
    answered(rows, model, *OPTIONS, actors=2, gpus=0, rows=8, num_cpus=1).write_parquet(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
