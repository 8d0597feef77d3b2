"""The arms of ms-swift in benchmarks/staging.py, in an environment of their own.

It is made once, below the user's cache, and nothing of it is in uv.lock: ms-swift wants older
versions of transformers and peft than ours. torch is the version that we run on.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from staging_arms import BATCH_SIZE, LEARNING_RATE, MAX_LENGTH, Arm
from staging_process import STEP, Measured, run_process

VERSION = "4.6.0"
_COMPLETE = "complete.json"
_PACKAGES = ("ms-swift", "torch", "transformers", "peft", "accelerate")
_STEP = re.compile(r"^\{'loss'.*'global_step/max_steps': '\d+/\d+'")

_TOKENS = re.compile(r"Dataset Token Length: ([\d.]+)")


class NoSwiftError(Exception):
    """The environment could not be made; the text says why."""


def python() -> Path:
    """Return the interpreter of the environment, which is made where it is not there.

    Takes a gigabyte beside a cache of uv's that has our torch, six without. Raises NoSwiftError.
    """
    root = _cache() / f"ms-swift-{VERSION}"
    interpreter = root / "bin" / "python"
    if (root / _COMPLETE).exists():
        return interpreter
    shutil.rmtree(root, ignore_errors=True)
    torch = importlib.metadata.version("torch").partition("+")[0]
    uv = _uv()
    wanted = [f"ms-swift=={VERSION}", f"torch=={torch}"]
    commands = [
        [uv, "venv", "--quiet", "--python", sys.executable, str(root)],
        [uv, "pip", "install", "--quiet", "--python", str(interpreter), *wanted],
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise NoSwiftError(f"{' '.join(command[:3])}: {done.stderr.strip()[-1000:]}")
    found = subprocess.run(
        [str(interpreter), "-c", _VERSIONS, *_PACKAGES], capture_output=True, text=True, check=True
    )
    (root / _COMPLETE).write_text(found.stdout, encoding="utf-8")
    return interpreter


_VERSIONS = (
    "import importlib.metadata, json, sys;"
    "print(json.dumps({name: importlib.metadata.version(name) for name in sys.argv[1:]}))"
)


def versions() -> dict[str, str]:
    """Return what is in the environment."""
    found: dict[str, str] = json.loads((python().parents[1] / _COMPLETE).read_text("utf-8"))
    return found


def train(
    arm: Arm,
    groups: Sequence[range],
    *,
    model: Path,
    rows: Path,
    steps: int,
    work: Path,
    env: Mapping[str, str],
) -> Iterator[tuple[str, Measured, float | None]]:
    """Yield each `swift sft` of the arm, what was measured and the tokens that it finds in a row.

    There is one, or one for each group. `rows` are in the order in which they are to be seen. A
    group goes on from the model that the one before it saved. Raises ProcessFailedError.
    """
    folder = work / "ms-swift"
    shutil.rmtree(folder, ignore_errors=True)
    env = {name: value for name, value in env.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    for number, group in enumerate(groups or [range(0)], 1):
        output = folder / str(number)
        command = [
            str(python()),
            *("-m", "swift.cli.sft"),
            *_settings(model, rows, steps, output),
            *_tuner(arm, group),
        ]
        name = f"layers-{group[0]}-{group[-1]}" if group else "all"
        log = work / "logs" / f"{arm.name}-{name}.txt"
        measured = run_process(command, env=env, log=log, read=_read)
        found = _TOKENS.search(log.read_text(encoding="utf-8", errors="replace"))
        yield name, measured, float(found[1]) if found else None
        model = output / f"checkpoint-{steps}"
    shutil.rmtree(folder, ignore_errors=True)


def _settings(model: Path, rows: Path, steps: int, output: Path) -> list[str]:
    """Return what all arms ask for: our model, rows, order, batches, precision and rate."""
    values = {
        "model": model,
        "model_type": "llama",
        "template": "chatml",
        "check_model": "false",
        "torch_dtype": "float32",
        "dataset": rows,
        "split_dataset_ratio": 0,
        "dataset_shuffle": "false",
        "train_dataloader_shuffle": "false",
        "max_length": MAX_LENGTH,
        "per_device_train_batch_size": BATCH_SIZE,
        "gradient_accumulation_steps": 1,
        "max_steps": steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0,
        "gradient_checkpointing": "false",
        "eval_strategy": "no",
        "save_strategy": "steps",
        "save_steps": steps,
        "save_only_model": "true",
        "logging_steps": 1,
        "report_to": "none",
        "output_dir": output,
        "add_version": "false",
    }
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def _tuner(arm: Arm, group: range) -> list[str]:
    if arm.rank is not None:
        lora = {"lora_rank": arm.rank, "lora_alpha": 2 * arm.rank, "target_modules": "all-linear"}
        settings = [text for name, value in lora.items() for text in (f"--{name}", str(value))]
        return ["--tuner_type", "lora", "--lora_dropout", "0", *settings]
    if not group:
        return ["--tuner_type", "full"]
    layers = "|".join(map(str, group))
    return [
        *("--tuner_type", "full", "--freeze_parameters_ratio", "1"),
        *("--trainable_parameters_regex", rf"^model\.layers\.({layers})\."),
    ]


def _read(line: str) -> str | None:
    return STEP if _STEP.match(line) else None


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "stagetune"


def _uv() -> str:
    """Return uv: the one that runs us, the machine's, or the one that the Makefile installed."""
    ours = sorted(_cache().glob("uv-*/bin/uv"))
    found = os.environ.get("UV") or shutil.which("uv") or (str(ours[-1]) if ours else None)
    if found is None:
        raise NoSwiftError("uv is missing; `make setup` installs it")
    return found
