"""Tasks out of one corpus: its sequences divided by what the model makes of them."""

# Shapes: B batch, T tokens, D model width, N sequences

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from modmoe.analysis.passes.stream import Runner, Turn, starts_of
from modmoe.analysis.text.calibration import Batch, pad
from modmoe.errors import CalibrationError
from modmoe.runtime import ranks


def cluster_sequences(
    runner: Runner,
    batches: Sequence[Batch],
    num_clusters: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> dict[str, list[Batch]]:
    """Divide the sequences of one corpus into ``num_clusters`` tasks, named cluster0, cluster1, ...

    k-means on each sequence's mean hidden state, read behind half of the decoder layers, each dimension scaled to unit
    variance. Sizes are not balanced. The model is left as it was. ``progress`` is called with tokens that are done.

    Raises:
        CalibrationError: fewer different sequences than clusters.
    """
    from sklearn.cluster import KMeans

    first = starts_of(len(batch.input_ids_BT) for batch in batches)
    features_ND = torch.zeros(0, 1)
    layers = (runner.num_layers + 1) // 2

    def watch(layer: int, hidden_BTD: Tensor, turn: Turn) -> None:
        nonlocal features_ND
        if layer == layers - 1:
            if not len(features_ND):
                total = sum(len(batch.input_ids_BT) for batch in batches)
                features_ND = torch.zeros(total, hidden_BTD.shape[-1], dtype=torch.float64)
            mask_BT1 = turn.batch.attention_mask_BT.double().unsqueeze(-1)
            mean_BD = (hidden_BTD.double().cpu() * mask_BT1).sum(1) / mask_BT1.sum(1).clamp_min(1)
            features_ND[first[turn.index] :][: len(mean_BD)] = mean_BD

    runner.run({"": batches}, on_output=watch, layers=layers, progress=progress)
    features_ND = ranks.add_up(features_ND)
    if not bool(features_ND.isfinite().all()):
        raise CalibrationError(
            "calibration",
            "the model's hidden states are not finite",
            "its weights or config.json are damaged, which modmoe doctor looks for",
        )
    num_different = len(torch.unique(features_ND, dim=0))
    if num_different < num_clusters:
        raise CalibrationError(
            "calibration",
            f"{num_different} different sequences cannot make {num_clusters} clusters",
            "raise calibration.tokens, or ask for fewer experts",
        )
    features_ND = features_ND - features_ND.mean(0)
    # a few dimensions of a hidden state are hundreds of times larger than the rest and would decide alone
    features_ND = features_ND / features_ND.std(0, correction=0).clamp_min(1e-12)
    label_N = torch.zeros(len(features_ND), dtype=torch.int64)
    if ranks.is_first():
        label_N += torch.as_tensor(KMeans(num_clusters, n_init=10, random_state=seed).fit_predict(features_ND.numpy()))
    label_N = ranks.from_first(label_N)
    sequences = [
        ids_T[mask_T.bool()].tolist()
        for batch in batches
        for ids_T, mask_T in zip(batch.input_ids_BT, batch.attention_mask_BT, strict=True)
    ]
    size = max(len(batch.input_ids_BT) for batch in batches)
    clusters: dict[str, list[Batch]] = {}
    for cluster in range(num_clusters):
        members = [sequence for sequence, label in zip(sequences, label_N, strict=True) if label == cluster]
        clusters[f"cluster{cluster}"] = [pad(members[i : i + size], 0) for i in range(0, len(members), size)]
    return clusters
