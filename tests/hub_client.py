"""What lets this process's huggingface_hub talk to the Hub of tests/hub_server.py."""

import huggingface_hub


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


def titles(server, repo_id="tester/run", revision="main"):
    """The titles of a repository's commits, the newest first."""
    return [commit.title for commit in server.history(repo_id, revision)]
