from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dhns_fast.data import load
from dhns_fast.errors import DataError, InputError

ROWS = torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.5, -4.0]])
PRESENT = torch.tensor([True, True, False])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.tsv").write_text("a\tr\tb\nb\tr\tc\n")
    return tmp_path


@pytest.mark.parametrize(
    ("suffix", "save", "present"),
    [
        (".npy", lambda path: np.save(path, ROWS.numpy().astype(np.float16)), None),
        (".npy", lambda path: np.save(path, ROWS.double().numpy()), None),
        (".npz", lambda path: np.savez(path, any=ROWS.numpy()), None),
        (
            ".npz",
            lambda path: np.savez(path, features=ROWS.numpy(), other=ROWS.numpy(), present=PRESENT.numpy()),
            PRESENT,
        ),
        (".safetensors", lambda path: save_file({"features": ROWS.half(), "present": PRESENT}, path), PRESENT),
        (".safetensors", lambda path: save_file({"matrix": ROWS.bfloat16()}, path), None),
        (".pth", lambda path: torch.save(ROWS, path), None),
        (".pt", lambda path: torch.save({"a": torch.ones(3), "b": ROWS}, path), None),
        (
            ".pth",
            lambda path: torch.save(torch.nn.Embedding.from_pretrained(ROWS, freeze=False).state_dict(), path),
            None,
        ),
    ],
)
def test_every_format_gives_float32_and_presence(
    folder: Path, suffix: str, save: Callable[[Path], object], present: torch.Tensor | None
) -> None:
    save(folder / f"text{suffix}")
    kg = load(folder)
    assert kg.features["text"].dtype == torch.float32
    assert not kg.features["text"].requires_grad
    assert torch.equal(kg.features["text"], ROWS)
    # Without `present`, the row of zeros lacks the modality.
    assert torch.equal(kg.present["text"], torch.tensor([True, False, True]) if present is None else present)


def test_choosing_modalities(folder: Path) -> None:
    np.save(folder / "text.npy", ROWS.numpy())
    np.save(folder / "image.npy", ROWS.numpy() + 1)
    assert list(load(folder).features) == ["image", "text"]
    assert list(load(folder, features=["text"]).features) == ["text"]
    assert list(load(folder, features="text").features) == ["text"]
    assert load(folder, features=[]).features == {}
    np.save(folder / "empty.npy", 0 * ROWS.numpy())
    assert load(folder, features="empty").notes == (
        "empty.npy: no entity has it, as all its rows are zeros or masked.",
    )
    (folder / "empty.npy").unlink()
    other = load(folder, features={"sound": folder / "image.npy"})
    assert torch.equal(other.features["sound"], ROWS + 1)
    with pytest.raises(InputError, match=r"^features: got 'smell', which is not in .*; accepted: image, text$"):
        load(folder, features=["smell"])
    (folder / "image.npy").unlink()
    (folder / "text.npy").unlink()
    with pytest.raises(InputError, match=r"accepted: none, the folder has no feature file$"):
        load(folder, features=["text"])


@pytest.mark.parametrize(
    ("name", "save", "message"),
    [
        ("text.npy", lambda path: np.save(path, np.ones((4, 2))), r"found 4 rows; accepted: 3, one an entity$"),
        (
            "text.npy",
            lambda path: np.save(path, np.array([[1, 2], [3, np.nan], [np.nan, 0]])),
            r"found nan in row 1, column 1; accepted: finite numbers up to 1e\+15 \(a row that the bool array `present` rules out",
        ),
        (
            "text.npy",
            lambda path: np.save(path, np.array([[1, 2], [3, 4], [1e300, 0]])),
            r"found 1e\+300 in row 2, column 0; accepted: finite numbers up to 1e\+15",
        ),
        (
            "text.npy",
            lambda path: np.save(path, np.ones(3)),
            r"found \[3\] float64; accepted: one matrix of numbers \[3, D\], named `features`",
        ),
        (
            "text.npy",
            lambda path: np.save(path, np.array([["a"]] * 3)),
            r"found \[3, 1\] <U1; accepted: one matrix of numbers",
        ),
        ("text.npy", lambda path: path.write_bytes(b""), r"cannot be read as \.npy: "),
        (
            "text.npz",
            lambda path: np.savez(path, u=ROWS, v=ROWS),
            r"found u \[3, 2\] float32, v \[3, 2\] float32, none of them named after an entity; accepted: one matrix",
        ),
        (
            "text.npz",
            lambda path: np.savez(path, features=ROWS, present=[1, 0, 1]),
            r"`present` is \[3\] int64; accepted: bool of shape \[3\]$",
        ),
        ("text.pth", lambda path: torch.save([], path), r"found a list; accepted: a matrix, or a dict of tensors$"),
        ("text.safetensors", lambda path: path.write_bytes(b"no such thing"), r"cannot be read as \.safetensors: "),
    ],
)
def test_a_broken_file_is_one_error(folder: Path, name: str, save: Callable[[Path], object], message: str) -> None:
    save(folder / name)
    with pytest.raises(DataError, match=message) as caught:
        load(folder)
    assert str(caught.value).startswith(f"{folder / name}: ")


def test_missing_file_unknown_extension_and_two_files_of_a_modality(folder: Path) -> None:
    with pytest.raises(DataError, match=r"none\.npy: cannot be read: No such file or directory$"):
        load(folder, features={"text": folder / "none.npy"})
    with pytest.raises(
        DataError,
        match=r"text\.csv: found the extension '\.csv'; accepted: \.npy, \.npz, \.pth, \.pt, \.safetensors, \.h5, \.hdf5$",
    ):
        load(folder, features={"text": folder / "text.csv"})
    np.save(folder / "text.npy", ROWS.numpy())
    torch.save(ROWS, folder / "text.pth")
    with pytest.raises(
        DataError, match=r"text\.pth: text\.npy holds the modality 'text' too; accepted: one file a modality$"
    ):
        load(folder)
    assert torch.equal(load(folder, features={"text": folder / "text.pth"}).features["text"], ROWS)


def test_a_home_in_a_path_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    np.save(folder / "text.npy", ROWS.numpy())
    kg = load(f"~/{folder.name}")
    assert kg.name == folder.name
    assert list(load(f"~/{folder.name}", features={"t": f"~/{folder.name}/text.npy"}).features) == ["t"]
    with pytest.raises(InputError, match=r"^data: got '~no such user/kg'; accepted: a path whose `~`"):
        load("~no such user/kg")
