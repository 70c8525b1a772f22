"""Pushing a pipeline: where it goes, what stays private, and what a failure leaves.

The client is the real huggingface_hub, the Hub is tests/hub_server.py.
"""

import sys

import huggingface_hub
import pytest
import torch
from hub_cards import card_metadata
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from networks import pipeline, tiny_unet
from sharing_support import PLAIN, REPO, WEIGHTS, assert_no_token, digits, titles

from ddpm_vlb import DDPMVLBPipeline, DDPMVLBScheduler
from ddpm_vlb.repositories import CODE_FILES

DROPPED = ("ReadError", "RemoteProtocolError", "WriteError", "ConnectionError", "ChunkedEncodingError")


def repositories(server):
    return sorted(repo_id for _, repo_id in server._repositories)


def test_where_a_push_goes(hub, tmp_path, capfd):
    """A bare name is in the user's namespace, private is private, a folder's name is the repository's by default."""
    own = digits()
    own.push_to_hub("bare", private=True, commit_message="First")
    own.save_pretrained(tmp_path / "folder", push_to_hub=True)
    own.save_pretrained(tmp_path / "other", push_to_hub=True, repo_id="tester/saved", include_code=True, private=True)
    own.push_to_hub("tester/saved", subfolder="checkpoints/1")
    assert repositories(hub) == ["tester/bare", "tester/folder", "tester/saved"]
    private = {repo.id: repo.private for repo in hub._repositories.values()}
    assert private == {"tester/bare": True, "tester/folder": False, "tester/saved": True}
    assert titles(hub, "tester/bare") == ["First", "initial commit"]
    assert set(hub.files("tester/bare")) == PLAIN | {"README.md", ".gitattributes"}
    assert set(hub.files("tester/folder")) == PLAIN | {"README.md", ".gitattributes"}
    saved = PLAIN | {"README.md", ".gitattributes", *CODE_FILES}
    assert set(hub.files("tester/saved")) == saved | {f"checkpoints/1/{path}" for path in PLAIN}
    for name in ("folder", "other"):
        local = {str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*") if path.is_file()}
        assert local == PLAIN | (set(CODE_FILES) if name == "other" else set())
    assert 'from_pretrained("tester/bare")' in hub.files("tester/bare")["README.md"].decode()
    assert_no_token(hub)
    assert hub.token not in "".join(capfd.readouterr())


def test_a_card_is_kept_unless_another_is_given(hub):
    """The repository's own README survives a push, and goes where card= brings one."""
    own = digits()
    own.push_to_hub(REPO)
    mine = b"---\nlicense: mit\n---\n# Mine\n"
    huggingface_hub.upload_file(repo_id=REPO, path_or_fileobj=mine, path_in_repo="README.md")
    digits(1).push_to_hub(REPO, include_code=True)
    assert hub.files(REPO)["README.md"] == mine
    own.push_to_hub(REPO, card=ModelCard("---\nlicense: apache-2.0\n---\n# Given\n"))
    assert b"# Given" in hub.files(REPO)["README.md"]
    own.push_to_hub(REPO, card=ModelCard("---\nlicense: apache-2.0\n---\n# Given\n"))
    assert len(hub.history(REPO)) == 5  # what changes nothing is no commit


def test_no_path_of_the_machine_is_uploaded(hub, tmp_path):
    """diffusers notes in a configuration where it was loaded from; what is pushed from a folder does not tell it."""
    digits().save_pretrained(tmp_path / "of-somebody")
    loaded = DDPMVLBPipeline.from_pretrained(tmp_path / "of-somebody")
    loaded.push_to_hub(REPO, include_code=True)
    loaded.save_pretrained(tmp_path / "again", push_to_hub=True, repo_id="tester/again")
    for repo in (REPO, "tester/again"):
        assert [path for path, data in hub.files(repo).items() if b"of-somebody" in data] == []
        assert [path for path, data in hub.files(repo).items() if str(tmp_path).encode() in data] == []


def test_a_push_needs_no_template_engine(hub, monkeypatch):
    """huggingface_hub fills its own card templates with jinja2, which this package does not ask for."""
    monkeypatch.setitem(sys.modules, "jinja2", None)
    digits().push_to_hub(REPO, include_code=True)
    metadata, problems = card_metadata(hub.files(REPO)["README.md"].decode())
    assert metadata["library_name"] == "diffusers" and problems == []


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_without_a_right_to_write(hub, monkeypatch, token):
    """No token or a wrong one is an error of the Hub's with its status, and nothing is created."""
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HfHubHTTPError) as error:
        digits().push_to_hub(REPO, include_code=True, token=token)
    assert error.value.response.status_code == 401 and "401" in str(error.value)
    assert repositories(hub) == []
    digits().push_to_hub(REPO, token=hub.token)  # handed over, it reaches every request that needs it
    assert set(hub.files(REPO)) == PLAIN | {"README.md", ".gitattributes"}
    assert_no_token(hub)


def test_a_stranger_s_namespace_and_a_wrong_name(hub):
    """403 for what is another's; a name that no repository can have is refused before anything is asked."""
    with pytest.raises(HfHubHTTPError) as error:
        digits().push_to_hub("somebody/digits")
    assert error.value.response.status_code == 403
    asked = len(hub.requests)
    with pytest.raises(HFValidationError):
        digits().push_to_hub("a/b/c")
    assert repositories(hub) == [] and len(hub.requests) == asked


@pytest.mark.parametrize(
    "fault",
    [
        {"method": "PUT", "path_regex": "^/storage/", "drop_connection": True, "after_bytes": 4000, "times": 6},
        {"method": "POST", "path_regex": "/commit/", "drop_connection": True, "after_bytes": 4000},
        {"method": "POST", "path_regex": "/commit/", "status": 500},
        {"method": "POST", "path_regex": "/commit/", "status": 403},
    ],
    ids=["dropped-in-the-weights", "dropped-in-the-commit", "500", "403"],
)
def test_a_failed_push_leaves_the_branch_as_it_was(hub, monkeypatch, fault):
    """An error, and the repository as before it, card and all; the next push brings everything."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client tries a dropped upload five more times
    digits().push_to_hub(REPO)
    before = hub.files(REPO)
    injected = hub.fail(**fault)
    with pytest.raises(Exception) as error:
        digits(1).push_to_hub(REPO, include_code=True)
    cause = error.value.__cause__ or error.value
    assert getattr(getattr(cause, "response", None), "status_code", None) == fault.get("status")
    assert "status" in fault or type(cause).__name__ in DROPPED
    assert injected.times == 0
    assert hub.files(REPO) == before and len(hub.history(REPO)) == 2
    digits(1).push_to_hub(REPO, include_code=True)
    assert set(hub.files(REPO)) == set(before) | set(CODE_FILES) and hub.files(REPO)[WEIGHTS] != before[WEIGHTS]
    assert_no_token(hub)


def test_a_busy_hub_is_asked_again(hub):
    """A 5xx where asking again is harmless passes unnoticed: the client retries the weights' upload."""
    fault = hub.fail("PUT", "^/storage/", status=503)
    digits().push_to_hub(REPO)
    assert fault.times == 0 and titles(hub, REPO) == ["Upload DDPMVLBPipeline", "initial commit"]


def test_a_kept_card_is_said_to_be_kept(hub, log):
    """It may describe other weights; what is no card is refused before anything is made."""
    digits().push_to_hub("tester/digits")
    assert log == []
    digits(1).push_to_hub("tester/digits")
    assert len(log) == 1 and "keeps its model card" in log[0] and "card=" in log[0]
    with pytest.raises(ValueError, match="`card` must be"):
        digits().push_to_hub("tester/other", card="# hello")
    assert not huggingface_hub.HfApi().repo_exists("tester/other")


def test_shards_go_up_as_shards(hub, tmp_path):
    """max_shard_size holds for the upload as for the folder."""
    digits().save_pretrained(tmp_path / "digits", max_shard_size="20KB", push_to_hub=True)
    local = {path.name for path in (tmp_path / "digits" / "unet").iterdir()}
    assert len(local) > 3
    assert {name.partition("unet/")[2] for name in hub.files("tester/digits") if name.startswith("unet/")} == local


def test_a_pipeline_in_a_subfolder(hub, tmp_path):
    """What was pushed into a subfolder is loaded from it, from the Hub and from a folder, and not the root's."""
    digits(0).push_to_hub("tester/digits")
    digits(1).push_to_hub("tester/digits", subfolder="second")
    digits(0).save_pretrained(tmp_path)
    digits(1).save_pretrained(tmp_path / "second")
    for name in ("tester/digits", tmp_path):
        loaded = DDPMVLBPipeline.from_pretrained(name, subfolder="second", cache_dir=tmp_path / "cache")
        for own, other in zip(loaded.unet.parameters(), digits(1).unet.parameters(), strict=True):
            assert torch.equal(own, other)


def test_all_files_are_of_one_commit(hub, tmp_path, monkeypatch):
    """A push while a pipeline is being loaded does not mix two states: scheduler and weights are the first's."""
    pipeline(tiny_unet(seed=0), num_train_timesteps=20).push_to_hub("tester/digits")
    loaded = DDPMVLBScheduler.from_pretrained

    def and_push(*args, **kwargs):
        scheduler = loaded(*args, **kwargs)
        pipeline(tiny_unet(seed=1), num_train_timesteps=77).push_to_hub("tester/digits")
        return scheduler

    monkeypatch.setattr(DDPMVLBScheduler, "from_pretrained", and_push)
    pipe = DDPMVLBPipeline.from_pretrained("tester/digits", cache_dir=tmp_path)
    assert len(pipe.scheduler) == 20
    for own, other in zip(pipe.unet.parameters(), tiny_unet(seed=0).parameters(), strict=True):
        assert torch.equal(own, other)
    assert len(hub.history("tester/digits")) == 3
