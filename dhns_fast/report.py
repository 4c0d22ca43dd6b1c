"""report.html of a run or of a grid: one file without a network, for a browser: curves, hierarchy, attention, tables
that sort, nearest entities.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dhns_fast import files, plots
from dhns_fast.data import KnowledgeGraph
from dhns_fast.models import KGEModel
from dhns_fast.scoring import topk_all

if TYPE_CHECKING:
    from dhns_fast.ranking import RankingResult
    from dhns_fast.train.grid import Row
    from dhns_fast.train.trainer import Trainer

# Entities up to which the page finds the nearest ones of each: ten of 20 000 are 2 MB.
SEARCHED, NEIGHBOURS = 20_000, 10
METRICS = {"MRR": "mrr", "Hits@1": "hits@1", "Hits@3": "hits@3", "Hits@10": "hits@10", "MR": "mr"}
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@torch.no_grad()
def of_run(trainer: Trainer, results: Mapping[str, RankingResult], path: Path) -> Path:
    """Write the page of a run that has ended.

    Args:
        results: of test, by the names of rows.
        path: the file.
    """
    config, kg, model = trainer.config, trainer.kg, trainer.model
    attended = model.fusion is not None and model.fusion.attention is not None
    trained = results.get("trained")
    relations = {} if trained is None else trained.per_relation()
    rows = [[name, len(part.triples), *(part[m] for m in METRICS.values())] for name, part in relations.items()]
    content = {
        "title": f"{type(model).__name__} on {kg.name}",
        "about": f"{kg.num_entities} entities, {kg.num_relations} relations, {len(kg.train)} triples of train; "
        f"method {config.method} ({config.behaviour}), D {config.dim}, seed {config.seed}; "
        f"best validation after epoch {trainer.progress.best_epoch} of {trainer.progress.epoch}",
        "tables": [
            _table("Test, filtered, both sides, realistic ranks", ("model", *METRICS), _rows(results)),
            _table("By relation", ("relation", "triples", *METRICS), rows),
        ],
        "curves": _curves(trainer.progress.history),
        "boxes": [
            {"title": "Scores of positives and negatives, hard to easy", "rows": _boxes(plots.level_scores(trainer))},
            *(
                [{"title": "Attention over modalities", "rows": _boxes(plots.attention_shares(trainer))}]
                if attended
                else []
            ),
        ],
        "near": _near(model, kg),
        "options": _table(
            "Options",
            ("option", "value"),
            [[k, json.dumps(v, ensure_ascii=False)] for k, v in config.to_dict().items()],
        ),
    }
    return _write(path, content)


def of_grid(
    rows: Sequence[Row], columns: Sequence[str], cells: Sequence[Sequence[Any]], title: str, path: Path
) -> Path:
    """Write the page of a comparison.

    Args:
        rows: the grid's.
        columns, cells: of the table that the command line prints.
    """
    seeds = [
        [row.data, row.model, row.method, seed, *(result.get(metric) for metric in ("mrr", "hits@1", "hits@10"))]
        for row in rows
        for seed, result in row.results.items()
    ]
    tables = [
        _table("Test, realistic ranks, over seeds", columns, cells),
        _table("Seed by seed", ("data", "model", "method", "seed", "MRR", "Hits@1", "Hits@10"), seeds),
    ]
    return _write(path, {"title": title, "about": "", "tables": tables, "curves": [], "boxes": []})


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    return {"title": title, "columns": list(columns), "rows": [list(row) for row in rows]}


def _rows(results: Mapping[str, RankingResult]) -> list[list[Any]]:
    return [[name, *(result[metric] for metric in METRICS.values())] for name, result in results.items()]


def _curves(history: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Panels of lines, each a list of (epoch, value)."""
    panels = {
        "Training loss": plots.TERMS,
        "Validation": {"valid_mrr": "MRR", "valid_hits@1": "Hits@1", "valid_hits@10": "Hits@10"},
    }
    out = []
    for title, names in panels.items():
        lines = {label: [[row["epoch"], row[key]] for row in history if row.get(key)] for key, label in names.items()}
        out.append({"title": title, "lines": {label: line for label, line in lines.items() if line}})
    return out


def _boxes(values: Mapping[str, Tensor]) -> list[list[Any]]:
    """Name and quantiles of each; what is not finite is left out."""
    finite = {name: x[x.isfinite()].double() for name, x in values.items()}
    levels = torch.tensor(QUANTILES, dtype=torch.float64)
    return [[name, *x.quantile(levels).tolist()] for name, x in finite.items() if len(x)]


def _near(model: KGEModel, kg: KnowledgeGraph) -> dict[str, Any] | None:
    if not 1 < kg.num_entities <= SEARCHED:
        return None
    table = model.table()
    scores, ids = topk_all(table, table, min(NEIGHBOURS + 1, kg.num_entities), "l2")
    return {
        "names": list(kg.entity_names),
        "ids": ids.tolist(),
        "distances": [[round(-x, 4) for x in row] for row in scores.tolist()],
    }


def _write(path: Path, content: Mapping[str, Any]) -> Path:
    # Names may hold anything, the end of a script among it.
    data = (
        files.as_json(content, ensure_ascii=False, separators=(",", ":"))
        .replace("<", "\\u003c")
        .replace("\u2028", "\\u2028")
    )
    files.write_text(path, PAGE.replace("@DATA@", data))
    return path


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>dhns_fast</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; } p { color: #555; margin-top: .3rem; }
table { border-collapse: collapse; } th { cursor: pointer; text-align: left; border-bottom: 2px solid #444; }
td, th { padding: .15rem .8rem .15rem 0; white-space: nowrap; } .n { text-align: right; font-variant-numeric: tabular-nums; }
th { position: sticky; top: 0; background: #fff; user-select: none; } th::after { content: "\\2195"; color: #bbb; padding-left: .2em; }
th.up::after { content: "\\2191"; color: #222; } th.down::after { content: "\\2193"; color: #222; }
.keys span { margin-right: 1em; font-size: .85rem; }
tr:hover td { background: #f2f5f8; } .scroll { max-height: 26rem; overflow: auto; }
.panels { display: flex; flex-wrap: wrap; gap: 2rem; } svg { background: #fafafa; } svg text { font-size: 11px; fill: #444; }
input { font: inherit; padding: .3rem .5rem; width: 20rem; }
</style>
</head>
<body>
<script type="application/json" id="data">@DATA@</script>
<script>
const data = JSON.parse(document.getElementById("data").textContent);
const colours = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e"];
const make = (name, parent, text) => {
  const x = document.createElement(name);
  if (text !== undefined) x.textContent = text;
  parent.appendChild(x);
  return x;
};
const draw = (parent, name, attributes, text) => {
  const x = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) x.setAttribute(key, value);
  if (text !== undefined) x.textContent = text;
  parent.appendChild(x);
  return x;
};
const shown = (x, whole) => typeof x !== "number" ? String(x ?? "\u2013") : whole ? String(x) : x.toFixed(Math.abs(x) < 10 ? 4 : 1);
document.title = data.title;
make("h1", document.body, data.title);
make("p", document.body, data.about);
const table = ({title, columns, rows}) => {
  if (!rows.length) return;
  make("h2", document.body, title);
  const box = make("div", document.body), table = make("table", box), head = make("tr", make("thead", table)), body = make("tbody", table);
  if (rows.length > 15) box.className = "scroll";
  const numbers = columns.map((_, i) => rows.every(row => typeof row[i] === "number" || row[i] === null) && rows.some(row => row[i] !== null));
  const whole = columns.map((_, i) => rows.every(row => row[i] === null || Number.isInteger(row[i])));
  const heads = columns.map(name => make("th", head, name));
  const fill = (by, falling) => {
    heads.forEach((x, i) => { x.className = (numbers[i] ? "n " : "") + (i === by ? (falling ? "down" : "up") : ""); });
    body.replaceChildren();
    for (const row of rows) {
      const line = make("tr", body);
      row.forEach((x, i) => { make("td", line, shown(x, whole[i])).className = numbers[i] ? "n" : ""; });
    }
  };
  heads.forEach((x, i) => {
    // Numbers begin with the largest, words with the first; what is not there comes last.
    let falling = !numbers[i];
    x.title = "sort";
    x.onclick = () => {
      falling = !falling;
      const order = (a, b) => numbers[i] ? a - b : String(a).localeCompare(String(b), undefined, {numeric: true});
      rows.sort((a, b) => (a[i] === null) - (b[i] === null) || (a[i] === null ? 0 : (falling ? -1 : 1) * order(a[i], b[i])));
      fill(i, falling);
    };
  });
  fill();
};
const W = 480, H = 260, L = 55, B = 30;
const panel = (parent, title, keys = []) => {
  const box = make("div", parent);
  make("h2", box, title);
  const legend = make("div", box);
  legend.className = "keys";
  keys.forEach((name, i) => make("span", legend, "\u25cf " + name).setAttribute("style", "color: " + colours[i]));
  return draw(box, "svg", {width: W, height: H, role: "img", "aria-label": title});
};
data.tables.slice(0, data.options ? 1 : data.tables.length).forEach(table);
const panels = make("div", document.body);
panels.className = "panels";
for (const {title, lines} of data.curves) {
  const all = Object.values(lines).flat();
  if (!all.length) continue;
  const svg = panel(panels, title, Object.keys(lines)), xs = all.map(p => p[0]), ys = all.map(p => p[1]);
  const log = title === "Training loss" && Math.min(...ys) > 0, f = log ? Math.log10 : (y => y);
  const x0 = Math.min(...xs), x1 = Math.max(...xs), y0 = log ? f(Math.min(...ys)) : 0, y1 = f(Math.max(...ys));
  const px = x => L + (W - L - 10) * (x - x0) / (x1 - x0 || 1), py = y => H - B - (H - B - 10) * (f(y) - y0) / (y1 - y0 || 1);
  for (let k = 0; k < 5; k++) {
    const v = y0 + (y1 - y0) * k / 4, y = H - B - (H - B - 10) * k / 4;
    draw(svg, "line", {x1: L, x2: W - 10, y1: y, y2: y, stroke: "#ddd"});
    draw(svg, "text", {x: L - 6, y: y + 4, "text-anchor": "end"}, (log ? 10 ** v : v).toPrecision(2));
  }
  draw(svg, "text", {x: L, y: H - 10}, "epoch " + x0);
  if (x1 > x0) draw(svg, "text", {x: W - 10, y: H - 10, "text-anchor": "end"}, x1);
  Object.values(lines).forEach((points, i) => {
    draw(svg, "polyline", {points: points.map(([x, y]) => px(x) + "," + py(y)).join(" "), fill: "none", stroke: colours[i], "stroke-width": 2});
    // A line of few points, or of one, is hard to see.
    if (points.length <= 30) for (const [x, y] of points) draw(svg, "circle", {cx: px(x), cy: py(y), r: 3, fill: colours[i]});
  });
}
for (const {title, rows} of data.boxes) {
  if (!rows.length) continue;
  const svg = panel(panels, title), low = Math.min(...rows.map(r => r[1])), high = Math.max(...rows.map(r => r[5])), left = 150;
  const px = x => left + (W - left - 15) * (x - low) / (high - low || 1), step = (H - B - 10) / rows.length;
  rows.forEach(([name, a, b, c, d, e], i) => {
    const y = 10 + step * (i + .5);
    draw(svg, "text", {x: left - 8, y: y + 4, "text-anchor": "end"}, name);
    draw(svg, "line", {x1: px(a), x2: px(e), y1: y, y2: y, stroke: "#888"});
    const fill = title.startsWith("Attention") ? "#a9bfd6" : name === "positives" ? "#9cc59c" : "#d6a5a5";
    draw(svg, "rect", {x: px(b), y: y - step * .3, width: Math.max(px(d) - px(b), 1), height: step * .6, fill});
    draw(svg, "line", {x1: px(c), x2: px(c), y1: y - step * .3, y2: y + step * .3, stroke: "#222", "stroke-width": 2});
  });
  draw(svg, "text", {x: left, y: H - 10}, low.toPrecision(3));
  draw(svg, "text", {x: W - 15, y: H - 10, "text-anchor": "end"}, high.toPrecision(3));
}
if (data.options) data.tables.slice(1).forEach(table);
if (data.near) {
  make("h2", document.body, "Nearest entities");
  const {names, ids, distances} = data.near, input = make("input", document.body), out = make("div", document.body);
  input.placeholder = "name of an entity";
  input.oninput = () => {
    out.replaceChildren();
    const word = input.value.toLowerCase();
    if (!word) return;
    const found = names.map((n, i) => [n.toLowerCase(), i]).filter(([n]) => n.includes(word));
    if (!found.length) make("p", out, "No entity's name contains this.");
    found.sort((a, b) => (b[0] === word) - (a[0] === word) || b[0].startsWith(word) - a[0].startsWith(word));
    for (const [, i] of found.slice(0, 5)) {
      make("h2", out, names[i]);
      const near = make("table", out);
      ids[i].forEach((j, k) => {
        if (j === i) return;
        const line = make("tr", near);
        make("td", line, names[j]);
        make("td", line, shown(distances[i][k], false)).className = "n";
      });
    }
    if (found.length > 5) make("p", out, `and ${found.length - 5} more names that contain this`);
  };
}
if (data.options) table(data.options);
</script>
</body>
</html>
"""
