"""Rows become sequences of tokens: which of them count for the loss, which expert reads them, how they are packed."""

# Shapes: B sequences of a batch, T tokens of a sequence

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modmoe.analysis.text.calibration import load_task
from modmoe.analysis.text.encoding import EncodedRow, encode_tasks
from modmoe.analysis.text.reading import Reading
from modmoe.errors import RecipeError

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100
"""The label of a token whose prediction does not count, as in torch and transformers."""
_CHUNK_ROWS = 1000
_ROWS = 2**40
"""More rows than a task can have: a marked token's number is the task's number times this plus the row's."""


def training_set(
    tokenizer: Any,
    tasks: Mapping[str, str],
    *,
    sequence_length: int,
    num_sequences: int,
    seed: int,
    experts: Sequence[str] | None = None,
    packing: bool = False,
    marked: bool = False,
    num_embeddings: int | None = None,
    readings: dict[str, Reading] | None = None,
) -> Dataset:
    """Return sequences of tokens to train on: all tasks' rows mixed in an order drawn from ``seed``.

    Args:
        tokenizer: of transformers.
        tasks: task name to file.
        sequence_length: at most so many tokens of a sequence. A longer text becomes several sequences, each begun as
            the tokenizer begins a text; a longer prompt and completion, or conversation, loses its end.
        num_sequences: how many training reads; rows beyond that are not tokenised.
        seed: of the order.
        experts: names of the experts where each row is read by that of its task's name; else None.
        packing: lay several rows into one sequence (TRL's best-fit decreasing); ``seq_lengths`` then tells them apart.
        marked: record the row of each token in ``row_ids``, for ``rows_of``.
        num_embeddings: rows of the model's embeddings; a token beyond them is refused.
        readings: filled with what is read of each task.

    Columns: ``input_ids``, ``labels`` and, with ``experts``, ``expert_ids``, a number for each token.

    Raises:
        RecipeError: no expert has the name of a task.
        CalibrationError: a file cannot be read, or no row of a task has a token that counts.
        CheckpointError: the tokenizer does not fit the model.
    """
    from datasets import Dataset, concatenate_datasets
    from trl.data_utils import pack_dataset

    if experts is not None:
        for name in tasks:
            if name not in experts:
                raise RecipeError(
                    f"tasks.{name}",
                    "is no expert of this model, which is routed by task",
                    f"its experts are {', '.join(experts)}",
                )
    names, sources = list(tasks), [load_task(name, file) for name, file in tasks.items()]
    read = [Reading(source, tokenizer, learns=True, length=sequence_length) for source in sources]
    if readings is not None:
        readings.update(zip(names, read, strict=True))
    for reading in read:
        if not reading.can_learn:
            reading.check()
    owners = [(task, index) for task, source in enumerate(sources) for index in range(len(source))]
    order = torch.randperm(len(owners), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [owners[place] for place in order if read[owners[place][0]].is_wanted(owners[place][1])]
    encoded = encode_tasks(tokenizer, sources, chosen, end=True, num_embeddings=num_embeddings)
    chunks: list[Dataset] = []
    rows: list[dict[str, list[int]]] = []
    num_rows = num_tokens = 0
    with contextlib.closing(encoded):  # type: ignore[type-var]
        while (num_tokens < num_sequences * sequence_length) if packing else (num_rows < num_sequences):
            if (whole := next(encoded, None)) is None:
                # all rows were tried
                for reading in read:
                    reading.check()
                break
            pieces = _pieces(whole, "text" in sources[whole.task][whole.index], tokenizer, sequence_length)
            read[whole.task].add(
                whole, counted=sum(sum(piece.counted) for piece in pieces), tokens=sum(map(len, _ids(pieces)))
            )
            for piece in pieces:
                columns = _columns(piece, None if experts is None else experts.index(names[piece.task]))
                if marked:
                    number = sources[piece.task].numbers[piece.index]
                    columns["row_ids"] = [_ROWS * piece.task + number] * len(piece.input_ids)
                rows.append(columns)
                num_rows += 1
                num_tokens += len(piece.input_ids)
            if len(rows) >= _CHUNK_ROWS:
                chunks.append(Dataset.from_list(rows))
                rows = []
    if rows:
        chunks.append(Dataset.from_list(rows))
    dataset = concatenate_datasets(chunks)
    return pack_dataset(dataset, sequence_length, "bfd", {"keep_in_memory": True}) if packing else dataset


def rows_of(dataset: Dataset, sequences: Sequence[int], tasks: Sequence[str]) -> dict[str, list[int]]:
    """Return which rows of each task lie in some sequences of a marked training set, by their number in the file."""
    found: dict[str, set[int]] = {}
    for sequence in sequences:
        for row_id in dataset[int(sequence)]["row_ids"]:
            task, number = divmod(row_id, _ROWS)
            found.setdefault(tasks[task], set()).add(number)
    return {task: sorted(numbers) for task, numbers in found.items()}


def _pieces(whole: EncodedRow, is_text: bool, tokenizer: Any, sequence_length: int) -> list[EncodedRow]:
    """Return a row as the sequences that have tokens to learn from."""
    pieces = [whole.cut(sequence_length)]
    if is_text and len(whole.input_ids) > sequence_length:
        bos = getattr(tokenizer, "bos_token_id", None)
        head = whole.input_ids[:1] if bos is not None and whole.input_ids[0] == bos else []
        step = max(1, sequence_length - len(head))
        for start in range(sequence_length, len(whole.input_ids), step):
            ids = head + whole.input_ids[start : start + step]
            counted = [False] + [True] * (len(ids) - 1)
            pieces.append(dataclasses.replace(whole, input_ids=ids, counted=counted, num_bytes=[0] * len(ids)))
    return [piece for piece in pieces if any(piece.counted)]


def _ids(pieces: Sequence[EncodedRow]) -> list[list[int]]:
    return [piece.input_ids for piece in pieces]


def _columns(row: EncodedRow, expert: int | None) -> dict[str, list[int]]:
    labels = [token if counts else IGNORED for token, counts in zip(row.input_ids, row.counted, strict=True)]
    made = {"input_ids": row.input_ids, "labels": labels}
    return made if expert is None else {**made, "expert_ids": [expert] * len(labels)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Collator:
    """Makes a batch of sequences, padded on the right to one length."""

    padding: int
    """The token that pads sequences; it never counts."""
    packing: bool
    """Sequences hold several rows: their positions begin anew with each, and keep them apart."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return input_ids_BT, labels_BT, token_mask_BT, and attention_mask_BT or position_ids_BT, expert_ids_BT."""
        lengths = [len(row["input_ids"]) for row in rows]
        shape = (len(rows), max(lengths))
        mask_BT = torch.arange(shape[1]) < torch.tensor(lengths).unsqueeze(1)
        batch = {
            "input_ids": torch.full(shape, self.padding, dtype=torch.int64),
            "labels": torch.full(shape, IGNORED, dtype=torch.int64),
            "token_mask": mask_BT,
        }
        if "expert_ids" in rows[0]:
            batch["expert_ids"] = torch.zeros(shape, dtype=torch.int64)
        for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            for column in batch.keys() & row.keys():
                batch[column][number, :length] = torch.tensor(row[column])
        if self.packing:
            # no attention mask beside it: transformers tells packed rows apart by their positions only without one
            batch["position_ids"] = torch.zeros(shape, dtype=torch.int64)
            for number, row in enumerate(rows):
                positions = torch.cat([torch.arange(length) for length in row["seq_lengths"]])
                batch["position_ids"][number, : len(positions)] = positions
        else:
            batch["attention_mask"] = mask_BT.long()
        return batch


@torch.no_grad()
def keeps_rows_apart(model: Any) -> bool:
    """Return whether a row gets the same logits behind another one in a sequence as it gets alone.

    Measured, since it depends on the architecture and its attention: one that ignores where positions begin anew would
    read other rows. The model is run in evaluation mode and left as it was.
    """
    was_training = model.training
    model.eval()
    size = model.get_input_embeddings().weight.shape[0]
    rows_BT = torch.randint(0, size, (2, 6), generator=torch.Generator().manual_seed(0)).to(model.device)
    positions_T = torch.arange(6, device=model.device)
    routed = getattr(model.config, "routing", None) == "task"
    extra = {"expert_ids": torch.zeros(1, dtype=torch.int64, device=model.device)} if routed else {}

    def run(ids_T: Tensor, repeats: int) -> Tensor:
        positions_BT = positions_T.repeat(repeats)[None]
        logits: Tensor = model(input_ids=ids_T[None], position_ids=positions_BT, use_cache=False, **extra).logits
        return logits[0, -6:].float()

    try:
        alone, packed = run(rows_BT[1], 1), run(rows_BT.flatten(), 2)
    except (TypeError, ValueError, RuntimeError):
        return False
    finally:
        model.train(was_training)
    return bool((packed - alone).abs().max() <= 1e-2 * alone.abs().max())
