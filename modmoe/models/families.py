"""One row per dense architecture: where its FFNs lie. Data, no code of any model.

A row names modules by their dotted path inside a decoder layer. What follows from it for the tensors of a checkpoint,
``modmoe.models.ffn_layout`` says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modmoe.errors import CheckpointError, RecipeError, did_you_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Where a dense architecture keeps its feed-forward layers."""

    model_type: str
    """The ``model_type`` in config.json."""
    layers: str = "model.layers"
    """Path of the list of decoder layers, from the causal LM."""
    ffn: str = "mlp"
    """Path in a layer of the submodule that maps the FFN's input to its output once the model is tied."""
    gate: str | None = "mlp.gate_proj"
    """Path in a layer of the gate projection; None where there is none. Equal to ``up`` where both are one tensor."""
    up: str = "mlp.up_proj"
    """Path in a layer of the up projection."""
    down: str = "mlp.down_proj"
    """Path in a layer of the down projection."""
    transposed: bool = False
    """Weights are stored [in, out] (GPT-2's Conv1D) rather than [out, in]."""
    bypass: tuple[str, ...] = ()
    """Submodules of a layer that still run behind ``ffn`` and become identities in the tied model."""
    width: str = "intermediate_size"
    """The configuration key that holds the number of neurons."""
    activation: str = "hidden_act"
    """The configuration key that names the activation function."""
    head: str = "lm_head"
    """The output head's name in checkpoints; transformers renames it to ``lm_head`` for its own classes alone."""
    dropout: str | None = None
    """The configuration key of a dropout inside the FFN, behind ``down``; None where there is none."""

    @property
    def fused(self) -> bool:
        """Whether gate and up are the upper and lower half of one tensor."""
        return self.gate is not None and self.gate == self.up


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(model_type="llama"),
        Family(model_type="mistral"),
        Family(model_type="qwen2"),
        Family(model_type="qwen3"),
        Family(model_type="granite"),
        Family(model_type="olmo2"),
        Family(model_type="gemma2", activation="hidden_activation"),
        Family(model_type="gemma3_text", activation="hidden_activation"),
        Family(model_type="phi3", gate="mlp.gate_up_proj", up="mlp.gate_up_proj"),
        Family(
            model_type="gpt2",
            layers="transformer.h",
            gate=None,
            up="mlp.c_fc",
            down="mlp.c_proj",
            transposed=True,
            width="n_inner",
            activation="activation_function",
            dropout="resid_pdrop",
        ),
        Family(
            model_type="gpt_neox",
            layers="gpt_neox.layers",
            gate=None,
            up="mlp.dense_h_to_4h",
            down="mlp.dense_4h_to_h",
            head="embed_out",
        ),
        Family(
            model_type="opt",
            layers="model.decoder.layers",
            ffn="fc1",
            gate=None,
            up="fc1",
            down="fc2",
            bypass=("activation_fn", "fc2"),
            width="ffn_dim",
            activation="activation_function",
        ),
    )
}


def family_of(
    config: Mapping[str, Any], described: Mapping[str, Any] | None = None, where: str = "config.json"
) -> Family:
    """Return the row for a checkpoint's configuration.

    Args:
        config: the parsed config.json.
        described: the recipe's ``family:`` fields, for an architecture that has no row here.
        where: how to name the place in an error.

    Raises:
        RecipeError: ``described`` has an unknown field.
        CheckpointError: no row and no description; names the families known.
    """
    model_type = config.get("model_type")
    if described is not None:
        known = {field.name for field in dataclasses.fields(Family)}
        for key in described:
            if key not in known:
                raise RecipeError(f"family.{key}", "no such field", did_you_mean(key, known))
        fields = dict(described)
        fields["bypass"] = tuple(fields.get("bypass", ()))
        fields.setdefault("model_type", str(model_type))
        return Family(**fields)
    if not isinstance(model_type, str) or not model_type:
        raise CheckpointError(str(where), "model_type is missing", "it must name the architecture")
    if model_type not in FAMILIES:
        raise CheckpointError(
            str(where),
            f"model_type '{model_type}' is not a dense family known here ("
            f"{', '.join(sorted(FAMILIES))}). Describe where its FFNs lie under `family:` in a "
            "recipe",
        )
    return FAMILIES[model_type]


def neurons_of(config: Mapping[str, Any], family: Family) -> int:
    """Return the number of neurons F of each FFN, from the configuration alone.

    GPT-2 writes ``n_inner: null`` for 4 * n_embd. Raises CheckpointError where the key is absent or not positive.
    """
    value = config.get(family.width)
    if value is None and family.model_type == "gpt2":
        value = 4 * int(config.get("n_embd", config.get("hidden_size", 0)))
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise CheckpointError("config.json", f"{family.width} is {value!r}", "it must be a positive number of neurons")
    return value


def layers_of(config: Mapping[str, Any]) -> int:
    """Return the number of decoder layers; CheckpointError where the configuration does not say."""
    for key in ("num_hidden_layers", "n_layer"):
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    raise CheckpointError("config.json", "num_hidden_layers is missing or not a positive number")
