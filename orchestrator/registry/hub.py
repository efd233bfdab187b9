"""Upload of a publication to a hub that speaks Hugging Face's protocol: one commit, and a tag on it."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from orchestrator.errors import RunFailed, UsageError
from orchestrator.redaction import redact, summarize_error
from orchestrator.registry.model_card import POLYREF_TAG
from orchestrator.registry.publication import CARD, Publication, has_weights, is_model_file

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

_Error = TypeVar("_Error", bound=BaseException)

ENDPOINT_VARIABLE, TOKEN_VARIABLE = "HF_ENDPOINT", "HF_TOKEN"
CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 60.0
"""How long a connection may take, and how long a hub may keep silent before it counts as gone."""

_REFUSALS = (400, 401, 402, 403, 404, 410, 413, 422)
"""Answers that the same request would get again; others, such as 429 and 503, pass."""


@dataclass(frozen=True)
class PushedCommit:
    """What a push has left on the hub.

    Attributes:
        url: the commit's page.
        oid: its SHA.
        message: the first line of its message.
        tag: the tag on it; None if the repository has that tag on another commit.
        tag_taken: the tag that was not set for that reason.
        removed: files of an earlier push that the commit removes; the repository's history keeps them.
    """

    url: str
    oid: str
    message: str
    tag: str | None
    tag_taken: str | None
    removed: tuple[str, ...]


@dataclass(frozen=True)
class HubRepository:
    """A repository that the user may write to.

    Attributes:
        api: the client, with the user's token.
        repo: `owner/name`.
        is_private: whether others cannot read it.
    """

    api: "HfApi"
    repo: str
    is_private: bool

    @classmethod
    def open(cls, repo: str, *, public: bool) -> "HubRepository":
        """Find the repository or create it, private unless `public`, and check that it may be written to.

        Raises:
            UsageError: there is no token or the hub refuses it, the hub does not answer, or the repository is
                another owner's, readable by all without `public`, or holds a model that polyref did not push.
        """
        from huggingface_hub import CommitOperationAdd

        api = _connect()
        with _explain_errors(api, repo):
            found = _find_repository(api, repo)
            if found is None:
                api.create_repo(repo, private=not public, exist_ok=True)
            # The first request of every upload: whoever may not write is refused here, before any download.
            api.preupload_lfs_files(repo, [CommitOperationAdd(CARD, b"-")])
            is_private = bool(api.model_info(repo).private)
        if not is_private and not public:
            raise UsageError(
                f"{repo} is public, so that everybody could read the model: make it private on the hub, "
                "choose another repository, or add --public"
            )
        if found is not None:
            _refuse_other_models(repo, *found)
        return cls(api, repo, is_private)

    def upload(self, publication: Publication) -> PushedCommit:
        """Upload what the repository does not have yet, commit it at once, and tag the commit.

        A repository holds one model: files of an earlier one that loaders would still read are removed by the
        same commit. After an upload that broke off the branch is as it was, and a second call sends the rest.

        Raises:
            UsageError: the hub refuses the token or the files. RunFailed: the connection is lost.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        kind = "adapter of " if publication.adapter_only else ""
        message = f"Upload {kind}{publication.name}, version {publication.version}"
        with _explain_errors(self.api, self.repo, started=True):
            present = self.api.list_repo_files(self.repo)
            stale = [name for name in present if is_model_file(name) and name not in publication.files]
            operations = [CommitOperationAdd(name, content) for name, content in publication.files.items()]
            removals = [CommitOperationDelete(name) for name in stale]
            commit = self.api.create_commit(
                self.repo,
                [*operations, *removals],
                commit_message=message,
                commit_description=f"{publication.uri} of a polyref registry",
            )
            self._refuse_gaps(commit.oid, publication)
            tag = _name_tag(publication)
            is_set = self._set_tag(tag, commit.oid)
        return PushedCommit(
            url=redact(str(commit.commit_url)),
            oid=commit.oid,
            message=message,
            tag=tag if is_set else None,
            tag_taken=None if is_set else tag,
            removed=tuple(stale),
        )

    def _refuse_gaps(self, oid: str, publication: Publication) -> None:
        """Raise RunFailed if the commit lacks files, which the hub drops if a .gitignore there names them."""
        present = self.api.list_repo_files(self.repo, revision=oid)
        if missing := sorted(set(publication.files) - set(present)):
            raise RunFailed(
                f"commit {oid} of {self.repo} lacks {', '.join(missing)}: take them out of its .gitignore "
                "and push again"
            )

    def _set_tag(self, tag: str, oid: str) -> bool:
        """Tag a commit; False if the tag is on another one, where it stays."""
        tags = {ref.name: ref.target_commit for ref in self.api.list_repo_refs(self.repo).tags}
        if tag not in tags:
            self.api.create_tag(self.repo, tag=tag, revision=oid)
        return tags.get(tag, oid) == oid


def check_repo_name(repo: str) -> None:
    """Raise UsageError unless `repo` is an `owner/name` as hubs allow it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"{repo!r} is no name of a repository: {summarize_error(error)}") from None
    if "/" not in repo:
        raise UsageError(f"{repo!r} names no owner: write owner/{repo}, with you or an organisation as owner")


def _connect() -> "HfApi":
    from huggingface_hub import HfApi, get_session, get_token

    token = get_token()
    if token is None:
        raise UsageError(
            "there is no token to push with: `hf auth login` keeps one that may write, or set "
            f"{TOKEN_VARIABLE} to it; --to FOLDER writes the files without a hub"
        )
    # The library itself would wait for ever.
    get_session().timeout = ANSWER_SECONDS
    endpoint = os.environ.get(ENDPOINT_VARIABLE, "").rstrip("/") or None
    return HfApi(endpoint=endpoint, token=token, library_name=POLYREF_TAG)


def _find_repository(api: "HfApi", repo: str) -> tuple[list[str], list[str]] | None:
    """Return the files and tags of a repository; None if there is none that the user may read."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repo, timeout=CONNECT_SECONDS)
    except RepositoryNotFoundError:
        return None
    return [file.rfilename for file in info.siblings or ()], list(info.tags or ())


def _refuse_other_models(repo: str, files: list[str], tags: list[str]) -> None:
    if has_weights(files) and POLYREF_TAG not in tags:
        raise UsageError(
            f"{repo} holds a model that polyref did not push, which is left as it is: choose another name"
        )


def _name_tag(publication: Publication) -> str:
    name = re.sub(r"[^A-Za-z0-9._]+", "-", publication.name).strip(".-") or "model"
    return f"{name}-{publication.version}{'-adapter' if publication.adapter_only else ''}"


@contextmanager
def _explain_errors(api: "HfApi", repo: str, *, started: bool = False) -> Iterator[None]:
    """Turn errors of the hub and of the way to it into one message with the remedy."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled:
        raise UsageError(
            "HF_HUB_OFFLINE is set, so no hub is asked: unset it, or write the files with --to FOLDER"
        ) from None
    except RunFailed:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        answer = _find_cause(error, HfHubHTTPError)
        if answer is not None and answer.response.status_code in _REFUSALS:
            raise UsageError(_explain_refusal(api, repo, answer)) from error
        lost = _find_cause(error, HTTPError)
        reason = summarize_error(answer or lost or error)
        if started and "xet-write-token" in reason:
            raise UsageError(
                f"the hub at {redact(api.endpoint)} has no Xet storage ({reason}): set HF_HUB_DISABLE_XET=1 "
                "and push again"
            ) from error
        if started:
            raise RunFailed(
                f"the push to {repo} at {redact(api.endpoint)} broke off ({reason}); "
                "the same command sends what is missing"
            ) from error
        if lost is None and not isinstance(error, OSError):
            raise
        raise UsageError(
            f"the hub at {redact(api.endpoint)} does not answer ({reason}): check the network and "
            f"{ENDPOINT_VARIABLE}, or write the files with --to FOLDER"
        ) from error


def _find_cause(error: BaseException, kind: type[_Error]) -> _Error | None:
    """Return the error, or the first of its causes, that is of a kind."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, kind):
        cause = cause.__cause__
    return cause


def _explain_refusal(api: "HfApi", repo: str, error: "HfHubHTTPError") -> str:
    """Say why the hub refuses a request, and what to do."""
    status, hub = error.response.status_code, redact(api.endpoint)
    if status == 401:
        return (
            f"{hub} does not accept the token (401): `hf auth login` with a token that may write, or set "
            f"{TOKEN_VARIABLE} to one"
        )
    if status in (403, 404):
        return (
            f"{hub} does not let you write to {repo} ({status}): it is another owner's, or the token may not "
            "write there; choose a repository of your own, or a token with write access"
        )
    said = redact(error.server_message or "") or summarize_error(error)
    return f"{hub} refuses the push to {repo} ({status}): {' '.join(said.split())}"
