"""Worked arithmetic problems in plain English, generated from a seed.

Every answer writes its steps digit by digit, so a model of two million weights can learn the
procedure instead of a table of sums.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem: `prompt` ends in a newline, `completion` holds the steps and the result."""

    prompt: str
    completion: str

    @property
    def text(self) -> str:
        """The problem and its answer as one document."""
        return self.prompt + self.completion


def iterate_problems(seed: int = 0) -> Iterator[Problem]:
    """Yield problems without end; the same seed gives the same problems in the same order."""
    rng = random.Random(seed)
    while True:
        yield make_problem(rng)


def make_problem(rng: random.Random) -> Problem:
    """Draw one problem from `rng`: an operation, its numbers, and a way to put it in words."""
    operation = rng.choice(_OPERATIONS)
    a, b = operation.draw(rng)
    steps, result = operation.work(a, b)
    question, closing = rng.choice(operation.templates)
    name, other = rng.sample(_NAMES, 2)
    words = {"a": a, "b": b, "c": result, "name": name, "other": other, "items": rng.choice(_ITEMS)}
    answer = f"Answer: {steps} {closing.format(**words)}".rstrip()
    return Problem(prompt=f"Question: {question.format(**words)}\n", completion=answer)


@dataclass(frozen=True, slots=True)
class _Operation:
    draw: Callable[[random.Random], tuple[int, int]]
    work: Callable[[int, int], tuple[str, int]]
    # (question, closing sentence); {c} is the result
    templates: tuple[tuple[str, str], ...]


def _draw_number(rng: random.Random) -> int:
    """Draw the number of digits first, else nine in ten numbers would have three digits."""
    digits = rng.choice((1, 2, 2, 3, 3))
    return rng.randint(10 ** (digits - 1), 10**digits - 1)


def _draw_any(rng: random.Random) -> tuple[int, int]:
    return _draw_number(rng), _draw_number(rng)


def _draw_descending(rng: random.Random) -> tuple[int, int]:
    a, b = _draw_any(rng)
    return max(a, b), min(a, b)


def _draw_distinct(rng: random.Random) -> tuple[int, int]:
    a, b = _draw_any(rng)
    return (a, b) if a != b else (a, b + 1)


def _draw_factors(rng: random.Random) -> tuple[int, int]:
    return rng.randint(2, rng.choice((12, 99))), rng.randint(2, 9)


def _split_digits(number: int, places: int) -> list[int]:
    """Digits from the ones upward, with zeros up to `places`."""
    return [number // 10**place % 10 for place in range(places)]


def _work_addition(a: int, b: int) -> tuple[str, int]:
    places = len(str(max(a, b)))
    steps, carry = [], 0
    for x, y in zip(_split_digits(a, places), _split_digits(b, places), strict=True):
        total = x + y + carry
        steps.append(f"{x} + {y} + {carry} = {total}" if carry else f"{x} + {y} = {total}")
        carry = total // 10
    return _finish(steps, f"{a} + {b} = {a + b}."), a + b


def _work_subtraction(a: int, b: int) -> tuple[str, int]:
    places = len(str(a))
    steps, borrow = [], 0
    for x, y in zip(_split_digits(a, places), _split_digits(b, places), strict=True):
        top = x - borrow
        borrow = int(top < y)
        top += 10 * borrow
        steps.append(f"{top} - {y} = {top - y}")
    return _finish(steps, f"{a} - {b} = {a - b}."), a - b


def _work_multiplication(a: int, b: int) -> tuple[str, int]:
    if a <= 12 or a % 10 == 0:
        return f"{a} x {b} = {a * b}.", a * b
    tens, ones = a // 10 * 10, a % 10
    steps = [
        f"{tens} x {b} = {tens * b}",
        f"{ones} x {b} = {ones * b}",
        f"{tens * b} + {ones * b} = {a * b}",
    ]
    return _finish(steps, f"{a} x {b} = {a * b}."), a * b


def _finish(steps: list[str], conclusion: str) -> str:
    return conclusion if len(steps) == 1 else f"{', '.join(steps)}, so {conclusion}"


def _work_comparison(a: int, b: int) -> tuple[str, int]:
    if len(str(a)) != len(str(b)):
        reason = f"{a} has {_count_digits(a)} and {b} has {_count_digits(b)}"
    else:
        steps = []
        for x, y in zip(str(a), str(b), strict=True):
            sign = "=" if x == y else "<" if x < y else ">"
            steps.append(f"{x} {sign} {y}")
            if sign != "=":
                break
        reason = ", ".join(steps)
    return f"{reason}, so {a} {'<' if a < b else '>'} {b}.", max(a, b)


def _count_digits(number: int) -> str:
    count = len(str(number))
    return f"{count} digit" if count == 1 else f"{count} digits"


_NAMES = (
    "Ada", "Ben", "Carla", "Dan", "Emma", "Finn", "Grace", "Hugo", "Iris", "Jack", "Kim", "Leo",
    "Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tara", "Zoe",
)  # fmt: skip
_ITEMS = (
    "apples", "books", "cards", "coins", "cookies", "eggs", "flowers", "keys", "marbles", "pens",
    "shells", "stamps", "stickers", "tickets",
)  # fmt: skip

_OPERATIONS = (
    _Operation(
        draw=_draw_any,
        work=_work_addition,
        templates=(
            ("What is {a} + {b}?", ""),
            ("Add {a} and {b}.", "The sum is {c}."),
            ("Find the sum of {a} and {b}.", "The sum is {c}."),
            (
                "{name} has {a} {items} and buys {b} more. How many {items} does {name} have now?",
                "{name} has {c} {items}.",
            ),
            (
                "{name} has {a} {items} and {other} has {b}. How many {items} do they have together?",
                "Together they have {c} {items}.",
            ),
        ),
    ),
    _Operation(
        draw=_draw_descending,
        work=_work_subtraction,
        templates=(
            ("What is {a} - {b}?", ""),
            ("Subtract {b} from {a}.", "The difference is {c}."),
            ("How much is {a} minus {b}?", "The difference is {c}."),
            (
                "{name} had {a} {items} and gave {b} to {other}. How many {items} are left?",
                "{name} has {c} {items} left.",
            ),
            (
                "{name} has {a} {items} and {other} has {b}. How many more does {name} have?",
                "{name} has {c} more {items}.",
            ),
        ),
    ),
    _Operation(
        draw=_draw_factors,
        work=_work_multiplication,
        templates=(
            ("What is {a} x {b}?", ""),
            ("Multiply {a} by {b}.", "The product is {c}."),
            (
                "There are {b} boxes with {a} {items} in each. How many {items} are there?",
                "There are {c} {items}.",
            ),
            (
                "{name} buys {a} {items} every day. How many {items} does {name} buy in {b} days?",
                "{name} buys {c} {items}.",
            ),
        ),
    ),
    _Operation(
        draw=_draw_distinct,
        work=_work_comparison,
        templates=(
            ("Which is larger, {a} or {b}?", "The larger number is {c}."),
            ("Compare {a} and {b}.", ""),
            (
                "One box holds {a} {items} and another holds {b}. How many are in the fuller box?",
                "The fuller box holds {c} {items}.",
            ),
        ),
    ),
)
