"""Estimates of the memory and the time, as a range, that a conversion and its training need on a device.

Arithmetic on sizes from config.json alone. It follows the steps: a pass over the text profiles
the model, one more starts routers, and where experts are chosen layer after layer there are two or three more; k-means
runs on the CPU; the proof holds a float64 copy up to 200 M parameters, then a float32 one. Training holds weights in
float32, with bfloat16 products on a GPU, gradients and two moments of Adam for what learns, and the activations of one
batch. A pass of N parameters over T tokens is 2 N T operations, and a training step of all of them 6 N T
(https://arxiv.org/abs/2001.08361, section 2.1); activations are counted by what autograd keeps.

Left out: tokenizing, downloads, evaluation before and after, padding, and memory that allocators hold and do not use.
"""

# Shapes of what is counted: D model width, F neurons, M modules, E experts, V vocabulary, T tokens, L layers

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import torch

from modmoe.analysis.passes.by_layer import leaves_half
from modmoe.analysis.source import needs_gradients
from modmoe.conversion.modular.layerwise import KEPT_ROWS as LAYERWISE_ROWS
from modmoe.conversion.modular.routers import KEPT_ROWS as ROUTER_ROWS
from modmoe.conversion.modular.settled import count_clusters, count_experts, fits_layerwise, settle
from modmoe.conversion.proof import _FLOAT64_PARAMETERS
from modmoe.conversion.table import Conversion, find_conversion
from modmoe.cost.devices import Device
from modmoe.models.counts import routed_of
from modmoe.recipe.schema import FinetuneRecipe, Recipe

SHARE_OF_PEAK = {True: (0.5, 1.0), False: (0.2, 0.5)}
"""The least and the most of a rate that is reached: of a CPU's measured one, and of a vendor's published one."""
READ_RATE = (3e8, 2e9)
"""Bytes a second of a disk, the least and the most."""
WRITE_RATE = (3e8, 1e9)
"""Bytes a second of the writing, its SHA-256 included (benchmarks/results/convert.md)."""
START_S = (8.0, 25.0)
"""Seconds for imports and everything else that does not grow with the model."""
LAYER_S = (1e-3, 5e-3)
"""Seconds of a layer and batch that pass outside of products."""
PROCESS_BYTES = {"convert": 390 << 20, "finetune": 450 << 20}
"""Measured anonymous memory of a process with its libraries and a tiny model."""
CONTEXT_BYTES = 500 << 20
"""GPU memory that CUDA takes for itself."""
_SKETCH_ROWS = 256
_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.\d+\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The sizes of a model that count."""

    parameters: int
    """All; embeddings that are tied count once."""
    body: int
    """That multiply each token, without the head; of a mixture those of the chosen experts."""
    head: int
    """Of the output matrix."""
    layer: int
    """Of one decoder layer, all its experts included."""
    layers: int
    width: int
    neurons: int
    queries: int
    """Width of all queries of a token."""
    keys: int
    """Width of all keys of a token."""
    vocabulary: int
    itemsize: int
    """Bytes of a weight in the checkpoint."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the checkpoint."""
        return self.parameters * self.itemsize

    @property
    def outside(self) -> int:
        """Parameters in no decoder layer."""
        return self.parameters - self.layers * self.layer


@dataclass(slots=True)
class Need:
    """What one step takes."""

    device_bytes: float = 0
    """At its most, where the model runs; of a CPU all memory."""
    host_bytes: float = 0
    """At its most, in the memory of the machine."""
    low_s: dict[str, float] = field(default_factory=dict)
    """Seconds by what bounds them, at the best rates."""
    high_s: dict[str, float] = field(default_factory=dict)
    """The same at the worst."""

    def take(self, bound: str, low_s: float, high_s: float) -> None:
        """Add seconds."""
        self.low_s[bound] = self.low_s.get(bound, 0.0) + low_s
        self.high_s[bound] = self.high_s.get(bound, 0.0) + high_s

    def move(self, num_bytes: float, rates: tuple[float, float]) -> None:
        """Add bytes that a disk reads or writes."""
        self.take("disk", num_bytes / rates[1], num_bytes / rates[0])

    def run(self, device: Device, flops: float, moved_bytes: float, dtype_bytes: int) -> None:
        """Add products on the device: they take as long as the arithmetic or the memory, whichever is slower."""
        rate = device.float32_flops if dtype_bytes >= 4 else device.bfloat16_flops
        worst, best = SHARE_OF_PEAK[device.is_cpu]
        compute, memory = flops / rate, moved_bytes / device.bandwidth
        self.take(
            "compute" if compute >= memory else "memory bandwidth", *(max(compute, memory) / s for s in (best, worst))
        )

    def work(self, device: Device, flops: float) -> None:
        """Add products in float32 on the CPU of the machine."""
        seconds = flops / (device.core_flops * device.cores)
        self.take("host processor", seconds, 3 * seconds)


def sizes_of(model: Any) -> Sizes:
    """Return the sizes of a transformers model, which may be without values."""
    config = model.config
    named = dict(model.named_parameters())
    embedding, head = (get().weight.numel() for get in (model.get_input_embeddings, model.get_output_embeddings))
    inside = {name: weight.numel() for name, weight in named.items() if _LAYER.search(name)}
    experts, top_k = routed_of(config.to_dict())
    routed = sum(size for name, size in inside.items() if ".experts." in name)
    layers = int(config.num_hidden_layers)
    heads, dim = int(config.num_attention_heads), getattr(config, "head_dim", None)
    dim = int(dim or config.hidden_size // heads)
    total = sum(weight.numel() for weight in named.values())
    is_tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    outside = total - sum(inside.values()) - embedding - (0 if is_tied else head)
    neurons = next((getattr(config, name, 0) for name in _NEURONS if getattr(config, name, 0)), 4 * config.hidden_size)
    if stored := getattr(config, "stored_modules", None):
        neurons = sum(stored) * config.module_size // layers
    dtype = getattr(config, "dtype", None) or torch.float32
    return Sizes(
        parameters=total,
        body=sum(inside.values()) + outside - round(routed * (1 - top_k / experts) if routed else 0),
        head=head,
        layer=sum(inside.values()) // layers,
        layers=layers,
        width=int(config.hidden_size),
        neurons=int(neurons) * (top_k if routed else 1),
        queries=heads * dim,
        keys=int(getattr(config, "num_key_value_heads", None) or heads) * dim,
        vocabulary=head // int(config.hidden_size),
        itemsize=dtype.itemsize,
    )


_NEURONS = ("moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim")


def forward_flops(sizes: Sizes, tokens: int, sequence_length: int, *, has_head: bool) -> float:
    """Return the operations of a forward pass: two a weight and token, and attention's products over the sequence."""
    weights = sizes.body + (sizes.head if has_head else 0)
    return 2 * weights * tokens + 4 * sizes.layers * sizes.queries * sequence_length * tokens


def estimate_convert(recipe: Recipe, sizes: Sizes, device: Device) -> Need:
    """Return what a conversion takes, as its row in ``CONVERSIONS`` describes it."""
    need = Need(host_bytes=PROCESS_BYTES["convert"])
    need.take("start", *START_S)
    conversion = find_conversion(recipe.method)
    if not conversion.reads_text:
        _add_copies(need, conversion.copies(recipe), sizes)
        return _placed(need, device)
    if conversion.is_modular:
        recipe = settle(recipe)
    text = recipe.calibration
    tokens = text.tokens * max(1, len(recipe.tasks))
    batch_tokens = text.batch_size * text.sequence_length
    gradients = needs_gradients(recipe)
    by_layer = text.by_layer if conversion.has_by_layer else False
    if by_layer is None:
        by_layer = not gradients and not leaves_half(sizes.num_bytes, device.memory_bytes)
    weights = sizes.outside + sizes.layer if by_layer else sizes.parameters
    row_bytes = (5 * sizes.width + 4 * sizes.neurons + 2 * sizes.queries) * sizes.itemsize
    passes = _passes(recipe, conversion)
    _add_passes(need, recipe, sizes, device, passes, row_bytes)
    if by_layer:
        # hidden states go through a file between two layers
        need.move(2 * passes * sizes.layers * tokens * sizes.width * sizes.itemsize, READ_RATE)

    profile_bytes = sizes.neurons * (4 * _SKETCH_ROWS + 3 * 8 * max(1, len(recipe.tasks))) * sizes.layers
    here_bytes: float = weights * sizes.itemsize + batch_tokens * row_bytes + profile_bytes
    if gradients:
        # what autograd keeps of a batch, and the logits
        here_bytes += _activation_bytes(sizes, batch_tokens, sizes.itemsize, sizes.itemsize, train="router")
        here_bytes += 3 * batch_tokens * sizes.vocabulary * 4
    host_bytes = float(profile_bytes)
    if conversion.is_modular:
        _add_modules(need, recipe, sizes, device)
        if fits_layerwise(recipe):
            host_bytes += _add_layerwise(need, recipe, sizes, device, tokens)
        elif recipe.router.routing != "task":
            host_bytes += _add_routers(need, recipe, sizes, device, tokens, layers_kept=1 if by_layer else sizes.layers)
            here_bytes += sizes.width * sizes.neurons * 4
    proof = 8 if sizes.parameters <= _FLOAT64_PARAMETERS else 4
    if not conversion.has_short_proof:
        # two models over two sequences; float64 takes twice as long
        need.work(device, 2 * 2 * text.sequence_length * 2 * (sizes.body + sizes.head) * proof // 4)
    proof_bytes = sizes.parameters * proof
    if by_layer or not leaves_half(proof_bytes, device.memory_bytes if device.is_cpu else 10**18):
        proof_bytes = (sizes.outside + sizes.layer) * proof
    # the proof comes when the passes are over, beside the model that was analysed
    if device.is_cpu:
        loaded = weights * sizes.itemsize
        need.host_bytes += max(here_bytes + host_bytes, loaded + host_bytes + proof_bytes)
    else:
        need.device_bytes = here_bytes + CONTEXT_BYTES
        need.host_bytes += host_bytes + max(proof_bytes, 0 if by_layer else sizes.num_bytes)
    return _placed(need, device)


def _add_copies(need: Need, copies: int, sizes: Sizes) -> None:
    """Add a conversion that reads no text: the model is loaded once, or its FFNs are copied."""
    need.move(sizes.num_bytes, READ_RATE)
    if copies:
        ffns_bytes = 3 * sizes.layers * sizes.width * sizes.neurons * sizes.itemsize
        need.move(sizes.num_bytes + (copies - 1) * ffns_bytes, WRITE_RATE)
    need.host_bytes += 2 * sizes.num_bytes


def _passes(recipe: Recipe, conversion: Conversion) -> int:
    """Return how often the text is run through the model; the recipe is settled."""
    if conversion.passes is not None:
        return conversion.passes
    clusters = len(recipe.tasks) == 1 and count_clusters(recipe) > 1
    passes = 1 + (recipe.assignment.score == "output_norm") + clusters
    if conversion.is_modular and fits_layerwise(recipe):
        return passes + (3 if recipe.router.compensation or recipe.assignment.refit else 2)
    routed = conversion.is_modular and recipe.router.routing != "task"
    return passes + routed + recipe.router.compensation


def _add_passes(need: Need, recipe: Recipe, sizes: Sizes, device: Device, passes: int, row_bytes: int) -> None:
    """Add the passes over the text, and the reading and writing of the weights."""
    text = recipe.calibration
    tokens = text.tokens * max(1, len(recipe.tasks))
    batches = math.ceil(tokens / (text.batch_size * text.sequence_length))
    flops = forward_flops(sizes, tokens, text.sequence_length, has_head=False)
    # a backward pass to the activations, with the head, costs as much again as the forward
    total = passes * flops + (flops + 4 * sizes.head * tokens if needs_gradients(recipe) else 0)
    moved = passes * (batches * sizes.body * sizes.itemsize + tokens * sizes.layers * row_bytes)
    need.run(device, total, moved, sizes.itemsize)
    need.take("start", *(passes * batches * sizes.layers * seconds for seconds in LAYER_S))
    need.move(2 * sizes.num_bytes, READ_RATE)
    need.move(sizes.num_bytes, WRITE_RATE)


def _add_routers(need: Need, recipe: Recipe, sizes: Sizes, device: Device, tokens: int, *, layers_kept: int) -> float:
    """Add the fits of all routers to rows that a pass keeps; return the bytes of the rows."""
    experts, rows = count_experts(recipe), min(ROUTER_ROWS, tokens)
    need.run(device, 2 * sizes.layers * experts * rows * sizes.neurons * sizes.width, 0, 4)
    need.work(device, sizes.layers * _router_flops(recipe, sizes, rows, experts))
    return layers_kept * rows * (sizes.width + experts) * 4


def _add_modules(need: Need, recipe: Recipe, sizes: Sizes, device: Device) -> None:
    """Add the cutting of all layers, as benchmarks/results/clustering.md measured it: so many neurons a second."""
    method, modules = recipe.partition.method, recipe.partition.num_modules
    if method in ("random", "contiguous"):
        return
    columns = sizes.width if method == "kmeans" else _SKETCH_ROWS
    layer_s = sizes.neurons * (6e-5 * max(columns, 512) / 1024 + 2.3e-8 * modules**2)
    if method == "coactivation":
        layer_s += 2e-7 * sizes.neurons**2
    rounds = math.ceil(sizes.layers / device.cores)
    need.take("host processor", rounds * layer_s / 1.5, rounds * layer_s * 3)


def _add_layerwise(need: Need, recipe: Recipe, sizes: Sizes, device: Device, tokens: int) -> float:
    """Add the fits of each layer to what the ones before it leave; returns the bytes that one of them holds."""
    modules, experts, rows = recipe.partition.num_modules, count_experts(recipe), min(LAYERWISE_ROWS, tokens)
    grams = 2 * rows * (sizes.neurons * sizes.width + modules**2 * sizes.width)
    fits = _router_flops(recipe, sizes, rows, experts) if recipe.router.routing != "task" else 0
    held = rows * (2 * (sizes.neurons + sizes.width) + modules**2) * 4.0
    refit = 0.0
    if recipe.assignment.refit:
        width = sizes.neurons + (modules if recipe.router.compensation else 0)
        # the factorization is of float64, at half the rate
        refit = 2 * tokens * width * (width + 2 * sizes.width) + 2 * width**3 / 3
        held += 8.0 * width * (2 * width + sizes.width) + sizes.layers * sizes.neurons * sizes.width * 4
    need.work(device, sizes.layers * (grams + fits + refit))
    need.run(device, 2 * sizes.layers * tokens * sizes.neurons * sizes.width, 0, sizes.itemsize)
    return held


def _router_flops(recipe: Recipe, sizes: Sizes, rows: int, experts: int) -> float:
    """Return the operations of one layer's router fit: up to 200 steps over all rows, or 300 of 512 rows."""
    hidden = max(16, 4 * experts)
    if recipe.router.kind == "mlp":
        return 600 * 512 * 6 * hidden * (sizes.width + experts)
    if recipe.router.start == "logistic":
        return 100 * 4 * rows * sizes.width * experts
    return 2 * rows * sizes.width * (sizes.width + experts) + sizes.width**3


def estimate_finetune(
    wanted: FinetuneRecipe, sizes: Sizes, device: Device, *, trainable: int, teacher: Sizes | None = None
) -> Need:
    """Return what training takes.

    Args:
        wanted: how it is trained.
        sizes: of the model that learns; its ``itemsize`` is the checkpoint's.
        device: where.
        trainable: parameters that learn.
        teacher: of the dense model that it learns from, if any.
    """
    need = Need(host_bytes=PROCESS_BYTES["finetune"])
    need.take("start", *START_S)
    tokens = wanted.batch_size * wanted.sequence_length
    held = sizes.itemsize if wanted.train == "adapters" else 4
    products = 4 if device.is_cpu else 2
    added = trainable if wanted.train in ("lora", "adapters") else 0
    state = sizes.parameters * held + 4 * added + 8 * trainable
    forward = forward_flops(sizes, tokens, wanted.sequence_length, has_head=True) + 2 * added * tokens
    # backward: to the activations as much as forward, to the weights two a weight that learns
    step = 2 * forward + 2 * min(trainable, sizes.body + sizes.head) * tokens
    logits = tokens * sizes.vocabulary
    live = _activation_bytes(sizes, tokens, held, products, train=wanted.train)
    # the model's, those counted, and the gradients of both; float32 copies come in pieces
    live += 4 * logits * products + 3 * 4 * min(logits, 2**25)
    if teacher is not None:
        step += forward_flops(teacher, tokens, wanted.sequence_length, has_head=True)
        state += teacher.parameters * products
        live += 2 * logits * products + 4 * min(logits, 2**25)
    moved = 3 * sizes.parameters * held + 28 * trainable
    need.run(device, wanted.max_steps * step, wanted.max_steps * moved, products)
    passes = (4 if teacher is not None else 3) * wanted.max_steps
    need.take("start", *(passes * sizes.layers * seconds for seconds in LAYER_S))
    need.move(sizes.num_bytes + (teacher.num_bytes if teacher is not None else 0), READ_RATE)
    saved = sizes.parameters if wanted.train in ("full", "router") else trainable
    states = math.ceil(wanted.max_steps / wanted.save_steps)
    need.move(states * 4 * (saved + 2 * trainable), WRITE_RATE)
    need.move(4 * added if wanted.train == "adapters" else sizes.num_bytes, WRITE_RATE)
    # gradients grow as activations go
    most = state + max(live, 4 * trainable)
    if device.is_cpu:
        need.host_bytes += most
    else:
        cast = 2 * (trainable if wanted.train == "full" else 0)  # autocast keeps weights that learn in bfloat16
        need.device_bytes = most + cast + CONTEXT_BYTES
        need.host_bytes += sizes.parameters * held
    return _placed(need, device)


def _activation_bytes(sizes: Sizes, tokens: int, held: int, products: int, *, train: str) -> float:
    """Return what autograd keeps of a forward pass: inputs of norms in the weights' type, the rest in the products'.

    A layer keeps the inputs of both norms; queries, keys and values as attention takes them, and its output; of a gated
    FFN gate, up and what is made of them. Where weights learn, the inputs of their norms and linear layers too.
    """
    norms, kept = 2 * sizes.width, 4 * sizes.queries + 4 * sizes.neurons
    if train in ("full", "lora"):
        kept += sizes.width + sizes.neurons
    if train == "full":
        norms += 2 * sizes.width
        kept += sizes.width + sizes.queries
    return float(sizes.layers * tokens * (norms * held + kept * products))


def _placed(need: Need, device: Device) -> Need:
    if device.is_cpu:
        need.device_bytes = need.host_bytes
    return need
