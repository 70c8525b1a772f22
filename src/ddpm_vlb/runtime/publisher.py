"""Uploads to the Hub: in the background, again where they fail, never in the way of training."""

import argparse
import contextlib
import json
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
from tqdm.auto import tqdm

from ddpm_vlb import CODE_FILES, STORED_FILES
from ddpm_vlb.runtime.staging import OPTIONS_FILE, PICTURES, without_folders
from ddpm_vlb.runtime.stopping import end

# What an upload removes where it does not bring it; other files of the repository stay.
OURS = ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "README.md", "metrics.json"]
OURS += ["chain/scheduler_config.json", "transformer/config.json"]
OURS += [f"{folder}/{pattern}" for folder in ("scheduler", "chain") for pattern in STORED_FILES]
OURS += ["data.json", OPTIONS_FILE, *PICTURES, *CODE_FILES]
WEIGHTS = "unet/diffusion_pytorch_model"
# In the weights of one precision; of another, such as fp16, there is a dot before and behind its name.
SAME_WEIGHTS = [f"{WEIGHTS}.safetensors", f"{WEIGHTS}-*.safetensors", f"{WEIGHTS}.safetensors.index.json"]
# Options that may differ in one and the same run.
NOT_THE_RUN_S = ("max_train_steps", "num_epochs", "resume_from_checkpoint", "config", "push_to_hub", "logger")
WAITS = (5.0, 30.0)
_PREFIX = ".upload-"


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
        return json.loads(
            Path(api.hf_hub_download(repo_id, OPTIONS_FILE, local_dir=folder)).read_text(encoding="utf-8")
        )


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
    command = ["ddpm-vlb", "publish", args.output_dir, "--hub_model_id", repo_id]
    if args.hub_license != "unknown":
        command += ["--hub_license", args.hub_license]
    for name in ("hub_private_repo", "hub_include_code", "hub_overwrite"):
        if getattr(args, name):
            command.append(f"--{name}")
    return shlex.join(command)
