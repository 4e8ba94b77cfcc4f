"""MkDocs hooks: pages from the root of the repository, and links to files that the site does not have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
"""Pages of files in the root; README.md, which the first page replaces, is a link only."""
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the root, with the links that they have in ``docs``."""
    for source, page in PAGES.items():
        if source != "README.md":
            text = re.sub(r"\]\((?!https?:|#)", "](../", (ROOT / source).read_text(encoding="utf-8"))
            files.append(File.generated(config, page, content=text.replace("](../docs/", "](")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace links out of ``docs`` by links to pages, or by their text where the site has no page."""

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if not target.startswith("../"):
            return match[0]
        page = PAGES.get(target.removeprefix("../"))
        return f"[{text}]({page}{anchor})" if page else text

    return LINK.sub(link, markdown)
