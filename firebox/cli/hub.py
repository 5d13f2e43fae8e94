"""Downloading a model from the Hugging Face hub. The command does it, never the server, which fetches nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from firebox.wire.errors import NotFound, Unavailable

_WANTED: Final = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")


def download(repository: str, revision: str) -> tuple[Path, str]:
    """The directory of a repository at `revision`, in the hub's own cache, and the commit it is.

    Only weights as safetensors and files that are data are fetched. Raises NotFound and Unavailable.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        directory = Path(snapshot_download(repository, revision=revision, allow_patterns=list(_WANTED)))
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        if isinstance(error, HfHubHTTPError):
            raise NotFound(f"{repository!r} at {revision!r}: {error}; gated models need HF_TOKEN") from error
        raise Unavailable(
            f"{repository!r} at {revision!r} cannot be downloaded ({error}); is this machine online? A directory "
            "that you have is added with: firebox models add"
        ) from error
    return directory, directory.name
