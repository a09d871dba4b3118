"""What a converted model's routers do with text: which experts and modules tokens use, how surely, and what is kept.

    kept = 1 - |y - y_dense|^2 / |y_dense|^2

is the share of the dense FFN's output that a layer keeps of the same input; 0 is what no FFN at all would keep.
"""

# Shapes: B sequences, T tokens of a sequence, N tokens in all, P tasks, E experts, M modules, K experts chosen at once,
# S modules stored, D model width, Q steps from few modules to all of an expert

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modmoe.analysis.passes.stream import Runner
from modmoe.analysis.text.calibration import Batch, token_batches
from modmoe.analysis.text.rows import TaskRows
from modmoe.errors import CalibrationError
from modmoe.modeling.modular_ffn import ModularFFN
from modmoe.modeling.routing_modmoe import pass_of
from modmoe.modeling.sequences_modmoe import sequence_features
from modmoe.models.ffn_layout import FFNWeights
from modmoe.models.tokenizer_files import REMEDY, files_of
from modmoe.storage.bounded import call_in_bounds

MOST_TOKENS = 1536
"""Of all tasks together: one pass of one batch, a small part of what calibration reads."""
_ROW_TOKENS = 128
_STEPS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RoutedText:
    """One sequence and what was chosen for each of its tokens."""

    task: str
    """The task it is text of."""
    pieces: tuple[str, ...]
    """The text of each token; empty where a token is but a part of a character."""
    ids_LTK: Tensor
    """int64; the experts chosen in each layer, the most probable first."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RoutingView:
    """What the routers of a model do with a little text of each task."""

    tasks: tuple[str, ...]
    """Names of the tasks."""
    tokens_P: tuple[int, ...]
    """Tokens read of each."""
    is_held_out: bool
    """Whether none of the text was read for calibration."""
    chosen_LPE: Tensor
    """The share of a task's tokens that chose each expert; with several chosen at once they add up to as many."""
    used_LPM: Tensor
    """The share of a task's tokens that use each module, in the partition's numbering."""
    certainty_L: Tensor | None
    """Entropy of the routers' probabilities over its largest, mean over the tokens; None where the caller routes."""
    balance_L: Tensor
    """Entropy of the choices of all tokens together over its largest."""
    sparsity_LQ: Tensor
    """The share of a layer's neurons that a token does not use, with a part of each expert's modules up to all."""
    kept_LQ: Tensor
    """The share of the dense FFN's output kept with these."""
    samples: tuple[RoutedText, ...]
    """One sequence a task."""


def view_routing(
    runner: Runner,
    texts: Mapping[str, TaskRows],
    tokenizer: Any,
    ffns: Sequence[FFNWeights],
    members_EM: Sequence[Tensor],
    *,
    read: Mapping[str, int] | None = None,
    seed: int = 0,
) -> RoutingView:
    """Run a little text of each task through a tied model and note what its routers choose.

    Args:
        runner: what runs the tied model, whole or layer by layer.
        texts: the rows of each task.
        tokenizer: the model's.
        ffns: the dense model's, one a layer.
        members_EM: which modules of the partition each expert has, one a layer.
        read: rows of each task that calibration has read, in the order drawn from ``seed``; they are passed over where
            there are others.
        seed: what calibration's order was drawn from.

    Where the caller routes by task, a task's tokens use the expert of its name, and others the first one.
    """
    size = getattr(runner.model.config, "vocab_size", None)
    batch, rows, is_held_out = _draw(texts, tokenizer, read or {}, seed, size)
    tasks = tuple(texts)
    layers: dict[int, _Layer] = {}
    with _watching(runner.model, ffns, members_EM, batch, rows, tasks, layers), torch.no_grad():
        runner.logits(batch)
    views = [layers[layer] for layer in sorted(layers)]
    is_routed = views[0].certainty is not None
    samples = []
    for number, task in enumerate(tasks):
        row = rows.index(number)
        length = int(batch.attention_mask_BT[row].sum())
        ids_LTK = torch.stack([layer.ids_BTK[row, :length] for layer in views])
        pieces = _split_in_bounds(tokenizer, batch.input_ids_BT[row, :length].tolist())
        samples.append(RoutedText(task=task, pieces=pieces, ids_LTK=ids_LTK))
    task_B = torch.tensor(rows)
    return RoutingView(
        tasks=tasks,
        tokens_P=tuple(int(batch.attention_mask_BT[task_B == number].sum()) for number in range(len(tasks))),
        is_held_out=is_held_out,
        chosen_LPE=torch.stack([layer.chosen_PE for layer in views]),
        used_LPM=torch.stack([layer.used_PM for layer in views]),
        certainty_L=torch.tensor([layer.certainty for layer in views]) if is_routed else None,
        balance_L=torch.tensor([layer.balance for layer in views]),
        sparsity_LQ=torch.stack([layer.sparsity_Q for layer in views]),
        kept_LQ=torch.stack([layer.kept_Q for layer in views]),
        samples=tuple(samples),
    )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Layer:
    ids_BTK: Tensor
    chosen_PE: Tensor
    used_PM: Tensor
    certainty: float | None
    balance: float
    sparsity_Q: Tensor
    kept_Q: Tensor


def _draw(
    texts: Mapping[str, TaskRows], tokenizer: Any, read: Mapping[str, int], seed: int, num_embeddings: int | None
) -> tuple[Batch, list[int], bool]:
    """Return one batch of all tasks' rows, the task of each row, and whether none of them was read before."""
    batches, rows, is_held_out = [], [], True
    for number, (name, dataset) in enumerate(texts.items()):
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
        draw = partial(
            token_batches,
            tokenizer,
            name,
            tokens=max(_ROW_TOKENS, MOST_TOKENS // len(texts) - _ROW_TOKENS),
            sequence_length=_ROW_TOKENS,
            batch_size=MOST_TOKENS,
            seed=seed,
            num_embeddings=num_embeddings,
        )
        try:
            found = draw(dataset.select(order[read.get(name, 0) :]))[0]
        except CalibrationError:
            # there are no others, or a row that calibration never came to is broken: no reason to fail at the very end
            found, is_held_out = draw(dataset.select(order[: read.get(name)]))[0], False
        batches.append(found)
        rows += [number] * len(found.input_ids_BT)
    longest = max(batch.input_ids_BT.shape[1] for batch in batches)

    def widen(tensor_BT: Tensor) -> Tensor:
        return nn.functional.pad(tensor_BT, (0, longest - tensor_BT.shape[1]))

    ids_BT = torch.cat([widen(batch.input_ids_BT).flip(0) for batch in batches])  # a task's longest row comes first
    mask_BT = torch.cat([widen(batch.attention_mask_BT).flip(0) for batch in batches])
    return Batch(ids_BT, mask_BT), rows, is_held_out


@contextmanager
def _watching(
    model: nn.Module,
    ffns: Sequence[FFNWeights],
    members_EM: Sequence[Tensor],
    batch: Batch,
    rows: list[int],
    tasks: tuple[str, ...],
    layers: dict[int, _Layer],
) -> Iterator[None]:
    """Fill ``layers`` as each tied FFN runs."""
    real_N = batch.attention_mask_BT.reshape(-1).bool()
    shape = batch.input_ids_BT.shape
    task_N = torch.tensor(rows)[:, None].expand(shape).reshape(-1)[real_N]

    def before(ffn: ModularFFN, args: tuple[Tensor, ...]) -> None:
        if ffn.router is None:
            names = ffn.state.expert_names
            expert_P = torch.tensor([names.index(task) if task in names else 0 for task in tasks])
            run = pass_of(ffn.state, args[0])
            run.expert_ids_N = expert_P[rows].repeat_interleave(run.shape[1])

    def behind(ffn: ModularFFN, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0]
        ids_NK, probs_NE = _choices(ffn, x)
        layers[ffn.layer] = _note(
            ffn, x, output, ids_NK, probs_NE, ffns[ffn.layer], members_EM[ffn.layer], real_N, task_N, len(tasks), shape
        )

    handles = []
    try:
        for submodule in model.modules():
            if isinstance(submodule, ModularFFN):
                handles.append(submodule.register_forward_pre_hook(before))
                handles.append(submodule.register_forward_hook(behind))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _choices(ffn: ModularFFN, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the experts that a tied FFN chooses and its router's probabilities, if it has one."""
    x_ND = x.reshape(-1, x.shape[-1])
    run = pass_of(ffn.state, x)
    named_N = run.named_experts(len(x_ND), x_ND.device)
    if named_N is not None:
        return named_N[:, None], None
    assert ffn.router is not None
    features_ND = sequence_features(run, ffn.layer, x, ffn.chunk) if ffn.routing == "sequence" else x_ND
    probs_NE = ffn.router(features_ND).float().softmax(-1)
    return probs_NE.topk(ffn.top_k).indices, probs_NE


def _note(
    ffn: ModularFFN,
    x: Tensor,
    output: Tensor,
    ids_NK: Tensor,
    probs_NE: Tensor | None,
    dense: FFNWeights,
    member_EM: Tensor,
    real_N: Tensor,
    task_N: Tensor,
    num_tasks: int,
    shape: torch.Size,
) -> _Layer:
    device = ids_NK.device
    kept_N = real_N.to(device)
    chosen_NE = torch.zeros(int(kept_N.sum()), ffn.num_experts, device=device).scatter(1, ids_NK[kept_N], 1.0).cpu()
    used_NM = ((chosen_NE @ member_EM.float()) > 0).float()
    of_task_PN = nn.functional.one_hot(task_N, num_tasks).T.float()
    of_task_PN = of_task_PN / of_task_PN.sum(1, keepdim=True).clamp_min(1)
    largest = math.log(max(2, ffn.num_experts))
    certainty = None
    if probs_NE is not None:
        entropy_N = torch.special.entr(probs_NE[kept_N]).sum(1)
        certainty = float(entropy_N.mean()) / largest
    load_E = chosen_NE.mean(0) / chosen_NE.mean(0).sum()
    wanted_ND = dense_output(dense, x.reshape(-1, x.shape[-1])[kept_N], ffn.act_fn)
    sparsity, kept = [], []
    for modules, found in _steps(ffn, x, output):
        y_ND = found.reshape(-1, found.shape[-1])[kept_N].float()
        lost = float((y_ND - wanted_ND).square().sum() / wanted_ND.square().sum().clamp_min(1e-30))
        member_ES = torch.zeros_like(ffn.membership, dtype=torch.float32)
        member_ES = member_ES.scatter(1, ffn.ranking[:, :modules].long(), 1.0).cpu()
        active = float(((chosen_NE @ member_ES) > 0).float().sum(1).mean())
        sparsity.append(1 - active / member_EM.shape[1])
        kept.append(1 - lost)
    return _Layer(
        ids_BTK=ids_NK.reshape(*shape, -1).cpu(),
        chosen_PE=of_task_PN @ chosen_NE,
        used_PM=of_task_PN @ used_NM,
        certainty=certainty,
        balance=float(torch.special.entr(load_E).sum()) / largest,
        sparsity_Q=torch.tensor(sparsity),
        kept_Q=torch.tensor(kept),
    )


def _steps(ffn: ModularFFN, x: Tensor, output: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield numbers of an expert's best modules, all of them last, and what the FFN gives with these."""
    most = ffn.ranking.shape[1]
    for modules in sorted({max(1, round(part * most)) for part in _STEPS} - {most}):
        ffn.state.active_modules = modules
        try:
            # past the hooks, which brought us here
            yield modules, ffn.forward(x)
        finally:
            ffn.state.active_modules = None
    yield most, output


def dense_output(weights: FFNWeights, x_ND: Tensor, activation: Any) -> Tensor:
    """Return what a dense FFN gives for its inputs, in float32 or wider."""
    x_ND = x_ND.float()

    def product(rows: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, rows.to(inputs), None if bias is None else bias.to(inputs))

    up_NF = product(weights.up_FD, weights.up_bias_F, x_ND)
    if weights.gate_FD is None:
        hidden_NF = activation(up_NF)
    else:
        hidden_NF = activation(product(weights.gate_FD, weights.gate_bias_F, x_ND)) * up_NF
    return product(weights.down_DF, weights.down_bias_D, hidden_NF)


def _split_in_bounds(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Return as ``split_text``, which runs what is written in a stranger's file."""
    place, remedy = f"{files_of(tokenizer)}: decoder", REMEDY
    return tuple(call_in_bounds(lambda: split_text(tokenizer, ids), place=place, remedy=remedy))


def split_text(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Return the text of each token; together they are the text, and a character cut in parts is with its last one."""
    pieces, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and end < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(before) :])
        before = text
    return tuple(pieces)
