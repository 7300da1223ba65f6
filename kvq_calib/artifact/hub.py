"""Artifacts in folders and on the Hugging Face hub: ``save_pretrained``, ``push_to_hub`` and ``from_pretrained``."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from kvq_calib.artifact.card import CardEntry, is_card, model_card
from kvq_calib.artifact.described import Described
from kvq_calib.artifact.errors import ArtifactHubError
from kvq_calib.errors import one_line
from kvq_calib.files import write_atomically
from kvq_calib.model.hub import hub_reachable, quiet
from kvq_calib.schema.results import Results, read_results

__all__ = ["SUFFIX", "Shareable", "Upload", "file_name", "find_artifact", "push", "save"]

SUFFIX = ".kvq.safetensors"
_CARD = "README.md"

_log = logging.getLogger(__name__)


def file_name(artifact: Described) -> str:
    """The default file name of an artifact, from the name of its recipe."""
    recipe = re.sub(r"[^\w.-]+", "-", str(artifact.calibration.get("recipe", ""))).strip("-.")
    return f"{recipe or 'artifact'}{SUFFIX}"


def _entries(artifacts: Mapping[str, Described], results: Sequence[Results]) -> list[CardEntry]:
    """Artifacts by file name, with their results, which name artifacts by hash."""
    entries = []
    for name, artifact in artifacts.items():
        if Path(name).name != name or not name.endswith(SUFFIX):
            raise ArtifactHubError(
                f"{name!r} is not a name for an artifact; write a file name that ends in {SUFFIX}"
            )
        digest = hashlib.sha256(artifact.to_bytes()).hexdigest()
        measured = [
            (each, result)
            for each in results
            for result in each.artifacts
            if each.fact("artifact_sha256", result.name) == digest
        ]
        entries.append(CardEntry(name, artifact, measured))
    return entries


def save(
    folder: str | os.PathLike[str], artifacts: Mapping[str, Described], results: Sequence[Results] = ()
) -> list[Path]:
    """Write artifacts and their model card. A README that is not such a card is left as it is.

    Args:
        folder: folder to write to; created if needed.
        artifacts: artifacts by file name.
        results: files of ``kvq-eval perplexity --json``; the card shows the results of these artifacts.

    Returns:
        The files that were written.

    Raises:
        ArtifactHubError: a file name is not allowed, or the folder cannot be created.
        WriteError: a file cannot be written.
    """
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactHubError(f"cannot make the folder {place}: {error.strerror or error}") from error
    entries = _entries(artifacts, results)
    for entry in entries:
        entry.artifact.save(place / entry.file)
    written = [place / entry.file for entry in entries]
    card = place / _CARD
    if card.exists() and not is_card(card.read_text(encoding="utf-8", errors="replace")):
        _log.warning("%s describes something else and is left as it is; no model card is written", card)
        return written
    write_atomically(card, model_card(place.name, entries).encode())
    return [*written, card]


# --------------------------------------------------------------------------------------------------- hub


@dataclass(frozen=True)
class Upload:
    """Where and how artifacts are uploaded; the fields mean what they mean in ``push_to_hub`` of transformers.

    Attributes:
        repo_id: ``name/repository``.
        private: whether a new repository is private; ``None`` is the account's default.
        revision: branch, created if needed; ``None`` is the main branch.
        token: access token; ``None`` is the account that is logged in.
        commit_message: message of the commit.
        create_pr: open a pull request instead of changing the branch.
    """

    repo_id: str
    private: bool | None = None
    revision: str | None = None
    token: str | bool | None = None
    commit_message: str | None = None
    create_pr: bool = False


def push(target: Upload, artifacts: Mapping[str, Described], results: Sequence[Results] = ()) -> str:
    """Upload artifacts and their model card in one commit. A README that is not such a card is left as it is.

    Args:
        target: where to upload.
        artifacts: artifacts by file name.
        results: as in :func:`save`.

    Returns:
        Address of the commit, or of the pull request.

    Raises:
        ArtifactHubError: a file name is not allowed, or the hub refuses or cannot be reached.
    """
    entries = _entries(artifacts, results)
    api = huggingface_hub.HfApi(token=target.token, library_name="kvq-calib")
    try:
        with quiet():
            api.create_repo(target.repo_id, private=target.private, exist_ok=True)
            if target.revision is not None:
                api.create_branch(target.repo_id, branch=target.revision, exist_ok=True)
            operations = [
                huggingface_hub.CommitOperationAdd(entry.file, entry.artifact.to_bytes()) for entry in entries
            ]
            if _may_have_card(api, target):
                card = model_card(target.repo_id, entries).encode()
                operations.append(huggingface_hub.CommitOperationAdd(_CARD, card))
            made = api.create_commit(
                target.repo_id,
                operations,
                commit_message=target.commit_message or f"Add {', '.join(artifacts)}",
                revision=target.revision,
                create_pr=target.create_pr,
            )
    except Exception as error:  # the network, the client and the hub raise many kinds
        raise ArtifactHubError(f"cannot upload to {target.repo_id}: {_advice(error)}") from error
    return str(made.pr_url or made.commit_url)


def _may_have_card(api: Any, target: Upload) -> bool:
    """Whether a repository has no README, or a card of this module."""
    try:
        file = api.hf_hub_download(target.repo_id, _CARD, revision=target.revision)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return True
    if is_card(Path(file).read_text(encoding="utf-8", errors="replace")):
        return True
    _log.warning("the README of %s describes something else and is left as it is", target.repo_id)
    return False


def find_artifact(
    name: str | os.PathLike[str],
    filename: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """Find the file of an artifact: a path, or a file in a folder or in a repository on the hub.

    Args:
        name: file, folder, or hub id.
        filename: file name in the folder or repository; needed if there are several artifacts.
        revision: branch, tag or commit of the repository.
        token, cache_dir, local_files_only: as in Hugging Face's libraries.

    Raises:
        ArtifactHubError: there is no artifact, or there are several; the message names them.
    """
    path = Path(os.fspath(name)).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        return _choose(path, str(name), filename)
    text = os.fspath(name)
    if text.count("/") > 1 or text.startswith((".", "~", "/")) or text.endswith(SUFFIX):
        raise ArtifactHubError(f"no such artifact or folder: {text}")
    try:
        with quiet():
            folder = huggingface_hub.snapshot_download(
                text,
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                allow_patterns=filename or f"*{SUFFIX}",
                local_files_only=local_files_only or not hub_reachable(),
            )
    except Exception as error:
        raise ArtifactHubError(
            f"no artifact {text}: there is no such file or folder here, and on the hub: {_advice(error)}"
        ) from error
    return _choose(Path(folder), text, filename)


def _choose(folder: Path, name: str, filename: str | None) -> Path:
    if filename is not None:
        if not (folder / filename).is_file():
            raise ArtifactHubError(f"{name} holds no {filename}")
        return folder / filename
    found = sorted(file for file in folder.iterdir() if file.name.endswith(SUFFIX))
    if not found:
        raise ArtifactHubError(f"{name} holds no file that ends in {SUFFIX}")
    if len(found) > 1:
        raise ArtifactHubError(
            f"{name} holds {len(found)} artifacts; name one: filename={found[0].name!r}, or "
            f"{', '.join(file.name for file in found[1:])}"
        )
    return found[0]


def _advice(error: Exception) -> str:
    """The cause of a failure, and how to log in if access was denied."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    text = one_line(error)
    if isinstance(error, HfHubHTTPError) and status in (401, 403):
        return f"{text}; log in with hf auth login, or set HF_TOKEN"
    return text


# ------------------------------------------------------------------------------------------- an artifact


class Shareable:
    """Saving and uploading an artifact, with the methods that transformers models have."""

    def save_pretrained(
        self: Described,
        save_directory: str | os.PathLike[str],
        *,
        filename: str | None = None,
        results: Sequence[str] = (),
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **options: Any,
    ) -> None:
        """Write the artifact and a model card to a folder, as with transformers models.

        Args:
            save_directory: the folder; created if needed.
            filename: file name of the artifact; by default from the name of its recipe.
            results: files of ``kvq-eval perplexity --json``; the card shows the results of this artifact.
            push_to_hub: upload it too.
            repo_id: repository to upload to; by default the folder's name.
            options: further arguments of :meth:`push_to_hub`.

        Raises:
            KVQError: the folder cannot be written, or the upload fails.
        """
        artifacts, measured = {filename or file_name(self): self}, read_results(results)
        save(save_directory, artifacts, measured)
        if push_to_hub:
            push(Upload(repo_id or Path(save_directory).name, **options), artifacts, measured)

    def push_to_hub(
        self: Described,
        repo_id: str,
        *,
        filename: str | None = None,
        results: Sequence[str] = (),
        **options: Any,
    ) -> str:
        """Upload the artifact with a model card, which states bits, KL divergence, data and command.

        Args:
            repo_id: ``name/repository``; created if needed.
            filename, results: as in :meth:`save_pretrained`.
            options: ``private``, ``revision``, ``token``, ``commit_message`` and ``create_pr``, as in transformers.

        Returns:
            Address of the commit, or of the pull request.

        Raises:
            ArtifactHubError: the hub refuses, or cannot be reached.
        """
        artifacts = {filename or file_name(self): self}
        return push(Upload(repo_id, **options), artifacts, read_results(results))
