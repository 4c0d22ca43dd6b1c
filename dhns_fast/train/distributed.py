"""Several processes that train one model: who they are, what each one does of a batch, and checkpoints that any number
of them reads.

    python -m torch.distributed.run --standalone --nproc-per-node 4 -m dhns_fast train --output FOLDER ...

The entity table and its optimiser state are split by rows (:class:`dhns_fast.optim.sharded.ShardedEmbedding`);
everything else is small and kept whole by every process, its gradients summed. All processes draw the same batch,
corruptions and noise from the run's seed and take a share of each, so that what is learnt does not depend on their
number but for the order in which sums are taken.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dhns_fast import files
from dhns_fast.errors import DataError
from dhns_fast.optim import RowOptimizer, Together
from dhns_fast.optim.sharded import share
from dhns_fast.train import checkpoint

# Names of what torch.distributed.run sets for every process that it starts.
RANK, PROCESSES, RESTARTS = "RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"


def launched() -> bool:
    """Whether torch.distributed.run, or another launcher that speaks its language, started this process."""
    return RANK in os.environ and PROCESSES in os.environ


def restarted() -> bool:
    """Whether the launcher starts its processes anew after one of them has died."""
    return launched() and int(os.environ.get(RESTARTS, "0")) > 0


@dataclass(frozen=True)
class Processes:
    """This process among those that train together; by itself (`group` None) it does everything.

    Attributes:
        group: of torch.distributed, or None.
        rank, count: which of how many.
    """

    group: dist.ProcessGroup | None = None
    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls, device: torch.device) -> Processes:
        """Meet the others where a launcher has started them (NCCL for CUDA devices, gloo elsewhere); alone without
        one.
        """
        if not launched():
            return cls()
        if not dist.is_initialized():
            # A launcher that starts its processes anew keeps its store, in which those that died have left their
            # addresses.
            store, rank, count = next(iter(dist.rendezvous("env://")))  # type: ignore[attr-defined]
            store = dist.PrefixStore(f"dhns_fast/{os.environ.get(RESTARTS, '0')}", store)  # type: ignore[attr-defined]
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=count
            )
        return cls(dist.group.WORLD, dist.get_rank(), dist.get_world_size())

    def leave(self) -> None:
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks to the user."""
        return self.rank == 0

    def part(self, total: int) -> slice:
        """This process's share of `total` rows."""
        return slice(*share(total, self.rank, self.count))

    def sum(self, x: Tensor) -> Tensor:
        """`x` becomes the sum over all processes."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Gradients become sums over all processes, in one message; what has none on a process counts as zero there."""
        if self.group is None:
            return
        learned = [p for p in parameters if p.requires_grad]
        if not learned:
            return
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in learned])
        self.sum(flat)
        for p, grad in zip(learned, flat.split([p.numel() for p in learned]), strict=True):
            p.grad = grad.view_as(p)

    def agree(self, value: Any) -> Any:
        """What the first process says."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """What each process says, in their order."""
        if self.group is None:
            return [value]
        said: list[Any] = [None] * self.count
        dist.all_gather_object(said, value, group=self.group)
        return said

    def wait(self) -> None:
        if self.group is not None:
            dist.barrier(group=self.group)

    def spread(self, x: Tensor, total: int) -> Tensor:
        """A DTensor of `total` rows, divided as Shard(0), whose part here is `x`; `x` itself where one process has all
        of it.
        """
        if self.group is None:
            return x
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        mesh = DeviceMesh.from_group(self.group, x.device.type)
        shape = torch.Size((total, *x.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(x, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def begin(optimizer: torch.optim.Optimizer) -> None:
    """Give an optimiser the state that it otherwise makes in its first step, for a checkpoint to be read into:
    gradients of zero change nothing.
    """
    parts = optimizer.optimizers if isinstance(optimizer, Together) else [optimizer]
    for part in parts:
        if not isinstance(part, RowOptimizer):
            learned = [p for group in part.param_groups for p in group["params"]]
            for p in learned:
                p.grad = torch.zeros_like(p)
            part.step()
            part.zero_grad(set_to_none=True)


def save(folder: Path, name: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], processes: Processes) -> Path:
    """Write a checkpoint of all processes: `folder/name.json` says what it is and in which folder beside it the tensors
    are.

    Tensors go to a folder of a temporary name, by torch.distributed.checkpoint, a file a process. The folder takes its
    own name when every process has written, then the JSON file is replaced, and what it named before is removed: a
    reader finds the old checkpoint or the new one.

    Args:
        tensors: DTensors (:meth:`Processes.spread`), or tensors that are equal on all processes.
        meta: JSON-able, of the first process.

    Raises:
        files.WriteError: it cannot be written; on every process, and the earlier checkpoint stays.
    """
    from torch.distributed.checkpoint import state_dict_saver
    from torch.distributed.checkpoint.api import CheckpointException

    target = processes.agree(f"{name}-{secrets.token_hex(4)}")
    temporary = folder / f"{files.PREFIX}{target}{files.SUFFIX}"
    error: OSError | None = None
    try:
        if processes.first:
            clear(folder, name)
        processes.wait()
        state_dict_saver.save(
            dict(tensors), checkpoint_id=temporary, no_dist=processes.group is None, process_group=processes.group
        )
        digests = _digests(temporary, _written(temporary), processes)
        if processes.first:
            os.replace(temporary, folder / target)
            files.sync(folder)
            before = _named(folder / f"{name}.json")
            content = {"folder": target, "processes": processes.count, "files": digests, "meta": dict(meta)}
            files.write_json(folder / f"{name}.json", content | {files.CHECKSUM: files.digest(content)})
            if before is not None:
                shutil.rmtree(folder / before["folder"], ignore_errors=True)
    except OSError as caught:
        error = caught
    except CheckpointException as caught:  # what a process met while writing, told to all of them
        met = next((x[0] for x in caught.failures.values() if isinstance(x[0], OSError)), None)
        if met is None:
            raise
        error = met
    finally:
        with contextlib.suppress(OSError):
            if processes.first and temporary.exists():
                shutil.rmtree(temporary)
    failed = torch.tensor([0 if error is None else 1])
    if processes.group is not None and dist.get_backend(processes.group) == "nccl":
        failed = failed.cuda()
    if int(processes.sum(failed)):
        raise files.WriteError(
            errno.EIO if error is None else error.errno or errno.EIO,
            "another process could not write its part" if error is None else error.strerror or str(error),
            str(folder / target),
        ) from error
    return folder / f"{name}.json"


def load(
    folder: Path, name: str, tensors: Mapping[str, Tensor], graph: Mapping[str, str], processes: Processes
) -> dict[str, Any]:
    """Read a checkpoint into `tensors`, which are laid out for the processes that read, however many have written.
    Returns its meta.

    Raises:
        DataError: it is missing, damaged, of another graph, or of another model.
    """
    from torch.distributed.checkpoint import state_dict_loader
    from torch.distributed.checkpoint.api import CheckpointException

    path = folder / f"{name}.json"
    found = _named(path)
    if found is None:
        raise DataError(path, "no such checkpoint")
    meta = found["meta"]
    checkpoint.refuse_other_graph(path, meta.get("graph"), graph)
    where = folder / found["folder"]
    wanted = dict(tensors)
    try:
        digests = _digests(where, list(found["files"]), processes)
    except OSError as error:
        raise DataError(where, f"not a readable checkpoint ({error.strerror})") from None
    if damaged := sorted(part for part, digest in found["files"].items() if digests[part] != digest):
        raise DataError(where / damaged[0], f"damaged: its content does not have the checksum that {path.name} names")
    try:
        reader = _reader(where)
        stored = reader.read_metadata().state_dict_metadata
        shapes = {key: tuple(getattr(value, "size", ())) for key, value in stored.items()}
        expected = {key: tuple(x.shape) for key, x in wanted.items()}
        if shapes != expected:
            raise DataError(path, checkpoint.UNFIT)
        with warnings.catch_warnings():
            # One process without a group is what is meant.
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            state_dict_loader.load(
                wanted, storage_reader=reader, no_dist=processes.group is None, process_group=processes.group
            )
    except DataError:
        raise
    except (Exception, CheckpointException) as error:  # whatever a damaged file makes the library raise
        raise checkpoint.unreadable(where, error) from None
    return meta


def _written(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def _digests(folder: Path, names: Sequence[str], processes: Processes) -> dict[str, str]:
    """SHA-256 of files, of which each process reads a share; equal on all of them.

    Raises:
        OSError: a file cannot be read; on every process.
    """
    mine: dict[str, str | None] = {}
    for name in names[processes.rank :: processes.count]:
        try:
            mine[name] = files.digest_of(folder / name)
        except OSError:
            mine[name] = None
    found = {name: digest for part in processes.gather(mine) for name, digest in part.items()}
    if missing := sorted(name for name, digest in found.items() if digest is None):
        raise OSError(errno.EIO, f"{missing[0]} cannot be read", str(folder))
    return found


def _reader(folder: Path) -> Any:
    """Reads a checkpoint of torch.distributed.checkpoint, whose library pickles the description: nothing is run of it,
    and nothing made of it but descriptions.
    """
    import pickle

    from torch.distributed.checkpoint import filesystem, metadata

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            found = getattr(sys.modules.get(module), name, None)
            described = module == metadata.__name__ and isinstance(found, type)
            stored = (module, name) in ((filesystem.__name__, "_StorageInfo"), ("torch.serialization", "_get_layout"))
            path = isinstance(found, type) and issubclass(found, PurePath)
            if described or stored or path or found is torch.Size or isinstance(found, torch.dtype):
                return found
            raise pickle.UnpicklingError(f"found {module}.{name}; accepted: descriptions of tensors")

    class Reader(filesystem.FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with (folder / ".metadata").open("rb") as file:
                found = Unpickler(file).load()
            if not isinstance(found, metadata.Metadata):
                raise pickle.UnpicklingError(f"found {type(found).__name__}; accepted: the description of a checkpoint")
            if getattr(found, "storage_meta", None) is None:
                found.storage_meta = metadata.StorageMeta()
            found.storage_meta.load_id = self.load_id  # type: ignore[union-attr]
            return found

    return Reader(folder)


def exists(folder: Path, name: str) -> bool:
    return (folder / f"{name}.json").is_file()


def _named(path: Path) -> dict[str, Any] | None:
    """What the JSON file of a checkpoint says, or None where there is none."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        sealed = found.pop(files.CHECKSUM) == files.digest(found)
        inside = Path(found["folder"]).name == found["folder"]
        parts = isinstance(found["files"], dict) and all(Path(part).name == part for part in found["files"])
        if not (inside and parts and isinstance(found["meta"], dict)):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(path, "not a checkpoint of dhns_fast (no JSON object that names a folder beside it)") from None
    if not sealed:
        raise DataError(path, "damaged: its content does not have the checksum that it names")
    return found


def clear(folder: Path, name: str) -> None:
    """Remove what killed processes have left of checkpoints of this name: folders that were not finished, or that
    nothing names.
    """
    try:
        found = _named(folder / f"{name}.json")
    except DataError:
        return
    keep = None if found is None else found["folder"]
    for path in [*folder.glob(f"{files.PREFIX}{name}-*{files.SUFFIX}"), *folder.glob(f"{name}-" + "[0-9a-f]" * 8)]:
        if path.is_dir() and path.name != keep:
            shutil.rmtree(path, ignore_errors=True)
