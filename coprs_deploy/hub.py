"""Bundles and policies on the Hugging Face hub: ``hf://org/name@revision``.

A download goes to the cache of huggingface_hub, which a later call uses where the hub cannot be
reached. Only files of known kinds are downloaded: JSON, text, safetensors and graphs. Pickles and
Python code never are.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from coprs_deploy.errors import HubError, import_failure, install_hint, shorten

MAIN = "main"
"""Branch of a location without a revision."""

_MANIFEST = "manifest.json"

_LOCATION = re.compile(r"hf:/{1,2}(?:models/)?([\w.-]+/[\w.-]+)(?:@([\w.][\w./-]*))?/?")
"""Accepts a single slash, because :class:`pathlib.Path` merges two of them."""

_COMMIT = re.compile(r"[0-9a-f]{40}")

_TEXTS = ("*.json", "*.txt", "*.jinja", "*.md", "LICENSE*", "NOTICE*")

POLICY_FILES = (*_TEXTS, "*.safetensors", "*.model")
"""Files of a policy's directory that are downloaded; its folders are not."""

BUNDLE_FILES = (
    _MANIFEST,
    "*.onnx",
    "*.onnx.data",
    "*.engine",
    *(f"policy/{name}" for name in POLICY_FILES),
    *(f"policy_openvino/{name}" for name in ("*.xml", "*.bin", "*.npy", *_TEXTS)),
)
"""Files of a bundle that are downloaded and uploaded."""

_TIMEOUT_S = 10.0
"""Time that the hub has for its first response before the cache is used."""


@dataclass(frozen=True)
class HubLocation:
    """Repository on the hub.

    Attributes:
        repository: ``org/name``.
        revision: branch, tag or commit.
    """

    repository: str
    revision: str = MAIN

    @classmethod
    def parse(cls, text: str) -> HubLocation:
        """Parse ``hf://org/name`` or ``hf://org/name@revision``.

        Raises:
            ValueError: the text has another form.
        """
        found = _LOCATION.fullmatch(text)
        if not found:
            raise ValueError(
                f"location is {text!r}; accepted: hf://org/name, or hf://org/name@revision with a "
                "branch, tag or commit"
            )
        return cls(found[1], found[2] or MAIN)

    @property
    def is_commit(self) -> bool:
        """Whether the revision is the full hash of a commit, which never changes."""
        return bool(_COMMIT.fullmatch(self.revision))

    def __str__(self) -> str:
        revision = "" if self.revision == MAIN else f"@{self.revision}"
        return f"hf://{self.repository}{revision}"


def hub_location(path: str | Path) -> HubLocation | None:
    """Return the location on the hub that a path names; None for a path of this machine.

    Raises:
        ValueError: it starts with ``hf://`` and has another form.
    """
    text = str(path)
    return HubLocation.parse(text) if text.startswith("hf:/") else None


def local_bundle(path: str | Path) -> Path:
    """Return the folder of a bundle: a path as it is, or the download of a location on the hub.

    The files that the manifest lists are downloaded, unless the cache has them. A full commit hash
    whose files are in the cache needs no connection.

    Raises:
        ValueError: the location has another form.
        HubError: there is no such repository, revision or bundle, access is refused, a file is of
            an unknown kind, or the hub cannot be reached and the cache lacks a file.
        MissingDependencyError: huggingface_hub is not installed.
    """
    location = hub_location(path)
    if location is None:
        return Path(path)
    hub = _import_hub()
    with _reported(location):
        is_cached = location.is_commit and _cached_file(hub, location, _MANIFEST) is not None
        use_cache = is_cached or not _is_reachable(hub, location)
        options = {"revision": location.revision, "local_files_only": use_cache}
        manifest = Path(hub.hf_hub_download(location.repository, _MANIFEST, **options))
        root = manifest.parent
        names = _listed_files(manifest, location)
        if any(not (root / name).is_file() for name in names):
            hub.snapshot_download(
                location.repository,
                revision=root.name,  # the commit, so that all files are of one
                allow_patterns=[re.sub(r"([*?[])", r"[\1]", name) for name in names],
                local_files_only=use_cache and not is_cached,
            )
    if missing := [name for name in names if not (root / name).is_file()]:
        raise HubError(
            f"{location} lists {missing[0]} in its {_MANIFEST}, and "
            + (
                f"the cache {root} lacks it; connect once to complete the download"
                if use_cache
                else "has no such file; push the bundle again"
            )
        )
    return root


def local_policy(path: str | Path) -> Path:
    """Return the transformers directory of a policy: a path as it is, or the download of it.

    Raises:
        ValueError: the location has another form.
        HubError: there is no such repository or revision, access is refused, it has no weights in
            safetensors, or the hub cannot be reached and the cache has no copy.
        MissingDependencyError: huggingface_hub is not installed.
    """
    location = hub_location(path)
    if location is None:
        return Path(path)
    hub = _import_hub()
    with _reported(location):
        root = Path(
            hub.snapshot_download(
                location.repository,
                revision=location.revision,
                allow_patterns=list(POLICY_FILES),
                ignore_patterns=["*/*"],
                local_files_only=not _is_reachable(hub, location),
            )
        )
    if not any(root.glob("*.safetensors")):
        raise HubError(
            f"{location} has no weights in safetensors, the only format that is downloaded: others "
            "can run code when they are read. Convert them where you trust them "
            "(`AutoModelForImageTextToText.from_pretrained(...).save_pretrained(DIR)`), and pass "
            "the directory"
        )
    return root


def upload(
    location: HubLocation,
    files: Mapping[str, Path | bytes],
    *,
    message: str,
    private: bool | None = None,
    default_files: Mapping[str, bytes] | None = None,
) -> str:
    """Upload the files of a bundle in one commit; the repository and its branch are created.

    Files of an earlier bundle that are not among them are deleted in the same commit.

    Args:
        location: repository and branch.
        files: content, or path of a file, by its name in the repository.
        message: message of the commit.
        private: visibility of a new repository; None takes the default of the account.
        default_files: files that are uploaded only where the repository has none of that name.

    Returns:
        URL of the commit.

    Raises:
        ValueError: the revision is a commit.
        HubError: access is refused, a file is of an unknown kind, or the hub cannot be reached.
        MissingDependencyError: huggingface_hub is not installed.
    """
    if location.is_commit:
        raise ValueError(f"revision is {location.revision!r}; accepted: a branch to push to")
    hub = _import_hub()
    with _reported(location):
        api = hub.HfApi()
        api.create_repo(location.repository, private=private, exist_ok=True)
        if location.revision != MAIN:
            api.create_branch(location.repository, branch=location.revision, exist_ok=True)
        existing = set(api.list_repo_files(location.repository, revision=location.revision))
        defaults = {n: each for n, each in (default_files or {}).items() if n not in existing}
        added = {**defaults, **files}
        stale = sorted(name for name in existing - set(added) if _is_known(name))
        operations = [hub.CommitOperationAdd(name, each) for name, each in added.items()]
        operations += [hub.CommitOperationDelete(name) for name in stale]
        commit = api.create_commit(
            location.repository, operations, commit_message=message, revision=location.revision
        )
    return str(commit.commit_url)


def check_known_files(names: Sequence[str], owner: str) -> None:
    """Check that each file of a bundle is of a kind that is downloaded.

    Raises:
        HubError: a file is of another kind, or leaves the folder.
    """
    if unknown := [name for name in names if not _is_known(name)]:
        raise HubError(
            f"{owner} lists {unknown[0]!r}, which is not downloaded from the hub; accepted: "
            f"{', '.join(BUNDLE_FILES)}"
        )


def _is_known(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    patterns = (pattern.rpartition("/") for pattern in BUNDLE_FILES)
    return any(folder == wanted and fnmatchcase(file, kind) for wanted, _, kind in patterns)


def _listed_files(manifest: Path, location: HubLocation) -> list[str]:
    """Return what a manifest lists; whether it is valid is checked where the bundle is opened."""
    try:
        data = json.loads(manifest.read_bytes())
        policy = data["policy"]
        names = [file["path"] for file in data["files"]]
        if policy["path"] is not None:
            names += [f"{policy['path']}/{file['path']}" for file in policy["files"]]
        check_known_files(names, str(location))
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise HubError(
            f"{_MANIFEST} in {location} is not that of a bundle ({error!r}); "
            f"`coprs-deploy push BUNDLE {location}` uploads one"
        ) from error
    return names


def _cached_file(hub: Any, location: HubLocation, name: str) -> str | None:
    """Return the path of a file in the cache; None if it is not there."""
    found = hub.try_to_load_from_cache(location.repository, name, revision=location.revision)
    return found if isinstance(found, str) else None


def _is_reachable(hub: Any, location: HubLocation) -> bool:
    """Return whether the hub has the revision, or whether the cache must be used instead.

    Raises:
        HfHubHTTPError: the hub has no such repository or revision, or refuses access.
    """
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    try:
        hub.HfApi().model_info(location.repository, revision=location.revision, timeout=_TIMEOUT_S)
    except OfflineModeIsEnabled:
        return False
    except (HTTPError, ConnectionError) as error:
        if isinstance(error, HfHubHTTPError) and not _is_temporary(error):
            raise
        warnings.warn(
            f"{_endpoint()} cannot be reached ({_reason(error)}); {location} is taken from the "
            "cache, if it is there",
            stacklevel=4,
        )
        return False
    return True


def _is_temporary(error: Any) -> bool:
    status: int = error.response.status_code
    return status >= 500 or status in (408, 429)


@contextmanager
def _reported(location: HubLocation) -> Iterator[None]:
    """Turn the errors of huggingface_hub into a HubError that states the fix."""
    from huggingface_hub import errors

    login = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        try:
            yield
        except RuntimeError as error:  # an upload in a thread failed
            if isinstance(error.__cause__, errors.HTTPError):
                raise error.__cause__ from None
            raise
    except errors.GatedRepoError as error:
        url = f"{_endpoint()}/{location.repository}"
        raise HubError(
            f"{location} is gated: ask for access at {url}, then {login} to a token of that account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{_endpoint()} has no repository {location.repository}, or it is private; check the "
            f"name, or {login}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"{location.repository} has no revision {location.revision!r}; accepted: a branch, a "
            "tag, or the full hash of a commit"
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise HubError(
            f"{location} has no {_MANIFEST}, so it is not a bundle; `coprs-deploy push BUNDLE "
            f"{location}` uploads one"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        cause = f" ({_reason(error.__cause__)})" if error.__cause__ else ""
        raise HubError(
            f"{location} is not in the cache, or not as a whole, and is not downloaded from "
            f"{_endpoint()}{cause}; connect once (without HF_HUB_OFFLINE), or pass a local "
            "directory"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise HubError(
                f"{_endpoint()} refuses access to {location} ({status}: {_reason(error)}); {login} "
                "to a token with the permission"
            ) from error
        raise HubError(f"{_endpoint()} failed with {status}: {_reason(error)}") from error
    except (errors.HTTPError, ConnectionError) as error:
        raise HubError(
            f"the connection to {_endpoint()} failed ({_reason(error)}); repeat the command: what "
            "has been transferred is kept"
        ) from error


def _reason(error: BaseException) -> str:
    message = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return shorten(" ".join(message.split()))


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _import_hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        hint = install_hint("hub")
        raise import_failure(error, "huggingface_hub", hint, needed_by="hf://") from error
    return huggingface_hub
