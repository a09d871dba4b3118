"""Ways of spoiling what is valid: JSON trees with duplicate keys and hostile values, and bytes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st


class Pairs(list[list[Any]]):
    """A JSON object as pairs of key and value, so that a key may stand twice."""


class Raw(str):
    """JSON text that is written as it stands."""


def parse(text: str | bytes) -> Any:
    """Return JSON with its objects as Pairs."""
    return json.loads(text, object_pairs_hook=lambda pairs: Pairs([key, value] for key, value in pairs))


def dump(value: Any) -> str:
    """Return the JSON text of a tree."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{dump(key)}:{dump(item)}" for key, item in value) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(dump, value)) + "]"
    return json.dumps(value)


HOSTILE: Sequence[Any] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    7,
    2**31 - 1,
    2**31,
    2**40,
    2**62,
    2**63,
    2**64,
    Raw("1" + "0" * 400),
    Raw("1" + "0" * 5000),
    0.5,
    -0.0,
    1e308,
    Raw("NaN"),
    Raw("Infinity"),
    Raw("-Infinity"),
    "",
    "x",
    "1",
    "../../../../etc/passwd",
    "/etc/passwd",
    "a\x00b",
    "line\nbreak\r\n",
    "\ud800",
    "\u202eevil\u2028",
    "<script>alert(1)</script>",
    "A" * 100_000,
    [],
    [[]],
    [None],
    ["x", 1, None],
    [-1, 2**63],
    Pairs(),
    Pairs([["x", Pairs([["y", None]])]]),
    Raw("[" * 5000 + "]" * 5000),
    Raw('{"a":' * 3000 + "1" + "}" * 3000),
)
"""What may stand where something else belongs."""

# copies, since a later change may be to what an earlier one put in
hostile: st.SearchStrategy[Any] = st.sampled_from(HOSTILE).map(copy.deepcopy)


def places(tree: Any) -> list[tuple[Any, int]]:
    """Return every place of a tree: a container and the index in it."""
    found: list[tuple[Any, int]] = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            for index, item in enumerate(node):
                found.append((node, index))
                waiting.append(item[1] if isinstance(node, Pairs) else item)
    return found


def _value(node: Any, index: int) -> Any:
    return node[index][1] if isinstance(node, Pairs) else node[index]


def _put(node: Any, index: int, value: Any) -> None:
    if isinstance(node, Pairs):
        node[index] = [node[index][0], value]
    else:
        node[index] = value


@st.composite
def spoiled(draw: st.DrawFn, tree: Any, keys: Sequence[str] = (), most: int = 3) -> Any:
    """Return a copy of a tree with one to ``most`` things changed; ``keys`` are what a change may be aimed at."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, most))):
        aimed = [(node, i) for node, i in places(tree) if isinstance(node, Pairs) and node[i][0] in keys]
        anywhere = places(tree)
        if not anywhere:
            return draw(hostile)
        use_aim = bool(aimed) and draw(st.booleans())
        node, index = draw(st.sampled_from(aimed if use_aim else anywhere))
        draw(st.sampled_from(_CHANGES))(draw, node, index)
    return tree


def _replace(draw: st.DrawFn, node: Any, index: int) -> None:
    _put(node, index, draw(hostile))


def _nudge(draw: st.DrawFn, node: Any, index: int) -> None:
    value = _value(node, index)
    if isinstance(value, int) and not isinstance(value, bool):
        step = draw(st.sampled_from((-1, 1, -value, value, 2**32, 2**63, -(2**63), 8, -8)))
        _put(node, index, value + step)
    else:
        _put(node, index, draw(hostile))


def _delete(draw: st.DrawFn, node: Any, index: int) -> None:
    del node[index]


def _repeat(draw: st.DrawFn, node: Any, index: int) -> None:
    again = copy.deepcopy(node[index])
    if isinstance(node, Pairs) and draw(st.booleans()):
        again = [again[0], draw(hostile)]
    node.insert(draw(st.sampled_from((index, len(node)))), again)


def _rename(draw: st.DrawFn, node: Any, index: int) -> None:
    if isinstance(node, Pairs):
        node[index] = [draw(st.sampled_from(_KEYS)), node[index][1]]
    else:
        _replace(draw, node, index)


def _add(draw: st.DrawFn, node: Any, index: int) -> None:
    if isinstance(node, Pairs):
        node.insert(index, [draw(st.sampled_from(_KEYS)), draw(hostile)])
    else:
        node.insert(index, draw(hostile))


def _swap(draw: st.DrawFn, node: Any, index: int) -> None:
    other = draw(st.integers(0, len(node) - 1))
    one, two = _value(node, index), _value(node, other)
    _put(node, index, two), _put(node, other, one)


_CHANGES: Sequence[Callable[[Any, Any, int], None]] = (
    _replace,
    _replace,
    _nudge,
    _delete,
    _repeat,
    _rename,
    _add,
    _swap,
)
_KEYS = ("", "unknown_key", "a.b", "__metadata__", "__class__", "\x00", "\ud800", "K" * 5000, "name\nbreak", "[red]")


@st.composite
def spoiled_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Return bytes with some changed, cut off, put in or repeated."""
    result = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(result)))
        how = draw(st.sampled_from(("flip", "cut", "insert", "repeat", "replace")))
        if how == "flip" and at < len(result):
            result[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del result[at : at + draw(st.sampled_from((1, 8, 100, len(result))))]
        elif how == "insert":
            result[at:at] = draw(st.sampled_from(SPLINTERS))
        elif how == "repeat":
            result[at:at] = result[at : at + 64]
        else:
            piece = draw(st.sampled_from(SPLINTERS))
            result[at : at + len(piece)] = piece
    return bytes(result)


SPLINTERS: Sequence[bytes] = (
    b"\x00",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\n",
    b'"',
    b"{",
    b"[" * 3000,
    b"}",
    b"\\ud800",
    b"NaN",
    b"1e999",
    b"-" * 100,
    b"9" * 5000,
    b"\xc0\x80",
    "\u2028".encode(),
)
