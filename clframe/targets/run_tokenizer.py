"""The tokenizer in the run folder of a language model."""

from __future__ import annotations

from pathlib import Path

from clframe.data.inputs import InputFormat
from clframe.data.tokenizer import digest_of, read_tokenizer
from clframe.errors import DataError, RunFolderError

TOKENIZER = "tokenizer.json"
"""Its name in a run folder."""


def run_tokenizer(folder: Path, inputs: InputFormat | None) -> str:
    """Read the content of the tokenizer of a run.

    Args:
        folder: The run folder.
        inputs: The conversion of text that the run's checkpoint records, which has the digest of the tokenizer.

    Raises:
        RunFolderError: No tokenizer, or another one than the run was trained with.
        UnsupportedError: The package tokenizers is not installed.
    """
    file = folder / TOKENIZER
    try:
        content = read_tokenizer(file, where=str(folder))
    except DataError as error:
        raise RunFolderError(f"{error}, that of the run") from None
    if inputs is not None and inputs.tokenizer and digest_of(content) != inputs.tokenizer:
        raise RunFolderError(f"{file}: is another tokenizer than the run was trained with; restore it")
    return content
