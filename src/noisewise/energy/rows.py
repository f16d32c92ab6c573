"""Rows of numbers as a fit wants them: their conversion to a tensor, and the checks that name what is wrong with them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput

__all__ = ["LEAST_ROWS", "as_rows", "check_rows", "check_varies", "few_rows"]

# With 50 rows in one column the share of one half has a standard error of .07, and a held-out tenth is 5 rows; every column
# adds its own shape to learn. Below 10 rows not even a spread is known.
LEAST_ROWS, _ROWS_PER_COLUMN = 10, 50


def as_rows(data: Any, name: str = "data") -> Tensor:
    """`data` as a tensor: one is taken as it is, arrays, lists and frames in float64. Raises `InvalidInput` for text."""
    if isinstance(data, Tensor):
        return data.detach()
    try:
        # copied: an array may be read-only or run backwards, which torch does not take
        return torch.tensor(np.asarray(data, dtype=np.float64))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"{name} must be rows of numbers, [row, dim]: {_text_column(data) or error}") from error


def _text_column(frame: Any) -> str | None:
    """Which column of a frame is no numbers, in words; None for what is no frame."""
    for number, column in enumerate(getattr(frame, "columns", ()), 1):
        try:
            np.asarray(frame[column], dtype=np.float64)
        except (TypeError, ValueError) as error:
            return f"column {number} ({column!r}) is not: {error}; drop or encode it"
    return None


def check_varies(data: Float[Tensor, "row dim"], names: Sequence[str] = ()) -> None:
    """Raise `InvalidInput` for a column that holds one value; columns are counted from 1 and named where `names` are known."""
    constant = (data.amax(0) == data.amin(0)).nonzero().flatten().tolist()
    if constant:
        first = constant[0]
        raise InvalidInput(
            f"column {first + 1}" + (f" ({names[first]!r})" if len(names) else "") + f" is constant at {data[0, first]:g}"
            + (f" (and {len(constant) - 1} more)" if len(constant) > 1 else "")
            + ": such data have no density; remove it"
        )  # fmt: skip


def few_rows(data: Float[Tensor, "row dim"]) -> str | None:
    """What to say of data with fewer rows than a density of their columns can be learnt from; None where there are enough."""
    rows, columns = data.shape
    if rows >= _ROWS_PER_COLUMN * columns:
        return None
    return (
        f"{rows} rows in {columns} column{'s' * (columns > 1)} are few: with less than {_ROWS_PER_COLUMN} a column, densities "
        "and weights say little about other rows of their kind; give more rows or fewer columns"
    )


def check_rows(data: Float[Tensor, "row *event"], least: int = 2) -> None:
    """Raise `InvalidInput` unless there are `least` rows or more, all finite; the first rows that are not are named."""
    if data.ndim < 2 or len(data) < least or not data[:1].numel():
        raise InvalidInput(f"data must be [row, dim] with at least {least} rows, got shape {tuple(data.shape)}")
    bad = (~torch.isfinite(data).flatten(1).all(1)).nonzero().flatten().tolist()
    if bad:
        shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        raise InvalidInput(
            f"{len(bad)} of {len(data)} data rows hold NaN or infinite values (index {shown}, from 0): remove or fill them"
        )
