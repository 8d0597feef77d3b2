"""Whether a `config.json` describes a model that stages can be cut from; refuses it with a reason.

Used by `base_model` before anything is built.
"""

import json
from pathlib import Path
from typing import Any, NoReturn

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from stagetune_api.problems import ProblemReason
from stagetune_trainer.errors import UserError


def check_config_file(path: Path) -> None:
    """Check what can be seen before transformers reads the file; raises UserError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _refusal(f"{path} is not JSON ({error}); fetch the model again") from error
    if not isinstance(raw, dict):
        raise _refusal(f"{path} is not a JSON object; fetch the model again")
    if raw.get("auto_map"):
        raise _refusal(
            "its config.json has an auto_map: the model comes with Python code of its own, which "
            "is never run; use a model that transformers itself implements (if this one is, remove "
            "auto_map from a local copy)"
        )
    if raw.get("quantization_config"):
        raise _refusal(
            "its weights are quantised (config.json has a quantization_config); use the "
            "unquantised model"
        )


def check_config(directory: Path) -> PreTrainedConfig:
    """Return the folder's config if it is that of a decoder-only language model of text.

    Raises UserError with the reason where it is not.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise _refusal(
            f"its config.json cannot be used: {str(error)[:300]}; is the model newer than this "
            "version of transformers?"
        ) from error
    what = f"it is a {config.model_type}"
    if config.is_encoder_decoder:
        _refuse_kind(f"{what}, an encoder-decoder")
    if config.get_text_config(decoder=True) is not config:
        _refuse_kind(f"{what}, which has more parts than a text decoder")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        _refuse_kind(f"{what}, which transformers cannot load as a causal language model")
    expected = _causal_class_name(config)
    if config.architectures and expected not in config.architectures:
        _refuse_kind(f"its weights are those of a {config.architectures[0]}, not of a {expected}")
    return config


def _causal_class_name(config: PreTrainedConfig) -> str:
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return str(model_class.__name__)


def _refuse_kind(what: str) -> NoReturn:
    raise _refusal(f"{what}; a decoder-only causal language model is needed")


def _refusal(message: str) -> UserError:
    return UserError.at("spec.model.source", message, ProblemReason.INVALID)
