"""Stagetune from Python: the same manifest, the same run, the same files.

from pathlib import Path
import stagetune

file = stagetune.read_manifest_file(Path("finance-qa.yaml"))
report = stagetune.run_locally(file, Path("runs/finance-qa"))
"""

from stagetune.listeners import Listeners
from stagetune.local_run import RunFailedError, RunInterruptedError, run_locally
from stagetune.manifest_file import ManifestFile, read_manifest_file
from stagetune.run_lock import RunIsBusyError
from stagetune.run_report import RunReport
from stagetune_api.problems import InvalidManifestError, Problem

__all__ = [
    "InvalidManifestError",
    "Listeners",
    "ManifestFile",
    "Problem",
    "RunFailedError",
    "RunInterruptedError",
    "RunIsBusyError",
    "RunReport",
    "read_manifest_file",
    "run_locally",
]
