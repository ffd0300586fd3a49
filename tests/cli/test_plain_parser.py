"""Contract: a wrong argument of a plain command is one line: what was found, what is expected, what to do."""

import argparse
import re

import pytest

from lightning_dlrm.__main__ import main
from lightning_dlrm.bench.command import WORKS
from lightning_dlrm.cli.plain_parser import PlainParser
from lightning_dlrm.contracts.errors import UserError


def share_of_rows(text: str) -> float:
    raise ValueError(text)


def even(text: str) -> int:
    raise argparse.ArgumentTypeError(f"{text} is odd; expected an even number")


def parser() -> PlainParser:
    made = PlainParser(prog="python -m lightning_dlrm try")
    works = made.add_subparsers(dest="work", required=True, metavar="WORK")
    work = works.add_parser("make")
    work.add_argument("source", metavar="FILE")
    work.add_argument("--output", required=True, metavar="DIR")
    work.add_argument("--rows", type=int)
    work.add_argument("--rate", type=float)
    work.add_argument("--share", type=share_of_rows)
    work.add_argument("--even", type=even)
    work.add_argument("-c", "--config", action="append")
    work.add_argument("--inputs", nargs="+")
    work.add_argument("--bag", type=int, nargs=2, metavar=("MIN", "MAX"))
    work.add_argument("--form", choices=("shop", "ads"))
    work.add_argument("--level", type=int, choices=(1, 2))
    work.add_argument("--json", action="store_true")
    either = work.add_mutually_exclusive_group()
    either.add_argument("--ranks", type=int)
    either.add_argument("--plan")
    needed = works.add_parser("cut").add_mutually_exclusive_group(required=True)
    needed.add_argument("--parts")
    needed.add_argument("--size")
    works.add_parser("join").add_argument("--pair", required=True, nargs=2, metavar=("A", "B"))
    return made


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "nothing follows try; expected one of make, cut, join"),
        ("mak", "try has no work mak; did you mean make? The works are make, cut, join"),
        ("make", "FILE and --output are missing: write try make FILE --output DIR"),
        ("make x", "--output is missing: give --output DIR"),
        ("cut", "--parts or --size is missing: give one of them"),
        ("join", "--pair is missing: give --pair A B"),
        ("make x --rows x", "--rows is x; expected a whole number"),
        ("make x --rows=1.5", "--rows is 1.5; expected a whole number"),
        ("make x --rows -", "--rows is -; expected a whole number"),
        ("make x --rate x", "--rate is x; expected a number"),
        ("make x --share x", "--share is x; expected share of rows"),
        ("make x --even 3", "--even: 3 is odd; expected an even number"),
        ("make x --rows", "--rows needs a value"),
        ("make x -c", "--config needs a value"),
        ("make x --inputs", "--inputs needs one value or more"),
        ("make x --bag 1", "--bag needs 2 values"),
        ("make x --form shp", "--form is shp; did you mean shop? Expected one of shop, ads"),
        ("make x --level 3", "--level is 3; expected one of 1, 2"),
        ("make x --json=yes", "--json is given the value yes, but takes none: write --json alone"),
        ("make x --ranks 2 --plan y", "--ranks and --plan exclude each other: give one of them"),
        ("make x --output y --rowz 3", "unknown option --rowz; did you mean --rows?"),
        ("make x --outputs y", "unknown option --outputs; did you mean --output?"),
        ("make x --output y z", "unknown argument z"),
    ],
)
def test_what_is_wrong_is_said_in_plain_words(arguments: str, said: str) -> None:
    words = arguments.split()
    prog = " ".join(["python -m lightning_dlrm try", *(words[:1] if words[:1] != ["mak"] else [])])
    with pytest.raises(UserError) as told:
        parser().parse_args(words)
    assert str(told.value) == f"{said}{'' if said.endswith('?') else ';'} {prog} --help lists the options"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("bench", "nothing follows bench; expected one of lookup, step, fit, "),
        ("generate", "nothing follows generate; expected one of "),
        ("checkpoint", "nothing follows checkpoint; expected one of import, info, merge, reshard;"),
        (
            "checkpoint info",
            "PATH is missing: write checkpoint info PATH; python -m lightning_dlrm checkpoint info --help lists",
        ),
        ("checkpoint reshard x --ranks 0 --output y", "checkpoint x does not exist"),
        ("checkpoint import x.pt --output", "--output needs a value; python -m lightning_dlrm checkpoint import --h"),
        ("compare --split tset", "--split is tset; did you mean test? Expected one of test, validation; "),
        ("compare", "nothing to compare: give run folders, or an experiment such as --config figure5.yaml"),
        ("compare --config", "--config needs a value; python -m lightning_dlrm compare --help lists the options"),
        ("params --match", "--match needs one value or more; python -m lightning_dlrm params --help lists the options"),
    ],
)
def test_commands_say_it_so(command: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {said}"), error


@pytest.mark.parametrize("command", ["bench", *(f"bench {name}" for name in WORKS), "dashboard", "inspect"])
def test_help_has_the_form_of_that_of_fit(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Usage, one sentence, examples, options; no line is longer than 78 characters, and no option lacks words."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    shown = capsys.readouterr().out
    usage, summary, *parts = shown.split("\n\n")
    assert usage.startswith(f"usage: python -m lightning_dlrm {command}") and usage.endswith("[options]")
    assert summary.endswith(".") and parts[0].startswith("examples:\n  python -m lightning_dlrm ")
    assert max(map(len, shown.splitlines())) <= 78 and "{" not in shown and "-h, --help" not in shown
    options = next((part for part in parts if part.startswith("options:")), "")
    entries = re.split(r"\n  (?=--)", options)[1:]
    assert (command == "bench") != bool(entries)
    assert not [entry for entry in entries if not re.search(r" [a-z0-9.]{2,} ", entry)]
