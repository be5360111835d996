"""Folders to and from the Hugging Face hub, or a local folder in its place."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from xdfast.atomic import write_whole

__all__ = ["LOCAL", "Target", "fetch_folder", "parse_target", "send_folder"]

LOCAL, HUB = "local-dir:", "hf-hub:"

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")

#: What a model's repository may hold for us; a pull brings nothing else, above all no pickles.
_FILES = ("*.safetensors", "*.json", "*.yaml", "*.md", "*.onnx", "*.onnx.data", "*.pt2")


class Target(str):
    """A repository ``OWNER/NAME``, or a folder.

    Attributes:
        folder: the folder, or None.
    """

    folder: Path | None = None


def parse_target(text: str, what: str) -> Target:
    """``OWNER/NAME`` or ``hf-hub:OWNER/NAME`` of the hub, ``local-dir:PATH`` for a folder: timm's words.

    Raises:
        ValueError: neither; the message says how a folder is written.
    """
    text = str(text)
    if text.startswith(LOCAL):
        target = Target(text)
        target.folder = Path(text.removeprefix(LOCAL)).expanduser()
        return target
    name = text.removeprefix(HUB)
    if not _REPOSITORY.fullmatch(name) or name.startswith((".", "/", "~")):
        raise ValueError(f"{what} must be OWNER/NAME, a repository of the hub, or {LOCAL}PATH, a folder; got {text!r}")
    return Target(name)


def send_folder(folder: Path, target: Target, *, private: bool, revision: str | None, message: str) -> str:
    """Puts the files of a folder into a repository (made if missing) or a folder, in one commit; where they are now.

    Raises:
        ConnectionError: the hub cannot be reached, or refuses; the message says what to do.
        NotADirectoryError: the folder is a file.
    """
    if target.folder is not None:
        if target.folder.exists() and not target.folder.is_dir():
            raise NotADirectoryError(f"{LOCAL} needs a folder, but {target.folder} is a file")
        for file in sorted(f for f in folder.rglob("*") if f.is_file()):
            inside = target.folder / file.relative_to(folder)
            inside.parent.mkdir(parents=True, exist_ok=True)
            write_whole(inside, lambda aside, file=file: shutil.copyfile(file, aside))  # type: ignore[misc]
        return str(target.folder)
    from huggingface_hub import HfApi

    api = HfApi()
    with _in_words(target):
        api.create_repo(str(target), private=private, repo_type="model", exist_ok=True)
        if revision is not None:
            api.create_branch(str(target), branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=str(target), folder_path=folder, commit_message=message, revision=revision, repo_type="model"
        )
    return str(getattr(done, "commit_url", done))


def fetch_folder(source: Target, out: Path | None, *, revision: str | None) -> Path:
    """The files of a repository (weights, JSON, YAML, text, exported graphs) in ``out``, or in the hub's cache; of a folder a
    copy in ``out``, or the folder itself.

    Raises:
        FileNotFoundError: no such folder.
        ConnectionError: the hub cannot be reached, or has no such repository or revision.
    """
    if source.folder is not None:
        if not source.folder.is_dir():
            raise FileNotFoundError(f"{source.folder} is no folder; push with to={str(source)!r} makes it")
        if out is None or out.resolve() == source.folder.resolve():
            return source.folder
        for pattern in _FILES:
            for file in source.folder.rglob(pattern):
                inside = out / file.relative_to(source.folder)
                inside.parent.mkdir(parents=True, exist_ok=True)
                write_whole(inside, lambda aside, file=file: shutil.copyfile(file, aside))  # type: ignore[misc]
        return out
    from huggingface_hub import snapshot_download

    with _in_words(source):
        found = snapshot_download(
            str(source), revision=revision, local_dir=None if out is None else str(out), allow_patterns=list(_FILES)
        )
    return Path(found)


@contextlib.contextmanager
def _in_words(target: Target) -> Iterator[None]:
    """The hub's errors, with what to do."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        yield
    except LocalEntryNotFoundError as error:  # of some versions an HfHubHTTPError without a response
        raise ConnectionError(_unreachable(endpoint, target, error)) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = "log in with `hf auth login`, or set HF_TOKEN to a token that may do this"
        if status == 404:
            hint = f"there is no such repository or revision, or it is private: {hint}"
        elif status not in (401, 403):
            hint = "try again later"
        raise ConnectionError(f"{endpoint} refuses {target}: {first}; {hint}") from error
    except OSError as error:
        if error.filename is not None:  # a file of this machine, not the network
            raise
        raise ConnectionError(_unreachable(endpoint, target, error)) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "requests", "urllib3"):
            raise
        raise ConnectionError(_unreachable(endpoint, target, error)) from error


def _unreachable(endpoint: str, target: Target, error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"{endpoint} cannot be reached for {target} ({first}). Without a connection use a folder, {LOCAL}PATH, and copy it where "
        "there is one"
    )
