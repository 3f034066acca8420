"""A whole job of Ray Data: Parquet in, Parquet out, as `deploy/k8s/ray` starts it.

    python -m foldserve.server.api.batch.ray_job REQUESTS RESULTS CHECKPOINTS MODEL [engine options of vllm serve]

Joins the cluster that RAY_ADDRESS names, or starts one on this machine.
"""

from __future__ import annotations

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Sequence

from foldserve.server.api.batch.ray import answered


def read_arguments(argv: Sequence[str] | None = None) -> tuple[Namespace, list[str]]:
    """Our arguments, and the engine's options."""
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.add_argument("requests", help="Parquet files with the columns custom_id and line, a line of a batch file")
    parser.add_argument("results", help="folder for Parquet files with the column result besides")
    parser.add_argument("checkpoints", help="folder of the ids that are answered: the job started again does the rest")
    parser.add_argument("model", help="a name on the hub, or a directory that all machines have")
    parser.add_argument(
        "--actors", type=int, nargs=2, default=(1, 1), metavar=("LEAST", "MOST"), help="number of engines"
    )
    parser.add_argument("--gpus", type=float, default=1, help="of each engine")
    parser.add_argument("--rows", type=int, default=256, help="most rows in flight per engine")
    return parser.parse_known_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    import ray.data  # an extra
    from ray.data.checkpoint import CheckpointConfig

    args, options = read_arguments(argv)
    ray.data.DataContext.get_current().checkpoint_config = CheckpointConfig(
        "custom_id", args.checkpoints, delete_checkpoint_on_success=False
    )
    requests = ray.data.read_parquet(args.requests)
    results = answered(requests, args.model, *options, actors=tuple(args.actors), gpus=args.gpus, rows=args.rows)
    results.write_parquet(args.results)


if __name__ == "__main__":
    main()
