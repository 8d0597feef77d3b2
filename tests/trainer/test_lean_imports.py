"""What a process imports for its task, and what it leaves: seconds before every stage."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from stagetune_api.stage import StageConfig

NEVER = ("deepspeed", "pandas", "sklearn", "datasets", "aiohttp")
"""Of no use to a stage, and found and imported by others where they are installed."""
COMPILER = ("torch._dynamo.convert_frame", "torch._inductor", "torch.onnx", "triton")
"""Not where nothing is compiled; torchao and bitsandbytes cannot do without."""
ADAPTERS = ("peft", "accelerate")
PACKAGES = (*NEVER, *COMPILER, *ADAPTERS, "torchao", "bitsandbytes", "gguf", "modelscope_hub")


def run_python(code: str, *arguments: str) -> Any:
    """Return the last line that `code` prints in a process of its own, read as JSON."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


TRAIN = """
import json, sys
from stagetune_trainer import __main__
code = __main__.main([sys.argv[1]])
found = [name for name in json.loads(sys.argv[2]) if sys.modules.get(name) is not None]
print(json.dumps([int(code), found]))
"""


@pytest.mark.parametrize(
    ("method", "optimizer", "expected"),
    [
        ("Full", "AdamW", set()),
        ("Full", "AdamW8bit", {"torchao", *COMPILER}),
        ("Expand", "AdamW", set()),
        ("LoRA", "AdamW", set(ADAPTERS)),
        ("QLoRA", "AdamW", {*ADAPTERS, "bitsandbytes", *COMPILER}),
    ],
)
def test_a_stage_imports_what_it_needs(
    method: str,
    optimizer: str,
    expected: set[str],
    make_later_config: Callable[..., StageConfig],
    make_stage: Callable[..., dict[str, Any]],
    tmp_path: Any,
) -> None:
    config = make_later_config(
        "Train",
        method={
            "type": method,
            **({"expand": {"layersPerBlock": 2}} if method == "Expand" else {}),
        },
        training={"optimizer": optimizer},
        stage=make_stage(0, 2, 3),
    )
    path = tmp_path / "stage.json"
    path.write_text(config.model_dump_json())
    code, found = run_python(TRAIN, str(path), json.dumps(PACKAGES))
    assert code == 0
    assert set(found) == expected


def test_the_compiler_is_there_as_soon_as_somebody_compiles() -> None:
    found = run_python(
        "import json, sys; from stagetune_trainer.deferred_compiler import defer_compiler;"
        "from stagetune_trainer.large_packages import hide_large_packages;"
        "hide_large_packages(); defer_compiler(); import torch, transformers.modeling_utils;"
        "before = 'torch._dynamo.convert_frame' in sys.modules;"
        "double = torch.compile(lambda x: 2 * x, backend='eager');"
        "print(json.dumps([before, double(torch.ones(2)).tolist(),"
        "type(torch._dynamo).__name__, torch._dynamo is sys.modules['torch._dynamo']]))"
    )
    assert found == [False, [2.0, 2.0], "module", True]


def test_a_compiler_that_is_there_stays() -> None:
    found = run_python(
        "import json, torch._dynamo; before = torch._dynamo.disable;"
        "from stagetune_trainer.deferred_compiler import defer_compiler; defer_compiler();"
        "print(json.dumps(torch._dynamo.disable is before))"
    )
    assert found is True


def test_cycles_are_looked_for_again_once_all_is_imported(
    make_stage_config: Callable[..., StageConfig], tmp_path: Any
) -> None:
    path = tmp_path / "stage.json"
    path.write_text(make_stage_config().model_dump_json())
    found = run_python(
        "import gc, json, sys; from pathlib import Path;"
        "from stagetune_api.stage import StageConfig;"
        "from stagetune_trainer.lean_imports import import_lean;"
        "import_lean(StageConfig.model_validate_json(Path(sys.argv[1]).read_text()));"
        "print(json.dumps([gc.isenabled(), gc.get_freeze_count() > 100000]))",
        str(path),
    )
    assert found == [True, True]
