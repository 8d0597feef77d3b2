"""What the command line's tests share: a tiny model and data on disk, and a manifest for them.

Trainer processes are real ones; only the model is small.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PAIRS = [("red", "blue"), ("one", "two"), ("cat", "dog"), ("sun", "moon"), ("up", "down")]


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama and 40 rows of questions and answers."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("workspace")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ["What goes with red? blue"],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML_TEMPLATE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(fast),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                bos_token_id=None,
                eos_token_id=fast.eos_token_id,
                pad_token_id=fast.pad_token_id,
            )
        )
    model.save_pretrained(root / "model")
    fast.save_pretrained(root / "model")
    rows = [
        {"query": f"{index}: what goes with {word}?", "response": answer}
        for index in range(8)
        for word, answer in PAIRS
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = [{"text": f"The {word} is not the {other}."} for word, other in PAIRS]
    (root / "general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text))
    return root


def merged(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes` laid over it; None takes a key out."""
    result = dict(base)
    for key, value in changes.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return result


@pytest.fixture
def write_manifest(workspace: Path, tmp_path: Path) -> Callable[..., Path]:
    """`write_manifest(name="tiny", **spec) -> Path` of a valid manifest with changes laid over."""

    def write(name: str = "tiny", **changes: Any) -> Path:
        spec: dict[str, Any] = {
            "model": {"source": f"file://{workspace / 'model'}"},
            "dataset": {
                "source": f"file://{workspace / 'rows.jsonl'}",
                "validation": {"fraction": 0.2},
                "maxLength": 64,
            },
            "schedule": {"stageCount": 2, "epochsPerStage": 2},
            "training": {
                "learningRate": 3e-3,
                "batchSize": 4,
                "microBatchSize": 4,
                "checkpointIntervalSeconds": 1,
            },
            "evaluation": {
                "exactMatch": {"maxRows": 4, "maxNewTokens": 4},
                "generalText": {"source": f"file://{workspace / 'general.jsonl'}"},
                "samples": 2,
            },
        }
        document = {
            "apiVersion": "stagetune.io/v1alpha1",
            "kind": "StagedFineTune",
            "metadata": {"name": name},
            "spec": merged(spec, changes),
        }
        path = tmp_path / f"{name}.yaml"
        with path.open("w") as file:
            YAML(typ="safe", pure=True).dump(document, file)
        return path

    return write
