"""What is relied on in huggingface_hub: how a commit refers to a large file that was uploaded before."""

from huggingface_hub import CommitOperationAdd
from huggingface_hub.lfs import UploadInfo


def uploaded(name: str, sha256: str, size: int) -> CommitOperationAdd:
    """The addition of a large file to a commit, without the file: `preupload_lfs_files` has uploaded it before.

    Args:
        name: the path in the repository.
        sha256: of the file's content, in hexadecimal.
        size: of the file, in bytes.
    """
    addition = CommitOperationAdd(name, b"")
    addition.upload_info = UploadInfo(sha256=bytes.fromhex(sha256), size=size, sample=b"")
    addition._upload_mode = "lfs"
    addition._is_uploaded = True
    return addition


def hash_of_upload(addition: CommitOperationAdd) -> str | None:
    """SHA-256 of the file that `preupload_lfs_files` has uploaded, in hexadecimal; None if it has not.

    It does not upload what the repository keeps in git itself, or ignores.
    """
    return addition.upload_info.sha256.hex() if addition._is_uploaded else None
