"""The dashboard: asv's pages and a front page, in one folder that opens anywhere, without a network.

``python -m benchmarks.dashboard build`` makes it, ``serve`` shows it to browsers on this machine, ``screenshots`` takes
the two pictures of the README. It needs the extra ``bench`` and npm; the pictures need Chromium.
"""

from __future__ import annotations

import argparse
import ast
import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastlstm.bench import report
from fastlstm.bench.cases import CASES

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

# What asv's pages load from public servers, and the file of an npm package that has it.
VENDOR = {
    "jquery-3.3.1.min.js": "jquery/dist/jquery.min.js",
    "jquery.flot.min.js": "flot/jquery.flot.js",
    "jquery.flot.time.min.js": "flot/jquery.flot.time.js",
    "jquery.flot.selection.min.js": "flot/jquery.flot.selection.js",
    "jquery.flot.categories.min.js": "flot/jquery.flot.categories.js",
    "jquery.flot.orderBars.js": "flot-orderbars/js/jquery.flot.orderBars.js",
    "stupidtable.min.js": "stupid-table-plugin/stupidtable.min.js",
    "md5.min.js": "blueimp-md5/js/md5.min.js",
    "bootstrap.min.js": "bootstrap/dist/js/bootstrap.min.js",
    "bootstrap.min.css": "bootstrap/dist/css/bootstrap.min.css",
}
FRONT_VENDOR = ["d3/dist/d3.min.js", "@observablehq/plot/dist/plot.umd.min.js"]
SPEEDUPS = {"reference.Forward.track_speedup": "Inference", "reference.Training.track_speedup": "Training step"}
FEATURE, LAYER = "machine.Feature.track_feature", "machine.ThreadingLayer.track_threading_layer"
MODES = {"infer": "Inference", "train": "Training step"}


class DashboardError(Exception):
    """What the user must do first."""


def install_packages() -> Path:
    """Install the npm packages of the lock file, unless they are there, and return their folder."""
    modules = HERE / "node_modules"
    installed, locked = modules / ".package-lock.json", HERE / "package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < locked.stat().st_mtime:
        npm = shutil.which("npm")
        if npm is None:
            raise DashboardError("npm is not installed: it comes with Node.js (on Debian: apt-get install npm)")
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
        if done.returncode:
            raise DashboardError(f"npm could not install the packages: {last_line(done.stderr)}")
    return modules


def last_line(text: str) -> str:
    """Return the last line that is not empty."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "it gave no reason")


def publish(config: Path, folder: Path) -> None:
    """Have asv make its pages in a folder."""
    if find_spec("asv") is None or find_spec("markdown_it") is None:
        raise DashboardError("asv is not installed: pip install 'fastlstm[bench]'")
    command = [sys.executable, "-m", "asv", "publish", "--no-pull", "--config", str(config), "--html-dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DashboardError(f"asv publish failed: {last_line(done.stdout + done.stderr)}")


def make_local(folder: Path, modules: Path) -> None:
    """Put beside asv's pages what they load from elsewhere and their JSON as a script; link them to the front page."""

    def local(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in VENDOR:
            raise DashboardError(f"asv's pages load {name}, which is not among the packages of the dashboard")
        (folder / "vendor").mkdir(exist_ok=True)
        shutil.copy(modules / VENDOR[name], folder / "vendor" / name)
        return f'{match["attribute"]}="vendor/{name}"'

    files = {
        path.relative_to(folder).as_posix(): json.loads(path.read_text(encoding="utf-8"))
        for path in folder.rglob("*.json")
    }
    (folder / "files.js").write_text(f"const asvFiles = {json.dumps(files)};\n", encoding="utf-8")
    shutil.copy(HERE / "offline.js", folder)
    page = folder / "index.html"
    html = page.read_text(encoding="utf-8")
    html = re.sub(r'(?P<attribute>src|href)="https://[^"]*/(?P<name>[^/"]+\.(?:js|css))"', local, html)
    html = re.sub(r' (?:integrity|crossorigin|referrerpolicy)="[^"]*"', "", html)
    scripts = '<script src="files.js"></script>\n    <script src="offline.js"></script>\n  </head>'
    html = html.replace("</head>", scripts, 1)
    html = html.replace('<li id="nav-li-"', '<li><a href="../index.html">Front page</a></li>\n\t<li id="nav-li-"', 1)
    if re.search(r"<(?:script|link)[^>]*://", html) or "Front page" not in html:
        raise DashboardError("asv's pages are not those this was written for: see make_local in benchmarks/dashboard")
    page.write_text(html, encoding="utf-8")


def read_results(config: Path) -> tuple[list[dict[str, Any]], list[list[Any]]]:
    """Return what asv has recorded: a value with its machine, commit and parameters each, and the machines' rows."""
    from asv.benchmarks import Benchmarks
    from asv.config import Config
    from asv.results import iter_results

    conf = Config.load(str(config))
    conf.results_dir = str(config.parent / conf.results_dir)
    known = Benchmarks.load(conf)
    values, machines = [], {}
    for results in sorted(iter_results(conf.results_dir), key=lambda results: results.date):
        own = []
        for name in results.get_result_keys(known):
            params = [[ast.literal_eval(value) for value in axis] for axis in known[name]["params"]]
            for chosen, value in zip(
                itertools.product(*params), results.get_result_value(name, known[name]["params"]), strict=True
            ):
                if value is not None and value == value:
                    own.append({"name": name, "params": chosen, "value": value})
        machine = results.params["machine"]
        values += [row | {"machine": machine, "commit": results.commit_hash} for row in own]
        machines[machine] = describe(results.params, own)  # the latest counts
    columns = list(machines.values())
    labels = dict.fromkeys(label for column in columns for label, text in column.items() if text)
    return values, [[label, [column[label] for column in columns]] for label in labels]


def describe(params: dict[str, str], values: list[dict[str, Any]]) -> dict[str, str]:
    """Return what is known of a machine, from a run on it."""
    found = {(row["name"], *row["params"]): row["value"] for row in values}
    yes = {name: [key[1] for key, value in found.items() if key[0] == name and value] for name in (FEATURE, LAYER)}
    lanes, threads = found.get(("machine.Machine.track_lanes",)), found.get(("machine.Machine.track_threads",))
    peaks = {count: found.get(("machine.Peak.track_peak", count)) for count in ("1", "all")}
    return {
        "name": params["machine"],
        "CPU": params.get("cpu", ""),
        "features": ", ".join(yes[FEATURE]),
        "vectors": f"{lanes:g} float32" if lanes else "",
        "threads": f"{threads:g}" if threads else "",
        "threading layer": ", ".join(yes[LAYER]),
        "peak": ", ".join(f"{peak:.0f} GFLOP/s with {count}" for count, peak in peaks.items() if peak),
        "memory": params.get("ram", ""),
        "system": params.get("os", ""),
        "versions": ", ".join(f"{name} {params[name]}" for name in ("python", "numba", "numpy") if params.get(name)),
    }


def history(values: list[dict[str, Any]], repository: Path) -> dict[str, Any]:
    """Return the speed-ups in the order of their commits, as front.js draws them."""
    values = [row for row in values if row["name"] in SPEEDUPS]
    hashes = list(dict.fromkeys(row["commit"] for row in values))
    return {
        "commits": [describe_commit(commit, repository) for commit in hashes],
        "values": [
            {
                "benchmark": row["name"],
                "machine": row["machine"],
                "commit": hashes.index(row["commit"]),
                "case": row["params"][0],
                "threads": row["params"][1],
                "speedup": row["value"],
            }
            for row in values
        ],
        "benchmarks": [[name, title] for name, title in SPEEDUPS.items() if any(row["name"] == name for row in values)],
        "machines": list(dict.fromkeys(row["machine"] for row in values)),
        "threads": list(dict.fromkeys(row["params"][1] for row in values)),
        "regimes": {case.name: case.regime for case in CASES},
    }


def describe_commit(commit: str, repository: Path) -> dict[str, str]:
    """Return the short hash, the day and the subject of a commit."""
    command = ["git", "-C", str(repository), "show", "--no-patch", "--format=%cs%n%s", commit]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    day, _, subject = done.stdout.strip().partition("\n")
    return {"hash": commit[:8], "date": day, "subject": subject}


def read_peers(paths: list[Path]) -> list[dict[str, Any]]:
    """Return the comparisons with other libraries: heading, results, and the table of the README."""
    from markdown_it import MarkdownIt

    peers = []
    for path in paths:
        result = json.loads(path.read_text(encoding="utf-8"))
        table = MarkdownIt().enable("table").render(report.markdown(result))
        drawn = {"results": result["results"], "means": result["geometric_means"], "engines": result["engines"]}
        peers.append({"title": MODES[result["mode"]], "table": table} | drawn)
    return peers


def build(config: Path, peers: list[Path], output: Path) -> None:
    """Make the dashboard in a folder, in place of what is there.

    Parameters
    ----------
    config : pathlib.Path
        asv's configuration.
    peers : list of pathlib.Path
        What ``benchmarks/peers.py --json`` wrote.
    output : pathlib.Path
        The folder.

    Raises
    ------
    DashboardError
        If something must be installed or measured first.
    """
    modules = install_packages()
    pages = output / "asv"
    publish(config, pages)
    make_local(pages, modules)
    values, machines = read_results(config)
    regressions = json.loads((pages / "regressions.json").read_text(encoding="utf-8"))["regressions"]
    data = {
        "history": history(values, config.parent),
        "machines": machines,
        "peers": read_peers(peers),
        "regressions": len(regressions),
    }
    (output / "data.js").write_text(f"const dashboard = {json.dumps(data)};\n", encoding="utf-8")
    (output / "vendor").mkdir(exist_ok=True)
    for name in FRONT_VENDOR:
        shutil.copy(modules / name, output / "vendor")
    for name in ("index.html", "front.js", "front.css"):
        shutil.copy(HERE / name, output)


def require_built(folder: Path) -> None:
    """Raise unless there is a dashboard in a folder."""
    if not (folder / "index.html").exists():
        raise DashboardError(f"there is no dashboard in {folder}: python -m benchmarks.dashboard build")


def serve(folder: Path, port: int) -> None:
    """Serve a folder to this machine alone, until interrupted; port 0 is any that is free."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        print(f"http://127.0.0.1:{server.server_port}/", flush=True)
        server.serve_forever()


def find_chromium() -> str | None:
    """Return the path of Chromium, None where it is not installed."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next(filter(None, map(shutil.which, names)), None)


@contextmanager
def browser() -> Iterator[Any]:
    """Start headless Chromium, driven by Playwright."""
    program = find_chromium()
    if program is None:
        raise DashboardError("Chromium is not installed (on Debian: apt-get install chromium)")
    if find_spec("playwright") is None:
        raise DashboardError("Playwright is not installed: pip install 'fastlstm[bench]'")
    from playwright.sync_api import sync_playwright

    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
    sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=[*quiet, *sandbox])
        try:
            yield started
        finally:
            started.close()


def take_screenshots(folder: Path, target: Path) -> None:
    """Take the pictures of the README: the front page, and a graph of asv's."""
    graph = "asv/index.html#forward.Forward.time_forward?p-threads='1'&y-axis-scale=log&x-axis-scale=even"
    with browser() as chromium:
        for name, address in (("front.png", "index.html"), ("graph.png", graph)):
            page = chromium.new_page(viewport={"width": 1200, "height": 800}, color_scheme="light")
            page.goto(f"{folder.resolve().as_uri()}/{address}")
            page.wait_for_selector("#history-chart svg" if name == "front.png" else "#main-graph canvas")
            page.wait_for_timeout(500)
            page.screenshot(path=target / name)


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dashboard", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("action", choices=("build", "serve", "screenshots"))
    add("--folder", type=Path, default=ROOT / ".asv" / "dashboard", help="the dashboard (default .asv/dashboard)")
    add("--config", type=Path, default=ROOT / "asv.conf.json", help="for build: asv's configuration")
    add("--peers", type=Path, nargs="*", help="for build: comparisons to show (default benchmarks/peers*.json)")
    add("--port", type=int, default=8080, help="for serve (default %(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.action == "build":
            peers = sorted(HERE.parent.glob("peers*.json")) if options.peers is None else options.peers
            build(options.config.resolve(), peers, options.folder)
            print((options.folder / "index.html").resolve().as_uri())
        elif options.action == "serve":
            require_built(options.folder)
            serve(options.folder, options.port)
        else:
            require_built(options.folder)
            take_screenshots(options.folder, HERE)
    except (DashboardError, OSError) as error:
        print(f"dashboard: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
