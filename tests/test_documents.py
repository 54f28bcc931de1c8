"""The documents' links: to files that are there, and to headings that are in them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.S | re.M)
    return {anchor(found.strip()) for found in re.findall(r"^#+ (.*)$", text, re.M)}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.S | re.M)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:", link)]
    for link in links:
        name, _, heading = link.partition("#")
        target = (path.parent / name) if name else path
        assert target.exists(), link
        assert not heading or heading in anchors(target), link


def test_documents_are_found():
    assert {"README.md", "pipeline.md", "pipeline-measured.md"} <= {path.name for path in DOCUMENTS}
