"""`<DS>_NumericalTriples.txt` of MMKB: entity, attribute, value; as a modality of numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dhns_fast.data.readers.lines import rows, shown
from dhns_fast.errors import DataError

FILE = re.compile(r"(?i)(.*[_-])?numerical[_-]?triples\.(txt|tsv)(\.gz)?")
MODALITY = "numeric"
# A typed literal of RDF, or a number in quotes: what stands between the quotes counts.
LITERAL = re.compile(r'"([^"]*)"(\^\^.*|@.*)?')
# Columns: two an attribute.
MOST = 1 << 16


def read(path: Path, entity_names: Sequence[str]) -> tuple[Tensor, Tensor, list[str]]:
    """(features float32 [E, 2A], present bool [E], notes) of lines `entity attribute value`, separated by tabs or
    blanks.

    Column a is the value of attribute a, standardised over the entities that have it (the mean where an entity has
    several); column A + a is 1 where it has one and 0, like column a, where it does not. Attributes are in the order of
    first appearance.

    Raises:
        DataError: a line that is not an entity, an attribute and a finite number; more than 2¹⁵ attributes.
    """
    ids = {name: i for i, name in enumerate(entity_names)}
    ids |= {
        name[1:-1]: i
        for i, name in enumerate(entity_names)
        if name.startswith("<") and name.endswith(">") and name[1:-1] not in ids
    }
    attributes: dict[str, int] = {}
    entity, attribute, value = [], [], []
    unknown = lines = 0
    for line, row in rows(path):
        cells = [cell.strip(" ") for cell in row.split("\t")] if "\t" in row else row.split(" ")
        cells = [cell for cell in cells if cell]
        cells = cells[:-1] if len(cells) == 4 and cells[-1] == "." else cells
        if len(cells) != 3:
            raise DataError(
                path, f"found {len(cells)} columns, {shown(row)}; accepted: `entity<TAB>attribute<TAB>number`", line
            )
        name, kind, number = cells
        literal = LITERAL.fullmatch(number)
        try:
            parsed = float(literal[1] if literal else number)
        except ValueError:
            parsed = math.nan
        if not math.isfinite(parsed):
            raise DataError(path, f"found {shown(number)} as the value; accepted: a finite number", line)
        lines += 1
        found = ids.get(name)
        found = ids.get(name[1:-1]) if found is None and name.startswith("<") else found
        if found is None:
            unknown += 1
            continue
        entity.append(found)
        attribute.append(attributes.setdefault(kind, len(attributes)))
        value.append(parsed)
    A, E = len(attributes), len(entity_names)
    if not A:
        raise DataError(
            path, f"none of its {lines} lines is about an entity of the graph; accepted: names of the graph's entities"
        )
    if 2 * A > MOST:
        raise DataError(path, f"found {A} attributes; accepted: at most {MOST // 2}")
    place = torch.tensor(entity) * A + torch.tensor(attribute)
    count = torch.zeros(E * A).index_add_(0, place, torch.ones(len(place)))
    total = torch.zeros(E * A, dtype=torch.float64).index_add_(0, place, torch.tensor(value, dtype=torch.float64))
    has = (count > 0).reshape(E, A)
    mean = (total / count.clamp(min=1)).reshape(E, A)
    holders = has.sum(0)
    # Divided by the largest first: squares of numbers near the end of float64 would not be finite.
    mean = mean / mean.abs().amax(0).clamp(min=torch.finfo(torch.float64).tiny)
    centred = torch.where(has, mean - (mean * has).sum(0) / holders, 0)
    deviation = (centred.square().sum(0) / holders).sqrt()
    standard = centred / torch.where(deviation > 1e-12, deviation, 1)
    notes = [f"{path.name}: {unknown} of {lines} lines are about no entity of the graph."] if unknown else []
    return torch.cat([standard, has], 1).float(), has.any(1), notes
