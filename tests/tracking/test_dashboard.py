"""Contract: the dashboard as code shows what runs log, under the names they log it by, and is saved where there is a
server that takes it; else one clear line says what is missing."""

import json
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import wandb_workspaces.reports.v2 as wr

from lightning_dlrm.__main__ import main
from lightning_dlrm.tracking import names
from lightning_dlrm.tracking import panels as drawn_panels
from lightning_dlrm.tracking.dashboard import Dashboard
from lightning_dlrm.tracking.panels import build_report, build_workspace

SECTIONS = ["quality", "training", "norms", "speed", "system", "GPUs", "parallel"]


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def spec(built: Any) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(built._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
    return document


def panels_of(workspace: Any) -> dict[str, list[dict[str, Any]]]:
    sections = spec(workspace)["section"]["panelBankConfig"]["sections"]
    return {section["name"]: [panel["config"] for panel in section["panels"]] for section in sections}


def test_the_workspace_shows_the_runs_of_the_group_over_samples() -> None:
    workspace = build_workspace(Dashboard(project="p", entity="me", group="figure 5"))
    panels = panels_of(workspace)
    assert list(panels) == SECTIONS
    whole = spec(workspace)["section"]
    (condition,) = whole["runSets"][0]["filters"]["filters"]
    assert (condition["key"]["name"], condition["value"]) == ("group", "figure 5")
    assert whole["settings"]["xAxis"] == "samples"
    assert {panel["xAxis"] for panel in panels["training"] if "xAxis" in panel} == {"samples"}
    # A sentence opens each section.
    assert all(len(panels[0]["value"]) > 30 for panels in panels.values())
    drawn = [metric for panel in panels["quality"] for metric in panel.get("metrics", [])]
    assert drawn[: len(names.METRICS)] == [f"validation/{metric}" for metric in names.METRICS]


def test_every_panel_names_its_unit() -> None:
    """On its axis, or in the title of panels whose axes W&B names itself."""
    for section, drawn in drawn_panels.panels_of(Dashboard(project="p")).items():
        for panel in drawn:
            if isinstance(panel, wr.LinePlot):
                assert panel.title_x and panel.title_y, (section, panel.title)
            elif isinstance(panel, wr.BarPlot):
                assert panel.title_x, (section, panel.title)
            else:
                title = panel.chart_strings["title"] if isinstance(panel, wr.CustomChart) else panel.title
                assert re.search("FLOPs per sample|from 0 to 1", title), (section, title)


def test_every_metric_that_is_drawn_is_one_that_runs_have() -> None:
    """So that a renamed metric cannot leave an empty panel."""
    ours = {value for value in vars(names).values() if isinstance(value, str)}
    ours |= {f"{stage}/{metric}" for stage in ("train", "validation") for metric in names.METRICS}
    ours |= set(names.amounts_in_gib(dict.fromkeys(ours, 2**30)))
    for section, panels in panels_of(build_workspace(Dashboard(project="p", entity="me"))).items():
        for panel in panels:
            drawn = [*panel.get("metrics", []), *(panel[axis] for axis in ("xAxis", "yAxis") if axis in panel)]
            for metric in drawn:
                bare = re.sub(r"^summary_metrics\.|^config\.|^summary:|^config:|\.value$|\.max$", "", metric)
                bare = re.sub(r"^(config|summary)[.:]|\.value$", "", bare)
                assert bare in ours or bare == "_runtime" or bare.startswith("system/"), (section, metric)
            if pattern := panel.get("metricRegex"):
                assert pattern.removesuffix("/.*") in ours or pattern.startswith("system/")


def test_both_show_what_a_comparison_logs() -> None:
    """Its figures, the operators' stacked bar, parameters and load of each rank among them, and their numbers."""
    board = Dashboard(project="p", entity="me", group="g", comparison=True)
    sections = panels_of(build_workspace(board))
    shown = sections["comparison"] + sections["parallel"]
    figures = [key for panel in shown for key in panel.get("mediaKeys", [])]
    # The load of each rank, which few comparisons have, is not in the section that opens.
    names_shown = [*(name for name in names.COMPARISON_FIGURES if name != "load"), "load"]
    assert figures == [names.comparison_figure(name) for name in names_shown]
    assert "comparison/load" not in json.dumps(sections["comparison"])
    for text in (json.dumps(shown), json.dumps(spec(build_report(replace(board, entity=""))))):
        for name in names.COMPARISON_TABLES:
            assert f'"{names.comparison_table(name)}"' in text
            # The panel of a table has no title: the panel before it is one.
            assert text.index(f"**{names.COMPARISON_TABLES[name]}**") < text.index(f'"{names.comparison_table(name)}"')
        for key in figures:
            assert f'"mediaKeys": ["{key}"]' in text


def test_the_report_opens_with_the_findings() -> None:
    report = build_report(
        Dashboard(project="p", group="g", findings=["dcn is better than dlrm by AUC: 0.00100 higher."], comparison=True)
    )
    text = json.dumps(spec(report))
    assert (
        text.index("dcn is better than dlrm")
        < text.index("Comparison")
        < text.index("Quality")
        < text.index("Parallel")
    )
    assert text.count('"panel-grid"') == len(SECTIONS) + 2


def test_runs_with_equal_tags_are_drawn_as_their_mean_and_range() -> None:
    panels = panels_of(build_workspace(Dashboard(project="p", by_tag=True)))
    lines = [panel for section in panels.values() for panel in section if "xAxis" in panel and "yAxis" not in panel]
    assert len(lines) > 10
    for panel in lines:
        assert (panel["groupBy"], panel["groupAgg"], panel["groupArea"]) == ("tags", "mean", "minmax")


def test_a_page_shows_the_dashboard_without_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "board.html"
    options = ["--project", "p", "--entity", "ads-team", "--group", "g", "--comparison"]
    assert main(["dashboard", *options, "--output", str(path)]) == 0
    html = path.read_text()
    heads = ("<h1>Outline of the dashboard of p: g</h1>", "<h2>Comparison</h2>", "<span>lines: ", "<span>bars: ")
    for words in (
        *heads,
        "the group g in the project p of\nads-team:",
        "validation AUC",
        "validation/log_loss",
        "by runs with <code>--log_norms true</code> only",
        "GiB",
        "gpu.N.gpu",
    ):
        assert words in html
    titles = re.findall("<strong>(.*?)</strong>", html)
    assert {*names.COMPARISON_FIGURES.values(), *names.COMPARISON_TABLES.values()} <= set(titles)
    # Titles are phrases, not names.
    assert len(set(titles)) == len(titles) and "table" not in titles and "figure" not in titles
    assert not [title for title in titles if "_" in title or "comparison/" in title]
    assert "\\" not in html and ".*" not in html and "bytes" not in html
    assert main(["dashboard", "--output", str(tmp_path / "no/board.html")]) == 2
    assert "choose another --output" in capsys.readouterr().err


def test_without_a_key_one_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dashboard", "--project", "p"]) == 2
    error = capsys.readouterr().err
    assert "no API key" in error and "wandb login" in error and len(error.splitlines()) == 1


def test_a_group_that_cannot_be_filtered_by_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dashboard", "--group", "it's"]) == 2
    assert "quotes" in capsys.readouterr().err


class _Server(BaseHTTPRequestHandler):
    """As much of a W&B server as saving needs."""

    refuses = False
    saved: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        asked = json.loads(body) if body.startswith(b"{") else {"query": ""}
        query, variables = asked["query"], asked.get("variables") or {}
        data: dict[str, Any] = {}
        if "viewer" in query:
            data["viewer"] = {"id": "VXNlcjox", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
        if "internalId" in query:
            data["project"] = {"internalId": "UHJvamVjdDox"}
        if "GetProjects" in query:
            node = {"id": "1", "name": "p", "entityName": "me", "createdAt": "2026-01-01", "isBenchmark": False}
            page = {"endCursor": None, "hasNextPage": False}
            data["models"] = {"edges": [{"node": node | {"user": None}, "cursor": "1"}], "pageInfo": page}
        if "upsertView" in query:
            self.saved.append(variables)
            view = {"id": "VjE=", "name": "nw-1-v", "displayName": "t", "description": "", "type": variables["type"]}
            view |= {"spec": variables["spec"], "project": {"id": "1", "name": "p", "entityName": "me"}, "user": None}
            data["upsertView"] = {"view": view | {"updatedAt": None, "createdAt": None}, "inserted": True}
        refused = self.refuses and "upsertView" in query
        answer = json.dumps({"errors": [{"message": "permission denied"}]} if refused else {"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Server]]:
    handler = type("Handler", (_Server,), {"saved": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{running.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        yield handler
        running.shutdown()
        thread.join()


def test_both_are_saved_at_the_server(server: type[_Server], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dashboard", "--project", "p", "--group", "g"]) == 0
    assert [(view["type"], view["entityName"], view["displayName"]) for view in server.saved] == [
        ("project-view", "me", "p: g"),
        ("runs", "me", "p: g"),
    ]
    told = capsys.readouterr().out
    assert re.search(r"workspace +http://127.0.0.1:\d+/me/p\?nw=", told)
    assert re.search(r"report +http://127.0.0.1:\d+/me/p/reports/", told)


def test_a_refusal_is_one_line(server: type[_Server], capsys: pytest.CaptureFixture[str]) -> None:
    server.refuses = True
    assert main(["dashboard", "--project", "p"]) == 2
    assert "error: W&B refuses the dashboard of p (" in capsys.readouterr().err
