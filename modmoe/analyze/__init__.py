"""Tokens become statistics, statistics become modules: calibration text, profiles, partitions and scores."""

from modmoe.analyze.calibration import Batch, cluster_sequences, load_task, token_batches
from modmoe.analyze.modules import Partition, check_num_modules, load_partitions, save_partitions
from modmoe.analyze.partition import PARTITIONERS, Partitioner, find_partitioner
from modmoe.analyze.profile import ActivationProfile, load_profiles, profile_model, save_profiles
from modmoe.analyze.score import SCORES, module_scores, neuron_scores

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
