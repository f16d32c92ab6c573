"""ListOps (Nangia & Bowman 2018) in the long form of the Long Range Arena, by its rules and the same in every process."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from noisewise.errors import InvalidInput, NoisewiseError
from noisewise.typing import check_count

__all__ = ["CLOSE", "OPERATORS", "PAD", "VOCABULARY", "acceptance", "arrays", "encode", "evaluate", "generate"]

PAD, CLOSE = "<pad>", "]"
OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
# a token is its place here; padding is 0
VOCABULARY = (PAD, *"0123456789", *OPERATORS, CLOSE)

_CODES = {token: code for code, token in enumerate(VOCABULARY)}
_DIGIT, _OPERATOR, _CLOSE = _CODES["0"], _CODES["[MIN"], _CODES[CLOSE]
# share of nodes that are operators
_INNER = 0.25
# trees that are drawn at once; it is part of what a seed means
_BATCH = 1024
# batches without a new sequence, after which there is no hope of one
_PATIENCE = 2000
# a request that fewer trees meet is refused
_RAREST = 1e-7


class _Level(NamedTuple):
    """The nodes of one depth of many trees, in order: whether each is an operator, how many children it has, its symbol."""

    tree: Int[np.ndarray, " node"]
    children: Int[np.ndarray, " node"]
    symbol: Int[np.ndarray, " node"]

    def of(self, kept: np.ndarray) -> "_Level":
        """The nodes of the trees that are True in `kept`."""
        chosen = kept[self.tree]
        return _Level(*(field[chosen] for field in self))


def generate(
    n: int, min_length: int = 500, max_length: int = 2000, max_depth: int = 10, max_args: int = 10, seed: int = 0
) -> Iterator[tuple[list[str], int]]:
    """Yield `n` different pairs of tokens and value, with `min_length` < number of tokens < `max_length`.

    A node is an operator with probability 1/4 above `max_depth` (the root is at depth 1), with 2 to `max_args` children, all
    numbers equally likely; else a digit. The first sequences do not depend on `n`, and a seed means the same on every machine.
    Raises `InvalidInput` for bounds that contradict themselves, `NoisewiseError` where (almost) no tree meets them or not `n`
    different ones exist.
    Source: Nangia & Bowman, NAACL 2018 workshop; bounds of Tay et al., ICLR 2021 (arXiv 2011.04006).
    """
    n = check_count("n", n)
    bounds = _checked(min_length, max_length, max_depth, max_args)
    seed = check_count("seed", seed, 0)
    _refuse_hopeless(n, *bounds)
    return _generate(n, *bounds, seed)


def arrays(
    n: int, min_length: int = 500, max_length: int = 2000, max_depth: int = 10, max_args: int = 10, seed: int = 0
) -> tuple[Int[np.ndarray, "n max_length"], Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Codes of the tokens, padded with 0, the values and the lengths of what `generate` yields."""
    drawn = generate(n, min_length, max_length, max_depth, max_args, seed)
    codes, values, lengths = np.zeros((n, max_length), np.int64), np.zeros(n, np.int64), np.zeros(n, np.int64)
    for row, (tokens, value) in enumerate(drawn):
        lengths[row], values[row] = len(tokens), value
        codes[row, : len(tokens)] = encode(tokens)
    return codes, values, lengths


def encode(tokens: Sequence[str]) -> list[int]:
    """The place of each token in `VOCABULARY`. Raises `InvalidInput` for others."""
    try:
        return [_CODES[token] for token in tokens]
    except KeyError as error:
        raise InvalidInput(f"there is no token {error.args[0]!r}; known: {' '.join(VOCABULARY)}") from None


def evaluate(tokens: Sequence[str]) -> int:
    """The value of one expression. Raises `InvalidInput` for what is none, with the place where it breaks.

    MED is the mean of the two middle values where their number is even, cut to a whole number; SM the sum modulo 10.
    """
    outer: list[tuple[str, list[int]]] = []
    operator, values = "", list[int]()
    for place, token in enumerate(tokens):
        if token in OPERATORS:
            outer.append((operator, values))
            operator, values = token, []
        elif token == CLOSE:
            if not outer or not values:
                raise InvalidInput(f"token {place} closes {'nothing' if not outer else f'{operator} without values'}")
            value = _OF[operator](values)
            operator, values = outer.pop()
            values.append(value)
        elif len(token) == 1 and token in _CODES:
            values.append(int(token))
        else:
            raise InvalidInput(f"token {place} is {token!r}; an expression has {' '.join(VOCABULARY[1:])}")
    if outer or len(values) != 1:
        said = f"{len(outer)} operators are never closed" if outer else f"{len(values)} values stand side by side"
        raise InvalidInput(f"not one expression: {said}")
    return values[0]


def _median(values: list[int]) -> int:
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) // 2


_OF: dict[str, Callable[[list[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": _median,
    "[SM": lambda values: sum(values) % 10,
}


def acceptance(min_length: int, max_length: int, max_depth: int, max_args: int) -> float:
    """The share of all random trees whose length lies strictly between the bounds, exactly."""
    bounds = _checked(min_length, max_length, max_depth, max_args)
    leaf = np.eye(1, bounds[1], 1)[0]
    found = leaf
    for _ in range(bounds[2] - 1):
        found = (1 - _INNER) * leaf + _INNER / (bounds[3] - 1) * _nodes(found, bounds[3])
    return float(found[bounds[0] + 1 :].sum())


def _distinct(min_length: int, max_length: int, max_depth: int, max_args: int) -> float:
    """How many different sequences there are between the bounds; infinity where a float cannot hold it."""
    leaf = 10 * np.eye(1, max_length, 1)[0]
    found = leaf
    for _ in range(max_depth - 1):
        # beyond this nobody asks for all of them, and infinity times zero is not a number
        found = np.minimum(leaf + len(OPERATORS) * _nodes(found, max_args), 1e30)
    return float(found[min_length + 1 :].sum())


def _nodes(child: Float[np.ndarray, " length"], max_args: int) -> Float[np.ndarray, " length"]:
    """Series of an operator's length, by that of a child: two tokens, and 2 to `max_args` children."""
    size, total = len(child), np.zeros(len(child))
    # children are at least one token each
    for _ in range(min(max_args, size) - 1):
        total = np.convolve(np.minimum(total, 1e30), child)[:size]
        total += child
    both = np.convolve(np.minimum(total, 1e30), child)[:size]
    return np.concatenate([np.zeros(2), both])[:size]


def _checked(min_length: int, max_length: int, max_depth: int, max_args: int) -> tuple[int, int, int, int]:
    least, most = check_count("min_length", min_length, 0), check_count("max_length", max_length, 2)
    depth, args = check_count("max_depth", max_depth), check_count("max_args", max_args, 2)
    if most - least < 2:
        raise InvalidInput(f"no length lies strictly between min_length={least} and max_length={most}: move them apart")
    return least, most, depth, args


def _refuse_hopeless(n: int, min_length: int, max_length: int, max_depth: int, max_args: int) -> None:
    asked = f"min_length={min_length}, max_length={max_length}, max_depth={max_depth}, max_args={max_args}"
    share = acceptance(min_length, max_length, max_depth, max_args)
    if share < _RAREST:
        said = "no tree" if not share else f"one tree in {1 / share:.0e}"
        raise NoisewiseError(f"{said} meets {asked}: move the lengths apart, or allow deeper or wider trees")
    known = _distinct(min_length, max_length, max_depth, max_args)
    if n > known:
        raise NoisewiseError(f"there are {known:.0f} different sequences with {asked}, but n={n} were asked for")


def _generate(
    n: int, min_length: int, max_length: int, max_depth: int, max_args: int, seed: int
) -> Iterator[tuple[list[str], int]]:
    bits = np.random.PCG64(seed)
    names = np.array(VOCABULARY)
    seen: set[bytes] = set()
    waited = 0
    while True:
        waited += 1
        for codes in _draw(bits, min_length, max_length, max_depth, max_args):
            mark = hashlib.blake2b(codes.tobytes(), digest_size=16).digest()
            if mark in seen:
                continue
            seen.add(mark)
            waited = 0
            tokens = names[codes].tolist()
            yield tokens, evaluate(tokens)
            if len(seen) == n:
                return
        if waited >= _PATIENCE:
            raise NoisewiseError(
                f"{len(seen)} of {n} different sequences were found, and no new one among {_PATIENCE * _BATCH} trees: ask for "
                "fewer, or move the lengths apart"
            )


def _draw(
    bits: np.random.PCG64, min_length: int, max_length: int, max_depth: int, max_args: int
) -> Iterator[Int[np.ndarray, " length"]]:
    """The codes of those of a batch of random trees that fit, drawn depth by depth: all nodes are independent."""
    levels: list[_Level] = []
    tree, length = np.arange(_BATCH), np.zeros(_BATCH, np.int64)
    for depth in range(1, max_depth + 1):
        inner = _uniform(bits, len(tree)) > 1 - _INNER if depth < max_depth else np.zeros(len(tree), bool)
        children = np.where(inner, 2 + (_uniform(bits, len(tree)) * (max_args - 1)).astype(np.int64), 0)
        digit, operator = ((_uniform(bits, len(tree)) * count).astype(np.int64) for count in (10, len(OPERATORS)))
        level = _Level(tree, children, np.where(inner, _OPERATOR + operator, _DIGIT + digit))
        length += np.bincount(tree, 1 + inner, _BATCH).astype(np.int64)
        # a child will be at least one token more
        kept = length + np.bincount(tree, children, _BATCH) < max_length
        levels = [one.of(kept) for one in (*levels, level)]
        tree = np.repeat(levels[-1].tree, levels[-1].children)
        if not len(tree):
            break
    kept &= length > min_length
    yield from _written([one.of(kept) for one in levels], length)


def _uniform(bits: np.random.PCG64, size: int) -> Float[np.ndarray, " size"]:
    # the raw stream is promised never to change, the methods of numpy's Generator are not
    return (bits.random_raw(size) >> np.uint64(11)) * 2.0**-53


def _written(levels: list[_Level], length: Int[np.ndarray, " tree"]) -> Iterator[Int[np.ndarray, " length"]]:
    """The codes of each tree: the extents of nodes from the leaves up, their places from the roots down."""
    extents = [1 + (level.children > 0) for level in levels]
    for depth in range(len(levels) - 2, -1, -1):
        parent = np.repeat(np.arange(len(levels[depth].tree)), levels[depth].children)
        inside = np.bincount(parent, extents[depth + 1], len(levels[depth].tree))
        extents[depth] = extents[depth] + inside.astype(np.int64)
    trees = levels[0].tree
    ends = np.cumsum(length[trees])
    codes = np.zeros(int(ends[-1]) if len(ends) else 0, np.int64)
    place = ends - length[trees]
    for depth, level in enumerate(levels):
        codes[place] = level.symbol
        inner = level.children > 0
        codes[(place + extents[depth])[inner] - 1] = _CLOSE
        if depth + 1 < len(levels):
            # siblings stand one after another, the first behind its operator
            before = np.cumsum(extents[depth + 1]) - extents[depth + 1]
            first = np.cumsum(level.children) - level.children
            begin = np.repeat(before[first[inner]], level.children[inner])
            place = np.repeat(place + 1, level.children) + before - begin
    yield from np.split(codes, ends[:-1]) if len(ends) else ()
