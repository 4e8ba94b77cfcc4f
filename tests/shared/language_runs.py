"""Text of three domains in files, and options of a language model that learns them in a second."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

WORDS = {
    "prose": "the quick brown fox jumps over the lazy dog\n", "code": "def area(r):\n    return 3.14 * r ** 2\n",
    "zahlen": "eins zwei drei vier sieben acht\n",
}  # fmt: skip
CONTEXT, VOCABULARY = 8, 280
SMALL = (
    f"benchmark.context={CONTEXT}", f"benchmark.vocabulary={VOCABULARY}", "backbone.width=8", "backbone.depth=2",
    "backbone.heads=2", "trainer.batch_size=16", "trainer.figures=none", "trainer.loggers=[csv]",
    "trainer.progress=false",
)  # fmt: skip
LEARNED = ("prose", "code")


def write_domains(folder: Path, *, of: Sequence[str] = tuple(WORDS)) -> Path:
    """Write training and test text of each domain."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in of:
        (folder / f"{name}_train.txt").write_text(WORDS[name] * 40, encoding="utf-8")
        (folder / f"{name}_test.txt").write_text(WORDS[name][5:] + WORDS[name] * 6, encoding="utf-8")
    return folder


def options_of(texts: Path, *more: str, domains: Sequence[str] = LEARNED) -> list[str]:
    """Overrides of ``language_model`` for these domains."""
    named = f"benchmark.domains=[{', '.join(domains)}]"
    return [f"benchmark.path={texts}", named, f"benchmark.experiences={len(domains)}", *SMALL, *more]
