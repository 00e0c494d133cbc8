"""The documents: their links lead somewhere, the API reference is complete, and the wheel says that it is typed."""

import inspect
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import flashnorm

REPOSITORY = Path(__file__).parent.parent
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]

_FENCED = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?) *#*$", re.MULTILINE)


def links(text: str) -> list[str]:
    """The targets of the links and pictures in a page, but for those in code."""
    return _LINK.findall(_CODE.sub("", _FENCED.sub("", text)))


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them. Of headings that are the same, the first."""
    headings = _HEADING.findall(_FENCED.sub("", text))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken(page: Path) -> list[str]:
    """The relative links of a page that lead to no file, or to no heading of it."""
    found = []
    for link in links(page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.is_file() or (anchor and anchor not in anchors(target.read_text())):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links(page: Path) -> None:
    assert broken(page) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One `word`, *two*\n\n```\n# No heading\n```\n")
    (tmp_path / "page.md").write_text(
        "[a](other.md) [b](other.md#one-word-two) [c](#here) `[d](code.md)` [e](https://example.org/x#y)\n"
        "## Here\n[f](absent.md) [g](other.md#no-heading) ![h](absent.png) [i](#absent)\n"
    )
    assert broken(tmp_path / "page.md") == ["absent.md", "other.md#no-heading", "absent.png", "#absent"]


def test_every_page_is_in_the_menu() -> None:
    menu = re.findall(r"^ +- [^:\n]+: (\S+\.md)$", (REPOSITORY / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(menu) == sorted(page.name for page in PAGES if page.parent == REPOSITORY / "docs")


def test_the_api_reference_has_every_public_name() -> None:
    text = (REPOSITORY / "docs" / "api.md").read_text()
    assert sorted(re.findall(r"^::: flashnorm\.(\w+)$", text, re.MULTILINE)) == sorted(flashnorm.__all__)


@pytest.mark.parametrize("name", [name for name in flashnorm.__all__ if inspect.isfunction(getattr(flashnorm, name))])
def test_docstrings_name_the_parameters_that_there_are(name: str) -> None:
    """Each by itself: `make docs` refuses others."""
    function = getattr(flashnorm, name)
    (arguments,) = re.findall(r"^Args:\n(.*?)(?:\n\n|\Z)", inspect.getdoc(function) or "", re.MULTILINE | re.DOTALL)
    named = re.findall(r"^    (\w[^:\n]*):", arguments, re.MULTILINE)
    assert named == list(inspect.signature(function).parameters)


def test_the_wheel_says_that_it_is_typed(tmp_path: Path) -> None:
    """Built without a compiler, since the kernels do not matter here."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    environment = {**os.environ, "CXX": "false"}
    ended = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        assert "flashnorm/py.typed" in file.namelist()
