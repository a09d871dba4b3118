"""What is known of a layer's modules from some rows of text, and what choosing among them costs.

The error of an expert on a row is ``|sum_{j not in S} (F_j(x) - m_j)|^2`` with F_j a module's output and m_j its mean
over all rows, or 0 where nothing makes up for what is skipped. It is exact in the row's Gram matrix of outputs,
``G_ij = <F_i - m_i, F_j - m_j>``: 1_skipped^T G 1_skipped.
"""

# Shapes: N rows, D model width, F neurons, m neurons of a module, M modules, E experts, P tasks

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modmoe.analysis.modules import Partition

_AT_ONCE = 1 << 24
"""Numbers of module outputs that are held at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class ModuleOutputs:
    """One layer's modules on some rows of text."""

    gram_NMM: Tensor
    """float32; each row's Gram matrix of module outputs, centred or not."""
    task_N: Tensor
    """int64; the task each row is of."""

    @property
    def num_tasks(self) -> int:
        """Tasks, of which each has rows."""
        return int(self.task_N.max()) + 1

    def gram_PMM(self) -> Tensor:
        """Return each task's mean Gram matrix, float64, scaled so that all tasks weigh alike."""
        grams = [self.gram_NMM[self.task_N == task].mean(0, dtype=torch.float64) for task in range(self.num_tasks)]
        return torch.stack([gram_MM / gram_MM.trace().clamp_min(1e-300) for gram_MM in grams])

    def value_NM(self) -> Tensor:
        """Return the squared norm of each module's output."""
        return self.gram_NMM.diagonal(dim1=1, dim2=2)

    def errors_NE(self, membership_EM: Tensor) -> Tensor:
        """Return what each expert alone costs on each row."""
        skipped_ME = (~membership_EM).T.to(self.gram_NMM.dtype)
        return torch.stack([((rows_MM @ skipped_ME) * skipped_ME).sum(0) for rows_MM in self.gram_NMM])


def module_outputs(
    hidden_NF: Tensor, down_DF: Tensor, partition: Partition, task_N: Tensor, *, is_centred: bool
) -> ModuleOutputs:
    """Return the Gram matrices of module outputs; a row's takes as much as D * M + M^2 numbers while it is made."""
    modules, width = partition.num_modules, len(down_DF)
    order_F = partition.permutation_F
    down_MmD = down_DF.float()[:, order_F].T.reshape(modules, -1, width)
    hidden_NF = hidden_NF.float()
    if is_centred:
        hidden_NF = hidden_NF - hidden_NF.mean(0)
    hidden_MNm = hidden_NF[:, order_F].reshape(len(hidden_NF), modules, -1).transpose(0, 1)
    grams = []
    for part_MNm in torch.split(hidden_MNm, max(1, _AT_ONCE // (modules * width)), dim=1):
        output_NMD = torch.bmm(part_MNm, down_MmD).transpose(0, 1)
        grams.append(output_NMD @ output_NMD.transpose(1, 2))
    return ModuleOutputs(torch.cat(grams), task_N)


def eliminate(gram_MM: Tensor, first: Tensor | None = None) -> Tensor:
    """Return the modules, int64, the best first: the reverse of the order in which leaving them out costs least.

    Backward elimination: at each step the module goes whose loss, on top of those gone already, adds the least to the
    error. So each leading part is an expert, and experts of all sizes are nested.

    Args:
        gram_MM: Gram matrix of module outputs.
        first: modules that stay, in this order, whatever they cost.
    """
    gram_MM = gram_MM.double()
    cost_M = gram_MM.diagonal().clone()
    fixed = torch.zeros(0, dtype=torch.int64) if first is None else first
    cost_M[fixed] = torch.inf
    gone = []
    for _ in range(len(gram_MM) - len(fixed)):
        module = int(cost_M.argmin())
        gone.append(module)
        cost_M += 2 * gram_MM[module]
        cost_M[module] = torch.inf
    return torch.cat([fixed, torch.tensor(gone[::-1], dtype=torch.int64)])
