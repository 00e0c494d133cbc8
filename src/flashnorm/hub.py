"""Models on the Hugging Face hub: huggingface_hub fetches what is read, and uploads what was converted."""

import contextlib
import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm

from flashnorm.compat.huggingface_hub import hash_of_upload, uploaded
from flashnorm.errors import InputError, brief
from flashnorm.format import FileRecord

# Other formats of the same weights, and what a training run leaves behind, are not fetched. `[!0-9]` spares a module of
# sentence-transformers (`2_Dense/`), whose weights may be in any format.
_IGNORED = (
    *(f"[!0-9]*.{kind}" for kind in ("bin", "pth", "pt", "ckpt", "msgpack", "h5", "ot", "npz", "onnx", "onnx_data")),
    *("*.gguf", "*.tflite", "*.nemo", "*.llamafile", "consolidated*"),
    *("original/*", "metal/*", "onnx/*", "openvino/*", "coreml/*", "checkpoint-*/*", "global_step*/*", "runs/*"),
)

# The files that a plan is made from.
_CONFIG_AND_CODE = ["config.json", "modules.json", "*.py"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"

# Exception of huggingface_hub -> what was found, and what to do. The first class that fits is used.
_FAILURES: tuple[tuple[type[Exception], str], ...] = (
    (GatedRepoError, f"a gated repository; ask for access on its page, then {_LOG_IN}"),
    (RepositoryNotFoundError, f"neither; check the name, and if it is that of a private repository, {_LOG_IN}"),
    (HFValidationError, "neither; check the name"),
    (RevisionNotFoundError, "a repository without that revision (by default its main branch); check both"),
    (LocalEntryNotFoundError, "no folder, and no hub that has it; check the connection, and HF_HUB_OFFLINE"),
    (Exception, "that it cannot be fetched; run again, which keeps the files that are whole"),
)

_UNKNOWN_USER = f"that the hub does not know who you are; {_LOG_IN}"

# Status with which the hub refuses an upload -> what was found, and what to do.
_REFUSALS = {
    401: _UNKNOWN_USER,
    403: "that you may not write there; use a token with write access, or a name of your own",
    404: "no such owner, or none that you may write to; check the name and the token",
}


def local_folder(
    source: str | Path, revision: str | None = None, subfolder: str = "", *, config_only: bool = False
) -> Path:
    """The folder of a model: the path itself, or a snapshot of a hub repository, fetched if it is not cached.

    Args:
        source: a path, or a hub id. A path that exists on disk is preferred.
        revision: branch, tag or commit of a hub repository; None for its main branch.
        subfolder: the model's folder, relative to `source`.
        config_only: whether to fetch only the files of a repository that a plan is made from. If there are none, the
            folder does not exist.

    Raises:
        InputError: there is no such folder, and no such repository, revision or subfolder, or it cannot be fetched; or
            there is a revision for a folder on disk.
    """
    inside = PurePosixPath(subfolder)
    if inside.is_absolute() or ".." in inside.parts:
        raise InputError(f"{source}: expected a subfolder of it, found {subfolder!r}, which leads out of it")
    if os.path.exists(source):
        if revision is not None:
            raise InputError(
                f"{source}: expected a hub id, as there is a revision ({revision}), found a path on disk; leave out "
                "--revision, or name the repository"
            )
        folder = Path(source)
    elif on_hub(source):
        folder = _snapshot(str(source), revision, "" if inside == PurePosixPath() else f"{inside}/", config_only)
    else:
        raise InputError(f"{source}: expected a model's folder, found nothing there")
    if subfolder and not (folder / inside).is_dir():
        raise InputError(f"{source}: expected a model in its folder {subfolder!r}, found none; check --subfolder")
    return folder / inside


def on_hub(source: str | Path) -> bool:
    """Whether this is the id of a repository on the hub, and no path that exists on disk."""
    return not os.path.exists(source) and isinstance(source, str) and bool(_HUB_ID.fullmatch(source))


def _snapshot(repository: str, revision: str | None, prefix: str, config_only: bool) -> Path:
    """Fetch a repository's files whose path begins with a prefix, unless they are cached."""
    at = glob.escape(prefix)
    wanted = [at + pattern for pattern in (_CONFIG_AND_CODE if config_only else ["*"])]
    ignored = [at + pattern for pattern in _IGNORED]
    with hub_errors(repository if revision is None else f"{repository} at {revision}"):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted, ignore_patterns=ignored))


def is_ignored(name: str) -> bool:
    """Whether a file of a model's folder in a repository is not fetched with the model."""
    return any(fnmatchcase(name, pattern) for pattern in _IGNORED)


def commit_of(repository: str, revision: str | None) -> str:
    """The commit that a revision of a repository means now; None is its main branch. Raises `InputError`."""
    with hub_errors(repository if revision is None else f"{repository} at {revision}"):
        if HF_HUB_OFFLINE:
            raise LocalEntryNotFoundError("HF_HUB_OFFLINE is set")
        return str(HfApi().model_info(repository, revision=revision).sha)


def download(repository: str, commit: str, path: str, folder: Path, advance: Callable[[float | None], object]) -> Path:
    """Fetch a file of a repository into a folder, past the cache. What an interrupted call has fetched is kept.

    Args:
        repository, commit, path: where the file is.
        folder: the folder to fetch it into, under the same path.
        advance: called with the number of bytes since the last call. An `InputError` that it raises ends the call.

    Raises:
        InputError: it cannot be fetched.
    """

    class Watched(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            advance(n)
            return super().update(n)

    with hub_errors(f"{repository} at {commit}"):
        return Path(hf_hub_download(repository, path, revision=commit, local_dir=folder, tqdm_class=Watched))


def hub_identity(folder: Path) -> tuple[str | None, str | None]:
    """Hub id and commit of a snapshot in the hub's cache, or of a folder in it; (None, None) for other folders."""
    found = re.search(r"/models--([^/]+)/snapshots/([0-9a-f]{40})(/|$)", Path(os.path.abspath(folder)).as_posix())
    return (found[1].replace("--", "/", 1), found[2]) if found else (None, None)


@contextlib.contextmanager
def hub_errors(source: str) -> Iterator[None]:
    """Within the block, what huggingface_hub raises becomes an `InputError` about `source` that says what to do."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the network, the hub and the disk of the cache can raise anything
        # If the hub answers with an error, snapshot_download reports a missing connection; the cause has the answer.
        cause = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
        found = next(words for kind, words in _FAILURES if isinstance(cause, kind))
        raise InputError(f"{source}: expected a folder or a hub id, found {found} ({brief(cause)})") from error


def check_login(repository: str) -> None:
    """Ask the hub whether it knows the user, so that a long conversion does not end with an upload that cannot begin.

    Raises:
        InputError: there is no token, the hub does not know it, or the hub cannot be reached.
    """
    try:
        HfApi().whoami()
    except Exception as error:
        raise _cannot_upload(repository, error) from error


def upload(folder: Path, names: Iterable[str], repository: str, *, private: bool | None = None) -> str:
    """Upload files of a folder to a repository's main branch. What the hub has already is not sent again.

    Args:
        folder: the folder.
        names: the files, relative to it; the others are not uploaded.
        repository: hub id of the repository, which is made if it does not exist.
        private: whether it is made private; None for the owner's default.

    Returns:
        The address of the repository.

    Raises:
        InputError: the repository cannot be made or written, or the hub cannot be reached.
    """
    api = HfApi()
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            allow_patterns=[glob.escape(name) for name in names],
            commit_message="Upload a FlashNorm checkpoint",
        )
    except Exception as error:  # the network, the hub and the folder's disk can raise anything
        raise _cannot_upload(repository, error) from error
    return str(made)


class Publication:
    """A repository that takes large files one at a time, and shows all files by one commit."""

    def __init__(self, repository: str, private: bool | None) -> None:
        """`private`: whether the repository is made private, if it does not exist; None for the owner's default."""
        self.repository = repository
        self._private = private
        self._made: str | None = None

    def upload(self, name: str, path: Path, record: FileRecord) -> None:
        """Upload a large file, which no commit shows yet. What the hub has already is not sent again.

        Args:
            name: the path in the repository.
            path: the file.
            record: what was verified; the file must still be that.

        Raises:
            InputError: the file cannot be uploaded, or is another one.
        """
        api, address = HfApi(), self.make()
        try:
            addition = CommitOperationAdd(name, path)
            api.preupload_lfs_files(self.repository, [addition])
        except Exception as error:  # the network, the hub and the disk can raise anything
            raise _cannot_upload(self.repository, error) from error
        found = hash_of_upload(addition)
        if found is None:
            raise InputError(
                f"{address}: expected a repository that keeps {name} as a large file, found that its .gitattributes or "
                ".gitignore says otherwise; use another repository"
            )
        if found != record.sha256:
            raise InputError(
                f"{path}: expected the file that was verified, with the SHA-256 {record.sha256}, found {found}; run "
                "the same command again when nothing else writes there"
            )

    def commit(self, files: Mapping[str, Path], large: Mapping[str, FileRecord]) -> str:
        """Show files, and the large files that were uploaded, by one commit. Returns the repository's address.

        Raises:
            InputError: the hub refuses the commit, or cannot be reached.
        """
        api, address = HfApi(), self.make()
        additions = [CommitOperationAdd(name, path) for name, path in files.items()]
        additions += [uploaded(name, record.sha256, record.size) for name, record in large.items()]
        try:
            api.create_commit(self.repository, additions, commit_message="Upload a FlashNorm checkpoint")
        except Exception as error:
            raise _cannot_upload(self.repository, error) from error
        return address

    def make(self) -> str:
        """Make the repository, if it does not exist. Returns its address. Raises `InputError` if that cannot be."""
        if self._made is None:
            try:
                made = HfApi().create_repo(self.repository, private=self._private, exist_ok=True)
            except Exception as error:
                raise _cannot_upload(self.repository, error) from error
            self.repository, self._made = made.repo_id, str(made)
        return self._made


def _cannot_upload(repository: str, error: Exception) -> InputError:
    # The upload of a large file wraps the hub's answer.
    cause = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
    if isinstance(cause, HFValidationError):
        found = "that this is no name of one"
    elif isinstance(cause, LocalTokenNotFoundError):
        found = _UNKNOWN_USER
    else:
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else 0
        found = _REFUSALS.get(
            status, "that the hub cannot be reached or fails; check the connection and HF_HUB_OFFLINE"
        )
    return InputError(f"{repository}: expected a repository to upload to, found {found} ({brief(cause)})")
