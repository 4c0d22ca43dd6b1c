"""report.html: what it holds, and that its script does what it should, in Node with the few elements that it makes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from fixtures.training import config, graph

from dhns_fast import report
from dhns_fast.train import Trainer, grid

# Elements that remember what was put into them, and nothing more.
DOM = """
class Element {
  constructor(name) { this.name = name; this.children = []; this.attributes = {}; this.textContent = ""; this.className = ""; this.value = ""; }
  appendChild(x) { this.children.push(x); return x; }
  replaceChildren() { this.children = []; }
  setAttribute(key, value) { this.attributes[key] = String(value); }
  all(name) { return this.children.flatMap(x => [...(x.name === name ? [x] : []), ...x.all(name)]); }
}
globalThis.document = {
  body: new Element("body"), getElementById: () => ({textContent: DATA}),
  createElement: name => new Element(name), createElementNS: (space, name) => new Element(name),
};
"""
SAID = """
const tables = document.body.all("table"), relations = tables[1];
const column = () => relations.all("tbody")[0].children.map(row => Number(row.children[1].textContent));
const before = column();
relations.all("th")[1].onclick(); const falling = column();
relations.all("th")[1].onclick(); const rising = column();
const input = document.body.all("input")[0];
input.value = "e1"; input.oninput();
const out = document.body.children[document.body.children.indexOf(input) + 1];
const near = out.all("h2").map(x => x.textContent);
input.value = "nobody"; input.oninput();
const nobody = out.all("p").map(x => x.textContent);
const numbers = document.body.all("polyline").map(x => x.attributes.points).concat(document.body.all("rect").map(x => x.attributes.width));
console.log(JSON.stringify({
  title: document.title, tables: tables.length, falling, rising, near, nobody, lines: document.body.all("polyline").length,
  boxes: document.body.all("rect").length, odd: numbers.filter(x => /NaN|undefined|Infinity/.test(x)).length,
}));
"""


def content(path: Path) -> tuple[str, str]:
    """The data and the script of a page."""
    text = path.read_text(encoding="utf-8")
    found = re.search(
        r'<script type="application/json" id="data">(.*?)</script>\n<script>(.*?)</script>', text, re.DOTALL
    )
    assert found
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), "it needs no network"
    return found[1], found[2]


def test_the_page_of_a_run(tmp_path: Path) -> None:
    kg = graph(relation_names=["</script><b>", "b", "c", "d"])
    trainer = Trainer(config(epochs=3), kg)
    trainer.fit(show=False)
    data, script = content(report.of_run(trainer, {"trained": trainer.validate("test")}, tmp_path / "report.html"))
    said = json.loads(data)
    assert [table["title"] for table in said["tables"]] == [
        "Test, filtered, both sides, realistic ranks",
        "By relation",
    ]
    assert ["model", '"complex"'] in said["options"]["rows"]
    assert "</script><b>" in {row[0] for row in said["tables"][1]["rows"]}
    assert [row[0] for row in said["boxes"][1]["rows"]] == ["structure", "text", "image"]
    # Nearest but itself, by the embeddings that are scored.
    table = trainer.model.table().detach().double()
    distance = torch.linalg.vector_norm(table - table[7], dim=1)
    ids = [i for i in said["near"]["ids"][7] if i != 7][:3]
    assert distance[ids].tolist() == pytest.approx(distance.sort().values[1:4].tolist(), rel=1e-4)
    if shutil.which("node") is None:
        pytest.skip("the script runs in Node only")
    program = f"const DATA = {json.dumps(data)};{DOM}{script}{SAID}"
    done = subprocess.run(["node", "-e", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    shown = json.loads(done.stdout)
    counts = [row[1] for row in said["tables"][1]["rows"]]
    assert (shown["falling"], shown["rising"]) == (sorted(counts, reverse=True), sorted(counts))
    assert (shown["title"], shown["odd"]) == ("ComplEx on synthetic", 0)
    assert shown["near"][0] == "e1"
    assert len(shown["near"]) == 5
    assert shown["nobody"] == ["No entity's name contains this."]
    assert shown["lines"] >= 6
    assert shown["boxes"] == sum(len(box["rows"]) for box in said["boxes"])


def test_numbers_that_json_lacks_do_not_empty_the_page(tmp_path: Path) -> None:
    path = report._write(tmp_path / "report.html", {"rows": [(1.0, float("nan"))], "of": {"x": float("inf")}, "n": 3})
    assert json.loads(content(path)[0]) == {"rows": [[1.0, None]], "of": {"x": None}, "n": 3}


def test_the_page_of_a_grid(tmp_path: Path) -> None:
    rows = [grid.Row("g", "transe", "dhns", {0: {"mrr": 0.25, "hits@1": 0.1, "hits@10": 0.5, "epoch_seconds": 2.0}})]
    data, _ = content(report.of_grid(rows, ("model", "MRR"), [["transe", "0.25"]], "A grid", tmp_path / "report.html"))
    assert json.loads(data)["tables"][1]["rows"] == [["g", "transe", "dhns", 0, 0.25, 0.1, 0.5]]
