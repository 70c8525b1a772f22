"""Upload a finished run to the Hub: the pipeline, its card, the pictures, the metrics and the training options.

train.py does the same by itself with --push_to_hub. Here it is for a run that was trained without, or whose upload
failed, and to put what evaluate.py measured into the card.

    python examples/publish.py runs/digits --hub_model_id me/digits
    python examples/publish.py runs/digits --hub_model_id me/digits --evaluations runs/digits/evaluation/metrics.json
"""

import argparse
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi
from huggingface_hub.utils import HfHubHTTPError, disable_progress_bars
from reporting import write_json
from tqdm.auto import tqdm

from ddpm_vlb import DDPMVLBPipeline, model_card
from ddpm_vlb.pipeline_ddpm_vlb import CODE_FILES

PICTURES = ("samples.png", "vlb_terms.png")
OPTIONS_FILE = "training_options.json"
# What an upload replaces; other files of the repository stay.
OURS = ["model_index.json", "unet/*", "scheduler/*", "README.md", "metrics.json", "data.json", OPTIONS_FILE]
OURS += [*PICTURES, *CODE_FILES]
WAITS = (5.0, 30.0)


def add_hub_options(group: Any) -> None:
    """The options of an upload, named as in diffusers' scripts where it has them.

    Args:
        group: a parser or a group of its options.
    """
    switch = argparse.BooleanOptionalAction
    group.add_argument("--hub_model_id", help="Name of the repository; default: the folder's, in your namespace.")
    group.add_argument("--hub_private_repo", action=switch, default=False, help="Make the repository private.")
    group.add_argument(
        "--hub_include_code", action=switch, default=False, help="Upload the code of DDPMVLBPipeline as well."
    )
    group.add_argument(
        "--hub_license", default="unknown", help="License of the weights, as the Hub names it: mit, ..."
    )


class Publisher:
    """Uploads to one repository of the Hub, in the background and again where it fails.

    Args:
        repo_id: "user/name" of a repository that is there.
        report: told what happens.
        waits: seconds before each further attempt.
    """

    def __init__(self, repo_id: str, report: Callable[[str], object] = tqdm.write, waits: Sequence[float] = WAITS):
        self.repo_id, self.report, self.waits = repo_id, report, waits
        self.api = HfApi()
        self._running: Future | None = None

    @classmethod
    def open(cls, name: str, private: bool, report: Callable[[str], object] = tqdm.write) -> "Publisher":
        """Make the repository, or take one that is empty or holds an earlier run.

        Args:
            name: "user/name", or a name in the namespace of the token's user.
            private: the repository must be private.
            report: told what happens.

        Raises:
            SystemExit: the Hub refuses or cannot be reached, or the repository is public or holds something else.
        """
        api = HfApi()
        try:
            repo_id = api.create_repo(name, private=private, exist_ok=True).repo_id
            info = api.model_info(repo_id)
        except Exception as error:  # httpx's, requests' or huggingface_hub's own, according to its version
            raise SystemExit(f"--hub_model_id {name}: {explain(error)}") from error
        if private and not info.private:
            raise SystemExit(f"--hub_private_repo: {repo_id} is there already, and public. Make it private first.")
        files = sorted({file.rfilename for file in info.siblings or ()} - {".gitattributes"})
        if files and OPTIONS_FILE not in files:
            shown = ", ".join(files[:4]) + (", ..." if len(files) > 4 else "")
            raise SystemExit(
                f"--hub_model_id {repo_id} holds something else already ({shown}). Choose another name: nothing of it "
                "was touched."
            )
        report(f"Uploading to {api.endpoint}/{repo_id}.")
        return cls(repo_id, report)

    def offer(self, make: Callable[[Path], object], message: str) -> None:
        """Upload a snapshot in the background, unless one is on its way.

        Args:
            make: writes the snapshot into a folder; called at once, so that training can go on.
            message: of the commit.
        """
        if self._running is not None and not self._running.done():
            self.report(f"{message}: not uploaded, because the upload before is still running.")
            return
        disable_progress_bars()  # they would write over training's
        folder = Path(tempfile.mkdtemp(prefix="upload-"))
        if self._staged(make, folder):
            self._running = self.api.run_as_future(self._upload_and_remove, folder, message)
        else:
            shutil.rmtree(folder, ignore_errors=True)

    def finish(self, make: Callable[[Path], object], message: str, tag: str) -> str | None:
        """Upload the result and tag it, after what is still on its way.

        Args:
            make: writes the result into a folder.
            message: of the commit.
            tag: its name; where another commit has it, this one's hash is put behind it.

        Returns:
            The tag's name, or None: the upload failed, and the repository is as it was before.
        """
        if self._running is not None:
            self._running.result()
        with tempfile.TemporaryDirectory(prefix="upload-") as folder:
            commit = self._upload(Path(folder), message) if self._staged(make, Path(folder)) else None
        name = None if commit is None else self._attempt(f"The tag {tag}", lambda: self._tag(tag, commit))
        if name is not None:
            self.report(f"Uploaded to {self.api.endpoint}/{self.repo_id}, tag {name}.")
        return name

    def _staged(self, make: Callable[[Path], object], folder: Path) -> bool:
        try:
            make(folder)
        except Exception as error:  # a full disk, say: training goes on
            self.report(f"Nothing to upload, because it could not be written to {folder}: {error}")
            return False
        return True

    def _tag(self, tag: str, commit: str) -> str:
        known = {ref.name: ref.target_commit for ref in self.api.list_repo_refs(self.repo_id).tags}
        name = tag if known.get(tag, commit) == commit else f"{tag}-{commit[:7]}"
        if name not in known:
            self.api.create_tag(self.repo_id, tag=name, revision=commit)
        return name

    def _upload_and_remove(self, folder: Path, message: str) -> None:
        try:
            self._upload(folder, message)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _upload(self, folder: Path, message: str) -> str | None:
        """Upload a folder in one commit, which is there whole or not at all; returns its hash."""

        def upload() -> str:
            return self.api.upload_folder(
                repo_id=self.repo_id, folder_path=folder, commit_message=message, delete_patterns=OURS
            ).oid

        return self._attempt(f"The upload of {message!r}", upload)

    def _attempt(self, what: str, action: Callable[[], str]) -> str | None:
        for wait in (*self.waits, None):
            try:
                return action()
            except Exception as error:  # whatever it is, it must not end the run
                again = wait is not None and not _is_final(error)
                then = f"trying again in {wait:.0f} s" if again else "given up"
                self.report(f"{what} failed, {then}: {explain(error)}")
                if not again:
                    return None
                assert wait is not None
                time.sleep(wait)
        return None


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None)


def _is_final(error: Exception) -> bool:
    """Whether the Hub has answered that it will not, rather than that it could not."""
    status = _status(error)
    return status is not None and 400 <= status < 500 and status not in (408, 409, 412, 425, 429)


def explain(error: BaseException) -> str:
    """What the Hub's client says, in one line, without the signatures that its addresses hold.

    Args:
        error: what it raised.
    """
    said = re.sub(r"\?\S*", "", " ".join(str(error).split()))[:300] or type(error).__name__
    if isinstance(error, HfHubHTTPError) and _status(error) == 401:
        return f"the Hub knows no token of yours, or not this one: run `hf auth login`, or set HF_TOKEN ({said})"
    if isinstance(error, HfHubHTTPError) and _status(error) == 403:
        return f"your token may not do this ({said})"
    return said


def open_publisher(accelerator: Accelerator, args: argparse.Namespace) -> Publisher | None:
    """The publisher of --push_to_hub, on the main process; all processes end if there can be none.

    Args:
        accelerator: of the run.
        args: its options.

    Raises:
        SystemExit: as `Publisher.open`.
    """
    if not args.push_to_hub:
        return None
    publisher = None
    refusal: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            publisher = Publisher.open(args.hub_model_id, args.hub_private_repo)
        except SystemExit as error:
            refusal = [error.code]
    refusal = broadcast_object_list(refusal)
    if refusal[0] is not None:
        raise SystemExit(refusal[0])
    return publisher


def without_folders(content: Any) -> Any:
    """The same content with this machine's paths cut to their last part, which is nobody's business on the Hub.

    Args:
        content: what JSON can hold.
    """
    if isinstance(content, Mapping):
        return {key: without_folders(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [without_folders(value) for value in content]
    if isinstance(content, str) and content:
        path = Path(content).expanduser()
        if path.is_absolute() or content.startswith(("./", "../")) or (path.parent != Path() and path.exists()):
            return f"./{path.name}"
    return content


def describe_folder(
    pipeline: DDPMVLBPipeline,
    folder: Path,
    repo_id: str,
    metrics: dict[str, Any],
    args: argparse.Namespace,
    evaluations: Sequence[Mapping[str, Any]] = (),
    status: str | None = None,
) -> None:
    """Write what goes with a saved pipeline: metrics, training options and the card, in what may be published of them.

    Args:
        pipeline: that was saved.
        folder: where it was saved, and where the pictures lie.
        repo_id: of the repository.
        metrics: train.py's.
        args: the options --hub_license and --hub_include_code.
        evaluations: evaluate.py's metrics.
        status: a sentence on top of the card.
    """
    metrics, evaluations = without_folders(metrics), without_folders(evaluations)
    if metrics:
        write_json(metrics, folder / "metrics.json")
    # Also the mark by which a repository is known as one that this script may write to.
    write_json(metrics.get("options", {}), folder / OPTIONS_FILE)
    if "data" in metrics:
        write_json(metrics["data"], folder / "data.json")
    pictures = [name for name in PICTURES if (folder / name).exists()]
    card = model_card(
        pipeline,
        repo_id,
        training=metrics,
        evaluations=evaluations,
        pictures=pictures,
        license=args.hub_license,
        includes_code=args.hub_include_code,
        status=status,
    )
    card.save(folder / "README.md")


def stage_result(
    result: Path,
    repo_id: str,
    args: argparse.Namespace,
    evaluations: Sequence[Mapping[str, Any]] = (),
) -> Callable[[Path], None]:
    """What writes a finished run into a folder as it is to be uploaded.

    Args:
        result: train.py's output folder, or any saved pipeline.
        repo_id: of the repository.
        args: the options --hub_license and --hub_include_code.
        evaluations: evaluate.py's metrics.
    """

    def make(folder: Path) -> None:
        pipeline = DDPMVLBPipeline.from_pretrained(result)
        pipeline.save_pretrained(folder, include_code=args.hub_include_code)
        for path in (folder / "model_index.json", folder / "unet" / "config.json"):
            config = json.loads(path.read_text())
            config.pop("_name_or_path", None)  # diffusers' note of where it was loaded from, a path of this machine
            write_json(config, path)
        for name in PICTURES:
            if (result / name).exists():
                shutil.copyfile(result / name, folder / name)
        metrics = read_metrics(result / "metrics.json") if (result / "metrics.json").exists() else {}
        describe_folder(pipeline, folder, repo_id, metrics, args, evaluations)

    return make


def read_metrics(path: Path, needed: Sequence[str] = ()) -> dict[str, Any]:
    """A metrics.json.

    Args:
        path: of the file.
        needed: keys that it must have.

    Raises:
        SystemExit: it is not there, no JSON, or lacks a key.
    """
    try:
        metrics = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read: {error}") from error
    missing = [key for key in needed if key not in metrics] if isinstance(metrics, dict) else list(needed)
    if missing or not isinstance(metrics, dict):
        raise SystemExit(f"{path} is no metrics.json of evaluate.py: it has no {missing}.")
    return metrics


def build_parser() -> argparse.ArgumentParser:
    """The options and their help texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="train.py's --output_dir, or any saved pipeline.")
    add_hub_options(parser)
    parser.add_argument("--evaluations", type=Path, nargs="+", default=[], help="metrics.json files of evaluate.py.")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Upload a run and tag it."""
    args = build_parser().parse_args(argv)
    if not (args.folder / "model_index.json").is_file():
        raise SystemExit(f"{args.folder} holds no pipeline: there is no model_index.json in it.")
    needed = ("bits_per_dim", "timesteps", "data", "num_images", "network_calls_per_image")
    evaluations = [read_metrics(path, needed) for path in args.evaluations]
    publisher = Publisher.open(args.hub_model_id or args.folder.resolve().name, args.hub_private_repo)
    metrics = args.folder / "metrics.json"
    steps = read_metrics(metrics).get("train", {}).get("steps") if metrics.exists() else None
    make = stage_result(args.folder, publisher.repo_id, args, evaluations)
    tag = "result" if steps is None else f"step-{steps}"
    if publisher.finish(make, f"Upload {args.folder.resolve().name}", tag) is None:
        raise SystemExit("Nothing was published. Run the same command again.")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
