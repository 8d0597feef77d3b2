"""From a GGUF file to an ordinary Hugging Face folder with fp32 weights.

Used by `base_model`. GGUF is how small models come in packages; training needs plain weights.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stagetune_trainer.errors import UserError

CONVERTER = "gguf-to-fp32-safetensors/1"
"""Name of this conversion; it changes when equal files would give other weights."""


def convert_gguf(path: Path, directory: Path) -> None:
    """Write the model and the tokenizer of the GGUF file `path` to `directory`.

    Holds all weights in memory in fp32. Raises UserError where transformers cannot read the file.
    """
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
        )
    # transformers reports some unusable files as OSError; a real one, of the disk, has a number.
    except (ValueError, LookupError, TypeError, NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError.at(
            "spec.model.source",
            f"{path.name} cannot be read as GGUF ({type(error).__name__}: {str(error)[:300]}); use "
            "a file of an architecture that transformers reads, or a folder of safetensors",
        ) from error
    # The weights are plain now; these marks would make save_pretrained refuse to write them.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
