"""What the Hugging Face hub's refusals mean for who asked: a licence to accept, a token, a name that is not there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from .errors import AFLoRAError, one_line

_LOGIN = "`hf auth login` on this machine, or the variable HF_TOKEN in a job"


def refusal(error: BaseException, name: str) -> str | None:
    """Why the hub does not give a repository, and what to do; None where the error is of another kind.

    Args:
        error: As transformers raises it: the hub's own is its cause.
        name: Of the repository.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, GatedRepoError):  # a RepositoryNotFoundError, too
            return (
                f"it is gated. Accept its licence at https://huggingface.co/{name}, wait for access if it has to be "
                f"granted, and give the token of that account: {_LOGIN}."
            )
        if isinstance(cause, RepositoryNotFoundError):
            return (
                f"there is neither a folder nor a repository on the hub of that name. If it is private, give the token "
                f"of an account that may read it: {_LOGIN}."
            )
        if isinstance(cause, RevisionNotFoundError):
            return f"it has no such revision. https://huggingface.co/{name} shows its branches, tags and commits."
        cause = cause.__cause__ or cause.__context__
    return None


def snapshot(name: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """The folder in the cache with a repository's files of these patterns; they are fetched if they are not there.

    Raises:
        AFLoRAError: They cannot be had.
    """
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*patterns]))
    except Exception as error:  # of the network, too
        reason = refusal(error, name) or one_line(error)
        raise AFLoRAError(f"{name} is no folder, and could not be fetched from the hub: {reason}") from None
