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
    """The name of an artifact among others: that of its recipe."""
    recipe = re.sub(r"[^\w.-]+", "-", str(artifact.calibration.get("recipe", ""))).strip("-.")
    return f"{recipe or 'artifact'}{SUFFIX}"


def _entries(artifacts: Mapping[str, Described], results: Sequence[Results]) -> list[CardEntry]:
    """Artifacts by their file names, with what was measured of them: results know files by their hashes."""
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
    """Write artifacts and their model card; a README that is not such a card stays.

    Args:
        folder: made if it is not there.
        artifacts: by file name.
        results: of ``kvq-eval perplexity --json``; those of these artifacts are shown.

    Returns:
        The files that were written.

    Raises:
        ArtifactHubError: a name is not one for an artifact, or the folder cannot be made.
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
        _log.warning("%s is of something else and stays as it is; there is no card of the artifacts", card)
        return written
    write_atomically(card, model_card(place.name, entries).encode())
    return [*written, card]


# --------------------------------------------------------------------------------------------------- hub


@dataclass(frozen=True)
class Upload:
    """Where and how artifacts are uploaded; the fields mean what they mean in ``push_to_hub`` of transformers.

    Attributes:
        repo_id: ``name/repository``.
        private: whether a repository that is made is private; ``None`` is the account's default.
        revision: branch, made if it is not there; ``None`` is the repository's main branch.
        token: token of the account; ``None`` is the account that is logged in.
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
    """Upload artifacts and their model card in one commit; a README that is not such a card stays.

    Args:
        target: where to.
        artifacts: by file name.
        results: as in :func:`save`.

    Returns:
        Address of the commit, or of the pull request.

    Raises:
        ArtifactHubError: a name is not one for an artifact, or the hub refuses, or cannot be reached.
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
    except Exception as error:  # of the network, the client and the hub
        raise ArtifactHubError(f"cannot upload to {target.repo_id}: {_advice(error)}") from error
    return str(made.pr_url or made.commit_url)


def _may_have_card(api: Any, target: Upload) -> bool:
    """Whether a repository has no README, or one that was written here."""
    try:
        file = api.hf_hub_download(target.repo_id, _CARD, revision=target.revision)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return True
    if is_card(Path(file).read_text(encoding="utf-8", errors="replace")):
        return True
    _log.warning("the README of %s is of something else and stays as it is", target.repo_id)
    return False


def find_artifact(
    name: str | os.PathLike[str],
    filename: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The file of an artifact: of a path, or in a folder, or in a repository of the hub.

    Args:
        name: file, folder, or hub id.
        filename: which artifact of a folder or repository; needed where there are several.
        revision: of a repository: branch, tag or commit.
        token, cache_dir, local_files_only: as everywhere in Hugging Face's libraries.

    Raises:
        ArtifactHubError: nothing there, or several; says which.
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
    """What went wrong, and for an account that may not what helps."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    text = one_line(error)
    if isinstance(error, HfHubHTTPError) and status in (401, 403):
        return f"{text}; log in with hf auth login, or set HF_TOKEN"
    return text


# ------------------------------------------------------------------------------------------- an artifact


class Shareable:
    """Saving and uploading of an artifact, as models of transformers are."""

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
        """Write the artifact and a model card to a folder, as models of transformers are saved.

        Args:
            save_directory: the folder; made if it is not there.
            filename: of the artifact; that of its recipe by default.
            results: files of ``kvq-eval perplexity --json``; the card shows what they say of this artifact.
            push_to_hub: upload it too.
            repo_id: where to; the folder's name by default.
            options: of :meth:`push_to_hub`.

        Raises:
            KVQError: the folder cannot be written, or see :meth:`push_to_hub`.
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
            repo_id: ``name/repository``; made if it is not there.
            filename, results: as in :meth:`save_pretrained`.
            options: ``private``, ``revision``, ``token``, ``commit_message`` and ``create_pr``, as in transformers.

        Returns:
            Address of the commit, or of the pull request.

        Raises:
            ArtifactHubError: the hub refuses, or cannot be reached.
        """
        artifacts = {filename or file_name(self): self}
        return push(Upload(repo_id, **options), artifacts, read_results(results))
