"""Every shell and Python block of README and docs/ is run as it stands; see tests/support/pages.py for the rules."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pages
import pytest
import typer

USAGE = typer.BadParameter.__bases__[0]  # typer carries its own copy of click
WITH_BLOCKS = [page for page in pages.PAGES if any(block.language in pages.RUN for block in pages.blocks(page))]
NAMES = [page.relative_to(pages.REPOSITORY).as_posix() for page in WITH_BLOCKS]


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace that each page gets a copy of."""
    folder = tmp_path_factory.mktemp("documented")
    pages.make_workspace(folder)
    return folder


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", WITH_BLOCKS, ids=NAMES)
def test_blocks_of_a_page(page: Path, documented: Path, tmp_path: Path) -> None:
    folder = tmp_path / "workspace"
    shutil.copytree(documented, folder, symlinks=True)
    scripts: list[str] = []
    for block in pages.blocks(page):
        if block.language not in pages.RUN:
            continue
        assert block.note in ("", *pages.PARSED), f"{page.name}:{block.line}: unknown note '{block.note}' of a block"
        if block.note:
            assert block.language != "python", f"{page.name}:{block.line}: a Python block cannot be parsed only"
            assert pages.commands(block), f"{page.name}:{block.line}: no command of hpc-gen in a block that is not run"
        if block.language != "python":
            for words in pages.commands(block):
                _accepted(words, f"{page.name}:{block.line}")
        if not block.note and block.language == "python":
            scripts.append(block.text)
        elif not block.note:
            pages.run_shell(folder, block.text)
    if scripts:
        pages.run_python(folder, "\n".join(scripts))


def _accepted(words: list[str], where: str) -> None:
    try:
        pages.parse(words)
    except typer.Exit:
        pass  # --help and --version end so
    except USAGE as error:
        raise AssertionError(f"{where}: 'hpc-gen {' '.join(words)}' is refused: {error.format_message()}") from error


@pytest.mark.parametrize(
    "words", [["no-such"], ["run"], ["run", "x.yaml", "--no-such"], ["shards", "no-such"], ["shards", "info"]]
)
def test_a_command_that_does_not_exist_would_be_seen(words: list[str]) -> None:
    with pytest.raises(AssertionError, match="is refused"):
        _accepted(words, "page.md:1")


def test_a_block_that_fails_would_be_seen(tmp_path: Path) -> None:
    runs: list[tuple[Callable[[Path, str], str], str]] = [
        (pages.run_shell, "true\nfalse\ntrue\n"),
        (pages.run_python, "1/0"),
    ]
    for run, text in runs:
        with pytest.raises(AssertionError, match="ended with 1"):
            run(tmp_path, text)


def test_every_language_is_known() -> None:
    """A block without a language, or with a mistyped one, would be run by nobody."""
    known = {*pages.RUN, "text", "yaml", "json"}
    for page in pages.PAGES:
        for block in pages.blocks(page):
            assert block.language in known, (
                f"{page.name}:{block.line}: a block of language '{block.language}'; known: {known}"
            )
