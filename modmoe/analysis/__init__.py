"""Tokens become statistics, statistics become modules: calibration text, profiles, partitions and scores."""

from modmoe.analysis.modules import Partition, check_num_modules, load_partitions, save_partitions
from modmoe.analysis.partitions.table import PARTITIONERS, Partitioner, find_partitioner
from modmoe.analysis.passes.clusters import cluster_sequences
from modmoe.analysis.profile import ActivationProfile, load_profiles, profile_model, save_profiles
from modmoe.analysis.score import SCORES, module_scores, neuron_scores
from modmoe.analysis.text.calibration import Batch, load_task, token_batches

__all__ = [
    "PARTITIONERS",
    "SCORES",
    "ActivationProfile",
    "Batch",
    "Partition",
    "Partitioner",
    "check_num_modules",
    "cluster_sequences",
    "find_partitioner",
    "load_partitions",
    "load_profiles",
    "load_task",
    "module_scores",
    "neuron_scores",
    "profile_model",
    "save_partitions",
    "save_profiles",
    "token_batches",
]
