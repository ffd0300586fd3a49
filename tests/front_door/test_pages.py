"""Contract: what README and the pages of docs/ say can be followed: links lead somewhere, files exist, blocks run.

Blocks are read out of the pages and run in an empty folder, of an installed wheel, one after the other; sizes alone are
cut. ``test_own_data`` and ``test_own_model`` run the blocks of these two pages.
"""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import lightning_dlrm
from lightning_dlrm.contracts.shipped import shipped_names
from tests.forked import interpreter
from tests.front_door.conftest import REPOSITORY, SMALL_DATA, Shell
from tests.front_door.pages import (
    LANGUAGES,
    NOT_RUN,
    PAGES,
    Block,
    anchors_of,
    blocks_of,
    links_of,
    run_block,
)

DOCS = REPOSITORY / "docs"
GENERATED = ("commands.md", "configuration.md")
SEPARATE = ("own-data.md", "own-model.md")
LONG = " compare "
"""Command of README that is left out of the default run: the same command is in a page of docs/."""
WRITTEN_BY_READERS = re.compile(
    r"own|my_models|log\.yaml|mylog|places|matched|plan\.yaml|settings\.yaml|NAME|FILE|EXPERIMENT|OVERLAY|schema\.yaml"
)


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def run_here(page: Path) -> list[Block]:
    return [block for block in blocks_of(page.read_text()) if block.language in ("bash", "python") and not block.reason]


def test_every_link_leads_somewhere() -> None:
    dead = []
    for page in PAGES:
        for link in links_of(page.read_text()):
            if link.startswith(("https://", "mailto:")):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or (anchor and anchor not in anchors_of(target.read_text())):
                dead.append(f"{name_of(page)}: {link}")
    assert not dead


def test_the_reference_is_that_of_the_checkout_of_its_script(tmp_path: Path) -> None:
    """The installed package may be that of another checkout."""
    for name in ("docs", "lightning_dlrm"):
        (tmp_path / name).mkdir()
    (tmp_path / "lightning_dlrm" / "__init__.py").write_text("raise SystemExit('this checkout')")
    script = shutil.copy(DOCS / "reference.py", tmp_path / "docs")
    ran = subprocess.run([interpreter(), script], cwd=REPOSITORY, capture_output=True, text=True)
    assert ran.stderr.strip() == "this checkout"


def test_every_page_is_reached_from_the_index_and_says_what_it_is_for() -> None:
    linked = set(links_of((DOCS / "index.md").read_text()))
    for page in DOCS.glob("*.md"):
        if page.name == "index.md":
            assert "\n\nFrom here you reach every page" in page.read_text()
            continue
        assert page.name in linked, f"docs/index.md does not link {page.name}"
        opening = page.read_text().split("\n\n")[1]
        assert re.match(r"After this page you|On this page you find", opening), f"{page.name}: {opening[:80]}"
    assert "docs/index.md" in links_of((REPOSITORY / "README.md").read_text())
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 150


def test_every_block_runs_or_says_why_not() -> None:
    for page in PAGES:
        text = page.read_text()
        assert not re.search(r"^(<{7}|>{7}) ", text, re.MULTILINE), f"{name_of(page)} has two versions of some lines"
        blocks = blocks_of(text)
        assert len(blocks) == len(re.findall(r"^```", text, re.MULTILINE)) / 2, name_of(page)
        assert {block.language for block in blocks} <= LANGUAGES, name_of(page)
        for block in blocks:
            assert not block.reason or (block.reason.startswith(NOT_RUN) and len(block.reason) > 20), block
            # What runs is a command of this project or Python, in a page whose blocks are run.
            if block.language == "bash" and not block.reason:
                assert re.fullmatch(r"(?:python (?:-m lightning_dlrm|-c) .*\n)+", re.sub(r"\\\n", "", block.code)), (
                    block
                )


def test_files_that_pages_name_exist() -> None:
    shipped, missing = set(shipped_names()), []
    for page in PAGES:
        if page.name == "CHANGELOG.md":
            # It names files of earlier releases.
            continue
        text = re.sub(r"https://\S+", "", page.read_text())
        for path in re.findall(r"\b(?:tests|docs|lightning_dlrm|datamodules|configs|notebooks|\.ci)/[\w./*-]+\w", text):
            if "." in Path(path).name and not list(REPOSITORY.glob(path)):
                missing.append(f"{name_of(page)}: {path}")
        for config in re.findall(r"(?<![\w/.<-])((?:[\w-]+/)?[\w*]+\.yaml)\b", text):
            known = any(Path(name).match(config.removeprefix("configs/")) for name in shipped)
            if not known and not WRITTEN_BY_READERS.search(config) and not config.endswith("config.yaml"):
                missing.append(f"{name_of(page)}: {config}")
    assert not missing


def test_generated_pages_and_lists_of_names_are_as_the_code_is() -> None:
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    assert spec is not None and spec.loader is not None
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    for name, text in reference.pages().items():
        differing = set(without_meanings(text)) ^ set(without_meanings((DOCS / name).read_text()))
        assert not differing, f"docs/{name} is not as the code is: run python docs/reference.py"
    listed = re.findall(r"^\| `(\w+)` \|", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(lightning_dlrm.__all__)
    models = (DOCS / "models.md").read_text()
    assert all(f"`{name}`" in models for name in shipped_names() if is_model(name))


def without_meanings(text: str) -> list[str]:
    """Return the headings of a page, and the rows of its tables without their last cells: options, keys, defaults.

    The strict build of the site, with the versions that CI tests, compares every word (docs/conf.py).
    """
    return [line.rpartition(" | ")[0] or line for line in text.splitlines() if line.startswith(("#", "|"))]


def is_model(name: str) -> bool:
    """Whether a shipped file is the configuration of a model on demo data, which overlays can follow."""
    text = (REPOSITORY / "configs" / name).read_text()
    return "/" not in name and "  network:\n    class_path:" in text and not name.startswith("mlperf")


RUN = [page for page in PAGES if run_here(page) and page.name not in (*SEPARATE, *GENERATED)]


def marks(page: Path) -> list[pytest.MarkDecorator]:
    """The blocks of all pages but README are slow tests, which .ci/run runs in a step of its own."""
    return [] if page.name == "README.md" else [pytest.mark.slow]


@pytest.mark.parametrize("page", [pytest.param(page, marks=marks(page), id=name_of(page)) for page in RUN])
def test_blocks_run(page: Path, shell_environment: dict[str, str], tmp_path: Path) -> None:
    shell = Shell(tmp_path, shell_environment)
    (tmp_path / "small_data.yaml").write_text(SMALL_DATA)
    said = ""
    for block in run_here(page):
        if page.name == "README.md" and LONG in block.code:
            assert block.code in (DOCS / "compare.md").read_text()
            continue
        for finished in run_block(shell, block):
            assert finished.code == 0 and "Traceback" not in finished.output, f"{block}\n{finished.output}"
            said += finished.output
    if page.name == "first-run.md":
        shown = re.findall(r"^    ([A-Za-z&]+(?: [a-z]+)*)(?=  |:)", page.read_text(), re.MULTILINE)
        assert len(shown) > 10 and all(label in said for label in shown)
