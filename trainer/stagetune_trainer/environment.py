"""What libraries look for in the environment, set before they are imported.

A pod has a read-only root, one folder for temporary files, and a user that no passwd file knows.
"""

import atexit
import getpass
import os
import shutil
import tempfile

from stagetune_api.stage import Task

_DEFAULTS = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Needed for the same bits on a GPU (PyTorch's notes on reproducibility).
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}


def set_up_environment(task: Task) -> None:
    """Fill in what is missing; what somebody has set otherwise stays as it is."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    if task is not Task.PREPARE:
        # Everything is on the volume by now: nothing after prepare may depend on a hub.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    _give_home()
    _give_user_name()


def _give_home() -> None:
    """Point HOME, below which all caches lie, to a folder that can be written to."""
    home = os.environ.get("HOME")
    if home and os.access(home, os.W_OK | os.X_OK):
        return
    # Of this process alone: in a shared one somebody else could leave files to be loaded.
    folder = tempfile.mkdtemp(prefix="stagetune-home-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["HOME"] = folder


def _give_user_name() -> None:
    """Name the user where nobody does: torch's compiler asks for it, and fails without."""
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        os.environ["LOGNAME"] = "stagetune"
