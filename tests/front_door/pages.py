"""Pages in Markdown: their code blocks, links and anchors, and blocks run as they are typed."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.forked import INTERPRETER, interpreter
from tests.front_door.conftest import REPOSITORY, Finished, Shell

PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])
LANGUAGES = {"bash", "python", "yaml", "text"}
NOT_RUN = "not run: "
"""How the comment before a block that does not run begins; the reason follows."""

LESS_PYTHON = {"train_rows=204_800": "train_rows=16_384"}
LESS_ROWS = {"200000": "4000", "100000": "4000", "40000": "4000", "20000": "4000", "2000": "400"}
"""As typed -> in tests, after ``--rows``."""
LESS = {
    "RandomData": ["--data.train_rows=4096", "--data.validation_rows=256", "--data.test_rows=256"],
    "bars/": ["--trainer.max_epochs=1"],
    "mydata": ["--data.batch_size=128"],
}
"""Word of a ``fit`` or ``compare`` -> options that make it small, in place of the small demo data."""


@dataclass(frozen=True)
class Block:
    """A fenced code block."""

    section: str
    language: str
    code: str
    reason: str
    """Why it does not run; empty if it runs."""

    def __str__(self) -> str:
        return f"{self.section}: {self.code.split(chr(10))[0][:50]}"


def blocks_of(text: str) -> list[Block]:
    """Return the fenced code blocks of a document in Markdown."""
    pattern = r"^## (?P<section>[^\n]+)$|(?:<!--(?P<reason>[^>]*)-->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$"
    blocks, section = [], ""
    for match in re.finditer(pattern, text, re.MULTILINE | re.DOTALL):
        section = match["section"] or section
        if match["code"] is not None:
            blocks.append(Block(section, match["language"], match["code"], (match["reason"] or "").strip()))
    return blocks


def commands_of(code: str) -> list[str]:
    """Return a block's commands, each in one line."""
    return [line for line in code.replace("\\\n", " ").splitlines() if line.strip()]


def prose_of(text: str) -> str:
    """Return a document without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors_of(text: str) -> set[str]:
    """Return the anchors of a document's headings, as code hosts make them."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", prose_of(text), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-")
        found.append(anchor if anchor not in found else f"{anchor}-{found.count(anchor)}")
    return set(found)


def links_of(text: str) -> list[str]:
    """Return the targets of a document's links and images."""
    prose = re.sub(r"`[^`\n]*`", "", prose_of(text))
    return [*re.findall(r"\]\(([^)\s]+)\)", prose), *re.findall(r' src(?:set)?="([^"]+)"', prose)]


def smaller(words: list[str]) -> list[str]:
    """Return the arguments of a command, with fewer rows and smaller fits."""
    words = [
        LESS_ROWS.get(word, word) if before == "--rows" else word
        for before, word in zip(["", *words], words, strict=False)
    ]
    command, line = words[0], " ".join(words)
    if command in ("fit", "compare") and "--config" in words:
        options = next((less for part, less in LESS.items() if part in line), None)
        if options is None and "--data.path" not in words:
            at = len(words) - words[::-1].index("--config") + 1
            words = [*words[:at], "--config", "small_data.yaml", *words[at:]]
        words += options or (["--data.batch_size=64"] if "--data.path" in words and command == "fit" else [])
    if "--device-memory" in words:
        words += ["--config", "small_data.yaml", "--device-memory", "400KiB"]
    return words


def run_block(shell: Shell, block: Block) -> list[Finished]:
    """Run a block's commands up to the first that fails, in forked processes, also those that they start themselves."""
    environment = shell.environment | {INTERPRETER: interpreter()}
    if block.language == "python":
        code = block.code
        for size, fewer in LESS_PYTHON.items():
            code = code.replace(size, fewer)
        Path(shell.folder, "example.py").write_text(code)
        return [shell.forked(["example.py"], environment, 300)]
    done: list[Finished] = []
    for line in commands_of(block.code) if block.language == "bash" else []:
        command = shlex.split(line)
        assert command[:3] == ["python", "-m", "lightning_dlrm"], line
        words = smaller(command[3:])
        done.append(shell.forked(["-m", "lightning_dlrm", *words], environment, 1200))
        if done[-1].code:
            break
    return done
