"""What the splits of a graph look like, and how a part of one is held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from dhns_fast.catalogue import SPLITS
from dhns_fast.data.filter import INT64_END, pack
from dhns_fast.errors import printable

# Above this share of distinct validation triples found in train or test, choosing a model on them rewards memorising.
# Clean benchmarks have none; the published validation file of DB15K has 99 %.
CONTAMINATED = 0.05
HELD = SPLITS[1:]
# Pairs of relations that a sentence names.
FEW = 3
# Triples of train with one pair of entities that are looked at: a graph of two entities has any number.
PARALLEL = 256


# A relation counts as giving another away where train answers MOSTLY of the other's held-out triples, or from LEAKS
# such triples on OFTEN of them, where that is also 10 times what chance would do. 94 % of WN18RR's derivationally
# related forms are in train the other way round, 80 % of MKG-Y's `playsFor` as `isAffiliatedTo`, and of the embedded
# graph none.
MOSTLY, OFTEN, LEAKS = 0.5, 0.1, 3


@dataclass(frozen=True, slots=True)
class Leak:
    """Triples of `relation` whose two entities train connects by `other`: the other way round (`inverse`), or the same
    way.

    `relation` and `other` are names; they are one where a relation is its own inverse. `count` has the distinct triples
    of "valid" and "test".
    """

    relation: str
    other: str
    inverse: bool
    count: dict[str, int]

    def pair(self) -> str:
        """The two relations in words."""
        relation, other = (
            repr(printable(name if len(name) <= 40 else f"…{name[-32:]}")) for name in (self.relation, self.other)
        )
        return f"{relation} is its own inverse" if self.relation == self.other else f"{relation} by {other}"


@dataclass(frozen=True, slots=True)
class SplitReport:
    """What was found in the splits. Overlaps count distinct triples; the other counts are of lines.

    Attributes:
        size, distinct: triples, and distinct triples, of "train", "valid" and "test".
        valid_in_train, test_in_train, test_in_valid: overlaps.
        valid_elsewhere: distinct validation triples found in train or in test.
        unseen_entity, unseen_relation: triples of "valid" and "test" that mention an entity (a relation) which train
            does not.
        leaks: pairs of relations of which one in train gives away the other in "valid" and "test" (`x parent y`, `y
            child x`), most first.
        inverse, duplicate: distinct triples of "valid" and "test" that an inverse relation (a relation of the same
            sense) gives away.
    """

    size: dict[str, int]
    distinct: dict[str, int]
    valid_in_train: int
    test_in_train: int
    test_in_valid: int
    valid_elsewhere: int
    unseen_entity: dict[str, int]
    unseen_relation: dict[str, int]
    leaks: tuple[Leak, ...] = ()
    inverse: dict[str, int] = field(default_factory=lambda: dict.fromkeys(HELD, 0))
    duplicate: dict[str, int] = field(default_factory=lambda: dict.fromkeys(HELD, 0))

    @classmethod
    def of(cls, splits: dict[str, Tensor], num_entities: int, relation_names: Sequence[str]) -> SplitReport:
        """The report of splits "train", "valid", "test" [n, 3]. Memory: some 32 bytes a triple while it is made."""
        num_relations = len(relation_names)
        if num_entities * num_relations * num_entities < INT64_END:
            keys = [
                pack(x[:, 0], x[:, 1], x[:, 2], num_entities, num_relations)[0] for x in map(splits.__getitem__, SPLITS)
            ]
        else:  # pairs are numbered over all splits
            head, tie, tail = torch.cat([splits[name] for name in SPLITS]).unbind(1)
            keys = list(
                pack(head, tie, tail, num_entities, num_relations)[0].split([len(splits[name]) for name in SPLITS])
            )
        train, valid, test = (torch.unique(key) for key in keys)
        del keys
        in_train, in_test = torch.isin(valid, train, assume_unique=True), torch.isin(valid, test, assume_unique=True)
        entity, relation = torch.zeros(num_entities, dtype=torch.bool), torch.zeros(num_relations, dtype=torch.bool)
        entity[splits["train"][:, [0, 2]].flatten()] = True
        relation[splits["train"][:, 1]] = True
        held = {name: splits[name] for name in HELD}
        return cls(
            size={name: len(splits[name]) for name in SPLITS},
            distinct={"train": len(train), "valid": len(valid), "test": len(test)},
            valid_in_train=int(in_train.sum()),
            test_in_train=int(torch.isin(test, train, assume_unique=True).sum()),
            test_in_valid=int(in_test.sum()),
            valid_elsewhere=int((in_train | in_test).sum()),
            unseen_entity={name: int((~entity[x[:, [0, 2]]]).any(1).sum()) for name, x in held.items()},
            unseen_relation={name: int((~relation[x[:, 1]]).sum()) for name, x in held.items()},
            **_leaks(splits, num_entities, relation_names),
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON holds it; :meth:`from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SplitReport:
        return cls(**{**values, "leaks": tuple(Leak(**leak) for leak in values["leaks"])})

    @property
    def duplicates(self) -> dict[str, int]:
        """Lines of each split that repeat an earlier line of it."""
        return {name: self.size[name] - self.distinct[name] for name in self.size}

    @property
    def contaminated_validation(self) -> bool:
        """Whether validation cannot be trusted: it is empty, or more than 5 % of its distinct triples are also in train
        or test.
        """
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
        ways = (
            ("the other way round, under an inverse relation", self.inverse, True),
            ("under another relation with the same entities", self.duplicate, False),
        )
        for kind, counts, inverse in ways:
            for name, count in counts.items():
                if count:
                    pairs = [leak.pair() for leak in self.leaks if leak.inverse == inverse and leak.count[name]]
                    named = "; ".join([*pairs[:FEW], *([f"{len(pairs) - FEW} more"] if len(pairs) > FEW else [])])
                    out.append(
                        f"{name}: {count} of {self.distinct[name]} distinct triples are in train {kind} ({named}): a model can copy them."
                    )
        for what, counts in (("an entity", self.unseen_entity), ("a relation", self.unseen_relation)):
            out += [
                f"{name}: {n} of {self.size[name]} triples mention {what} that train does not."
                for name, n in counts.items()
                if n
            ]
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


def _leaks(splits: dict[str, Tensor], num_entities: int, names: Sequence[str]) -> dict[str, Any]:
    """`leaks`, `inverse` and `duplicate` of a report: what train says of the two entities of held-out triples."""
    R, train = len(names), splits["train"]
    pair, order = (train[:, 0] * num_entities + train[:, 2]).sort()
    relation, size = train[order, 1], train[:, 1].bincount(minlength=R)
    held = {name: torch.unique(splits[name], dim=0) for name in HELD}
    total = torch.cat(list(held.values()))[:, 1].bincount(minlength=R)
    leaks: list[Leak] = []
    given: dict[bool, dict[str, int]] = {}
    for inverse in (True, False):
        # (relation · R + other, which triple) of every pair of a held-out triple and a triple of train with its
        # entities.
        found = {}
        for name, x in held.items():
            h, r, t = x.unbind(1)
            key = t * num_entities + h if inverse else h * num_entities + t
            first = torch.searchsorted(pair, key)
            count = (torch.searchsorted(pair, key, right=True) - first).clamp_(max=PARALLEL)
            row = torch.arange(len(x)).repeat_interleave(count)
            place = first[row] + torch.arange(len(row)) - (count.cumsum(0) - count)[row]
            code = r[row] * R + relation[place]
            # A triple that train holds as it is has leaked already, and a loop is its own reverse.
            of_itself = (h == t)[row] if inverse else r[row] == relation[place]
            # Each pair of relations once a triple, however often train repeats it.
            found[name] = torch.unique(torch.stack([code, row], 1)[~of_itself], dim=0)
        codes, count = torch.unique(torch.cat([x[:, 0] for x in found.values()]), return_counts=True)
        r, other = codes // R, codes % R
        chance = total[r].double() * size[other] / num_entities**2
        share = count / total[r]
        certain = (share >= OFTEN) & (count >= LEAKS) & (count > 10 * chance)
        leaky = certain | (share >= MOSTLY) & (inverse | (count >= LEAKS))
        given[inverse] = {name: len(x[torch.isin(x[:, 0], codes[leaky]), 1].unique()) for name, x in found.items()}
        for code in codes[leaky][count[leaky].argsort(descending=True, stable=True)].tolist():
            counts = {name: int((x[:, 0] == code).sum()) for name, x in found.items()}
            leaks.append(Leak(names[code // R], names[code % R], inverse, counts))
    return {"leaks": tuple(leaks), "inverse": given[True], "duplicate": given[False]}


def hold_out(
    triples: Tensor, count: int, num_entities: int, num_relations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Splits triples [n, 3] at random into (kept, held out).

    At most `count` distinct triples are held out, none that mentions what nothing kept mentions; fewer where there are
    no more such.
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
    # The last triple in random order to mention an entity or a relation stays: this alone keeps all of them, with no
    # sequential pass.
    last_e = torch.full((num_entities,), -1).scatter_reduce(0, torch.cat([h, t]), rank.repeat(2), "amax")
    last_r = torch.full((num_relations,), -1).scatter_reduce(0, r, rank, "amax")
    needed = (rank == last_e[h]) | (rank == last_e[t]) | (rank == last_r[r])
    held = order[~needed[order]][:count]
    moved = torch.zeros(total, dtype=torch.bool)
    moved[held] = True
    return triples[~moved[inverse]], triples[first[held].sort().values]
