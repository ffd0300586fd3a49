"""``compare``: an experiment of several configurations and seeds, or finished runs."""

import argparse
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_dlrm.cli.configs import find_config
from lightning_dlrm.cli.parser import WandbSettings
from lightning_dlrm.cli.trust import admit_file, trust_options
from lightning_dlrm.compare.anatomy import anatomy, measure_steps
from lightning_dlrm.compare.experiment import (
    EXPECTED,
    PlannedArm,
    check_configurations,
    chooses_network,
    how_to_write,
    is_experiment,
    keep_configurations,
    plan_arms,
    read_experiment,
)
from lightning_dlrm.compare.figures import draw_all
from lightning_dlrm.compare.options import Split, make_parser
from lightning_dlrm.compare.processes import Job, device_environments, run_jobs
from lightning_dlrm.compare.ranking import answer, title_of
from lightning_dlrm.compare.report import arms_table, closing_words, page_of, write_report
from lightning_dlrm.compare.results import check_data, compare, ranked
from lightning_dlrm.compare.runs import Arm, arms_of, read_run
from lightning_dlrm.compare.scores import (
    Samples,
    note_source,
    predict_command,
    read_scores,
    scoring_command,
    shared_samples,
)
from lightning_dlrm.compare.training_length import fallen, still_improving
from lightning_dlrm.contracts.disk import write_fault
from lightning_dlrm.contracts.errors import UserError, joined, nearest
from lightning_dlrm.contracts.terminal import command_after
from lightning_dlrm.tracking.dashboard import Dashboard, publish
from lightning_dlrm.tracking.run_folder import CONFIG, SUMMARY
from lightning_dlrm.tracking.wandb_mode import choose_mode
from lightning_dlrm.tracking.wandb_run import JOB_TYPE, ComparisonPage, RunPlace, send_comparison


def run(arguments: Sequence[str]) -> int:
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    options.seeds = None if options.seeds is None else _seeds(options.seeds)
    options.parallel = None if options.parallel is None else _positive(options.parallel)
    # Other options of an experiment are for its runs; without an experiment the rest are run folders.
    for option in (part.partition("=")[0] for part in rest if part.startswith("-")):
        meant = nearest(option, parser.option_names(), cutoff=0.8)
        if meant or not options.config:
            raise UserError(f"unknown option {option}{meant or '; compare --help lists them'}")
    for name in ("seeds", "discard_checkpoints"):
        if getattr(options, name) and not options.config:
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{option} without --config: it is for the runs of an experiment; leave it out, or give one"
            )
    if not (options.config or rest):
        raise UserError("nothing to compare: give run folders, or an experiment such as --config figure5.yaml")
    if options.output is None and not options.dry_run:
        raise UserError("compare needs a folder for its report: give --output DIR")
    output = Path(options.output or "")
    if options.config:
        return _run_experiment(options, rest, output)
    return _run_given([Path(path) for path in rest], options, output)


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds is {text}; expected whole numbers separated by commas, such as 1,2,3") from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--parallel is {text}; expected a whole number, 1 or more")
    return int(text)


# --- an experiment ----------------------------------------------------------------------------------


def _run_experiment(options: argparse.Namespace, rest: Sequence[str], output: Path) -> int:
    configs = [find_config(name) for name in options.config]
    for path in configs:
        admit_file(path, EXPECTED)
    experiments = [path for path in configs if is_experiment(path)]
    if not experiments:
        whole = [name for name, path in zip(options.config, configs, strict=True) if chooses_network(path)]
        raise UserError(f"{joined(options.config, 'and')}: expected an experiment; {how_to_write(whole)}")
    if len(experiments) > 1:
        raise UserError(f"{joined([path.name for path in experiments], 'and')} are experiments; give one of them")
    experiment = read_experiment(experiments[0], options.seeds)
    overlays = [str(path) for path in configs if path != experiments[0]]
    grouping = [] if options.group is None else ["--data.group", options.group]
    arms, notes = plan_arms(experiment, overlays, [*rest, *grouping])
    for note in notes:
        print(note)
    print(arms_table(arms, experiment.seeds))
    if options.output is not None:
        check_configurations(arms, output)
    if options.dry_run:
        return 0
    _make(output)
    files = keep_configurations(arms, output)
    arms[0].built.datamodule.prepare_data()
    group = f"{experiment.name}-{output.resolve().name}"
    names = {(arm.name, seed): f"{arm.name}-{seed}" for arm in arms for seed in experiment.seeds}
    # Seed by seed, so that an interrupted experiment has all arms of the first seeds.
    every_job = [
        _job(arm, seed, names[arm.name, seed], files[arm.name], output, options.split, group)
        for seed in experiment.seeds
        for arm in arms
    ]
    jobs = [job for job in every_job if job.commands]

    def scored(job: Job) -> None:
        note_source(read_run(job.run), options.split, _scores(output, job.name))
        if options.discard_checkpoints:
            shutil.rmtree(job.run / "checkpoints", ignore_errors=True)

    before = len(names) - len(jobs)
    state = f"{len(names)} runs, {before} of them finished before" if jobs else f"all {len(names)} runs are finished"
    print(f"{state}; their output: {output / 'logs'}")
    run_jobs(jobs, device_environments(options.parallel, _gpus(arms)), scored)
    finished = [
        Arm(name=arm.name, runs=[read_run(output / "runs" / names[arm.name, seed]) for seed in experiment.seeds])
        for arm in arms
    ]
    samples = shared_samples([run for arm in finished for run in arm.runs], options.split, options.group)
    page = _report(finished, samples, options, output)
    print(_to_wandb(page, arms[0].document["wandb"] | {"group": group}, output, runs_too=True))
    return 0


def _job(arm: PlannedArm, seed: int, name: str, config: Path, output: Path, split: Split, group: str) -> Job:
    run, scores = output / "runs" / name, _scores(output, name)
    samples = 0.0
    if (run / SUMMARY).is_file():
        scoring = scoring_command(read_run(run), split, scores)
        commands = [] if scoring is None else [scoring]
    else:
        samples = arm.samples
        fit = [
            "fit", "--config", str(config), "--seed_everything", str(seed), "--run_dir", str(run), "--resume", "auto",
            "--wandb.group", group, "--wandb.name", name, "--wandb.tags", f"[{arm.name}]", *trust_options(),
        ]  # fmt: skip
        commands = [fit, predict_command(run, split, scores)]
    return Job(
        name=name,
        commands=commands,
        run=run,
        log=output / "logs" / f"{name}.log",
        samples=samples,
        scored=arm.schema.splits[split].rows if split in arm.schema.splits else 0,
    )


def _scores(output: Path, name: str) -> Path:
    return output / "scores" / name


def _gpus(arms: Sequence[PlannedArm]) -> list[str]:
    """Return the GPUs for the runs; an empty list if a run uses no GPU or several."""
    trainer: Any = arms[0].built.settings.trainer
    if trainer.accelerator not in ("auto", "gpu", "cuda") or str(trainer.devices) not in ("1", "auto"):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return visible.split(",")[:count] if visible else [str(index) for index in range(count)]


# --- finished runs -------------------------------------------------------------------------------------


def _run_given(paths: Sequence[Path], options: argparse.Namespace, output: Path) -> int:
    files = [str(path) for path in paths if path.suffix in (".yaml", ".yml")]
    if files:
        raise UserError(f"{joined(files, 'and')}: expected folders of finished fits; {how_to_write(files)}")
    for path in paths:
        if sum(path.resolve() == other.resolve() for other in paths) > 1:
            raise UserError(f"the run {path} is given twice; give each run once")
    runs = [read_run(path, name) for path, name in zip(paths, _run_names(paths), strict=True)]
    for run in runs:
        admit_file(run.path / CONFIG)
    warnings = check_data(runs, options.force)
    arms = arms_of(runs)
    if len(arms) < 2:
        found = "only one run is given" if len(runs) == 1 else f"the {len(runs)} runs given are of one configuration"
        raise UserError(f"{found}; give runs of at least two configurations to compare")
    print("configurations and their runs:")
    for arm in arms:
        print(f"  {arm.name}: {', '.join(run.name for run in arm.runs)}")
    commands = [scoring_command(run, options.split, _scores(output, run.name)) for run in runs]
    samples = shared_samples(runs, options.split, options.group)
    if options.dry_run:
        return 0
    _make(output)
    jobs = [
        Job(
            name=run.name,
            commands=[command],
            run=run.path,
            log=output / "logs" / f"{run.name}.log",
            scored=len(samples[run.final["data_fingerprint"]].labels),
        )
        for run, command in zip(runs, commands, strict=True)
        if command is not None
    ]
    by_name = {run.name: run for run in runs}

    def scored(job: Job) -> None:
        note_source(by_name[job.name], options.split, _scores(output, job.name))

    if jobs:
        print(f"scoring {len(jobs)} of {len(runs)} runs on their {options.split} split")
        run_jobs(jobs, device_environments(options.parallel, []), scored)
    page = _report(arms, samples, options, output, warnings)
    places = [dataclasses.asdict(WandbSettings()) | run.config["wandb"] for run in runs]
    if any(place[key] != places[0][key] for place in places for key in ("project", "entity", "group")):
        print("W&B: no page for this comparison, because its runs belong to several projects or groups")
    else:
        print(_to_wandb(page, places[0], output))
    return 0


def _run_names(paths: Sequence[Path]) -> list[str]:
    """Return the names of the run folders; equal names have as many of the folders above them as tell them apart.

    >>> _run_names([Path("one/runs/dlrm-1"), Path("two/runs/dlrm-1"), Path("two/runs/dcn-1")])
    ['one-runs-dlrm-1', 'two-runs-dlrm-1', 'dcn-1']
    """
    parts = [path.resolve().parts for path in paths]
    names = [of_path[-1] for of_path in parts]
    for depth in range(2, max(map(len, parts)) + 1):
        names = [
            name if names.count(name) == 1 else "-".join(of_path[-depth:])
            for name, of_path in zip(names, parts, strict=True)
        ]
    return names


# --- report -------------------------------------------------------------------------------------------


def _report(
    arms: Sequence[Arm],
    samples: Mapping[str, Samples],
    options: argparse.Namespace,
    output: Path,
    warnings: Sequence[str] = (),
) -> ComparisonPage:
    """Compare the scored runs, write the report, print the result, and return the comparison's W&B page."""
    runs = [run for arm in arms for run in arm.runs]
    scores = {run.name: read_scores(_scores(output, run.name), samples[run.final["data_fingerprint"]]) for run in runs}
    comparison = compare(
        arms,
        scores,
        title=title_of(arms),
        split=options.split,
        warnings=warnings,
        experiment=bool(options.config),
    )
    anatomies = {arm.name: anatomy(arm.runs[0]) for arm in arms}
    print("all runs are scored: drawing the report", file=sys.stderr, flush=True)
    try:
        steps = measure_steps(ranked(comparison), anatomies, output / "operators.json")
        pictures = draw_all(comparison, anatomies, steps, output / "figures")
    except KeyboardInterrupt:
        print("interrupted: no report is written; the same command continues", file=sys.stderr)
        raise
    html, document = output / "report.html", output / "report.json"
    write_report(comparison, pictures, anatomies, steps, html)
    found = {
        "answer": " ".join(answer(comparison)),
        "still_improving": [dataclasses.asdict(one) for one in still_improving(comparison)],
        "best_early": [dataclasses.asdict(one) for one in fallen(comparison)],
        **comparison.document(),
    }
    document.write_text(json.dumps(found, indent=1) + "\n")
    print(closing_words(comparison, output))
    return page_of(comparison, pictures, anatomies, steps.shown, [html, document])


def _to_wandb(page: ComparisonPage, settings: Mapping[str, Any], output: Path, runs_too: bool = False) -> str:
    """Log the comparison as a run of the same group, and, if W&B is online, save a workspace and a report.

    Args:
        page: page of the comparison.
        settings: W&B settings of the runs: project, entity, group and mode.
        output: folder of the comparison.
        runs_too: whether the runs are in the same folder, and may be offline too.

    Returns:
        The addresses, or the commands that send everything to W&B.
    """
    mode, reason = choose_mode(settings["mode"])
    if mode == "disabled":
        return "W&B: disabled"
    project, entity, group = settings["project"], settings["entity"], settings["group"]
    place = RunPlace(project=project, entity=entity, group=group, name=output.resolve().name, job_type=JOB_TYPE)
    where, reason = send_comparison(page, output, place, mode, reason)
    # An experiment's runs are tagged with their arms.
    by_tag = " --by-tag" * runs_too
    later = f"python -m lightning_dlrm dashboard --project {project} --group {group} --comparison{by_tag}"
    if reason:
        sent = f"{output / 'runs/*/wandb/offline-run-*'} " if runs_too else ""
        sync = f"wandb sync {sent}{output / 'wandb/offline-run-*'}"
        lines = [command_after(f"W&B: offline ({reason}); send it with:", sync)]
        if group is not None:
            lines.append(command_after("then, for a workspace and a report there:", later))
        return "\n".join(lines)
    lines = [f"W&B comparison: {where}"]
    if group is None:
        return lines[0]
    try:
        saved = publish(
            Dashboard(
                project=project,
                entity=entity or "",
                group=group,
                findings=page.findings,
                comparison=True,
                by_tag=runs_too,
            )
        )
        lines += [f"W&B {name}: {address}" for name, address in saved.items()]
    except UserError as error:
        # The report is written; a missing page at W&B must not fail the command.
        lines.append(command_after(f"W&B: no workspace and no report ({error}); later:", later))
    return "\n".join(lines)


def _make(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(write_fault(output, error, "another --output")) from error
