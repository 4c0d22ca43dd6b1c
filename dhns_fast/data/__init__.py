"""Knowledge graphs: readers, writer, filter of known answers, corruption, synthetic graphs."""

from dhns_fast.data.convert import convert
from dhns_fast.data.filter import CSRFilter, Ragged
from dhns_fast.data.graph import KnowledgeGraph
from dhns_fast.data.load import EMBEDDED, load
from dhns_fast.data.negatives import NegativeSampler
from dhns_fast.data.planted import synthetic
from dhns_fast.data.splits import SplitReport
from dhns_fast.data.types import TypeConstraints
from dhns_fast.data.write import write

__all__ = [
    "EMBEDDED",
    "CSRFilter",
    "KnowledgeGraph",
    "NegativeSampler",
    "Ragged",
    "SplitReport",
    "TypeConstraints",
    "convert",
    "load",
    "synthetic",
    "write",
]
