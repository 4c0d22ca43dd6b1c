"""MODEL_CARD.md: what a run is, what it was trained on, how good it is, and how to use it, for whoever finds the
folder.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from typing import Any

from dhns_fast.catalogue import MODELS
from dhns_fast.data import KnowledgeGraph
from dhns_fast.errors import printable
from dhns_fast.ranking import RankingResult
from dhns_fast.train.config import TrainConfig

COLUMNS = {"MRR": "mrr", "Hits@1": "hits@1", "Hits@3": "hits@3", "Hits@10": "hits@10"}


def card(
    config: TrainConfig, kg: KnowledgeGraph, summary: Mapping[str, Any], results: Mapping[str, RankingResult]
) -> str:
    """The text, in Markdown.

    Args:
        summary: what :func:`dhns_fast.train.run.summary` says of the run.
        results: of the test split, by the names of rows.
    """
    title = MODELS[config.model].title
    modalities = escaped(", ".join(kg.features)) or "none"
    lines = [
        "---", "library_name: dhns_fast", "tags: [knowledge-graph, link-prediction, knowledge-graph-embedding]", "---", "",
        f"# {title} on {escaped(kg.name)}", "",
        f"Link prediction: scores triples (head, relation, tail) of {kg.num_entities} entities and {kg.num_relations} relations.", "",
        "## Data",
        f"{len(kg.train)} triples of train, {len(kg.valid)} of validation, {len(kg.test)} of test; modalities: {modalities}.",
        *(f"- {escaped(note)}" for note in kg.report.lines()), "",
        "## Training",
        f"Method {config.method} ({config.behaviour}), loss {config.loss}, D {config.dim}, seed {config.seed}; "
        f"{summary['epochs']} epochs, best validation after epoch {summary['best_epoch']}, {summary['training_seconds']} s on "
        f"{summary['device']}. All options: config.yaml.", "",
    ]  # fmt: skip
    if results:
        lines += [
            "## Results",
            "Test, filtered, both sides, realistic ranks:",
            "",
            f"| | {' | '.join(COLUMNS)} |",
            "|---" * 5 + "|",
        ]
        lines += [
            f"| {name} | {' | '.join(f'{row[key]:.4f}' for key in COLUMNS.values())} |" for name, row in results.items()
        ]
        lines.append("")
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    lines += [
        "## Use", "```python", "import dhns_fast", 'run = dhns_fast.load_run("FOLDER")', "run.model.score_hrt(run.graph.test[:5])", "```",
        "`dhns-fast predict --run FOLDER HEAD RELATION ?` completes a triple; `dhns-fast export --run FOLDER --to npy` writes the embeddings.",
        "", "## Limits", "A score ranks candidates; it is no probability. Entities that train does not mention have initial embeddings.", "",
        f"Made with {versions}.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def escaped(text: str) -> str:
    """A text as a line of Markdown shows it, whatever is in it: names may look like markup, HTML or a table."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(printable(text), quote=False))
