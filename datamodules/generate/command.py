"""The subcommand ``generate``: its options and its output. Each kind of data has its own subcommand."""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

from datamodules.generate.demo import DemoSettings, generate_demo
from datamodules.generate.log import FORMS, LogSettings, generate_log
from datamodules.generate.profiles import LEAST_ACCESSES, Profile, TraceSource, save_profiles
from datamodules.generate.random import PRESETS, Law, RandomSettings, generate_random
from datamodules.generate.trace import TraceSettings, generate_trace, measure_fit, plot_fits, render_fits
from datamodules.generate.tsv import TSV_DATASETS, TsvSettings, generate_tsv
from datamodules.preprocess.progress import format_rate
from datamodules.writer import DatasetWriter
from lightning_dlrm.contracts.errors import require, settings_as_options
from lightning_dlrm.contracts.figures import check_figure_file
from lightning_dlrm.contracts.interrupts import exit_on_signals
from lightning_dlrm.contracts.schema import SPLITS, DatasetSchema
from lightning_dlrm.contracts.shipped import shipped_names
from lightning_dlrm.contracts.terminal import binary_size, command_after, command_line, counted, wrapped

_DESCRIPTION = """\
Write generated data: a dataset folder for fit, or raw files for preprocess. Each kind has its own options:
  python -m lightning_dlrm generate KIND --help

example:
  python -m lightning_dlrm generate demo --rows 100000 --output data/demo
"""

_DEMO_DESCRIPTION = """\
Write a dataset folder that looks like Criteo Kaggle: its 40 columns, the sizes of its tables, skewed ids and missing
values. The labels are drawn from a known click model, so that the best AUC and log loss any model can reach are
known; dataset.json has them under "optimum". The same options give the same rows everywhere.

examples:
  python -m lightning_dlrm generate demo --output data/demo
  python -m lightning_dlrm generate demo --output data/small --rows 300000 --max-table-rows 100000
then:
  python -m lightning_dlrm fit --config dlrm.yaml --data.path data/demo
"""

_RANDOM_DESCRIPTION = """\
Write a dataset folder of any shape, for measuring speed: normal dense features; ids with a uniform, a Gaussian
or a Zipf distribution over each table's rows, one or a bag of them for each table, with or without weights; clicks that
are independent of the features, so that no model has an AUC above 0.5. The same options give the same rows everywhere.

presets, whose values other options replace:
  paper    the DLRM paper's section 5.2: 8 tables of 1M rows, 512 dense features, bags of 1 to 100 ids
  kaggle   Criteo Kaggle's tables, 13 dense features, single ids
  mlperf   MLPerf's DLRM v2: tables of up to 40M rows, 13 dense features, its sizes of bags

examples:
  python -m lightning_dlrm generate random --preset paper --rows 100000 --output data/paper
  python -m lightning_dlrm generate random --tables 1000,50000,2000000 --dense 4 --law zipf --output data/zipf
  python -m lightning_dlrm generate random --tables 1000,50000 --indices 1,20 --min-indices 0 --weights --output data/w
then:
  python -m lightning_dlrm fit --config dlrm.yaml --data.path data/zipf
"""

_TRACE_DESCRIPTION = """\
Write a dataset folder whose columns access the rows of their tables in an order like that of real columns: with the
same hit rates in an LRU cache of any size, and as many unique rows. The command measures and prints how similar they
are. Labels are independent of the features, so that no model has an AUC above 0.5. A saved profile generates accesses
later, without the data. docs/generated-data.md says what is not reproduced.

Needs: pip install 'lightning-dlrm[trace]'

examples:
  python -m lightning_dlrm generate trace --from data/criteo --column C3 --output data/trace --plot fit.png
  python -m lightning_dlrm generate trace --from data/criteo --profile criteo.json
  python -m lightning_dlrm generate trace --profile criteo.json --rows 100000000 --output data/long
then:
  python -m lightning_dlrm fit --config dlrm.yaml --data.path data/trace
"""

_TSV_DESCRIPTION = """\
Write raw text in the form of Criteo's click logs, for preprocess: a label, 13 integers and 26 hashes between tabs,
empty if missing. The clicks are drawn from a known click model. The same options give the same rows everywhere;
more rows begin with the same rows.

examples:
  python -m lightning_dlrm generate tsv --rows 1000000 --output train.txt
  python -m lightning_dlrm generate tsv --rows 4000000 --dataset terabyte --output day_{0..3}.gz
then:
  python -m lightning_dlrm preprocess --dataset kaggle --protocol dlrm --input train.txt --output data/mine
"""

_LOG_DESCRIPTION = """\
Write a raw log of five columns, or one in the form of a public data set (file names, header, separator, values), to try
preprocess --infer or a schema without the real data. The clicks are drawn from a known
click model.

forms:
{forms}

examples:
  python -m lightning_dlrm generate log --form shop --rows 100000 --output mylog
  python -m lightning_dlrm generate log --form avazu --rows 200000 --output avazu
then:
  python -m lightning_dlrm preprocess --infer log.yaml --label clicked --input mylog/clicks.csv
  python -m lightning_dlrm preprocess --schema datasets/avazu.yaml --input avazu/train --output data/avazu
"""


Option = tuple[str, dict[str, Any]]
"""Name and settings of a command-line option, as ``ArgumentParser.add_argument`` takes them."""

_OUTPUT: Option = (
    "--output",
    {"type": Path, "metavar": "DIR", "help": "folder to make; it must not exist, or must be empty"},
)


_SEED = "seed of the rows (default: %(default)s)"
_MODEL_SEED = "seed of the click model and of the rows (default: %(default)s)"


def _number(
    name: str, words: str, default: float | None = None, kind: type[int] | type[float] = int, metavar: str = "N"
) -> Option:
    """Return an option that takes a number."""
    return name, {"type": kind, "default": default, "metavar": metavar, "help": words}


def _share(name: str, words: str, default: float | None = None) -> Option:
    return _number(name, words, default, float, "SHARE")


def _row_options(train: int | None, validation: int, test: int) -> list[Option]:
    defaults = (
        ("--rows", train, "training"),
        ("--validation-rows", validation, "validation"),
        ("--test-rows", test, "test"),
    )
    return [
        _number(name, f"{split} rows (default: {'those of the split or the profile' if rows is None else rows})", rows)
        for name, rows, split in defaults
    ]


def _numbers(text: str) -> int | tuple[int, ...]:
    """Parse ``7`` or ``1,2,3``; also in brackets, as YAML writes lists."""
    try:
        numbers = tuple(int(part) for part in text.strip("[]").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of whole numbers; separate them by commas, such as 1000,50000"
        ) from None
    return numbers[0] if len(numbers) == 1 and "[" not in text else numbers


def _demo_options() -> list[Option]:
    default = DemoSettings()
    return [
        ("--output", {**_OUTPUT[1], "required": True}),
        *_row_options(default.train_rows, default.validation_rows, default.test_rows),
        _number("--seed", _MODEL_SEED, default.seed),
        _number("--max-table-rows", "maximum of a table's rows (default: Kaggle's own sizes)"),
    ]


def _random_options() -> list[Option]:
    default = RandomSettings()
    numbers = {"type": _numbers, "metavar": "N[,N...]"}
    # An option that is not given is None: the preset decides, or the default.
    return [
        ("--output", {**_OUTPUT[1], "required": True}),
        *_row_options(default.train_rows, default.validation_rows, default.test_rows),
        ("--preset", {"choices": PRESETS, "help": "start from the shape of a known workload"}),
        ("--tables", {**numbers, "help": "rows of each table (default: 26 tables of 100,000)"}),
        _number("--dense", f"number of dense features (default: {default.dense})"),
        ("--indices", {**numbers, "help": "ids of a bag, one number for all tables or one for each (default: 1)"}),
        (
            "--min-indices",
            {**numbers, "help": "fewest ids of a bag, 0 or more: bag sizes are uniform between it and --indices"},
        ),
        ("--law", {"choices": get_args(Law), "help": f"distribution of the ids (default: {default.law})"}),
        _number(
            "--exponent",
            f"exponent of zipf: probability of id k ~ (k + 1) ** -exponent (default: {default.exponent})",
            kind=float,
            metavar="NUMBER",
        ),
        _share("--mean", f"of gaussian, as a share of the table's rows (default: {default.mean})"),
        _share("--deviation", f"of gaussian, as a share of the table's rows (default: {default.deviation})"),
        ("--weights", {"action": "store_true", "help": "give each id a weight in (0, 1]"}),
        _share("--click-rate", f"share of rows with label 1 (default: {default.click_rate})"),
        _number("--seed", f"seed of the rows (default: {default.seed})"),
    ]


def _trace_options() -> list[Option]:
    default = TraceSettings
    file_help = "with --from, JSON file to save profiles in; otherwise the file to read them from"
    return [
        ("--from", {"dest": "source", "metavar": "DIR", "help": "dataset folder to profile, a path or a URL"}),
        ("--profile", {"type": Path, "metavar": "FILE", "help": file_help}),
        (
            "--column",
            {
                "action": "append",
                "metavar": "NAME",
                "help": "column to trace; may be repeated (default: all with a table)",
            },
        ),
        ("--split", {"choices": SPLITS, "default": "train", "help": "split to profile (default: %(default)s)"}),
        _OUTPUT,
        *_row_options(None, default.validation_rows, default.test_rows),
        _number("--dense", "number of dense features (default: %(default)s)", default.dense),
        _share("--click-rate", "share of rows with label 1 (default: %(default)s)", default.click_rate),
        _number("--seed", _SEED, default.seed),
        ("--plot", {"type": Path, "metavar": "FILE", "help": "draw the fit: .png, .svg or .pdf"}),
    ]


def _tsv_options() -> list[Option]:
    output_help = "files for the rows, in order; .gz and .zst are compressed"
    dataset_help = "Criteo's dataset to imitate (default: kaggle)"
    return [
        ("--output", {"required": True, "nargs": "+", "type": Path, "metavar": "FILE", "help": output_help}),
        ("--rows", {"required": True, "type": int, "metavar": "N", "help": "rows of all files together"}),
        ("--dataset", {"default": "kaggle", "choices": TSV_DATASETS, "help": dataset_help}),
        _number("--seed", _MODEL_SEED, 0),
    ]


def _log_options() -> list[Option]:
    return [
        ("--form", {"required": True, "choices": FORMS, "metavar": "NAME", "help": "form of the log: see forms above"}),
        ("--output", {"required": True, "type": Path, "metavar": "DIR", "help": "folder for the files"}),
        ("--rows", {"required": True, "type": int, "metavar": "N", "help": "rows of all files together"}),
        _number("--seed", _SEED, 0),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the kinds of data and their options to a parser; ``run`` takes what it parses."""
    parser.description = _DESCRIPTION
    forms = "\n".join(f"  {name:<13} {form.about}" for name, form in FORMS.items())
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, words, description, options, run_kind in (
        ("demo", "click logs like Criteo Kaggle's, to compare models", _DEMO_DESCRIPTION, _demo_options(), _run_demo),
        (
            "random",
            "tables, dense features and bags of any shape, to measure speed",
            _RANDOM_DESCRIPTION,
            _random_options(),
            _run_random,
        ),
        (
            "trace",
            "tables read in an order like that of a dataset, to measure caches",
            _TRACE_DESCRIPTION,
            _trace_options(),
            _run_trace,
        ),
        ("tsv", "raw text shaped like Criteo's click logs", _TSV_DESCRIPTION, _tsv_options(), _run_tsv),
        (
            "log",
            "raw logs in the form of other public data sets",
            _LOG_DESCRIPTION.format(forms=forms),
            _log_options(),
            _run_log,
        ),
    ):
        kind = kinds.add_parser(name, summary=words, description=description)
        required = [f"{option} {settings['metavar']}" for option, settings in options if settings.get("required")]
        # Two lines if it would be longer than a terminal.
        between = " " if len(required) < 3 else "\n           "
        kind.usage = f"{kind.prog}{between}{' '.join([*required, '[options]'])}"
        for option, settings in options:
            kind.add_argument(option, **settings)
        kind.set_defaults(run_kind=run_kind)


def run(args: argparse.Namespace) -> int:
    """Generate data with the parsed options, print a summary, and return the exit code.

    Raises:
        UserError: an option is out of range, the output folder holds something else, or its disk cannot hold all.
        SystemExit: on SIGTERM and SIGHUP.
    """
    values = vars(args) | {"train_rows": getattr(args, "rows", None)}
    options = {name: f"--{name.replace('_', '-')}" for name in vars(args)} | {"train_rows": "--rows"}
    with exit_on_signals(), settings_as_options(options, values):
        return args.run_kind(args)


def _run_demo(args: argparse.Namespace) -> int:
    settings = DemoSettings(
        train_rows=args.rows,
        validation_rows=args.validation_rows,
        test_rows=args.test_rows,
        seed=args.seed,
        max_table_rows=args.max_table_rows,
    )
    return _make(args.output, lambda: generate_demo(settings, args.output), _summary)


def _run_random(args: argparse.Namespace) -> int:
    names = ("dense", "indices", "min_indices", "law", "exponent", "mean", "deviation", "click_rate", "seed")
    settings = RandomSettings.of(
        args.preset,
        tables=(args.tables,) if isinstance(args.tables, int) else args.tables,
        weights=args.weights,
        train_rows=args.rows,
        validation_rows=args.validation_rows,
        test_rows=args.test_rows,
        **{name: getattr(args, name) for name in names},
    )
    return _make(args.output, lambda: generate_random(settings, args.output), _shape)


def _run_trace(args: argparse.Namespace) -> int:
    require(
        args.source is not None or args.profile is not None,
        "generate trace: no source is given; give --from DIR, or --profile FILE of an earlier run",
    )
    saves = args.source is not None and args.profile is not None
    require(
        args.output is not None or saves,
        "generate trace: no output is given; give --output DIR, or --from DIR and --profile FILE",
    )
    require(
        args.output is not None or args.plot is None,
        "generate trace: --plot compares generated accesses with their original; give --output DIR too",
    )
    require(
        args.source is not None or args.profile.is_file(),
        f"there is no file {args.profile}; give --profile a file of trace profiles, or --from DIR, a dataset folder",
    )
    # Refused here, because these faults would otherwise show after an hour's work.
    require(
        not saves or not args.profile.exists(),
        f"{args.profile} exists; name a new file, or leave --from out to generate from it",
    )
    if args.plot is not None:
        check_figure_file(args.plot)
    if args.output is not None:
        DatasetWriter(args.output, ())
    if saves:
        require(
            args.profile.absolute().parent.is_dir(),
            f"cannot write {args.profile}: there is no folder {args.profile.parent}; make it, or choose another file",
        )
    source = TraceSource(args.source or args.profile, args.column, args.split)
    settings = TraceSettings(
        train_rows=source.length if args.rows is None else args.rows,
        validation_rows=args.validation_rows,
        test_rows=args.test_rows,
        dense=args.dense,
        click_rate=args.click_rate,
        seed=args.seed,
    )
    require(
        settings.train_rows >= LEAST_ACCESSES,
        f"generate trace: --rows is {settings.train_rows}; give at least {LEAST_ACCESSES:,}, to measure the fit",
    )
    profiles = source.profiles()
    if saves:
        save_profiles(profiles, args.profile)
        print(wrapped([f"profiles of {', '.join(source.tables)} are in {args.profile}"]))
    if args.output is not None:
        make = partial(generate_trace, source, settings, args.output, profiles=profiles)
        _make(args.output, make, _shape, partial(_report_fit, profiles, args))
    return 0


def _report_fit(originals: list[Profile], args: argparse.Namespace) -> None:
    generated = TraceSource(args.output).profiles(cuts={profile.column: profile.accesses for profile in originals})
    fits = [measure_fit(*pair) for pair in zip(originals, generated, strict=True)]
    lines = render_fits(fits).splitlines()
    for original, copy in zip(originals, generated, strict=True):
        if copy.accesses > original.accesses and original.distinct < original.rows:
            lines.append(
                f"{original.column}: after the original's {original.accesses:,} accesses, the unique rows grow as "
                f"the accesses to the power of {original.growth:.2f}, up to the {original.rows:,} rows of the table: "
                f"{copy.distinct:,} unique rows after {copy.accesses:,} accesses"
            )
    if args.plot is not None:
        plot_fits(originals, generated, str(args.source or args.profile), args.plot)
        lines.append(f"{args.plot} compares the generated accesses with the original ones")
    print(wrapped(lines))


def _make(
    output: Path,
    generate: Callable[[], DatasetSchema],
    summarize: Callable[[DatasetSchema], str],
    report: Callable[[], None] = lambda: None,
) -> int:
    start = time.perf_counter()
    schema = generate()
    print(summarize(schema))
    print(f"{output} is ready after {time.perf_counter() - start:.1f} s")
    report()
    if "train" in schema.splits:
        command = command_line("fit", "--config", "dlrm.yaml", "--data.path", str(output))
        chance = "the labels are independent of the features (best AUC 0.5): use these data for speed, not scores:"
        print(command_after(chance if schema.optimum["train"].auc == 0.5 else "train on it:", command))
    return 0


def _shape(schema: DatasetSchema) -> str:
    rows = ", ".join(counted(split.rows, f"{name} row") for name, split in schema.splits.items())
    tables, table_rows = len(schema.features.tables), sum(schema.features.table_rows)
    dense = counted(schema.features.dense, "dense feature")
    return wrapped([f"{rows}; {dense}, {counted(tables, 'table')} with {counted(table_rows, 'row')} in all"])


def _run_tsv(args: argparse.Namespace) -> int:
    settings = TsvSettings(rows=args.rows, dataset=args.dataset, seed=args.seed)
    start = time.perf_counter()
    sizes = generate_tsv(settings, args.output)
    seconds = time.perf_counter() - start
    for path, size in zip(args.output, sizes, strict=True):
        print(f"{path}: {binary_size(size)}")
    rate = f" after {seconds:.1f} s ({format_rate(settings.rows / seconds)} rows/s)" * (seconds >= 1)
    print(f"{counted(settings.rows, 'row')}{rate}")
    options = ["--dataset", args.dataset, "--protocol", "dlrm", "--input", *map(str, args.output), "--output", "DIR"]
    print(command_after("preprocess them:", command_line("preprocess", *options)))
    return 0


def _run_log(args: argparse.Namespace) -> int:
    made = generate_log(LogSettings(form=args.form, rows=args.rows, seed=args.seed), args.output)
    for path in made.files:
        print(f"{path}: {binary_size(path.stat().st_size)}")
    scores = f"AUC {made.best.auc:.4f}, log loss {made.best.log_loss:.4f}"
    print(wrapped([f"{counted(args.rows, 'row')}; best scores that any model can reach on all of them: {scores}"]))
    schema, files = f"datasets/{args.form}.yaml", ["--input", *map(str, made.files)]
    words = ["--schema", schema, *files, "--output", "DIR"]
    if schema not in shipped_names():
        words = ["--infer", "FILE.yaml", "--label", "clicked", *files]
    print(command_after("preprocess them:", command_line("preprocess", *words)))
    return 0


def _summary(schema: DatasetSchema) -> str:
    lines = [f"{sum(schema.features.table_rows):,} table rows; best scores that any model can reach:"]
    for name, split in schema.splits.items():
        best = schema.optimum[name]
        share = (split.positives or 0) / split.rows
        lines.append(
            f"  {name:10s} {split.rows:>9,} rows, {share:.1%} clicks, AUC {best.auc:.4f}, log loss {best.log_loss:.4f}"
        )
    return "\n".join(lines)
