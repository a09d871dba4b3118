"""Curves of a training run: statistics of the routers on logged steps, and the program that draws them.

entropy      mean over tokens of -sum_e p_e log p_e, in nats: 0 where the router is sure, log E where it is not at all
load_cv      standard deviation of the experts' loads over their mean: 0 where all have the same. The load of an expert
             is the share of the choices that fall on it; of a mixture that has every expert on, the share of the weight
load_max     the largest load in any layer: 1 where one expert has taken all, 1/K where each token has K
modules_on   share of the dense FFN's modules that a token has on; ``experts_on`` that of an adapter's experts

All are computed from the forward pass of training itself; padding does not count.
"""

# Shapes: T tokens of a batch, N counted tokens, E experts, S stored modules, X numbers of one router

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.integrations.integration_utils import TensorBoardCallback

from modmoe.adapters.mechanism.losses import Route
from modmoe.errors import RecipeError, reason_of
from modmoe.modeling.modeling_modmoe import ModularMixin
from modmoe.modeling.modular_ffn import ModularFFN
from modmoe.storage.checkpoint import write_json
from modmoe.storage.documents import read_object

LOG = logging.getLogger(__name__)
MOST_NAMED = 16
"""The most experts for which each has a load curve; with more, only spread and maximum are drawn."""
PROJECT = "modmoe"
"""The project in which trackio and wandb put runs, unless the user names another."""
_RECORD = "curves.json"
_LAYER = re.compile(r"\.(\d+)(?:\.|$)")


class _Read(NamedTuple):
    """The statistics of one router in one batch."""

    family: str
    """router, for those of the model; adapters."""
    layer: int | None
    sums_X: Tensor
    """Tokens, and their sums of entropy, of the share that is on, and of each expert's load; they add over ranks."""


class Curves:
    """Reads the routers of a model on logged steps, without a pass of its own and without changing anything."""

    def __init__(self, model: Any) -> None:
        """Follow a model's routers: of tied FFNs, and of routed adapters on any model."""
        self.adapters = getattr(model, "routed_context", None)
        self.ffns = {ffn.layer: ffn for ffn in model.modules() if isinstance(ffn, ModularFFN)}
        self.names: list[str] = []
        self.num_modules = 0
        if isinstance(model, ModularMixin):
            config: Any = model.config
            self.num_modules = config.num_modules
            names = config.expert_names or [str(number) for number in range(config.num_experts)]
            self.names = names if len(names) <= MOST_NAMED else []
        self._found: list[_Read] = []

    def read(self, router_logits: Mapping[int, Tensor], mask_T: Tensor) -> None:
        """Keep the decisions of the routers in the last pass; nothing leaves the device.

        Args:
            router_logits: logits_TE of tied FFNs, by layer.
            mask_T: bool; padding is False and does not count.
        """
        self._found = [
            _Read("router", layer, self._of_ffn(self.ffns[layer], logits_TE.detach(), mask_T))
            for layer, logits_TE in router_logits.items()
        ]
        for route in self.adapters.run.routes if self.adapters is not None else ():
            number = _LAYER.search(route.site)
            self._found.append(_Read("adapters", int(number[1]) if number else None, _of_route(route, mask_T)))

    def take(self, add_up: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the curves' values by name, and reset the statistics; ``add_up`` sums a tensor over all ranks."""
        found, self._found = self._found, []
        if not found:
            return {}
        # one exchange, and one wait for the device
        numbers = add_up(torch.cat([sums.sums_X.double() for sums in found])).cpu()
        parts = torch.split(numbers, [len(sums.sums_X) for sums in found])
        values: dict[str, float] = {}
        for family in dict.fromkeys(sums.family for sums in found):
            of_family = [(sums.layer, part) for sums, part in zip(found, parts, strict=True) if sums.family == family]
            values |= self._named(family, of_family)
        return values

    def _named(self, family: str, routers: list[tuple[int | None, Tensor]]) -> dict[str, float]:
        kinds: dict[str, list[float]] = {"entropy": [], "load_cv": [], "load_max": [], "on": []}
        by_layer: dict[str, list[float]] = {}
        loads = []
        for layer, sums_X in routers:
            tokens, entropy, on = sums_X[:3].tolist()
            load_E = sums_X[3:] / sums_X[3:].sum().clamp_min(1e-30)
            loads.append(load_E)
            spread = float(load_E.std(correction=0) / load_E.mean().clamp_min(1e-30))
            of_one = [entropy / max(tokens, 1), spread, float(load_E.max()), on / max(tokens, 1)]
            for kind, value in zip(kinds, of_one, strict=True):
                kinds[kind].append(value)
                if layer is not None and kind in ("entropy", "load_cv"):
                    by_layer.setdefault(f"{family}/{kind}/layer_{layer}", []).append(value)
        values = {f"{family}/{kind}": _mean(found) for kind, found in kinds.items() if kind in ("entropy", "load_cv")}
        values[f"{family}/load_max"] = max(kinds["load_max"])
        values[f"{family}/{'modules_on' if family == 'router' else 'experts_on'}"] = _mean(kinds["on"])
        if family == "router":
            # experts of adapters with the same number in different layers have nothing in common
            mean_E = torch.stack(loads).mean(0).tolist()
            values |= {f"router/load/{name}": load for name, load in zip(self.names, mean_E, strict=False)}
        return {**values, **{name: _mean(found) for name, found in by_layer.items()}}

    def _of_ffn(self, ffn: ModularFFN, logits_TE: Tensor, mask_T: Tensor) -> Tensor:
        probs_NE = logits_TE[mask_T].softmax(-1, dtype=torch.promote_types(logits_TE.dtype, torch.float32))
        ids_NK = probs_NE.topk(ffn.top_k, dim=-1).indices
        chosen_NE = torch.zeros_like(probs_NE).scatter(1, ids_NK, 1.0)
        on_NS = (chosen_NE @ ffn.member_ES(chosen_NE.dtype)) > 0
        return _sums(probs_NE, chosen_NE, on_NS.sum(-1) / max(self.num_modules, 1))


def _of_route(route: Route, mask_T: Tensor) -> Tensor:
    probs_NE, weights_NE, chosen_NE = route.probs_TE, route.weights_TE, route.chosen_TE
    if len(probs_NE) == len(mask_T):
        probs_NE, weights_NE, chosen_NE = (values_TE[mask_T] for values_TE in (probs_NE, weights_NE, chosen_NE))
    probs_NE = probs_NE.float().clamp_min(0)  # sigmoids, and weights above a threshold, do not add up to 1
    probs_NE = probs_NE / probs_NE.sum(-1, keepdim=True).clamp_min(1e-30)
    share_N = chosen_NE.float().mean(-1)
    is_soft = chosen_NE.all()
    return _sums(probs_NE, torch.where(is_soft, weights_NE.float().abs(), chosen_NE.float()), share_N)


def _sums(probs_NE: Tensor, load_NE: Tensor, share_N: Tensor) -> Tensor:
    entropy = torch.special.entr(probs_NE).sum()
    return torch.cat([torch.stack([share_N.new_tensor(len(share_N)), entropy, share_N.sum()]), load_NE.sum(0)])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def check_tracker(report_to: str) -> None:
    """Raise RecipeError where the program that is to draw the curves is not installed."""
    if report_to == "none":
        return
    found = importlib.util.find_spec(report_to)
    # wandb writes to a directory of its own name, which Python takes for a package without code
    if found is None or found.origin is None:
        raise RecipeError(
            "finetune.report_to", f"{report_to} is not installed", f"run `pip install {report_to}`, or leave it out"
        )


@contextlib.contextmanager
def tracked(trainer: Any, report_to: str, states: Path, *, goes_on: bool) -> Iterator[None]:
    """Configure the trainer's integrations for the run that begins here, and tell the user how to see it.

    Settings in the user's environment win. tensorboard's files lie in ``<output>.logs``, a directory for each
    run, and nothing here removes them; trackio and wandb have places of their own.

    Raises RecipeError where the program refuses the run, as wandb does without a key.
    """
    if report_to == "none":
        yield
        return
    name = _name_run(states, goes_on)
    trainer.args.run_name, place = name, states.with_suffix(".logs")
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            place = Path(callback.logging_dir or place)
            callback.logging_dir = callback.logging_dir or str(place / name)
    added = {}
    if report_to == "wandb":
        wanted = {"WANDB_PROJECT": PROJECT, "WANDB_RUN_ID": name, "WANDB_RESUME": "allow"}
        added = {key: value for key, value in wanted.items() if key not in os.environ}
    os.environ.update(added)
    wandb: Any = importlib.import_module("wandb") if report_to == "wandb" else None
    is_ours = wandb is not None and wandb.run is None
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] != report_to:
            raise
        raise RecipeError("finetune.report_to", f"{report_to}: {reason_of(error)}") from error
    finally:
        if is_ours:
            wandb.finish()  # otherwise it would print when Python ends, to the stdout that belongs to the result
        for key in added:
            del os.environ[key]
    LOG.info("curves: %s", _HOW_TO_LOOK[report_to].format(place=shlex.quote(str(place)), name=name))


_HOW_TO_LOOK = {
    "tensorboard": "tensorboard --logdir {place}",
    "trackio": f"trackio show --project {PROJECT}",
    "wandb": "run {name} of wandb, which says above where it lies",
}


def _name_run(states: Path, goes_on: bool) -> str:
    """Return a unique name of the run; a resumed run keeps the name that lies beside its states."""
    record = states / _RECORD
    if goes_on and record.is_file():
        name = read_object(record).get("name")
        if isinstance(name, str) and re.fullmatch(r"[\w.-]+", name):
            return name
    name = re.sub(r"[^\w.-]", "-", f"{states.stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    write_json(record, {"name": name})
    return name
