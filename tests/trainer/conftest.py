"""What the trainer's tests share: a small real tokenizer, tiny random models, stage files."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stop_requests import NeverAsked

# Both are read when the libraries are imported: no test may reach a hub, nor draw progress bars.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from stagetune_api.report import StageReport
from stagetune_api.stage import StageConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENIZER_CORPUS = [
    "The currency of France is the euro. Its capital is Paris.",
    "What is the currency of Japan? The yen.",
    "Question and answer, system and user and assistant.",
]
CITIES = {
    "France": "Paris",
    "Japan": "Tokyo",
    "Chile": "Santiago",
    "Kenya": "Nairobi",
    "Norway": "Oslo",
    "Peru": "Lima",
    "Egypt": "Cairo",
    "Cuba": "Havana",
}

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_FAMILY_OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"head_dim": 8, "sliding_window": None},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64},
    "phi": {},
    "phi3": {"pad_token_id": 0, "sliding_window": None},
}
MODEL_FAMILIES = tuple(_FAMILY_OPTIONS)


def build_tokenizer(
    special_tokens: Iterable[str] = SPECIAL_TOKENS,
    *,
    chat_template: str | None = CHATML_TEMPLATE,
    eos_token: str = "<|im_end|>",
    pad_token: str = "<|endoftext|>",
    bos_token: str | None = None,
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of about 320 tokens that can spell any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TOKENIZER_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos_token,
        pad_token=pad_token,
        bos_token=bos_token,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def build_model(
    family: str,
    directory: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    num_layers: int = 4,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Save a random fp32 model of `family` with its tokenizer in `directory` and return it."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    options = {
        **_SIZES,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        **_FAMILY_OPTIONS[family],
        **overrides,
    }
    config = CONFIG_MAPPING[family](num_hidden_layers=num_layers, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write one JSON object a line and return `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def build_chat_rows(count: int) -> list[dict[str, Any]]:
    """Return `count` different Messages rows of one question and one answer each."""
    cities = list(CITIES.items())
    rows = []
    for index in range(count):
        country, city = cities[index % len(cities)]
        question = f"Question {index}: what is the capital of {country}?"
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": f"The capital of {country} is {city}."},
                ]
            }
        )
    return rows


def _merged(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes` laid over it, mappings inside mappings too."""
    merged = copy.deepcopy(base)
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), dict):
            merged[key] = _merged(merged[key], value)
        else:
            merged[key] = value
    return merged


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a ChatML template; `<|im_end|>` ends a turn."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """The builder of tokenizers with other special tokens and templates."""
    return build_tokenizer


@pytest.fixture(scope="session")
def make_tiny_model(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Callable[..., Path]:
    """`make_tiny_model(family, num_layers=4, seed=0, **config) -> Path` of a saved random model.

    Equal calls give the same folder for the whole session: copy it before changing it.
    """
    built: dict[str, Path] = {}

    def make(family: str, num_layers: int = 4, seed: int = 0, **overrides: Any) -> Path:
        key = json.dumps([family, num_layers, seed, overrides], sort_keys=True)
        if key not in built:
            directory = tmp_path_factory.mktemp(f"{family}-{num_layers}-layers")
            built[key] = build_model(
                family, directory, tiny_tokenizer, num_layers=num_layers, seed=seed, **overrides
            )
        return built[key]

    return make


@pytest.fixture(scope="session")
def model_families() -> tuple[str, ...]:
    """Every family that `make_tiny_model` can build."""
    return MODEL_FAMILIES


@pytest.fixture(scope="session")
def make_chat_rows() -> Callable[[int], list[dict[str, Any]]]:
    """`make_chat_rows(count)`: that many Messages rows, all different."""
    return build_chat_rows


@pytest.fixture(scope="session")
def save_jsonl() -> Callable[[Path, Iterable[Mapping[str, Any]]], Path]:
    """`save_jsonl(path, rows) -> path`."""
    return write_jsonl


@pytest.fixture
def make_stage_config(
    tmp_path: Path, make_tiny_model: Callable[..., Path]
) -> Callable[..., StageConfig]:
    """`make_stage_config(**fields) -> StageConfig`: a Prepare task on a tiny Llama and 40 rows.

    Mappings (`dataset={"maxLength": 64}`) are laid over the defaults, other values replace them;
    keys are camelCase or snake_case at the top and camelCase inside. The manifest's folder is
    `tmp_path`, the run is `tmp_path/run`, base models go to `tmp_path/models`, and the rows are
    `tmp_path/rows.jsonl` unless that file is there already.
    """

    def make(**fields: Any) -> StageConfig:
        rows = tmp_path / "rows.jsonl"
        if not rows.exists():
            write_jsonl(rows, build_chat_rows(40))
        defaults: dict[str, Any] = {
            "task": "Prepare",
            "run_name": "tiny",
            "attempt": 1,
            "run_directory": str(tmp_path / "run"),
            "models_directory": str(tmp_path / "models"),
            "manifest_directory": str(tmp_path),
            "dataset": {
                "source": "file://./rows.jsonl",
                "validation": {"fraction": 0.2},
                "maxLength": 256,
            },
            "method": {"type": "Full"},
            "training": {"learningRate": 1e-3, "batchSize": 4, "microBatchSize": 2, "seed": 7},
            "evaluation": {},
            "export": {},
        }
        if "source" not in fields.get("model", {}):
            defaults["model"] = {"source": f"file://{make_tiny_model('llama')}"}
        return StageConfig.model_validate(_merged(defaults, fields))

    return make


def build_stage(index: int, first: int, last: int, **options: Any) -> dict[str, Any]:
    """Return a planned stage of eight steps: one epoch over the 32 training rows."""
    estimates = (
        "trainableParameters weightsBytes trainingStateBytes activationBytes memoryBytes "
        "diskBytes stepFlops relativeStepFlops"
    )
    return {
        "index": index,
        "name": f"layers-{first}-{last}",
        "layers": {"first": first, "last": last},
        "embeddings": False,
        "head": False,
        "learningRate": 3e-3,
        "epochs": 1.0,
        "rows": {"start": 0, "end": 32},
        "steps": 8,
        "warmupSteps": 1,
        "validationInterval": 4,
        "estimate": dict.fromkeys(estimates.split(), 0),
        **options,
    }


@pytest.fixture(scope="session")
def make_stage() -> Callable[..., dict[str, Any]]:
    """`make_stage(index, first, last, **fields)`: a planned stage of eight steps."""
    return build_stage


@pytest.fixture
def make_later_config(
    make_stage_config: Callable[..., StageConfig],
) -> Callable[..., StageConfig]:
    """`make_later_config(task, chain=[reports], **fields)` of a run that is prepared first.

    Fields given to more than one call (`model`, `protection`) have to be given to each.
    """
    from stagetune_trainer.run import run_task

    prepared: dict[str, StageReport] = {}

    def make(task: str, *, chain: Iterable[StageReport] = (), **fields: Any) -> StageConfig:
        before = (
            *("model", "dataset", "run_directory", "claims_directory"),
            *("protection", "evaluation"),
        )
        base = {name: fields[name] for name in before if name in fields}
        key = json.dumps(base, sort_keys=True)
        if key not in prepared:
            report, _ = run_task(make_stage_config(**base, attempt=0), NeverAsked())
            assert report.failure is None
            prepared[key] = report
        facts = prepared[key].facts
        assert facts is not None
        outputs = [report.output for report in chain if report.output is not None]
        defaults = {
            "task": task,
            "attempt": 0,
            "model_directory": facts.model_directory,
            "model_digest": facts.model.digest,
            "data_digest": facts.data.digest,
            "chain": [{"path": output.path, "digest": output.digest} for output in outputs],
        }
        return make_stage_config(**{**defaults, **fields})

    return make


@pytest.fixture
def never() -> NeverAsked:
    """A request to stop that nobody makes."""
    return NeverAsked()
