"""What was read of a task's file: rows and tokens, what was left out, and what does not look as it was meant."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from modmoe.analysis.text.encoding import EncodedRow, Piece
from modmoe.analysis.text.forms import EMPTY, NO_ANSWER, NO_ASSISTANT, NO_COMPLETION, NO_WEIGHT, lacks
from modmoe.analysis.text.rows import TaskRows
from modmoe.analysis.text.turns import SILENCE
from modmoe.errors import CalibrationError, hide_secrets

LOG = logging.getLogger(__name__)
# scripts from here on, of the far East, put no space between words
_FIRST_WITHOUT_SPACES = "\u2e80"
NOT_WRITTEN = "nothing that the assistant says is in the text that the model reads"
_REMEDIES = {
    NOT_WRITTEN: "use a model whose chat template writes it, calls of tools too",
    NO_COMPLETION: "fill in 'completion'",
    NO_ASSISTANT: "give messages whose 'role' is 'assistant'",
    NO_ANSWER: "fill in the 'content' of the assistant's messages",
    NO_WEIGHT: "write 1 as the 'weight' of those to be learned",
    EMPTY: "name a file with text in it",
}


class Reading:
    """Counts what is read of one task, and says it once."""

    def __init__(self, rows: TaskRows, tokenizer: Any, *, learns: bool, length: int) -> None:
        """Take the rows of a task.

        Args:
            rows: of the task.
            tokenizer: which reads them.
            learns: whether it matters what a model can learn from a row; else all of its text is read.
            length: tokens of a sequence.
        """
        self._rows, self._length = rows, length
        self._has_template = bool(getattr(tokenizer, "chat_template", None))
        self.num_rows = self.num_tokens = self.num_counted = 0
        self.left_out: Counter[str] = Counter(rows.left_out)
        self.first: list[Piece] = []
        self._lost: Counter[str] = Counter()
        self._pairs = self._joint = self._plain = self._cut = 0
        self._joint_words = ""
        self._reasons = [lacks(row) for row in rows]
        self._learns, self._use = learns, "learn from" if learns else "read"
        if learns:
            self.left_out.update(reason for reason in self._reasons if reason)

    def is_wanted(self, index: int) -> bool:
        """Return whether a row is read: where a model is to learn, not one that has nothing to learn from."""
        return not (self._learns and self._reasons[index])

    def add(self, row: EncodedRow, *, counted: int | None = None, tokens: int | None = None) -> bool:
        """Count a row, and return whether it is of use: it has a token, and where a model learns, one that counts.

        ``counted`` and ``tokens`` say how many are read of a row that is whole, and becomes several sequences.
        """
        is_cut = row.is_cut or (tokens is not None and tokens < len(row.input_ids))
        self.first = self.first or row.shown
        counted = sum(row.counted) if counted is None else counted
        self._lost.update(what for what in row.lost if what != SILENCE)
        if not (counted if self._learns else row.input_ids):
            reason = NOT_WRITTEN if SILENCE in row.lost else f"no token to {self._use} within {self._length} tokens"
            self.left_out[reason] += 1
            return False
        self._cut += is_cut
        self.num_rows += 1
        self.num_tokens += len(row.input_ids) if tokens is None else tokens
        self.num_counted += counted
        self._look_at(self._rows[row.index])
        return True

    def _look_at(self, row: dict[str, Any]) -> None:
        self._plain += not ("messages" in row or isinstance(row.get("completion"), list))
        prompt, completion = row.get("prompt"), row.get("completion")
        if not (isinstance(prompt, str) and isinstance(completion, str) and prompt and completion):
            return
        self._pairs += 1
        ends = prompt[-1], completion[0]
        if not any(end.isspace() or end >= _FIRST_WITHOUT_SPACES for end in ends):
            self._joint += 1
            self._joint_words = self._joint_words or f"{prompt[-12:]}|{completion[:12]}"

    def check(self) -> None:
        """Raise CalibrationError where nothing of the task is of use, with the reason that most rows have."""
        if self.num_rows:
            return
        told = {reason: count for reason, count in self.left_out.items() if reason != EMPTY} or dict(self.left_out)
        reason = max(told, key=lambda name: told[name], default=EMPTY)
        remedy = _REMEDIES.get(reason, "raise --sequence-length or name other text")
        reasons = ", ".join(f"{name} ({count:,})" for name, count in self.left_out.most_common())
        raise CalibrationError(str(self._rows.place), f"no row has anything to {self._use}: {reasons}", remedy)

    @property
    def can_learn(self) -> bool:
        """Whether any row may be of use, as far as is known before one is tokenized."""
        return any(self.is_wanted(index) for index in range(len(self._rows)))

    def summary(self) -> dict[str, Any]:
        """Return what ``--json`` has under ``read``."""
        return {
            "rows": self.num_rows,
            "rows_in_file": self._rows.num_in_file,
            "tokens": self.num_tokens,
            "counted": self.num_counted,
            "cut": self._cut,
            "left_out": dict(self.left_out),
            "warnings": self.warnings(),
        }

    def warnings(self) -> list[str]:
        """Return what was not read as it may have been meant, each with its remedy."""
        found = []
        if self._rows.num_ambiguous:
            found.append(
                f"{self._rows.num_ambiguous:,} rows have text in more than one form; of these messages come before "
                "prompt and completion, and both before text"
            )
        if not self._learns and (bare := sum(map(bool, self._reasons))):
            reasons = ", ".join(f"{name} ({count:,})" for name, count in Counter(filter(None, self._reasons)).items())
            found.append(f"{bare:,} rows have nothing to learn from, and their other text is read alone: {reasons}")
        for what, count in self._lost.items():
            found.append(
                f"the {what} of {count:,} {'row' if count == 1 else 'rows'} are not, or not all, in the text that the "
                f"{'chat template makes' if self._has_template else 'model reads, since it has no chat template'}; "
                "give messages and a template that writes them, or take them out"
            )
        if 2 * self._joint > self._pairs:
            found.append(
                f"{self._joint:,} of {self._pairs:,} rows have no white space between prompt and completion, as in "
                f"'{self._joint_words}', and nothing is put there; where the two are words of a text, end the prompt "
                "with a space or a line break"
            )
        if self._has_template and 2 * self._plain > self.num_rows:
            found.append(
                f"the model has a chat template, which {self._plain:,} of {self.num_rows:,} rows do not go through; "
                "where it is to be used in chats, give the rows as messages"
            )
        return found

    def tell(self) -> None:
        """Log what was read, once: the numbers, what looks odd, and at the level of debugging the first row."""
        name = self._rows.name
        line = (
            f"{name}: {self.num_rows:,} of {self._rows.num_in_file:,} rows read, {self.num_tokens:,} tokens, of which "
            f"{self.num_counted:,} count"
        )
        if self._cut:
            line += f"; {self._cut:,} rows are cut to {self._length:,} tokens"
        if self.left_out:
            told = ", ".join(f"{reason} ({count:,})" for reason, count in self.left_out.most_common())
            line += f"; left out: {told}"
        LOG.info("%s", line)
        for words in self.warnings():
            LOG.warning("%s", _printable(f"warning: {name}: {words}."))
        if self.first:
            words = "".join(f"[[{text}]]" if counts else text for text, counts in self.first)
            LOG.debug("%s", f"{name}: the first row as the model reads it, what counts in [[ ]]: {_printable(words)}")


def _printable(text: str) -> str:
    """Return a text on one line, without what steers a terminal, and without tokens of the Hub."""
    told = hide_secrets(text).replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
    return "".join(character if character.isprintable() else " " for character in told)


def tell(readings: Mapping[str, Reading]) -> None:
    """Log what was read of each task."""
    for reading in readings.values():
        reading.tell()


def summaries(readings: Mapping[str, Reading]) -> dict[str, dict[str, Any]]:
    """Return what ``--json`` has under ``read``, for each task."""
    return {name: reading.summary() for name, reading in readings.items()}
