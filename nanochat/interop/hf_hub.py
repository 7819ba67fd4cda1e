"""The Hugging Face hub: fetch a model's folder, push one. HF_ENDPOINT and HF_TOKEN are honoured by huggingface_hub."""

from __future__ import annotations

from pathlib import Path

MODEL_FILES = ["*.json", "*.safetensors", "README.md"]


def model_folder(path_or_repo: str) -> Path:
    """A local folder as it is, or the downloaded files of a hub repository "owner/name".

    Raises:
        FileNotFoundError: it is neither.
        RuntimeError: the repository can't be had; says why.
    """
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        return path
    if path_or_repo.count("/") != 1 or path_or_repo.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{path_or_repo} is no folder, and no hub repository (owner/name) either")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path_or_repo, allow_patterns=MODEL_FILES))
    except Exception as error:  # the hub's client raises many kinds; each means the same to the user
        raise RuntimeError(
            f"could not get {path_or_repo} from the hub ({_first_line(error)}): check the name and the network, set "
            "HF_TOKEN for a private repository, or give the folder of a copy"
        ) from error


def push_folder(folder: Path, repo: str, private: bool) -> str:
    """Upload a folder to the repository `repo`, made when it is missing; returns its address.

    Raises:
        RuntimeError: the hub refused, or can't be reached; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export from nanochat")
    except Exception as error:
        raise RuntimeError(
            f"could not push to {repo} ({_first_line(error)}): check HF_TOKEN (or `hf auth login`), the name and the "
            f"network; the export itself is in {folder}"
        ) from error
    return str(url)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
