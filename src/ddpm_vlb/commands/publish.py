"""Upload a finished run to the Hub: the pipeline, its card, the pictures, the metrics and the training options.

`ddpm-vlb train --push_to_hub` does the same by itself. Here it is for a run that was trained without, or whose upload
failed, and to put what `ddpm-vlb evaluate` measured into the card.

    ddpm-vlb publish runs/digits --hub_model_id me/digits
    ddpm-vlb publish runs/digits --hub_model_id me/digits --evaluations runs/digits/evaluation/metrics.json
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddpm_vlb import DDPMVLBPipeline
from ddpm_vlb.commands.options import Parser, add_hub_options
from ddpm_vlb.runtime.publisher import OURS, SAME_WEIGHTS, Publisher
from ddpm_vlb.runtime.staging import stage_result
from ddpm_vlb.runtime.stopping import refused
from ddpm_vlb.scoring.checkpoint import fingerprint_of


def read_metrics(path: Path, needed: Sequence[str] = ()) -> dict[str, Any]:
    """A metrics.json.

    Args:
        path: of the file.
        needed: keys that it must have.

    Raises:
        ValueError: it is not there, no JSON, lacks a key, or holds something else than objects where it should.
    """
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    known = metrics if isinstance(metrics, dict) else {}
    missing = [key for key in needed if key not in known]
    if missing or known is not metrics:
        train = " It is `ddpm-vlb train`'s, which is read by itself." if "train" in known else ""
        lacks = (
            f"of `ddpm-vlb evaluate`: it has no {missing}.{train}" if missing else "of `ddpm-vlb train`: no object."
        )
        raise ValueError(f"{path} is no metrics.json {lacks}")
    wrong = [key for key in ("options", "train", "model") if not isinstance(metrics.get(key, {}), dict)]
    if wrong:
        raise ValueError(f"{path} is no metrics.json: the values of {wrong} are no objects.")
    return metrics


def build_parser() -> argparse.ArgumentParser:
    """The options and their help texts."""
    parser = Parser("publish", __doc__)
    parser.add_argument("folder", type=Path, help="`ddpm-vlb train`'s --output_dir, or any saved pipeline.")
    add_hub_options(parser)
    parser.add_argument(
        "--evaluations",
        type=Path,
        nargs="+",
        default=[],
        help="metrics.json files of `ddpm-vlb evaluate`, or their folders.",
    )
    return parser


@refused("publish")
def main(argv: Sequence[str] | None = None) -> None:
    """Upload a run and tag it."""
    args = build_parser().parse_args(argv)
    if not (args.folder / "model_index.json").is_file():
        more = " Its run is not finished: it has checkpoints." if list(args.folder.glob("checkpoint-*")) else ""
        raise ValueError(f"{args.folder} holds no pipeline: there is no model_index.json in it.{more}")
    needed = ("bits_per_dim", "timesteps", "data", "num_images", "network_calls_per_image")
    paths = [path / "metrics.json" if path.is_dir() else path for path in args.evaluations]
    evaluations = [read_metrics(path, needed) for path in dict.fromkeys(paths)]
    hashes = {str(own["model"].get("weights_sha256")) for own in evaluations if "model" in own} - {"None"}
    if hashes and hashes != {fingerprint_of(DDPMVLBPipeline.from_pretrained(args.folder).unet)}:
        raise ValueError(f"--evaluations are of other weights than those in {args.folder}: score this model again.")
    metrics = args.folder / "metrics.json"
    content = read_metrics(metrics) if metrics.exists() else {}
    options = content.get("options", {})
    # What is not said again is as it was.
    args.hub_license = args.hub_license or options.get("hub_license") or "unknown"
    if args.hub_include_code is None:
        args.hub_include_code = bool(options.get("hub_include_code"))
    name = args.hub_model_id or args.folder.resolve().name
    if not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", name):
        raise ValueError(f"{name!r} is no name of a repository: give one with --hub_model_id.")
    publisher = Publisher.open(name, options, args, stale=(*OURS, *SAME_WEIGHTS))
    make = stage_result(args.folder, publisher.repo_id, content, args, evaluations)
    steps = content.get("train", {}).get("steps")
    tag = "result" if steps is None else f"step-{steps}"
    if publisher.finish(make, f"Upload {args.folder.resolve().name}", tag) is None:
        raise SystemExit("Nothing was published. Mend what is said above, and run the same command again.")


if __name__ == "__main__":
    main()
