"""Packages that libraries would import for nothing stay away until a task asks for one."""

import subprocess
import sys


def _run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_libraries_do_not_find_what_is_hidden() -> None:
    found = _run(
        "import sys; from stagetune_trainer.large_packages import hide_large_packages; "
        "hide_large_packages(); import stagetune_trainer.train, stagetune_trainer.export; "
        "print([n for n in ('bitsandbytes', 'deepspeed', 'torchao') if sys.modules.get(n)])"
    )
    assert found == "[]"


def test_what_is_revealed_is_found_again() -> None:
    found = _run(
        "from importlib.util import find_spec; from stagetune_trainer import large_packages; "
        "large_packages.hide_large_packages(); hidden = find_spec('deepspeed'); "
        "large_packages.reveal('deepspeed'); print(hidden, find_spec('deepspeed').name)"
    )
    assert found == "None deepspeed"


def test_what_is_imported_already_stays() -> None:
    found = _run(
        "import sys, types; sys.modules['torchao'] = types.ModuleType('torchao'); "
        "from stagetune_trainer.large_packages import hide_large_packages; "
        "hide_large_packages(); print(sys.modules['torchao'].__name__)"
    )
    assert found == "torchao"
