"""A model's embeddings in files that other programs read: NumPy, Parquet, safetensors, FAISS, word2vec, TensorBoard's
projector.

Rows are entities and relations in the order of their ids; `entities.tsv` and `relations.tsv` name them row for row (id,
name); inverse relations of a reciprocal model, `_inverse` behind their names, come after the others. Both are what is
scored: of unit norm where the model brings them to it, entities joint where modalities are fused, with the structural
ones beside them as `structure`. `about.json` says of which model they are, and how its scores are made of them.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dhns_fast import checks, files
from dhns_fast.catalogue import EXPORTS, SIDES
from dhns_fast.data import KnowledgeGraph
from dhns_fast.data.filter import as_queries
from dhns_fast.errors import InputError, Shown, shown
from dhns_fast.models import KGEModel
from dhns_fast.ops.ambient import plain

# Format -> the package that writes it, where that is no dependency.
NEEDS = {"parquet": "pyarrow", "faiss": "faiss"}


@plain()
@torch.no_grad()
def export(
    model: KGEModel, kg: KnowledgeGraph, to: str, folder: str | Path, queries: Tensor | None = None
) -> list[Path]:
    """Write a model's embeddings and the names of its graph.

    Args:
        to: "npy": `entities.npy`, `relations.npy`; "parquet": `entities.parquet`, `relations.parquet` (id, name,
            embedding); "safetensors": `embeddings.safetensors`; "faiss": `tails.faiss`, an index of what queries for
            tails search, `heads.faiss` where that is another, and the queries themselves, `queries.npy` and
            `queries.tsv`; "word2vec": `entities.vec`, text, with _ for blanks in names; "projector": `tensors.tsv`,
            `metadata.tsv` and `projector_config.pbtxt`.
        folder: made where it does not exist; files of the same names are replaced.
        queries: int64 `[n, 3]` with -1 for the head or tail that is asked for, for "faiss"; None: both sides of every
            test triple.

    Returns:
        the files.

    Raises:
        InputError: no such format, a package that it needs is missing, FAISS cannot search by the model's reduction,
            a query asks for no entity or a name has a tab or line break.
    """
    checks.one_of("to", to, EXPORTS)
    if to in NEEDS and importlib.util.find_spec(NEEDS[to]) is None:
        possible = ", ".join(name for name in EXPORTS if name not in NEEDS or importlib.util.find_spec(NEEDS[name]))
        raise InputError(
            "to", to, f"{possible} here; {to} needs the package {NEEDS[to]}: pip install 'dhns-fast[export]'"
        )
    if to == "faiss" and (model.reduction not in ("dot", "l1", "l2") or _scaled(model)):
        how = f"{model.reduction!r}{' with a scale of each query' if _scaled(model) else ''}"
        raise InputError("to", to, f"formats other than faiss for {type(model).__name__}: FAISS cannot search by {how}")
    for what, names in (("entity_names", kg.entity_names), ("relation_names", kg.relation_names)):
        # A blank name, which readers of lines would skip, has its id before it here.
        if (
            i := next((i for i, name in enumerate(names) if not {"\t", "\n", "\r"}.isdisjoint(name)), None)
        ) is not None:
            accepted = "names without tabs and line breaks, for tables with a line each (pack keeps any)"
            raise InputError(what, Shown(f"{shown(names[i])} at {i}"), accepted)
    if queries is not None:
        # An index holds entities.
        queries = as_queries(queries, kg.num_entities, kg.num_relations, ("head", "tail"))
    folder = files.expanded("folder", folder)
    tables = {"entities": _array(_entities(model)), "relations": _array(model.relation_table())}
    relation_names = _relation_names(kg, len(tables["relations"]))
    if model.fusion is not None and model.fusion.attend:
        tables["structure"] = _array(model.structure_table())
    made = [folder / f"{what}.tsv" for what in ("entities", "relations")]
    # Names beside rows of another model would be taken for theirs.
    with files.together(folder):
        for path, names in zip(made, (kg.entity_names, relation_names), strict=True):
            files.write_text(path, "".join(f"{i}\t{name}\n" for i, name in enumerate(names)))
        about = {
            "model": type(model).__name__, "reduction": model.reduction, "dim": model.dim, "offset": model.offset,
            **model.hal_options(), "graph": kg.name, "shapes": {name: list(x.shape) for name, x in tables.items()},
        }  # fmt: skip
        files.write_json(folder / "about.json", about)
        for name, content in _WRITERS[to](model, kg, tables, queries):
            path = folder / name
            if isinstance(content, str):
                files.write_text(path, content)
            else:
                with files.replacing(path) as file:
                    if isinstance(content, bytes):
                        file.write(content)
                    else:
                        content(file)
            made.append(path)
    return [*made, folder / "about.json"]


Made = Iterator[tuple[str, "str | bytes | Callable[[Any], object]"]]
Tables = Mapping[str, np.ndarray]


def _array(x: Tensor) -> np.ndarray:
    return x.detach().float().cpu().contiguous().numpy()


def _entities(model: KGEModel) -> Tensor:
    """What queries meet, where it is the same for both sides and all of an embedding; elsewhere what it is made of."""
    tail, head = (model.entities(side) for side in SIDES)
    same = tail.shape == head.shape and tail.shape[1] == model.dim and torch.equal(tail, head)
    return tail if same else model.table()


def _relation_names(kg: KnowledgeGraph, rows: int) -> Sequence[str]:
    names = kg.relation_names
    if rows == len(names):
        return names
    inverse = (f"{name}_inverse" for name in names)
    return [*names, *_distinct(inverse, set(names), len(names))]


def _distinct(names: Iterable[str], taken: set[str], first: int) -> list[str]:
    """Names of the ids from `first` on; one that is taken already, by another of them as well, carries its id."""
    out = []
    for i, name in enumerate(names, first):
        while name in taken:
            name = f"{name}#{i}"
        taken.add(name)
        out.append(name)
    return out


def _scaled(model: KGEModel) -> bool:
    zero = torch.zeros(1, dtype=torch.int64, device=model.compute_device)
    return model.query(zero, zero, "tail")[1] is not None


def _npy(model: KGEModel, kg: KnowledgeGraph, tables: Tables, queries: Tensor | None) -> Made:
    for name, table in tables.items():
        yield f"{name}.npy", functools.partial(np.save, arr=table)


def _safetensors(model: KGEModel, kg: KnowledgeGraph, tables: Tables, queries: Tensor | None) -> Made:
    from safetensors.numpy import save

    yield "embeddings.safetensors", save(dict(tables))


def _parquet(model: KGEModel, kg: KnowledgeGraph, tables: Tables, queries: Tensor | None) -> Made:
    import pyarrow
    from pyarrow import parquet

    for name, table in tables.items():
        names = _relation_names(kg, len(table)) if name == "relations" else kg.entity_names
        rows = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(table.ravel()), table.shape[1])
        content = pyarrow.table({"id": np.arange(len(table)), "name": list(names), "embedding": rows})
        yield f"{name}.parquet", functools.partial(parquet.write_table, content)


def _faiss(model: KGEModel, kg: KnowledgeGraph, tables: Tables, queries: Tensor | None) -> Made:
    import faiss

    if queries is None:
        asked = [kg.test.index_fill(1, torch.tensor([column]), -1) for column in (2, 0)]
        queries = torch.cat(asked)
    metric = {"dot": faiss.METRIC_INNER_PRODUCT, "l1": faiss.METRIC_L1, "l2": faiss.METRIC_L2}[model.reduction]
    views = {side: _array(model.entities(side)) for side in SIDES}
    same = np.array_equal(views["tail"], views["head"])
    for side, view in views.items():
        if side == "tail" or not same:
            index = faiss.IndexFlat(view.shape[1], metric)
            index.add(view)
            yield f"{side}s.faiss", faiss.serialize_index(index).tobytes()
    vectors = np.empty((len(queries), views["tail"].shape[1]), np.float32)
    device = model.compute_device
    for side, known, unknown in (("tail", 0, 2), ("head", 2, 0)):
        rows = (queries[:, unknown] == -1).nonzero()[:, 0]
        if len(rows):
            vectors[rows.numpy()] = _array(
                model.query(queries[rows, known].to(device), queries[rows, 1].to(device), side)[0]
            )
    yield "queries.npy", functools.partial(np.save, arr=vectors)
    e, r = kg.entity_names, kg.relation_names
    name = lambda i: "?" if i < 0 else e[i]  # noqa: E731
    yield "queries.tsv", "".join(f"{name(h)}\t{r[p]}\t{name(t)}\n" for h, p, t in queries.tolist())


def _word2vec(model: KGEModel, kg: KnowledgeGraph, tables: Tables, queries: Tensor | None) -> Made:
    table = tables["entities"]
    words = _words(kg.entity_names)
    lines = (f"{word} {' '.join(f'{x:.9g}' for x in row)}\n" for word, row in zip(words, table.tolist(), strict=True))
    yield "entities.vec", f"{len(table)} {table.shape[1]}\n" + "".join(lines)


def _words(names: Sequence[str]) -> list[str]:
    """Names without blanks, which end a word there; one that comes out as another name carries its id."""
    taken = {name for name in names if not re.search(r"\s", name)}
    return [
        name if name in taken else _distinct([re.sub(r"\s", "_", name)], taken, i)[0] for i, name in enumerate(names)
    ]


def _projector(model: KGEModel, kg: KnowledgeGraph, tables: Tables, queries: Tensor | None) -> Made:
    yield "tensors.tsv", "".join("\t".join(f"{x:.9g}" for x in row) + "\n" for row in tables["entities"].tolist())
    # One column has no heading there.
    yield "metadata.tsv", "".join(f"{name}\n" for name in kg.entity_names)
    yield (
        "projector_config.pbtxt",
        'embeddings {\n  tensor_name: "entities"\n  tensor_path: "tensors.tsv"\n  metadata_path: "metadata.tsv"\n}\n',
    )


_WRITERS: dict[str, Callable[[KGEModel, KnowledgeGraph, Tables, Tensor | None], Made]] = {
    "npy": _npy,
    "parquet": _parquet,
    "safetensors": _safetensors,
    "faiss": _faiss,
    "word2vec": _word2vec,
    "projector": _projector,
}
