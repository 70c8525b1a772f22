"""Upload a finished run to the Hub: the pipeline, its card, the pictures, the metrics and the training options.

train.py does the same by itself with --push_to_hub. Here it is for a run that was trained without, or whose upload
failed, and to put what evaluate.py measured into the card.

    python examples/publish.py runs/digits --hub_model_id me/digits
    python examples/publish.py runs/digits --hub_model_id me/digits --evaluations runs/digits/evaluation/metrics.json
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import HfHubHTTPError, disable_progress_bars
from reporting import write_json
from scoring import fingerprint_of
from stopping import end
from tqdm.auto import tqdm

from ddpm_vlb import DDPMVLBPipeline, model_card
from ddpm_vlb.pipeline_ddpm_vlb import CODE_FILES, forget_origin, write_code

PICTURES = ("samples.png", "vlb_terms.png")
OPTIONS_FILE = "training_options.json"
# What an upload removes where it does not bring it; other files of the repository stay.
OURS = ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "README.md", "metrics.json"]
OURS += ["scheduler/x_0_mse-*.safetensors", "data.json", OPTIONS_FILE, *PICTURES, *CODE_FILES]
WEIGHTS = "unet/diffusion_pytorch_model"
# In the weights of one precision; of another, such as fp16, there is a dot before and behind its name.
SAME_WEIGHTS = [f"{WEIGHTS}.safetensors", f"{WEIGHTS}-*.safetensors", f"{WEIGHTS}.safetensors.index.json"]
# Options that may differ in one and the same run.
NOT_THE_RUN_S = ("max_train_steps", "num_epochs", "resume_from_checkpoint", "config", "push_to_hub", "logger")
PATHS = ("output_dir", "train_data_dir", "cache_dir", "config", "logging_dir")
WAITS = (5.0, 30.0)
_PREFIX = ".upload-"


def add_hub_options(group: Any) -> None:
    """The options of an upload, named as in diffusers' scripts where it has them.

    Args:
        group: a parser or a group of its options.
    """
    switch = argparse.BooleanOptionalAction
    group.add_argument("--hub_model_id", help="Name of the repository; default: the folder's, in your namespace.")
    group.add_argument(
        "--hub_private_repo", action=switch, help="Make the repository private; default: as the Hub does."
    )
    group.add_argument("--hub_include_code", action=switch, help="Upload the code of DDPMVLBPipeline as well.")
    group.add_argument("--hub_license", help="License of the weights as the Hub names it, mit say; default: unknown.")
    group.add_argument(
        "--hub_overwrite", action=switch, help="Replace another run that the repository holds; its tags stay."
    )


class Publisher:
    """Uploads to one repository of the Hub, in the background and again where it fails.

    Args:
        repo_id: "user/name" of a repository that is there.
        report: told what happens.
        staging: the folder in which snapshots are written on their way; the system's when None.
        stale: patterns of what an upload removes where it does not bring it.
        waits: seconds before each further attempt.
    """

    def __init__(
        self,
        repo_id: str,
        report: Callable[[str], object] = tqdm.write,
        staging: Path | None = None,
        stale: Sequence[str] = (*OURS, f"{WEIGHTS}*"),
        waits: Sequence[float] = WAITS,
    ):
        self.repo_id, self.report, self.staging, self.stale, self.waits = repo_id, report, staging, stale, waits
        self.api = HfApi()
        self._running: Future | None = None
        self._closing = threading.Event()
        for left in () if staging is None else staging.glob(f"{_PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)  # by a run that was killed

    @classmethod
    def open(
        cls,
        name: str,
        options: Mapping[str, Any],
        args: argparse.Namespace,
        report: Callable[[str], object] = tqdm.write,
        **more: Any,
    ) -> "Publisher":
        """Make the repository, or take one that is empty or holds the same run.

        Args:
            name: "user/name", or a name in the namespace of the token's user.
            options: the run's, by which an earlier upload is known as its own.
            args: the options that `add_hub_options` adds.
            report: told what happens.
            more: further arguments of the publisher.

        Raises:
            SystemExit: the Hub refuses or cannot be reached, or the repository is public where a private one is
                wanted, or it holds another run or something else.
        """
        api = HfApi()
        try:
            ModelCard(f"---\n{ModelCardData(license=args.hub_license).to_yaml()}\n---\n").validate()
        except ValueError as error:
            raise SystemExit(f"--hub_license {args.hub_license}: {explain(error)}") from error
        except Exception:
            pass  # older clients ask huggingface.co whatever the endpoint; whether that one answers is seen next
        try:
            repo_id = api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
            info = api.model_info(repo_id)
            files = {file.rfilename for file in info.siblings or ()} - {".gitattributes"}
            known = _read_options(api, repo_id) if OPTIONS_FILE in files else None
        except Exception as error:  # httpx's, requests' or huggingface_hub's own, according to its version
            where = "" if _status(error) else f"{api.endpoint} was asked: "
            raise SystemExit(f"--hub_model_id {name}: {where}{explain(error)}") from error
        if args.hub_private_repo and not info.private:
            raise SystemExit(f"--hub_private_repo: {repo_id} is there already, and public. Make it private first.")
        if known is None and files - {"README.md"}:  # the website makes one
            shown = ", ".join(sorted(files)[:4]) + (", ..." if len(files) > 4 else "")
            raise SystemExit(
                f"--hub_model_id {repo_id} holds something else already ({shown}). Choose another name: nothing of it "
                "was touched."
            )
        if known is not None and not args.hub_overwrite and _identity(known) != _identity(without_folders(options)):
            raise SystemExit(
                f"--hub_model_id {repo_id} holds another run already. Choose another name, or replace it with "
                "--hub_overwrite (its tags stay): nothing of it was touched."
            )
        report(f"Uploading to {api.endpoint}/{repo_id}.")
        return cls(repo_id, report, **more)

    def begin(self, options: Mapping[str, Any]) -> None:
        """Upload the training options, which shows that one may, before hours are spent.

        Args:
            options: of the run.

        Raises:
            SystemExit: the Hub refuses.
        """
        content = json.dumps(without_folders(options), indent=2) + "\n"
        try:
            self.api.upload_file(
                path_or_fileobj=content.encode(),
                path_in_repo=OPTIONS_FILE,
                repo_id=self.repo_id,
                commit_message="Begin a run",
            )
        except Exception as error:  # httpx's, requests' or huggingface_hub's own, according to its version
            raise SystemExit(f"--hub_model_id {self.repo_id}: {explain(error)}") from error

    def offer(self, make: Callable[[Path], object], message: str) -> None:
        """Upload a snapshot in the background, unless one is on its way.

        Args:
            make: writes the snapshot into a folder; called at once, so that training can go on.
            message: of the commit.
        """
        if self._running is not None and not self._running.done():
            self._say(f"{message}: not uploaded, because the upload before is still running.")
            return
        disable_progress_bars()  # they would write over training's
        folder = self._staged(make)
        if folder is not None:
            self._running = self.api.run_as_future(self._upload_and_remove, folder, message)

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
            self._running.exception()  # waits; what failed was reported
        folder = self._staged(make)
        commit = None if folder is None else self._upload_and_remove(folder, message)
        name = None if commit is None else self._attempt(f"The tag {tag}", lambda: self._tag(tag, commit))
        if name is not None:
            self._say(f"Uploaded to {self.api.endpoint}/{self.repo_id}, tag {name}.")
        return name

    def close(self) -> None:
        """Let the upload that is on its way end, without further attempts; for a run that ends early."""
        self._closing.set()
        if self._running is not None and not self._running.done():
            self._say("Waiting for an upload that is on its way; Ctrl-C again leaves it.")
            self._running.exception()

    def _say(self, message: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a closed terminal ends no run
            self.report(message)

    def _staged(self, make: Callable[[Path], object]) -> Path | None:
        """A folder with what `make` writes; None where that fails, on a full disk, say: training goes on."""
        folder = None
        try:
            folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self.staging))
            make(folder)
        except Exception as error:
            self._say(f"Nothing to upload, because it could not be written: {error}")
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            return None
        return folder

    def _tag(self, tag: str, commit: str) -> str:
        known = {ref.name: ref.target_commit for ref in self.api.list_repo_refs(self.repo_id).tags}
        name = tag if known.get(tag, commit) == commit else f"{tag}-{commit[:7]}"
        if name not in known:
            self.api.create_tag(self.repo_id, tag=name, revision=commit)
        return name

    def _upload_and_remove(self, folder: Path, message: str) -> str | None:
        """Upload a folder in one commit, which is there whole or not at all; returns its hash."""

        def upload() -> str:
            return self.api.upload_folder(
                repo_id=self.repo_id, folder_path=folder, commit_message=message, delete_patterns=list(self.stale)
            ).oid

        try:
            return self._attempt(f"The upload of {message!r}", upload)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _attempt(self, what: str, action: Callable[[], str]) -> str | None:
        for wait in (*self.waits, None):
            try:
                return action()
            except Exception as error:  # whatever it is, it must not end the run
                again = wait is not None and not _is_final(error) and not self._closing.is_set()
                then = f"trying again in {wait:.0f} s" if again else "given up"
                self._say(f"{what} failed, {then}: {explain(error)}")
                if not again or self._closing.wait(wait):
                    return None
        return None


def _read_options(api: HfApi, repo_id: str) -> Any:
    """The training options that a repository holds."""
    with tempfile.TemporaryDirectory() as folder:
        return json.loads(Path(api.hf_hub_download(repo_id, OPTIONS_FILE, local_dir=folder)).read_text())


def _identity(options: Any) -> Any:
    """What of a run's options makes it that run."""
    if not isinstance(options, Mapping):
        return options
    kept = {k: v for k, v in options.items() if k not in NOT_THE_RUN_S and not k.startswith("hub_")}
    return json.loads(json.dumps(kept))


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
            publisher = Publisher.open(args.hub_model_id, vars(args), args, staging=Path(args.output_dir))
            publisher.begin(vars(args))
        except SystemExit as error:
            refusal = [error.code]
    refusal = broadcast_object_list(refusal)
    if refusal[0] is not None:
        end(accelerator, refusal[0])
    return publisher


def repair_command(args: argparse.Namespace, repo_id: str) -> str:
    """The command that uploads a run whose own upload failed.

    Args:
        args: its options.
        repo_id: of the repository.
    """
    command = ["python", "examples/publish.py", args.output_dir, "--hub_model_id", repo_id]
    if args.hub_license != "unknown":
        command += ["--hub_license", args.hub_license]
    for name in ("hub_private_repo", "hub_include_code", "hub_overwrite"):
        if getattr(args, name):
            command.append(f"--{name}")
    return shlex.join(command)


def without_folders(content: Any) -> Any:
    """The same content with this machine's paths cut to their last part, which is nobody's business on the Hub.

    Args:
        content: what JSON can hold.
    """
    if isinstance(content, Mapping):
        return {key: _cut(value) if key in PATHS else without_folders(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [without_folders(value) for value in content]
    if isinstance(content, str) and content:
        parts = content.count("/") + content.count("\\")
        local = content.startswith(("/", "~", "./", "../")) or "\\" in content or ":" in content.split("/")[0]
        # A name of the Hub has one slash at most; what is there as a file is no such name.
        if local or (parts == 1 and os.path.exists(content)) or (parts > 1 and "\n" not in content):
            return _cut(content)
    return content


def _cut(content: Any) -> Any:
    if not isinstance(content, str) or not content:
        return content
    last = content.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
    return f"./{last}"


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
        includes_code=bool(args.hub_include_code),
        status=status,
    )
    card.save(folder / "README.md")


def stage_result(
    result: Path,
    repo_id: str,
    metrics: dict[str, Any],
    args: argparse.Namespace,
    evaluations: Sequence[Mapping[str, Any]] = (),
) -> Callable[[Path], None]:
    """What writes a finished run into a folder as it is to be uploaded.

    Args:
        result: train.py's output folder, or any saved pipeline.
        repo_id: of the repository.
        metrics: its metrics.json, or nothing.
        args: the options --hub_license and --hub_include_code.
        evaluations: evaluate.py's metrics.
    """

    def make(folder: Path) -> None:
        pipeline = DDPMVLBPipeline.from_pretrained(result)
        for part in ("unet", "scheduler"):
            shutil.copytree(result / part, folder / part)
        shutil.copyfile(result / "model_index.json", folder / "model_index.json")
        if args.hub_include_code:
            write_code(folder)
        forget_origin(folder)
        for name in PICTURES:
            if (result / name).exists():
                shutil.copyfile(result / name, folder / name)
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
        train = " It is train.py's, which is read by itself." if "train" in metrics else ""
        raise SystemExit(f"{path} is no metrics.json of evaluate.py: it has no {missing}.{train}")
    return metrics


def build_parser() -> argparse.ArgumentParser:
    """The options and their help texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="train.py's --output_dir, or any saved pipeline.")
    add_hub_options(parser)
    parser.add_argument(
        "--evaluations", type=Path, nargs="+", default=[], help="metrics.json files of evaluate.py, or their folders."
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Upload a run and tag it."""
    args = build_parser().parse_args(argv)
    if not (args.folder / "model_index.json").is_file():
        more = " Its run is not finished: it has checkpoints." if list(args.folder.glob("checkpoint-*")) else ""
        raise SystemExit(f"{args.folder} holds no pipeline: there is no model_index.json in it.{more}")
    needed = ("bits_per_dim", "timesteps", "data", "num_images", "network_calls_per_image")
    paths = [path / "metrics.json" if path.is_dir() else path for path in args.evaluations]
    evaluations = [read_metrics(path, needed) for path in dict.fromkeys(paths)]
    hashes = {(own.get("model") or {}).get("weights_sha256") for own in evaluations} - {None}
    if hashes and hashes != {fingerprint_of(DDPMVLBPipeline.from_pretrained(args.folder).unet)}:
        raise SystemExit(f"--evaluations are of other weights than those in {args.folder}: score this model again.")
    metrics = args.folder / "metrics.json"
    content = read_metrics(metrics) if metrics.exists() else {}
    options = content.get("options", {})
    # What is not said again is as it was.
    args.hub_license = args.hub_license or options.get("hub_license") or "unknown"
    if args.hub_include_code is None:
        args.hub_include_code = bool(options.get("hub_include_code"))
    name = args.hub_model_id or args.folder.resolve().name
    if not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", name):
        raise SystemExit(f"{name!r} is no name of a repository: give one with --hub_model_id.")
    publisher = Publisher.open(name, options, args, stale=(*OURS, *SAME_WEIGHTS))
    make = stage_result(args.folder, publisher.repo_id, content, args, evaluations)
    steps = content.get("train", {}).get("steps")
    tag = "result" if steps is None else f"step-{steps}"
    if publisher.finish(make, f"Upload {args.folder.resolve().name}", tag) is None:
        raise SystemExit("Nothing was published. Mend what is said above, and run the same command again.")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
