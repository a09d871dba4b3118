"""The binding that makes every method of METHODS a PEFT method. Importing it makes the methods known to PEFT.

Each has a configuration with PEFT's own field names and a ``peft_type`` of its own, ``MODMOE_<METHOD>``; adapters are
saved and loaded by PEFT. What this uses of PEFT beyond its documented interface is held by a contract test.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, cast

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType, register_peft_method
from torch import Tensor, nn

from modmoe.adapters.fingerprint import fingerprint, same_base
from modmoe.adapters.mechanism.attach import CONTEXT, Site, add_adapter, attach_site, context_of, detach
from modmoe.adapters.mechanism.base import RoutedAdapter
from modmoe.adapters.mechanism.targets import find_targets, measure
from modmoe.adapters.table import METHODS, Method
from modmoe.errors import AdapterError, did_you_mean

LAYOUT = "modmoe-adapters-1"
"""How the tensors of an adapter file are laid out; names end in their shapes."""


@dataclass
class RoutedConfig(PeftConfig):
    """What the configurations of all routed adapters have beside their method's own fields."""

    method: ClassVar[str]

    target_modules: list[str] | str | None = dataclasses.field(default=None, kw_only=True)
    """Names of the layers to attach to, or a regular expression of whole paths; None for the method's own."""
    layers_to_transform: list[int] | int | None = dataclasses.field(default=None, kw_only=True)
    """Decoder layers to keep to; None for all."""
    exclude_modules: list[str] | str | None = dataclasses.field(default=None, kw_only=True)
    """Not used by routed adapters; kept because PEFT asks for it."""
    modules_to_save: list[str] | None = dataclasses.field(default=None, kw_only=True)
    """Layers of the base model to train whole and save with the adapter, as in PEFT."""
    z_loss_weight: float = dataclasses.field(default=0.0, kw_only=True)
    """Factor of the routers' z-loss, the mean squared log-sum-exp of their logits."""
    importance_loss_weight: float = dataclasses.field(default=0.0, kw_only=True)
    """Factor of the squared coefficient of variation of the experts' summed weights."""
    loss_scope: Literal["layer", "all"] = dataclasses.field(default="layer", kw_only=True)
    """Whether routers' losses are of each router and averaged, or of all routers' tokens together."""
    loss_tokens: Literal["tokens", "answers"] = dataclasses.field(default="tokens", kw_only=True)
    """Tokens that routers' losses count: all but padding, or those alone that are learned, where labels are given."""
    layout: str = dataclasses.field(default=LAYOUT, kw_only=True)
    """How the tensors in the file are laid out."""
    base_fingerprint: str | None = dataclasses.field(default=None, kw_only=True)
    """Hash of the base model's weights that the adapter was made for; filled in when it is attached."""

    def __post_init__(self) -> None:
        """Set the type, and check the numbers that need no model."""
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PeftType(f"MODMOE_{self.method.upper()}")
        if self.task_type is None:
            self.task_type = "CAUSAL_LM"
        for name, known in (("loss_scope", ("layer", "all")), ("loss_tokens", ("tokens", "answers"))):
            if getattr(self, name) not in known:
                raise AdapterError(
                    str(name), f"no such value '{getattr(self, name)}'", did_you_mean(str(getattr(self, name)), known)
                )
        if self.exclude_modules:
            raise AdapterError("exclude_modules", "routed adapters have no use for it", "name target_modules instead")

    def settings(self) -> Any:
        """Return the method's settings alone."""
        kind = METHODS[self.method].settings
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(kind)}
        # a file has lists only
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    def num_parameters(self, model: nn.Module) -> int:
        """Return the parameters that this adapter would add to ``model``, without building anything.

        Works on the meta device. Raises AdapterError as attaching would.
        """
        return sum(torch.Size(shape).numel() for shape in parameter_shapes(self, model).values())


def parameter_shapes(config: RoutedConfig, model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter that ``config`` would add to ``model``, by name; AdapterError as attaching."""
    adapter, settings = METHODS[config.method].adapter, config.settings()
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _find(model, adapter, config):
        shape = measure(model, model.get_submodule(path), path, adapter)
        try:
            adapter.check(settings, shape)
        except ValueError as error:
            raise AdapterError(f"{config.method} at {path}", str(error)) from None
        shapes.update({f"{path}.{name}": size for name, size in adapter.shapes(settings, shape).items()})
        shapes.update(adapter.shared_shapes(settings, shape))
    return shapes


def _find(model: nn.Module, adapter: type[RoutedAdapter], config: RoutedConfig) -> list[str]:
    try:
        return find_targets(model, adapter, config.target_modules, config.layers_to_transform)
    except ValueError as error:
        raise AdapterError(str(error)) from None


class RoutedLayer(Site, BaseTunerLayer):
    """A site whose adapters PEFT switches on and off."""

    def __init__(self, target: nn.Module, adapter_class: type[RoutedAdapter], path: str, context: Any) -> None:
        """Hang below ``target``."""
        super().__init__(target, adapter_class, path, context)
        self.adapter_layer_names = (self.container,)
        # plain values of this layer; PEFT's are of the class
        self._disable_adapters, self._active_adapter, self.merged_adapters = False, [], []
        self.unproved: set[str] = set()

    def active(self) -> list[RoutedAdapter]:
        """Return the adapters that PEFT has switched on; AdapterError where a file has not filled them."""
        if self.disable_adapters:
            return []
        if self.unproved:
            self.prove()
        return [cast(RoutedAdapter, self.adapters[name]) for name in self.active_adapters if name in self.adapters]

    def train(self, mode: bool = True) -> Self:
        """Set the mode, which what loads an adapter does last; AdapterError as ``active``."""
        if self.unproved:
            self.prove()
        return super().train(mode)

    def prove(self) -> None:
        """Raise AdapterError where an adapter that was to be loaded has values that are not finite."""
        for adapter_name in sorted(self.unproved & set(self.adapters)):
            adapter = cast(RoutedAdapter, self.adapters[adapter_name])
            for module in (adapter, *adapter.shared):
                for name, weight in module.named_parameters():
                    if not weight.is_meta and not bool(torch.isfinite(weight).all()):
                        raise AdapterError(
                            f"adapter '{adapter_name}'",
                            f"{name} of {self.path} has values that are not finite",
                            "the file lacks it or is damaged (or was never loaded: use PeftModel.from_pretrained)",
                        )
        self.unproved.clear()

    def get_base_layer(self) -> nn.Module:
        """Return this site: the layer that it serves is its parent."""
        return self

    @property
    def weight(self) -> Tensor:
        """Refuse: a site has no weight of its own, the layer above it has."""
        raise AttributeError("a routed adapter has no weight")

    @property
    def bias(self) -> Tensor:
        """Refuse, as for the weight."""
        raise AttributeError("a routed adapter has no bias")

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Do nothing: adapters are made on the device of the layer they serve."""


class RoutedTuner(BaseTuner):
    """Attaches one method's adapters to a model; PEFT makes it."""

    tuner_layer_cls = RoutedLayer
    method: ClassVar[Method]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attach an adapter, the first one or a further one; AdapterError before anything is changed."""
        try:
            self._check(model, adapter_name)
        except AdapterError:
            del self.peft_config[adapter_name]
            raise
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Switch to an adapter and to the router losses that its configuration asks for; of several, the first's."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        if names and hasattr(self.model, CONTEXT):
            config: Any = self.peft_config[names[0]]
            context = context_of(self.model)
            context.loss_scope, context.counts = config.loss_scope, config.loss_tokens
            context.more_losses = {"z": config.z_loss_weight, "importance": config.importance_loss_weight}

    def _check(self, model: nn.Module, adapter_name: str) -> None:
        # a copy, since what is filled in belongs to this model
        config: Any = copy.copy(self.peft_config[adapter_name])
        config._from_file = getattr(config, "base_fingerprint", None) is not None
        self.peft_config[adapter_name] = config
        if not isinstance(config, RoutedConfig) or METHODS[config.method] is not self.method:
            raise AdapterError("peft_type", f"{config.peft_type} cannot be added beside {self.prefix}", "load it alone")
        if config.layout != LAYOUT:
            raise AdapterError(
                "layout", f"the adapter's tensors are laid out as '{config.layout}'", f"this version reads {LAYOUT}"
            )
        found = fingerprint(model)
        if config.base_fingerprint is None:
            config.base_fingerprint = found
        elif found is not None and not same_base(config.base_fingerprint, found):
            raise AdapterError(
                "base model",
                f"the adapter was made for {config.base_model_name_or_path or 'another model'} (weights "
                f"{config.base_fingerprint}), not for this model ({found})",
                "load the base model it was trained on",
            )
        shapes = parameter_shapes(config, model)  # complains before anything is attached
        if (config.z_loss_weight or config.importance_loss_weight) and not any("router" in name for name in shapes):
            raise AdapterError(
                "z_loss_weight, importance_loss_weight", f"{config.method} has no router", "leave them 0"
            )

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        paths = _find(model, self.method.adapter, peft_config)
        names = sorted({path.rpartition(".")[2] for path in paths})
        if peft_config.target_modules is None and not any(name.isdigit() for name in names):
            peft_config.target_modules = names
        peft_config._paths = frozenset(paths)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        return key in peft_config._paths

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        site = cast(RoutedLayer, attach_site(self.model, current_key, self.method.adapter, RoutedLayer))
        try:
            adapter = add_adapter(site, self.model, current_key, peft_config.settings(), adapter_name)
        except ValueError as error:
            raise AdapterError(str(error)) from None
        if adapter_name not in self.active_adapters:
            adapter.requires_grad_(False)
        if peft_config._from_file and peft_config.inference_mode:
            mark_unfilled(adapter, site, adapter_name)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".{cls.prefix}.{adapter_name}.", f".{cls.prefix}.")

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_tensors(model, cls.prefix, adapter_name, found)
        return found

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Fold the named adapters, or the active ones, into the base model's weights and return it.

        Raises:
            AdapterError: one does not fold exactly, has values that are not finite, or lies on a quantized layer.
        """
        names = list(self.active_adapters) if adapter_names is None else adapter_names
        for name in names:
            if name not in self.peft_config:
                raise AdapterError("adapter_names", f"no adapter '{name}'", did_you_mean(name, self.peft_config))
        pairs = [
            (cast(RoutedAdapter, layer.adapters[name]), self.model.get_submodule(layer.path))
            for layer in _layers(self.model)
            for name in names
            if name in layer.adapters
        ]
        for adapter, target in pairs:
            check_foldable(adapter, target)
        for adapter, target in pairs:
            fold_into(adapter, target)
        detach(self.model)
        return cast(nn.Module, self._unload_and_optionally_merge(merge=True, adapter_names=adapter_names))

    def unload(self) -> nn.Module:
        """Return the base model without any adapter."""
        detach(self.model)
        return super().unload()

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: a router has to see every token."""
        raise AdapterError(
            str(self.prefix), "cannot be merged in place", "where it folds exactly, use merge_and_unload()"
        )

    def unmerge_adapter(self) -> None:
        """Do nothing: nothing is ever merged in place."""

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: routers of several adapters have no weighted sum."""
        raise AdapterError(
            "add_weighted_adapter",
            f"{self.prefix} adapters have routers, and the sum of two routers is neither",
            "train one adapter on all tasks, or put LoRAs together with modmoe.adapters.corespace.stack_loras",
        )


def check_foldable(adapter: RoutedAdapter, target: nn.Module) -> None:
    """Raise AdapterError where an adapter's change cannot be added to the layer's weights exactly."""
    if adapter.fold_kind != "exact":
        raise AdapterError(
            str(adapter.method),
            "depends on the token, so it cannot be merged into the weights exactly",
            "export it as it is (form tied), or keep the adapter",
        )
    for name, weight in adapter.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise AdapterError(f"{adapter.method} at {adapter.site}", f"{name} has values that are not finite")
    for name, weight in target.named_parameters(recurse=False):
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise AdapterError(
                f"{adapter.method} at {adapter.site}",
                f"{name} is quantized ({weight.dtype}), so nothing can be merged into it",
                "load the base model in bfloat16 or float32",
            )


def fold_into(adapter: RoutedAdapter, target: nn.Module, weights_E: Tensor | None = None) -> None:
    """Add an adapter's change to the weights of the layer it serves, computed in float32.

    ``weights_E`` holds the experts' weights; None for adapters that fold exactly.
    """
    with torch.no_grad():
        if hasattr(adapter, "merged"):
            for name, merged in cast(Any, adapter).merged(target).items():
                target.get_parameter(name).copy_(merged)
            return
        weight = target.get_parameter("weight")
        change_OD = adapter.fixed_weight(weights_E)
        change = change_OD.T if type(target).__name__ == "Conv1D" else change_OD
        weight.copy_(weight.float() + change.to(weight.device))


def mark_unfilled(adapter: RoutedAdapter, site: RoutedLayer, adapter_name: str) -> None:
    """Take the values from an adapter that a file is to fill, so that a tensor that the file lacks is found.

    ``model.load_adapter`` of transformers only logs what is missing, and an adapter at its start changes nothing.
    """
    with torch.no_grad():
        for module in (adapter, *adapter.shared):
            for weight in module.parameters():
                weight.fill_(torch.nan)
    site.unproved.add(adapter_name)


def check_tensors(model: nn.Module, prefix: str, adapter_name: str, found: dict[str, Tensor]) -> None:
    """Raise AdapterError where an adapter's tensors lack one, have one too many, or are of the wrong shape or NaN."""
    mark = f".{prefix}.{adapter_name}."
    wanted = {key: value for key, value in model.state_dict().items() if mark in key}
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise AdapterError(
            f"adapter '{adapter_name}'",
            f"lacks {len(missing)} of {len(wanted)} tensors, such as {missing[0]}",
            "the file is incomplete, or was made with other target_modules",
        )
    known = model.state_dict().keys()
    for key, value in found.items():
        if key not in known and key.removeprefix("base_model.model.") not in known:
            raise AdapterError(f"adapter '{adapter_name}'", f"has {key}, which this adapter does not; was it renamed?")
        if key in wanted and value.shape != wanted[key].shape:
            raise AdapterError(
                f"adapter '{adapter_name}'",
                f"{key} has the shape {list(value.shape)}, not {list(wanted[key].shape)}",
                "adapter_config.json belongs to another file",
            )
        if key in wanted and not bool(torch.isfinite(value).all()):
            raise AdapterError(
                f"adapter '{adapter_name}'", f"{key} has values that are not finite", "the file is damaged"
            )


def _layers(model: nn.Module) -> Iterator[RoutedLayer]:
    for module in model.modules():
        if isinstance(module, RoutedLayer) and module.path:
            yield module


def register(name: str, config: type[RoutedConfig]) -> None:
    """Make a method known to PEFT, whose table of types is a closed enumeration."""
    method, label = METHODS[name], f"modmoe_{name}"
    value = label.upper()
    if value not in PeftType.__members__:
        member = str.__new__(PeftType, value)
        member._name_, member._value_ = value, value
        type.__setattr__(PeftType, value, member)
        PeftType._member_map_[value] = member
        PeftType._value2member_map_[value] = member
        PeftType._member_names_.append(value)
    if PeftType(value) in PEFT_TYPE_TO_CONFIG_MAPPING:
        return
    tuner = type(f"{method.adapter.__name__}Model", (RoutedTuner,), {"prefix": label, "method": method})
    register_peft_method(name=label, config_cls=config, model_cls=tuner, prefix=label)
