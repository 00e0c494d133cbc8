"""Does a worker, perhaps on another host, see the files that its task is about?"""

import os

from flashnorm.errors import InputError
from flashnorm.files.reader import Checkpoint, FileState

REMEDY = "source and target must be on file systems that all workers have, by the same paths"


def check_shared(checkpoint: Checkpoint) -> None:
    """Refuse a host that does not see a checkpoint's files, or sees other ones by their names.

    Raises:
        InputError: a file is absent, or has another size or time than where the checkpoint was opened.
    """
    for name, state in checkpoint.states.items():
        path = checkpoint.folder / name
        if not os.path.exists(path):
            raise InputError(f"{path}: expected a file of source or target, found nothing; {REMEDY}")
        found = FileState.of(path)
        # The inode and the time of a change of status are not the same on every host of some network file systems.
        if (found.size, found.mtime_ns) != (state.size, state.mtime_ns):
            raise InputError(f"{path}: expected the file that the work began with, found another one; {REMEDY}")
