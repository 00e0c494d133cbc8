"""What is asked of huggingface_hub (`compat/huggingface_hub.py`)."""

import hashlib

import huggingface_hub
from huggingface_hub import CommitOperationAdd
from huggingface_hub._commit_api import _prepare_commit_payload

from flashnorm.compat.huggingface_hub import hash_of_upload, uploaded

VERSION = f"huggingface_hub {huggingface_hub.__version__}"
DATA = b"weights"


def payload(addition: CommitOperationAdd) -> list[dict[str, object]]:
    return [*_prepare_commit_payload([addition], files_to_copy={}, commit_message="m", commit_description="")]


def test_a_large_file_is_committed_without_its_content() -> None:
    real = CommitOperationAdd("folder/model.safetensors", DATA)
    assert hash_of_upload(real) is None, f"{VERSION}: a file counts as uploaded before it is"
    real._upload_mode, real._is_uploaded = "lfs", True
    sha256 = hashlib.sha256(DATA).hexdigest()
    remade = uploaded("folder/model.safetensors", sha256, len(DATA))
    assert hash_of_upload(real) == hash_of_upload(remade) == sha256
    assert payload(remade) == payload(real), f"{VERSION}: a commit says other things of a file that was uploaded"
    assert remade._local_oid == real._local_oid == sha256
