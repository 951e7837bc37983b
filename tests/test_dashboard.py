"""The dashboard in a real browser, and asv's configuration on a history made up for it. No speed is asserted."""

import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import SOURCES, environment
from needs import need

from benchmarks.dashboard import __main__ as dashboard
from fastlstm.bench.cases import CASES

ROOT = Path(__file__).parents[1]
COMMITS = 12
SLOWER = 8  # the first commit with the lasting regression
MACHINE = {
    "machine": "2-core-avx512",
    "cpu": "Some CPU",
    "num_cpu": "2",
    "ram": "24GB",
    "os": "Linux",
    "arch": "x86_64",
}
REGRESSION = "forward.Forward.time_forward('b256', '1')"


# A history


def value(name, params, commit):
    """Return what a benchmark gave at a commit: some number of its own, with 1% of noise, and what happened to it."""
    draw = random.Random(f"{name}{params}{commit}")
    if name.startswith("machine."):
        return float(params != ("tbb",))
    if "Training" in name or name.startswith("backward."):
        return math.nan  # skipped
    number = random.Random(f"{name}{params}").uniform(1, 50) * draw.uniform(0.99, 1.01)
    if f"{name}({', '.join(map(repr, params))})" == REGRESSION and commit >= SLOWER:
        number *= 1.1
    if name == "forward.Stream.time_step" and commit == 4:  # once: a neighbour on the machine
        number *= 1.3
    if name in ("reference.Forward.track_speedup", "peak.Share.track_share") and commit >= 6:  # an improvement
        number *= 1.2
    return number


def make_repository(folder):
    """Make a repository of empty commits, a day apart, and return their hashes."""
    git = ["git", "-C", str(folder), "-c", "user.name=name", "-c", "user.email=name@localhost"]
    subprocess.run([*git, "init", "--quiet", "--initial-branch=main"], check=True)
    for number in range(COMMITS):
        date = f"2026-01-{number + 1:02}T12:00:00Z"
        dates = environment(GIT_AUTHOR_DATE=date, GIT_COMMITTER_DATE=date)
        subprocess.run(
            [*git, "commit", "--quiet", "--allow-empty", f"--message=number {number}"], env=dates, check=True
        )
    done = subprocess.run([*git, "log", "--reverse", "--format=%H"], capture_output=True, text=True, check=True)
    return done.stdout.split()


def discover(folder):
    """Return the suite as asv discovers it."""
    from asv.runner import BENCHMARK_RUN_SCRIPT

    out = folder / "discovered.json"
    command = [sys.executable, str(BENCHMARK_RUN_SCRIPT), "discover", str(ROOT / "benchmarks"), str(out)]
    subprocess.run(command, env=environment(ASV_PYTHONPATH=str(SOURCES)), check=True, timeout=300)
    return json.loads(out.read_text(encoding="utf-8"))


def read_config():
    from asv.util import load_json

    return load_json(str(ROOT / "asv.conf.json"), 1, js_comments=True)


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    need("asv", find_spec("asv"), "pip install 'fastlstm[bench]'")
    return discover(tmp_path_factory.mktemp("suite"))


@pytest.fixture(scope="module")
def config(suite, tmp_path_factory):
    """A folder with a history: a repository, results at each of its commits, the project's configuration."""
    from asv.benchmarks import Benchmarks
    from asv.machine import Machine
    from asv.results import Results
    from asv.runner import BenchmarkResult
    from asv.util import write_json

    folder = tmp_path_factory.mktemp("history")
    changed = {"repo": str(folder), "results_dir": str(folder / "results"), "env_dir": str(folder / "env")}
    write_json(str(folder / "asv.conf.json"), read_config() | changed, 1)
    write_json(str(folder / "results" / MACHINE["machine"] / "machine.json"), MACHINE, Machine.api_version)
    by_name = {benchmark["name"]: benchmark for benchmark in suite}
    write_json(str(folder / "results" / "benchmarks.json"), by_name, Benchmarks.api_version)
    for number, commit in enumerate(make_repository(folder)):
        versions = {"numba": "0.68.1", "numpy": "2.2.6"}
        date = 1000 * (1767268800 + 86400 * number)
        results = Results(MACHINE | {"python": "3.11"} | versions, versions, commit, date, "3.11", "environment", {})
        for name, benchmark in by_name.items():
            chosen = itertools.product(*([eval(text) for text in axis] for axis in benchmark["params"]))
            values = [value(name, params, number) for params in chosen]
            nothing = [None] * len(values)
            results.add_result(benchmark, BenchmarkResult(values, nothing, nothing, 0, "", None))
        results.save(str(folder / "results"))
    return folder / "asv.conf.json"


@pytest.fixture(scope="module")
def packages():
    """The npm packages, installed."""
    try:
        return dashboard.install_packages()
    except dashboard.DashboardError as error:
        return need("npm", False, str(error))


@pytest.fixture(scope="module")
def peers():
    """The comparison with other libraries, as if one of them had not been installed."""
    recorded = json.loads((ROOT / "benchmarks" / "peers.json").read_text(encoding="utf-8"))
    return recorded | {"not_installed": ["Some Library"]}


@pytest.fixture(scope="module")
def built(config, packages, peers, tmp_path_factory):
    """The folder of the dashboard of that history."""
    folder = tmp_path_factory.mktemp("dashboard")
    path = config.parent / "peers.json"
    path.write_text(json.dumps(peers), encoding="utf-8")
    assert dashboard.main(["build", "--config", str(config), "--folder", str(folder), "--peers", str(path)]) == 0
    return folder


# asv's configuration


def test_regressions_page_has_what_lasts_and_nothing_else(built, config):
    found = json.loads((built / "asv" / "regressions.json").read_text(encoding="utf-8"))["regressions"]
    assert [regression[0] for regression in found] == [REGRESSION]
    _, _, _, _, last, best, jumps = found[0]
    assert last / best == pytest.approx(1.1, abs=0.02)
    assert [after for _, after, _, _ in jumps] == [SLOWER]


def test_benchmarks_run_in_fresh_processes():
    # A fork of a process that has imported fastlstm runs on one thread.
    pytest.importorskip("asv")
    assert read_config()["launch_method"] == "spawn"


def test_pinned_versions_are_those_the_package_allows():
    pytest.importorskip("asv")
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    pins = {name: versions for name, versions in read_config()["matrix"]["req"].items()}
    wanted = {needed.name: needed.specifier for needed in map(Requirement, requires("fastlstm")) if not needed.marker}
    assert {"numba", "numpy"} <= pins.keys()
    for name, versions in pins.items():
        assert len(versions) == 1
        assert wanted[name].contains(versions[0]) if name in wanted else versions[0]


# The commands


def test_missing_npm_is_said_and_exits_2(built, config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dashboard, "HERE", tmp_path)
    (tmp_path / "package-lock.json").touch()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert dashboard.main(["build", "--config", str(config), "--folder", str(tmp_path)]) == 2
    assert capsys.readouterr() == (
        "",
        "dashboard: npm is not installed: it comes with Node.js (on Debian: apt-get install npm)\n",
    )


def test_missing_chromium_is_said_and_exits_2(built, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert dashboard.main(["screenshots", "--folder", str(built)]) == 2
    assert capsys.readouterr() == ("", "dashboard: Chromium is not installed (on Debian: apt-get install chromium)\n")


@pytest.mark.parametrize("action", ["serve", "screenshots"])
def test_missing_dashboard_is_said_and_exits_2(action, tmp_path, capsys):
    assert dashboard.main([action, "--folder", str(tmp_path)]) == 2
    assert "python -m benchmarks.dashboard build" in capsys.readouterr().err


def test_missing_results_are_said_and_exit_2(packages, config, tmp_path, capsys):
    changed = json.loads(config.read_text(encoding="utf-8")) | {"results_dir": str(tmp_path / "none")}
    path = tmp_path / "asv.conf.json"
    path.write_text(json.dumps(changed), encoding="utf-8")
    assert dashboard.main(["build", "--config", str(path), "--folder", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("dashboard: asv publish failed: ")


def test_page_that_loads_something_else_is_refused(packages, tmp_path):
    (tmp_path / "index.html").write_text(
        '<head><script src="https://host/new.min.js"></script></head>', encoding="utf-8"
    )
    with pytest.raises(dashboard.DashboardError, match=r"new\.min\.js"):
        dashboard.make_local(tmp_path, packages)


def test_result_names_no_path(built):
    for path in [built / "data.js", built / "asv" / "files.js"]:
        text = path.read_text(encoding="utf-8")
        assert str(ROOT) not in text
        assert str(Path.home()) not in text


# The pages, in Chromium


@pytest.fixture(scope="module")
def chromium(built):
    need("playwright", find_spec("playwright"), "pip install 'fastlstm[bench]'")
    need("chromium", dashboard.find_chromium(), "on Debian: apt-get install chromium")
    with dashboard.browser() as browser:
        yield browser


@contextmanager
def visit(chromium, address):
    """Open a page; at the end nothing may have gone wrong or have been asked of another machine."""
    page = chromium.new_page(viewport={"width": 1200, "height": 900})
    wrong, asked = [], []
    page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(request.url))
    page.on("request", lambda request: asked.append(request.url))
    page.set_default_timeout(30_000)
    page.goto(address)
    yield page
    page.close()
    assert wrong == []
    assert len(asked) > 5
    assert [url for url in asked if not url.startswith(("file:", "data:", "http://127.0.0.1:"))] == []


COLOURED = """(canvas) => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let count = 0;
  for (let i = 0; i < data.length; i += 4) {
    const [lowest, , highest] = [data[i], data[i + 1], data[i + 2]].sort((a, b) => a - b);
    count += data[i + 3] > 100 && highest - lowest > 60;
  }
  return count;
}"""


def coloured(page, selector):
    """Return how many pixels of a canvas have a colour: those of the curves, for frame and text are grey."""
    return page.locator(selector).first.evaluate(COLOURED)


def series(page):
    """Return the labels of the curves of the graph."""
    return page.evaluate(
        "$('#main-graph').data('plot').getData().filter((one) => one.data.length).map((one) => one.label)"
    )


def test_front_page(chromium, built, peers):
    with visit(chromium, f"{built.as_uri()}/index.html") as page:
        lines = page.locator("#history-chart g[aria-label=line] path")
        assert lines.count() == 3
        for line in lines.all():
            assert line.get_attribute("d").count("L") + line.get_attribute("d").count("C") >= 1
            assert line.bounding_box()["width"] > 500
        assert page.locator("#history-chart g[aria-label=dot] circle").count() == 3 * COMMITS
        before = lines.first.get_attribute("d")
        page.select_option("#threads", "1")
        page.select_option("#threads", "all")
        assert lines.first.get_attribute("d") != before
        page.select_option("#group", "throughput")
        assert lines.count() == sum(case.regime == "throughput" for case in CASES)
        rated = [entry for entry in peers["results"] if entry["ratio"]]
        dots = page.locator("#comparisons g[aria-label=dot] circle")
        assert dots.count() == len(rated) + len(peers["geometric_means"])
        assert page.locator("#comparisons table tr", has_text="b256").count() == 2
        assert page.get_by_text("Not installed: Some Library").is_visible()
        assert page.locator("#machine-table").inner_text().count(MACHINE["machine"]) == 1
        assert page.locator("#regressions").inner_text() == "Regressions (1)"
        page.click("#regressions")
        page.wait_for_selector("#regressions-body td")


def test_summary_grid(chromium, built, suite):
    with visit(chromium, f"{built.as_uri()}/asv/index.html") as page:
        page.wait_for_selector(".benchmark-plot canvas")
        assert page.locator(".benchmark-container").count() == len(suite)
        page.locator("#summarygrid-forward\\.Forward\\.time_forward").scroll_into_view_if_needed()
        assert coloured(page, "#summarygrid-forward\\.Forward\\.time_forward canvas") > 100
        page.click("text=Front page")
        page.wait_for_selector("#history-chart svg")


def test_graph_and_its_parameters(chromium, built):
    address = f"{built.as_uri()}/asv/index.html#forward.Forward.time_forward"
    with visit(chromium, address) as page:
        page.wait_for_selector("#main-graph canvas.flot-base")
        assert len(series(page)) == 8  # asv draws no more at first: those of eight cases with one thread
        before = coloured(page, "#main-graph canvas.flot-base")
        assert before > 1000
        page.click("#graphdisplay-navigation-params a:text-is('all')")
        page.wait_for_function("$('#main-graph').data('plot').getData().length > 8")
        assert {label.partition("threads-")[2] for label in series(page)} == {"1", "all"}
        assert coloured(page, "#main-graph canvas.flot-base") > before
        page.click("#log-scale")
        page.click("#nav-li-summarylist a")
        page.wait_for_selector("#summarylist-body td")


def test_regressions_page(chromium, built):
    with visit(chromium, f"{built.as_uri()}/asv/index.html#/regressions") as page:
        page.wait_for_selector("#regressions-body td")
        rows = page.locator("#regressions-body tbody tr", has_text="x").all_inner_texts()
        assert len(rows) == 1
        assert REGRESSION in rows[0]
        page.click(f'text="{REGRESSION}"')
        page.wait_for_selector("#main-graph canvas.flot-base")
        assert len(series(page)) == 1
        assert coloured(page, "#main-graph canvas.flot-base") > 500


def test_served_dashboard_draws_the_same(chromium, built):
    command = [sys.executable, "-m", "benchmarks.dashboard", "serve", "--port", "0", "--folder", str(built)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment(), **pipes) as server:
        try:
            address = server.stdout.readline().strip()
            assert address.startswith("http://127.0.0.1:")
            with visit(chromium, f"{address}asv/index.html#forward.Forward.time_forward") as page:
                page.wait_for_selector("#main-graph canvas.flot-base")
                assert coloured(page, "#main-graph canvas.flot-base") > 1000
        finally:
            server.kill()


def test_dashboard_of_what_asv_has_measured(chromium):
    folder = os.environ.get("FASTLSTM_DASHBOARD")
    if folder is None:
        pytest.skip("FASTLSTM_DASHBOARD names no dashboard of a run of asv over two commits")
    front = Path(folder).resolve().as_uri()
    with visit(chromium, f"{front}/index.html") as page:
        assert page.locator("#history-chart g[aria-label=line] path").first.bounding_box()["width"] > 300
        assert "float32" in page.locator("#machine-table").inner_text()
    with visit(chromium, f"{front}/asv/index.html#forward.Forward.time_forward") as page:
        page.wait_for_selector("#main-graph canvas.flot-base")
        assert "case-short" in "".join(series(page))
        assert coloured(page, "#main-graph canvas.flot-base") > 500
