"""Losses: the text's, the dense model's predictions, and the balance between experts.

text      mean over counted tokens of -log q(next)
distill   T^2 mean over the same tokens of sum_v p_v (log p_v - log q_v), p and q at temperature T
          (Hinton et al., 2015, https://arxiv.org/abs/1503.02531; T^2 keeps the gradient's size)
balance   E sum_e f_e P_e, averaged over layers; f_e the share of choices that fall on expert e, P_e its mean
          probability. 1 where both are even
          (Fedus et al., 2022, https://arxiv.org/abs/2101.03961, equation 4; f divided by top_k)
"""

# Shapes: N counted tokens, V vocabulary, T tokens of a batch, L layers, E experts, K top_k

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

_CHUNK_NUMBERS = 2**25
"""Logits whose float32 copies are in memory at once: 128 MiB a copy."""


def token_losses(
    logits_NV: Tensor, target_N: Tensor, teacher_NV: Tensor | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """Return the mean loss on the text in nats, and the mean distillation loss where there is a teacher.

    Args:
        logits_NV: of the model that learns, in any float type; the losses are computed in float32.
        target_N: the tokens that came next.
        teacher_NV: the dense model's logits for the same tokens.
        temperature: above 0.

    Long batches are taken in pieces, recomputed in the backward pass, so that vocabularies of 150,000 fit. Without a
    single token both losses are 0.
    """
    count = max(len(target_N), 1)
    rows = max(1, _CHUNK_NUMBERS // logits_NV.shape[-1])
    starts = range(0, len(target_N), rows)
    text = distill = torch.zeros((), device=logits_NV.device)
    for start in starts:
        part = slice(start, start + rows)
        arguments = (logits_NV[part], target_N[part], None if teacher_NV is None else teacher_NV[part], temperature)
        if len(starts) > 1 and logits_NV.requires_grad:
            sums = checkpoint(_sums, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            sums = _sums(*arguments)
        text, distill = text + sums[0], distill + sums[1]
    return text / count, None if teacher_NV is None else distill / count


def _sums(logits_NV: Tensor, target_N: Tensor, teacher_NV: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    scores_NV = logits_NV.float()
    text = F.cross_entropy(scores_NV, target_N, reduction="sum")
    if teacher_NV is None:
        return text, text.new_zeros(())
    wanted_NV = (teacher_NV.float() / temperature).log_softmax(-1)
    found_NV = (scores_NV / temperature).log_softmax(-1)
    distill = F.kl_div(found_NV, wanted_NV, reduction="sum", log_target=True) * temperature**2
    return text, distill


def balance_loss(
    logits: Mapping[int, Tensor], mask_T: Tensor, top_k: int, add_up: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Return the load-balance loss of a batch: 1 where experts are used evenly, up to E where all choose one.

    Args:
        logits: router logits_TE by layer, of one pass.
        mask_T: bool; padding is False and does not count.
        top_k: experts chosen at once.
        add_up: sums a tensor over the ranks that have the rest of the batch. What is returned is then this rank's
            part: the ranks' parts, and their gradients, add up to those of the whole.
    """
    probs_LNE = torch.stack([logits_TE[mask_T] for logits_TE in logits.values()]).softmax(-1, dtype=torch.float32)
    num_experts = probs_LNE.shape[-1]
    chosen_LNK = probs_LNE.topk(top_k, dim=-1).indices
    counts_LE = torch.stack([torch.bincount(chosen.flatten(), minlength=num_experts) for chosen in chosen_LNK])
    if add_up is not None:
        counts_LE = add_up(counts_LE)
    # every token makes top_k choices, so the sum of the counts gives the number of tokens
    choices_L1 = counts_LE.sum(1, keepdim=True).clamp_min(1)
    share_LE, mean_LE = counts_LE / choices_L1, probs_LNE.sum(1) * top_k / choices_L1
    return num_experts * (share_LE * mean_LE).sum(1).mean()
