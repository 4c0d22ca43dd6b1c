"""What arguments are refused for, said in one way. A check costs well under a microsecond where it passes; nothing here
looks at values on a device.

Importable without torch: the configuration uses it too.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from dhns_fast.errors import InputError, Shown, shown

if TYPE_CHECKING:
    import torch
    from torch import Tensor


# The largest seed that torch's generators take.
SEEDS = 2**63 - 1


def one_of(argument: str, value: object, accepted: Collection[Any]) -> None:
    """Refuse a value that is not among the accepted ones; a near miss of a name is suggested."""
    try:
        known = value in accepted
    except (TypeError, ValueError, RuntimeError):  # not hashable, or a comparison element by element
        known = False
    if known:
        return
    choices = ", ".join(map(str, accepted))
    if isinstance(value, str):
        import difflib

        near = difflib.get_close_matches(value.lower(), [str(x) for x in accepted], 1)
        choices += f" (did you mean {near[0]!r}?)" if near else ""
    raise InputError(argument, value, choices)


def whole(argument: str, value: object, least: int | None = None, most: int | None = None) -> None:
    """Refuse what is not an integer in `least`..`most` (None: no bound); a bool is no integer. What torch.compile has
    in the place of one that changes from call to call is, and is asked about the bounds.
    """
    number: Any = value
    if (
        (isinstance(value, int) or type(value).__name__ == "SymInt")
        and not isinstance(value, bool)
        and (least is None or number >= least)
        and (most is None or number <= most)
    ):
        return
    if least is not None and most is not None:
        accepted = f"integers from {least} to {most}"
    elif least is not None:
        accepted = f"integers of at least {least}"
    else:
        accepted = "integers" if most is None else f"integers of at most {most}"
    raise InputError(argument, value, accepted)


def count(argument: str, value: object, least: int = 1, most: int | None = None) -> int:
    """`value` as an int where it is an integer of any library (NumPy's, a tensor without dimensions) in `least`..`most`
    (None: no bound); a bool is not.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        number = None
    if number is None or number < least or (most is not None and number > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise InputError(argument, value, f"integers {bounds}")
    return number


def finite(**numbers: object) -> None:
    """Refuse what is no finite real number; a number of any library is one, None and a text are not."""
    for name, value in numbers.items():
        try:
            fine = not isinstance(value, (str, bytes)) and math.isfinite(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError, RuntimeError):
            fine = False
        if not fine:
            raise InputError(name, value, "finite numbers")


def flag(**values: object) -> None:
    """Refuse what is no bool: the word "no" is true to Python."""
    for name, value in values.items():
        if type(value).__name__ not in ("bool", "bool_"):
            raise InputError(name, value, "True or False")


def instance(kind: type | tuple[type, ...], accepted: str, **values: object) -> None:
    """Refuse what is not of a kind, `accepted` in words; None passes."""
    for name, value in values.items():
        if value is not None and not isinstance(value, kind):
            raise InputError(name, Shown(f"{shown(value)} ({type(value).__name__})"), accepted)


def shapes(**tensors: tuple[Tensor | None, str]) -> dict[str, int]:
    """Refuse tensors whose shapes do not fit their specifications and one another.

    Args:
        tensors: name=(tensor or None, specification); a specification is sizes between blanks, each a letter that
            stands for one size in all of them (`"B D"`), a number, or `_` for anything. None passes.

    Returns:
        the size of each letter.
    """
    sizes: dict[str, int] = {"_": -1}
    for name, (x, specification) in tensors.items():
        if x is None:
            continue
        letters, shape = specification.split(), x.shape
        fits = len(letters) == len(shape)
        if fits:
            for letter, size in zip(letters, shape, strict=True):
                known = sizes.get(letter)
                if known is None:
                    known = sizes[letter] = int(letter) if letter.isdigit() else size
                if known != size and letter != "_":
                    fits = False
                    break
        if not fits:
            before: dict[str, int] = {}
            for other, (y, text) in tensors.items():
                if other == name:
                    break
                before.update(() if y is None else zip(text.split(), y.shape, strict=True))
            accepted = ", ".join(
                f"{x} = {before[x]}" if x in before and not x.isdigit() and x != "_" else x for x in letters
            )
            raise InputError(name, Shown(f"shape {list(shape)}"), f"[{accepted}]")
    return sizes


def floating(**tensors: Tensor | None) -> None:
    """Refuse tensors that are not of a floating-point dtype that torch computes with, as it does not with those of a
    byte; None passes.
    """
    for name, x in tensors.items():
        if x is not None and not (x.dtype.is_floating_point and x.dtype.itemsize > 1):
            raise InputError(name, x, "floating-point dtypes of at least 16 bits")


def dtype(accepted: torch.dtype, **tensors: Tensor | None) -> None:
    """Refuse tensors of another dtype; None passes."""
    for name, x in tensors.items():
        if x is not None and x.dtype != accepted:
            raise InputError(name, x, str(accepted))


def alike(anchor_name: str, anchor: Tensor, **tensors: Tensor | None) -> None:
    """Refuse tensors whose dtype or device is not the anchor's; None passes."""
    dtype, device = anchor.dtype, anchor.device
    for name, x in tensors.items():
        if x is not None and (x.dtype != dtype or x.device != device):
            raise InputError(name, Shown(f"{x.dtype} on {x.device}"), f"{dtype} on {device}, as {anchor_name}")


def on_device(anchor_name: str, anchor: Tensor, **tensors: Tensor | None) -> None:
    """Refuse tensors that are not where the anchor is; None passes."""
    device = anchor.device
    for name, x in tensors.items():
        if x is not None and x.device != device:
            raise InputError(name, Shown(f"a tensor on {x.device}"), f"{device}, as {anchor_name}")


def real(anchor_name: str, anchor: Tensor, **tensors: Tensor | None) -> None:
    """Refuse tensors without values ("meta") beside an anchor that has some: torch reads memory that nobody wrote for
    them. None passes.
    """
    for name, x in tensors.items():
        if x is not None and x.device.type == "meta" and anchor.device.type != "meta":
            raise InputError(name, Shown("a tensor on meta"), f"{anchor.device}, as {anchor_name}")


def tensor(**values: object) -> None:
    """Refuse what is no tensor, with the way to make it one."""
    torch = sys.modules.get("torch")
    for name, value in values.items():
        if torch is None or not isinstance(value, torch.Tensor):
            raise InputError(
                name, Shown(type(value).__name__), "a torch.Tensor (torch.as_tensor makes one of a list or an array)"
            )
