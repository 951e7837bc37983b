"use strict";

// `dashboard` comes from data.js: history, peers, machines, regressions.
const STYLE = "font-size: 13px; --plot-background: var(--page)";
const choose = (id) => document.getElementById(id).value;
const show = (id, ...nodes) => document.getElementById(id).replaceChildren(...nodes);
const say = (id, text) => show(id, Object.assign(document.createElement("p"), { textContent: text }));

function fill(id, options) {
  show(id, ...options.map(([value, text]) => new Option(text, value)));
  document.getElementById(id).addEventListener("change", drawHistory);
}

function drawHistory() {
  const { commits, values, regimes } = dashboard.history;
  const group = choose("group");
  const chosen = values.filter(
    (value) =>
      value.benchmark === choose("benchmark") && value.machine === choose("machine") && value.threads === choose("threads"),
  );
  // One line a regime: the geometric mean of its cases; or one line a case of the regime that was chosen.
  const line = (value) => (group === "" ? regimes[value.case] : value.case);
  const points = d3
    .flatRollup(
      chosen.filter((value) => group === "" || regimes[value.case] === group),
      (found) => Math.exp(d3.mean(found, (value) => Math.log(value.speedup))),
      line,
      (value) => value.commit,
    )
    .map(([name, commit, speedup]) => ({ name, speedup, ...commits[commit] }));
  if (points.length === 0) {
    return say("history-chart", "Nothing of the kind has been measured.");
  }
  const plot = Plot.plot({
    width: 1080,
    height: 420,
    marginLeft: 50,
    marginRight: 90,
    marginBottom: 60,
    style: STYLE,
    x: { type: "point", label: null, domain: commits.map((commit) => commit.hash), tickRotate: commits.length > 10 ? -30 : 0 },
    y: { type: "log", label: "times as fast as NumPy", grid: true, nice: true, tickFormat: (value) => `${value}` },
    color: { domain: [...new Set(points.map((point) => point.name))], scheme: "tableau10", legend: true },
    marks: [
      Plot.ruleY([1]),
      Plot.lineY(points, { x: "hash", y: "speedup", stroke: "name", strokeWidth: 2 }),
      Plot.dot(points, {
        x: "hash",
        y: "speedup",
        fill: "name",
        r: 4,
        tip: true,
        title: (point) => `${point.name}: ${point.speedup.toFixed(2)}\n${point.hash} ${point.date}\n${point.subject}`,
      }),
      Plot.text(
        points,
        Plot.selectLast({ x: "hash", y: "speedup", z: "name", text: "name", fill: "name", dx: 9, textAnchor: "start" }),
      ),
    ],
  });
  show("history-chart", plot);
}

function drawPeers({ results, means, engines }) {
  const count = (threads) => (threads === 1 ? "1 thread" : `${threads} threads`);
  const down = (ratio) => (Math.floor(ratio * 100 + 1e-9) / 100).toFixed(2); // 1.00 is never a loss
  const points = results
    .filter((entry) => entry.ratio !== null)
    .map((entry) => ({
      row: entry.case.name,
      regime: entry.case.regime,
      ratio: entry.ratio,
      threads: count(entry.threads),
      text: `${entry.case.name}, ${count(entry.threads)}: ${down(entry.ratio)} times as fast as ${engines[entry.fastest_peer].title}`,
    }));
  const averages = means.map((mean) => ({
    row: mean.regime,
    ratio: mean.ratio,
    threads: count(mean.threads),
    text: `${mean.regime}, ${count(mean.threads)}: ${down(mean.ratio)}, the geometric mean of ${mean.cases}`,
  }));
  const regimes = d3.group(points, (point) => point.regime, (point) => point.row);
  const rows = [...regimes].flatMap(([regime, names]) => [regime, ...names.keys()]);
  const [lowest, highest] = d3.extent(points, (point) => point.ratio);
  const dots = { x: "ratio", y: "row", tip: true, title: "text" };
  return Plot.plot({
    width: 1080,
    height: 90 + 24 * rows.length,
    marginLeft: 110,
    marginRight: 20,
    marginBottom: 45,
    style: STYLE,
    x: {
      type: "log",
      label: "times as fast as the fastest peer",
      domain: [Math.min(0.9, lowest / 1.05), Math.max(1.1, highest * 1.05)],
      grid: true,
      tickFormat: (value) => `${value}`,
    },
    y: { label: null, domain: rows },
    color: { scheme: "tableau10", legend: true },
    marks: [
      Plot.axisY({ ticks: rows.filter((row) => !regimes.has(row)) }),
      Plot.axisY({ ticks: [...regimes.keys()], fontWeight: "bold", tickSize: 0 }),
      Plot.ruleX([1], { strokeWidth: 1.5 }),
      Plot.dot(points, { ...dots, fill: "threads", r: 4.5 }),
      Plot.dot(averages, { ...dots, stroke: "threads", r: 6, strokeWidth: 2 }),
    ],
  });
}

function showPeers() {
  for (const peers of dashboard.peers) {
    const heading = Object.assign(document.createElement("h3"), { textContent: peers.title });
    const figure = document.createElement("figure");
    figure.append(drawPeers(peers));
    const table = Object.assign(document.createElement("div"), { className: "table", innerHTML: peers.table });
    document.getElementById("comparisons").append(heading, figure, table);
  }
  if (dashboard.peers.length === 0) {
    say("comparisons", "Nothing has been recorded: python benchmarks/peers.py --json benchmarks/peers.json");
  }
}

function showMachines() {
  const table = document.createElement("table");
  for (const [name, values] of dashboard.machines) {
    const row = table.insertRow();
    row.append(Object.assign(document.createElement("th"), { textContent: name }));
    for (const value of values) {
      row.insertCell().textContent = value;
    }
  }
  show("machine-table", table);
}

const { benchmarks, machines, regimes, threads } = dashboard.history;
fill("benchmark", benchmarks);
fill("group", [["", "all, by regime"], ...[...new Set(Object.values(regimes))].map((regime) => [regime, regime])]);
fill("threads", threads.map((count) => [count, count]));
fill("machine", machines.map((machine) => [machine, machine]));
drawHistory();
showPeers();
showMachines();
if (dashboard.regressions > 0) {
  document.getElementById("regressions").textContent += ` (${dashboard.regressions})`;
}
