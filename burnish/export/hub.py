"""`export_hub_model_id`: the finished folder uploaded to the Hugging Face hub under this name.

That the hub knows the user is asked before anything is read, so that an hour of merging does not end in a login.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from burnish.errors import Problem, RunStopped, UserError
from burnish.model.source import first_line

REMEDY = "connect and log in (HF_TOKEN or hf_hub_token), or leave it out and upload the folder later"


def check_login(name: str, token: str | None) -> None:
    try:
        HfApi(token=token).whoami()
    except Exception as error:  # no token, a wrong one, no network, offline by HF_HUB_OFFLINE
        message = f"cannot be uploaded to the hub ({first_line(error)})"
        raise UserError(Problem("settings", "export_hub_model_id", name, message, REMEDY)) from error


def upload(folder: Path, name: str, token: str | None) -> str:
    """The address of the uploaded model. What goes wrong leaves the folder as it is."""
    api = HfApi(token=token)
    try:
        address = api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="Export by burnish")
    except Exception as error:  # the hub's errors and the network's share no class
        message = f"the model is whole in {folder}, but was not uploaded as {name} ({first_line(error)})"
        raise RunStopped(f"{message}; try again with: hf upload {name} {folder}", 1) from error
    return str(address)
