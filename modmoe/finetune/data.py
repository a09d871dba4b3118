"""Rows become sequences of tokens: which of them count for the loss, which expert reads them, how they are packed."""

# Shapes: B sequences of a batch, T tokens of a sequence

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modmoe.analyze.calibration import load_task
from modmoe.errors import CalibrationError, RecipeError, reason_of

if TYPE_CHECKING:
    from datasets import Dataset

LOG = logging.getLogger(__name__)
IGNORED = -100
"""The label of a token whose prediction does not count, as in torch and transformers."""
_CHUNK_ROWS = 1000
_ROWS = 2**40
"""More than a task can have; a marked token's number is the task's times this, and the row's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a task as tokens."""

    input_ids: list[int]
    """Tokens, begun as the tokenizer begins a text."""
    counted: list[bool]
    """Whether the prediction of a token counts; never that of the first."""
    num_bytes: list[int]
    """UTF-8 bytes of the text that each token adds."""

    def cut(self, length: int) -> Row:
        """Return the first ``length`` tokens."""
        return Row(input_ids=self.input_ids[:length], counted=self.counted[:length], num_bytes=self.num_bytes[:length])


def encode_row(row: Mapping[str, Any], tokenizer: Any, *, end: bool = False) -> Row:
    """Return a row as tokens, whole.

    What counts: all of a text, the completion of a prompt, the assistant's turns of messages (all, where there are
    none). Messages go through the tokenizer's chat template; without one they become lines
    of "role: content".

    Args:
        row: with ``text``, ``prompt`` and ``completion``, or ``messages``.
        tokenizer: of transformers. One without offsets (not a fast one) is measured by decoding token by token.
        end: add the end-of-text token to a completion, so that a model learns to stop. A text gets none: where a file's
            text ends says little.
    """
    text, spans = _text_and_spans(row, tokenizer)
    bos = getattr(tokenizer, "bos_token", None)
    # a chat template writes the first token itself; a second one would be text that the model never saw
    special = not (bos and text.startswith(bos))
    ids, offsets = _tokenize(text, tokenizer, special)
    counted, num_bytes, reached = [], [], 0
    for number, (start, stop) in enumerate(offsets):
        counted.append(number > 0 and any(start < span[1] and span[0] < stop for span in spans))
        # counted from where the last token ended: tokenizers leave out spaces, and split a character's bytes
        num_bytes.append(len(text[reached:stop].encode()) if stop > reached else 0)
        reached = max(reached, stop)
    eos = getattr(tokenizer, "eos_token_id", None)
    if end and "completion" in row and eos is not None and ids and ids[-1] != eos:
        ids, counted, num_bytes = [*ids, int(eos)], [*counted, True], [*num_bytes, 0]
    return Row(input_ids=ids, counted=counted, num_bytes=num_bytes)


def _tokenize(text: str, tokenizer: Any, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
    if getattr(tokenizer, "is_fast", False):
        made = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        return list(made["input_ids"]), [(int(start), int(stop)) for start, stop in made["offset_mapping"]]
    ids = list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
    offsets, reached = [], 0
    for token in ids:
        length = len(tokenizer.decode([token], skip_special_tokens=True))
        offsets.append((reached, reached + length))
        reached += length
    return ids, offsets


def _text_and_spans(row: Mapping[str, Any], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """Return a row's text and the ranges of its characters that count."""
    if "messages" in row:
        return _chat(row["messages"], tokenizer)
    if "prompt" in row:
        prompt = str(row["prompt"])
        text = prompt + str(row["completion"])
        return text, [(len(prompt), len(text))]
    text = str(row["text"])
    return text, [(0, len(text))]


def _chat(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in messages]
    has_template = bool(getattr(tokenizer, "chat_template", None))

    def write(upto: int, *, opened: bool = False) -> str:
        if has_template:
            try:
                return str(tokenizer.apply_chat_template(turns[:upto], tokenize=False, add_generation_prompt=opened))
            except Exception as error:  # a template is a program, and raises what it likes
                raise CalibrationError(
                    f"tasks: the tokenizer's chat template refuses a row of {len(turns)} messages: {reason_of(error)}; "
                    "mend the row or the template."
                ) from error
        lines = [f"{turn['role']}: {turn['content']}" for turn in turns[:upto]]
        return "\n".join([*lines, "assistant: "] if opened else lines)

    text = write(len(turns))
    spans = []
    for number, turn in enumerate(turns):
        if turn["role"] == "assistant":
            # a template may write a conversation's beginning in another way than the whole; what they share is sure
            start = _shared(text, write(number, opened=True)) if number else 0
            spans.append((start, _shared(text, write(number + 1))))
    return text, spans or [(0, len(text))]


def _shared(text: str, other: str) -> int:
    """Return how many leading characters two texts share."""
    length = min(len(text), len(other))
    return next((place for place in range(length) if text[place] != other[place]), length)


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

        marked: say of each token in ``row_ids`` which row it is from, for ``rows_of``.

    Columns: ``input_ids``, ``labels`` and, with ``experts``, ``expert_ids``, a number for each token.

    Raises:
        RecipeError: a task's name is no expert's.
        CalibrationError: a file cannot be read, or no row has a token that counts.
    """
    from datasets import Dataset, concatenate_datasets
    from trl.data_utils import pack_dataset

    if experts is not None:
        for name in tasks:
            if name not in experts:
                raise RecipeError(
                    f"tasks.{name}: is no expert of this model, which is routed by task; its experts are "
                    f"{', '.join(experts)}."
                )
    sources = {name: load_task(name, file) for name, file in tasks.items()}
    owners = [(name, number) for name, source in sources.items() for number in range(len(source))]
    order = torch.randperm(len(owners), generator=torch.Generator().manual_seed(seed)).tolist()
    chunks: list[Dataset] = []
    rows: list[dict[str, list[int]]] = []
    num_rows = num_tokens = num_dropped = 0
    for place in order:
        if (num_tokens >= num_sequences * sequence_length) if packing else (num_rows >= num_sequences):
            break
        name, number = owners[place]
        made = _sequences(sources[name][number], tokenizer, sequence_length)
        num_dropped += not made
        for row in made:
            columns = _columns(row, None if experts is None else experts.index(name))
            if marked:
                columns["row_ids"] = [_ROWS * list(tasks).index(name) + number] * len(row.input_ids)
            rows.append(columns)
            num_rows += 1
            num_tokens += len(row.input_ids)
        if len(rows) >= _CHUNK_ROWS:
            chunks.append(Dataset.from_list(rows))
            rows = []
    if rows:
        chunks.append(Dataset.from_list(rows))
    if not chunks:
        raise CalibrationError(
            f"tasks: no row of {', '.join(tasks)} has a token to learn from within {sequence_length} tokens; raise "
            "finetune.sequence_length."
        )
    if num_dropped:
        LOG.info("%d rows have nothing to learn from within %d tokens and are left out", num_dropped, sequence_length)
    dataset = concatenate_datasets(chunks)
    return pack_dataset(dataset, sequence_length, "bfd", {"keep_in_memory": True}) if packing else dataset


def rows_of(dataset: Dataset, sequences: Sequence[int], tasks: Sequence[str]) -> dict[str, list[int]]:
    """Return which rows of each task lie in some sequences of a marked training set; rows count from 1."""
    found: dict[str, set[int]] = {}
    for sequence in sequences:
        for row_id in dataset[int(sequence)]["row_ids"]:
            task, number = divmod(row_id, _ROWS)
            found.setdefault(tasks[task], set()).add(number + 1)
    return {task: sorted(numbers) for task, numbers in found.items()}


def _sequences(row: Mapping[str, Any], tokenizer: Any, sequence_length: int) -> list[Row]:
    whole = encode_row(row, tokenizer, end=True)
    pieces = [whole.cut(sequence_length)]
    if "text" in row and len(whole.input_ids) > sequence_length:
        bos = getattr(tokenizer, "bos_token_id", None)
        head = whole.input_ids[:1] if bos is not None and whole.input_ids[0] == bos else []
        step = max(1, sequence_length - len(head))
        for start in range(sequence_length, len(whole.input_ids), step):
            ids = head + whole.input_ids[start : start + step]
            pieces.append(Row(input_ids=ids, counted=[False] + [True] * (len(ids) - 1), num_bytes=[0] * len(ids)))
    return [piece for piece in pieces if any(piece.counted)]


def _columns(row: Row, expert: int | None) -> dict[str, list[int]]:
    labels = [token if counts else IGNORED for token, counts in zip(row.input_ids, row.counted, strict=True)]
    made = {"input_ids": row.input_ids, "labels": labels}
    return made if expert is None else {**made, "expert_ids": [expert] * len(labels)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Collator:
    """Makes a batch of sequences, padded on the right to one length."""

    padding: int
    """The token that fills up; it never counts."""
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
