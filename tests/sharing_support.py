"""A Hub of the tests' own, programs that talk to it, and the pipeline that is shared there."""

import huggingface_hub
import torch
from networks import pipeline, sample, tiny_unet

from ddpm_vlb import DDPMVLBPipeline

REPO = "tester/digits"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PLAIN = {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json", WEIGHTS}
CONFIG = {"levels": 17, "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50}
# What stock cannot sample: the second format.
OURS_ONLY = {
    "tester/learned": ({}, {"variance_type": "learned"}),
    "tester/classes": ({"classes": 4}, {}),
}


def digits(seed: int = 0) -> DDPMVLBPipeline:
    return pipeline(tiny_unet(seed=seed), **CONFIG)


def images(pipe, **arguments) -> torch.Tensor:
    return torch.from_numpy(sample(pipe, batch_size=2, steps=10, output_type="np", **arguments))


def client_of(server, patch, home):
    """Let this process' client talk to the Hub."""
    patch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (huggingface_hub.constants, huggingface_hub.file_download):  # older clients read their own copy
        patch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    patch.setattr(huggingface_hub.hf_api.api, "endpoint", server.endpoint)
    patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True, raising=False)  # older clients have no Xet
    patch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(home / "no-token"))
    patch.setenv("HF_TOKEN", server.token)


def titles(server, repo, revision="main"):
    return [commit.title for commit in server.history(repo, revision)]


def assert_no_token(server):
    """The token is in no file of any commit, and was shown to nobody but the Hub."""
    for repo in server._repositories.values():
        for commit in repo.commits.values():
            assert not any(server.token.encode() in blob.data for blob in commit.files.values())
            assert server.token not in commit.title + commit.message
    storage = [request for request in server.requests if request.origin == server.storage]
    assert {request.authorization for request in storage} <= {None}
    assert not any(server.token in request.path + request.query for request in server.requests)
