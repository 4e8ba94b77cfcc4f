"""Relative links and anchors of README, CONTRIBUTING, CHANGELOG and docs resolve; every page is in the site's navigation."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
FENCED = re.compile(r"^( *)(`{3,}).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")


def prose(text: str) -> str:
    """The page without code: neither ``[i](x)`` in Python nor comments of a shell are links or headings."""
    return re.sub(r"`[^`\n]+`", lambda match: match[0].replace("](", "] ("), FENCED.sub("", text))


def anchors(text: str) -> set[str]:
    """Anchors of headings, as GitHub and the site make them; those of repeated headings differ, so these have none."""
    headings = re.findall(r"^#+ +(.+?) *#*$", FENCED.sub("", text), flags=re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "") for heading in headings]
    found = Counter(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain)
    return {anchor for anchor, times in found.items() if times == 1}


def broken(text: str, page: Path) -> list[str]:
    """Links of a page whose file or anchor does not exist."""
    found = []
    for target in LINK.findall(prose(text)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        exists = file.exists() and file.is_relative_to(ROOT)
        if exists and anchor:
            exists = file.suffix == ".md" and anchor in anchors(text if file == page else file.read_text(encoding="utf-8"))
        if not exists:
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_anchors_resolve(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not broken(text, page)


def test_broken_links_are_found() -> None:
    text = "# A `b` & c\n## D\n## D\n[x](#a-b--c) [x](#d) [x](no.md) [`x[0]`](README.md#no) ![x](docs/no.png) [x](https://a.b)\n```\n# e\n[f](g)\n```\n"
    assert anchors(text) == {"a-b--c"}
    assert broken(text, ROOT / "README.md") == ["#d", "no.md", "README.md#no", "docs/no.png"]


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:", 1)[1].split("\n\n", 1)[0]
    listed = re.findall(r"[\w/]+\.md", navigation)
    assert sorted(listed) == sorted([*(path.name for path in (ROOT / "docs").glob("*.md")), "contributing.md", "changelog.md"])
