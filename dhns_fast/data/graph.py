"""A knowledge graph in memory, and what its splits look like."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dhns_fast.data.filter import as_triples, pack
from dhns_fast.errors import InputError

# Above this share of distinct validation triples found in train or test, choosing a model on them rewards memorising. Clean benchmarks have
# none; the published validation file of DB15K has 99 %.
CONTAMINATED = 0.05


@dataclass(frozen=True, slots=True)
class SplitReport:
    """What was found in the splits. Overlaps count distinct triples; the other counts are of lines.

    Attributes:
        size, distinct: triples, and distinct triples, of "train", "valid" and "test".
        valid_in_train, test_in_train, test_in_valid: overlaps.
        valid_elsewhere: distinct validation triples found in train or in test.
        unseen_entity, unseen_relation: triples of "valid" and "test" that mention an entity (a relation) which train does not.
    """

    size: dict[str, int]
    distinct: dict[str, int]
    valid_in_train: int
    test_in_train: int
    test_in_valid: int
    valid_elsewhere: int
    unseen_entity: dict[str, int]
    unseen_relation: dict[str, int]

    @classmethod
    def of(cls, splits: dict[str, Tensor], num_entities: int, num_relations: int) -> SplitReport:
        head, tie, tail = torch.cat(list(splits.values())).unbind(1)
        keys, _ = pack(head, tie, tail, num_entities, num_relations)
        train, valid, test = (torch.unique(key) for key in keys.split([len(x) for x in splits.values()]))
        in_train, in_test = torch.isin(valid, train, assume_unique=True), torch.isin(valid, test, assume_unique=True)
        entity, relation = torch.zeros(num_entities, dtype=torch.bool), torch.zeros(num_relations, dtype=torch.bool)
        entity[splits["train"][:, [0, 2]].flatten()] = True
        relation[splits["train"][:, 1]] = True
        held = {name: splits[name] for name in ("valid", "test")}
        return cls(
            size={name: len(x) for name, x in splits.items()},
            distinct={"train": len(train), "valid": len(valid), "test": len(test)},
            valid_in_train=int(in_train.sum()),
            test_in_train=int(torch.isin(test, train, assume_unique=True).sum()),
            test_in_valid=int(in_test.sum()),
            valid_elsewhere=int((in_train | in_test).sum()),
            unseen_entity={name: int((~entity[x[:, [0, 2]]]).any(1).sum()) for name, x in held.items()},
            unseen_relation={name: int((~relation[x[:, 1]]).sum()) for name, x in held.items()},
        )

    @property
    def duplicates(self) -> dict[str, int]:
        """Lines of each split that repeat an earlier line of it."""
        return {name: self.size[name] - self.distinct[name] for name in self.size}

    @property
    def contaminated_validation(self) -> bool:
        """Whether validation cannot be trusted: it is empty, or more than 5 % of its distinct triples are also in train or test."""
        return self.valid_elsewhere > CONTAMINATED * self.distinct["valid"] or not self.size["valid"]

    def lines(self) -> list[str]:
        """Sentences about what is out of the ordinary, none where nothing is."""
        out = [
            f"{name}: {count} of {self.size[name]} triples repeat an earlier one ({self.distinct[name]} are distinct)."
            for name, count in self.duplicates.items()
            if count
        ]
        for name, other, count in (
            ("valid", "train", self.valid_in_train),
            ("test", "train", self.test_in_train),
            ("test", "valid", self.test_in_valid),
        ):
            if count:
                out.append(f"{name}: {count} of {self.distinct[name]} distinct triples are also in {other}.")
        for what, counts in (("an entity", self.unseen_entity), ("a relation", self.unseen_relation)):
            out += [f"{name}: {n} of {self.size[name]} triples mention {what} that train does not." for name, n in counts.items() if n]
        if not self.size["test"]:
            out.append("test: no triples.")
        if not self.size["valid"]:
            out.append("valid: no triples, so no model can be chosen on it; hold out a part of train instead.")
        elif self.contaminated_validation:
            clean = self.distinct["valid"] - self.valid_elsewhere
            out.append(
                f"valid is contaminated: only {clean} of its {self.distinct['valid']} distinct triples are in neither train nor test, "
                "and choosing a model on it rewards memorising; hold out a part of train instead."
            )
        return out


@dataclass(frozen=True, slots=True, eq=False)
class KnowledgeGraph:
    """Triples in three splits, names, and features by modality. Construction checks every shape and id (InputError).

    Attributes:
        name: what to call it.
        train, valid, test: int64 [n, 3], in the order head, relation, tail, on the CPU.
        entity_names, relation_names: by id.
        features: float32 [E, D_m] by modality name.
        present: bool [E] by modality name, whether the entity has the modality. Left out: rows that are not entirely zero.
        report: what was found in the splits.
    """

    name: str
    train: Tensor
    valid: Tensor
    test: Tensor
    entity_names: list[str]
    relation_names: list[str]
    features: dict[str, Tensor] = field(default_factory=dict)
    present: dict[str, Tensor] = field(default_factory=dict)
    report: SplitReport = field(init=False)

    def __post_init__(self) -> None:
        E, R = self.num_entities, self.num_relations
        splits = {name: as_triples(getattr(self, name), E, R, name) for name in ("train", "valid", "test")}
        for name, matrix in self.features.items():
            if matrix.dtype != torch.float32 or matrix.ndim != 2 or len(matrix) != E:
                raise InputError(
                    f"features[{name!r}]: found {matrix.dtype} of shape {tuple(matrix.shape)}; "
                    f"accepted: float32 of shape ({E}, D), one row an entity"
                )
        present = {name: self.present[name] if name in self.present else (matrix != 0).any(1) for name, matrix in self.features.items()}
        for name, has in present.items():
            if has.dtype != torch.bool or has.shape != (E,):
                raise InputError(f"present[{name!r}]: found {has.dtype} of shape {tuple(has.shape)}; accepted: bool of shape ({E},)")
        for key, value in {**splits, "present": present, "report": SplitReport.of(splits, E, R)}.items():
            object.__setattr__(self, key, value)

    @property
    def num_entities(self) -> int:
        return len(self.entity_names)

    @property
    def num_relations(self) -> int:
        return len(self.relation_names)

    def hold_out_validation(self, fraction: float, seed: int) -> KnowledgeGraph:
        """The same graph with validation taken from train, the old validation dropped.

        Whatever copies of a chosen triple train has leave it together, and every entity and relation of train stays in it.

        Args:
            fraction: share of the distinct triples of train, between 0 and 1; fewer are moved where train could not spare them.
            seed: decides which.

        Raises:
            InputError: `fraction` is out of range, or train cannot spare a single triple.
        """
        if not 0 < fraction < 1:
            raise InputError(f"fraction: found {fraction}; accepted: more than 0 and less than 1")
        count = max(1, round(fraction * self.report.distinct["train"]))
        train, valid = hold_out(self.train, count, self.num_entities, self.num_relations, torch.Generator().manual_seed(seed))
        if not len(valid):
            raise InputError(
                f"fraction: train of {self.name} cannot spare a triple for validation, "
                f"each of its {len(train)} is the only one to mention something"
            )
        return replace(self, train=train, valid=valid)


def hold_out(triples: Tensor, count: int, num_entities: int, num_relations: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Splits triples [n, 3] at random into (kept, held out).

    At most `count` distinct triples are held out, none that mentions what nothing kept mentions; fewer where there are no more such.
    """
    h, r, t = triples.unbind(1)
    _, inverse = torch.unique(pack(h, r, t, num_entities, num_relations)[0], return_inverse=True)
    total = int(inverse.max()) + 1 if len(inverse) else 0
    position = torch.arange(len(triples))
    first = torch.full((total,), len(triples)).scatter_reduce(0, inverse, position, "amin")
    h, r, t = triples[first].unbind(1)
    order = torch.randperm(total, generator=generator)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(total)
    # The last triple in random order to mention an entity or a relation stays: this alone keeps all of them, with no sequential pass.
    last_e = torch.full((num_entities,), -1).scatter_reduce(0, torch.cat([h, t]), rank.repeat(2), "amax")
    last_r = torch.full((num_relations,), -1).scatter_reduce(0, r, rank, "amax")
    needed = (rank == last_e[h]) | (rank == last_e[t]) | (rank == last_r[r])
    held = order[~needed[order]][:count]
    moved = torch.zeros(total, dtype=torch.bool)
    moved[held] = True
    return triples[~moved[inverse]], triples[first[held].sort().values]
