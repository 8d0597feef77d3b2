"""The prepared base model: what is taken, what is refused, and what it says of itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from stagetune_api.artifact import Provenance, verify_artifact
from stagetune_api.spec import ModelSpec
from stagetune_trainer.base_model import BaseModel, prepare_base_model
from stagetune_trainer.errors import UserError
from stagetune_trainer.measure import measure_model

MakeModel = Callable[..., Path]
OTHER_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ':' + m['content'] + '<|endoftext|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
)


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., BaseModel]:
    """`prepare(source, chat_template=None)` into `tmp_path/models`."""

    def run(source: Path, chat_template: str | None = None) -> BaseModel:
        spec = ModelSpec(source=f"file://{source}", chat_template=chat_template)
        provenance = Provenance(run_name="tiny", attempt=1, created_at="2024-01-01T00:00:00Z")
        return prepare_base_model(spec, source, tmp_path / "models", provenance)

    return run


@pytest.fixture
def copy_model(make_tiny_model: MakeModel, tmp_path: Path) -> Callable[..., Path]:
    """`copy_model(family)`: a tiny model's folder that the test may change."""

    def run(family: str = "llama", **options: Any) -> Path:
        return Path(shutil.copytree(make_tiny_model(family, **options), tmp_path / "source"))

    return run


def _edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi", "phi3"]
)
def test_facts_are_those_of_the_model(
    family: str, make_tiny_model: MakeModel, prepare: Callable[..., BaseModel]
) -> None:
    base = prepare(make_tiny_model(family, num_layers=3))
    model = AutoModelForCausalLM.from_pretrained(base.directory)
    facts = measure_model(base.directory)
    assert facts.parameters == sum(value.numel() for value in model.parameters())
    layer = model.model.layers[0]
    assert facts.layer.parameters == sum(value.numel() for value in layer.parameters())
    for name, shape in facts.layer.linear_shapes.items():
        assert tuple(layer.get_submodule(name).weight.shape) == shape[::-1]
    assert facts.num_layers == 3
    assert facts.tied_embeddings is (family in ("gemma", "gemma2"))
    assert facts.digest == base.manifest.digest
    assert (facts.vocab_size, facts.hidden_size, facts.dtype_bytes) == (320, 32, 4)


def test_prepared_folder_loads_as_the_source_does(
    make_tiny_model: MakeModel, prepare: Callable[..., BaseModel]
) -> None:
    source = make_tiny_model("qwen2")
    base = prepare(source)
    first = AutoModelForCausalLM.from_pretrained(source).state_dict()
    second = AutoModelForCausalLM.from_pretrained(base.directory).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    templates = [AutoTokenizer.from_pretrained(path) for path in (source, base.directory)]
    assert templates[0].chat_template == templates[1].chat_template
    assert (base.directory / "model.safetensors").samefile(source / "model.safetensors")


def test_sharded_weights_are_taken_with_their_index(
    copy_model: Callable[..., Path], prepare: Callable[..., BaseModel]
) -> None:
    source = copy_model()
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    shards: dict[str, dict[str, torch.Tensor]] = {"a.safetensors": {}, "b.safetensors": {}}
    for number, name in enumerate(sorted(tensors)):
        shards["ab"[number % 2] + ".safetensors"][name] = tensors[name]
    for name, part in shards.items():
        save_file(part, source / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, part in shards.items() for tensor in part}
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (source / "consolidated.safetensors").write_bytes(b"the same again")
    base = prepare(source)
    loaded = AutoModelForCausalLM.from_pretrained(base.directory).state_dict()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert not (base.directory / "consolidated.safetensors").exists()
    (source / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"names files that are not there \(b\.safetensors\)"):
        prepare(source)


def test_equal_sources_share_one_folder_and_one_digest(
    make_tiny_model: MakeModel, copy_model: Callable[..., Path], prepare: Callable[..., BaseModel]
) -> None:
    first = prepare(make_tiny_model("llama"))
    second = prepare(copy_model("llama"))
    assert not first.was_reused
    assert second.was_reused
    assert second.directory == first.directory
    assert second.manifest.digest == first.manifest.digest
    other = prepare(make_tiny_model("llama", seed=1))
    assert other.directory != first.directory


def test_runs_that_prepare_one_model_at_once_share_it(
    make_tiny_model: MakeModel, prepare: Callable[..., BaseModel]
) -> None:
    source = make_tiny_model("llama")
    with ThreadPoolExecutor(3) as pool:
        bases = list(pool.map(prepare, [source] * 3))
    assert sorted(base.was_reused for base in bases) == [False, True, True]
    assert len({base.manifest.digest for base in bases}) == 1


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_damaged_folder_is_moved_aside_and_made_again(
    damage: str, copy_model: Callable[..., Path], prepare: Callable[..., BaseModel]
) -> None:
    source = copy_model()
    base = prepare(source)
    weights = base.directory / "model.safetensors"
    content = bytearray(weights.read_bytes())
    weights.unlink()  # the source has the same file under another name
    match damage:
        case "flip":
            content[-1] ^= 1
            weights.write_bytes(content)
        case "truncate":
            weights.write_bytes(content[:-8])
        case "manifest":
            weights.write_bytes(content)
            (base.directory / "manifest.json").write_text("{}")
    again = prepare(source)
    assert not again.was_reused
    assert again.manifest.digest == base.manifest.digest
    verify_artifact(again.directory, digest=base.manifest.digest)
    assert (base.directory.parent / f".{base.directory.name}.bad-1").is_dir()


def test_source_is_never_changed(
    copy_model: Callable[..., Path], prepare: Callable[..., BaseModel]
) -> None:
    source = copy_model()
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    prepare(source, OTHER_TEMPLATE)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_chat_template_of_the_manifest_is_the_tokenizers(
    make_tiny_model: MakeModel, prepare: Callable[..., BaseModel]
) -> None:
    plain = prepare(make_tiny_model("llama"))
    base = prepare(make_tiny_model("llama"), OTHER_TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(base.directory)
    assert tokenizer.chat_template == OTHER_TEMPLATE
    assert base.directory != plain.directory
    # This template ends its turns with another token: generation has to stop at it too.
    model = AutoModelForCausalLM.from_pretrained(base.directory)
    stops = model.generation_config.eos_token_id
    assert stops == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")]


def test_model_without_any_chat_template_is_refused(
    copy_model: Callable[..., Path], prepare: Callable[..., BaseModel]
) -> None:
    source = copy_model()
    (source / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template") as caught:
        prepare(source)
    assert caught.value.problems[0].path == "spec.model.chatTemplate"
    assert prepare(source, OTHER_TEMPLATE).directory.is_dir()


def test_pickled_weights_are_refused(
    copy_model: Callable[..., Path], prepare: Callable[..., BaseModel]
) -> None:
    source = copy_model()
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"pytorch_model\.bin, which can carry code") as caught:
        prepare(source)
    assert "save_pretrained" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "auto_map"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"model_type": "nonsense"}, "cannot be used"),
        ({"model_type": "t5", "architectures": ["T5Model"]}, "it is a t5, an encoder-decoder"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "it is a vit, which transformers"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_size": 64}, "the weights are not those of its config.json"),
        ({"num_hidden_layers": 5}, r"model\.layers\.4\.\S+ is missing"),
    ],
)
def test_model_that_stages_cannot_be_cut_from_is_refused_with_the_reason(
    changes: dict[str, Any],
    message: str,
    copy_model: Callable[..., Path],
    prepare: Callable[..., BaseModel],
    tmp_path: Path,
) -> None:
    source = copy_model()
    _edit_json(source / "config.json", **changes)
    with pytest.raises(UserError, match=message) as caught:
        prepare(source)
    assert caught.value.problems[0].path == "spec.model.source"
    published = [path for path in (tmp_path / "models").glob("*") if path.name[0] != "."]
    assert published == []


def test_damaged_source_is_refused(
    copy_model: Callable[..., Path], prepare: Callable[..., BaseModel]
) -> None:
    source = copy_model()
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        prepare(source)
    (source / "tokenizer.json").write_text("{}")
    shutil.copy(source / "config.json", source / "model.safetensors")
    with pytest.raises(UserError, match="cannot be"):
        prepare(source)


def test_folder_without_a_model_and_files_of_other_kinds_are_refused(
    prepare: Callable[..., BaseModel], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no config\.json"):
        prepare(tmp_path / "empty")
    (tmp_path / "model.zip").write_text("x")
    with pytest.raises(UserError, match="is not a GGUF file"):
        prepare(tmp_path / "model.zip")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match="cannot be read as GGUF"):
        prepare(tmp_path / "model.gguf")


def test_adapter_beside_the_weights_is_left_behind(
    copy_model: Callable[..., Path], prepare: Callable[..., BaseModel]
) -> None:
    source = copy_model()
    (source / "adapter_config.json").write_text('{"base_model_name_or_path": "other/model"}')
    assert not (prepare(source).directory / "adapter_config.json").exists()
