"""Contract: the code blocks of README run as they are typed: in an empty folder, of an installed wheel.

Blocks are read out of README. A block that cannot run here has an HTML comment with the reason right before it. Sizes
alone are cut: every ``fit`` and ``compare`` gets an overlay after its own ones.
"""

import re
import shlex
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.front_door.conftest import REPOSITORY, TINY, Finished, Shell, asked_for

CUT = {
    "fit": ["--config", "cut.yaml"],
    "compare": ["--config", "cut.yaml"],
    "generate trace": ["--rows", "4096"],
}
RANDOM_ROWS = ["--data.train_rows=4096", "--data.validation_rows=256", "--data.test_rows=256"]
CUT_PYTHON = {"train_rows=204_800": "train_rows=16_384", "max_steps=100": "max_steps=8"}


@dataclass(frozen=True)
class Block:
    """A fenced code block."""

    section: str
    language: str
    code: str
    reason: str
    """Why it does not run here; empty if it runs."""

    def __str__(self) -> str:
        return f"{self.section}: {self.code.split(chr(10))[0][:50]}"

    @property
    def is_long(self) -> bool:
        return " compare " in self.code


def blocks_of(text: str) -> list[Block]:
    """Return the fenced code blocks of a document in Markdown."""
    pattern = r"^## (?P<section>[^\n]+)$|(?:<!--(?P<reason>[^>]*)-->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$"
    blocks, section = [], ""
    for match in re.finditer(pattern, text, re.MULTILINE | re.DOTALL):
        section = match["section"] or section
        if match["code"] is not None:
            blocks.append(Block(section, match["language"], match["code"], (match["reason"] or "").strip()))
    return blocks


README = (REPOSITORY / "README.md").read_text()
BLOCKS = blocks_of(README)
RUN_HERE = [block for block in BLOCKS if not block.reason]


def test_every_block_is_found_and_runs_or_says_why_not() -> None:
    assert len(BLOCKS) == README.count("\n```") // 2 and {block.language for block in BLOCKS} == {"bash", "python"}
    allowed = ("environment", "tests", "checkout", "real data", "GPU", "account")
    for block in BLOCKS:
        assert not block.reason or any(word in block.reason for word in allowed), block


def commands_of(code: str) -> list[str]:
    """Return a block's commands, each in one line."""
    return [line for line in code.replace("\\\n", " ").splitlines() if line.strip()]


def cut(command: list[str]) -> list[str]:
    """Add what makes a command small."""
    for start, more in CUT.items():
        words = start.split()
        if command[3 : 3 + len(words)] == words:
            configs = [i for i, word in enumerate(command) if word == "--config"]
            if "--config" in more and not configs:
                # A comparison of finished runs.
                continue
            at = configs[-1] + 2 if configs else 3 + len(words)
            command = [*command[:at], *more, *command[at:]]
    if "--device-memory" in command:
        command = [*command, "--config", "cut.yaml", "--device-memory", "30KiB"]
    return [*command, *(RANDOM_ROWS if "RandomData" in command else [])]


def run_block(shell: Shell, block: Block) -> list[Finished]:
    """Run a block's commands up to the first that fails."""
    if block.language == "python":
        code = block.code
        for size, smaller in CUT_PYTHON.items():
            assert size in code
            code = code.replace(size, smaller)
        Path(shell.folder, "example.py").write_text(code)
        return [shell.python("example.py")]
    done: list[Finished] = []
    for line in commands_of(block.code):
        command = shlex.split(line)
        assert command[:3] == ["python", "-m", "lightning_dlrm"], line
        done.append(shell.run([sys.executable, *cut(command)[1:]]))
        if done[-1].code:
            break
    return done


@pytest.fixture(scope="module")
def outcomes(shell: Shell, request: pytest.FixtureRequest) -> dict[Block, "Future[list[Finished]]"]:
    """All blocks that are asked for, running two at a time; those of one dataset folder after one another."""
    Path(shell.folder, "cut.yaml").write_text(TINY)
    # What README names as the way without Criteo's files.
    assert "generate tsv --rows 200000 --output train.txt" in README
    written = shell.cli("generate", "tsv", "--rows", "4000", "--output", "train.txt")
    assert written.code == 0, written.output
    asked = asked_for(request, "block")
    found: dict[Block, Future[list[Finished]]] = {block: Future() for block in RUN_HERE}

    def run_all(blocks: list[Block]) -> None:
        for block in blocks:
            try:
                found[block].set_result(run_block(shell, block))
            except BaseException as error:
                found[block].set_exception(error)

    pool = ThreadPoolExecutor(2)
    for needs_dataset in (True, False):
        blocks = [block for block in RUN_HERE if ("criteo" in block.code) == needs_dataset]
        # Of one dataset folder, later blocks need what earlier ones have made.
        last = max((i for i, block in enumerate(blocks) if block in asked), default=-1)
        pool.submit(run_all, [block for block in blocks[: last + 1] if needs_dataset or block in asked])
    return found


@pytest.mark.parametrize(
    "block", [pytest.param(b, marks=pytest.mark.slow) if b.is_long else b for b in RUN_HERE], ids=str
)
def test_block(block: Block, outcomes: dict[Block, "Future[list[Finished]]"]) -> None:
    for finished in outcomes[block].result():
        assert finished.code == 0 and "Traceback" not in finished.output, finished.output
