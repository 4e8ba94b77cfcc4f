"""Converted language models of transformers in a folder that loads without the dense model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from clframe.data.sources.text import load_tokenizer
from clframe.errors import RunFolderError
from clframe.nn.backbones.pretrained import require_package
from clframe.targets.folders import restore_model
from clframe.targets.language import DENSE
from clframe.targets.texts import load_quietly


def load_language_model(folder: str | Path) -> tuple[Any, Any]:
    """Load a language model that ``clframe moefy`` converted, with the gate that it was written with.

    Code that comes with a model is not executed, and weights are read as tensors only.

    Args:
        folder: Folder of the conversion.

    Returns:
        The model, in evaluation mode and without gradients, whose ``generate`` works as before, and its tokenizer.

    Raises:
        RunFolderError: No such conversion, or one of another kind of model.
        DataError: A config or tokenizer that cannot be read.
        UnsupportedError: transformers is not installed.
    """
    path = Path(folder).expanduser()
    architecture = path / DENSE
    if not (architecture / "config.json").is_file():
        raise RunFolderError(f"{folder}: found no {DENSE}/config.json; give the folder of a converted language model")
    library = require_package("transformers", where="moefy")
    load = partial(load_quietly, str(architecture), library=library)
    config = load(partial(library.AutoConfig.from_pretrained, trust_remote_code=False))
    model = load(lambda _: library.AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    if (architecture / "generation_config.json").is_file():
        model.generation_config = load(library.GenerationConfig.from_pretrained)
    restore_model(path, model)
    return model, load_tokenizer(str(architecture), where=str(folder))
