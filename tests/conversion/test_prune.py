"""Static pruning: the neurons that stay, what is written, and the repairs, each against plain sums over all tokens."""

# Shapes: T tokens, D model width, F neurons, N neurons kept

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import modmoe
from modmoe.analysis.passes.stream import Turn, WholeModel, watched
from modmoe.analysis.profile import ActivationProfile, load_profiles
from modmoe.analysis.score import neuron_scores
from modmoe.conversion import prune
from modmoe.conversion.modular import layerwise
from modmoe.errors import ModmoeError, PlanError
from modmoe.models.families import FAMILIES
from modmoe.models.ffn_layout import FFNWeights, LazyFFNs
from modmoe.models.inspection import inspect
from modmoe.models.loading import load
from modmoe.storage.checkpoint import Checkpoint
from modmoe.storage.plan import Take
from tests.support.tiny import NEURONS, save_dense, token_ids, write_tasks

RECIPES = Path(str(files("modmoe.recipes")))
KEPT = 18
OPTIONS: dict[str, Any] = {"method": "prune", "tokens": 300, "sequence_length": 16, "active_fraction": KEPT / NEURONS}

DRAW = torch.Generator().manual_seed(0)
TASKS = [torch.randn(tokens, 12, generator=DRAW).double() + 0.5 for tokens in (5, 40)]
SLOPES = [torch.randn(h_TF.shape, generator=DRAW).double() for h_TF in TASKS]
WEIGHTS = FFNWeights(*(torch.randn(shape, generator=DRAW).double() for shape in ((12, 6), (12, 6), (6, 12))))


def profile() -> ActivationProfile:
    taylor_PF = torch.stack([(h_TF * g_TF).abs().sum(0) for h_TF, g_TF in zip(TASKS, SLOPES, strict=True)])
    sums = [torch.stack([h_TF.sum(0) for h_TF in part]) for part in (TASKS, [h.abs() for h in TASKS])]
    squares_PF = torch.stack([h_TF.square().sum(0) for h_TF in TASKS])
    rows = torch.zeros(1, 12)
    return ActivationProfile(("a", "b"), torch.tensor([5, 40]), *sums, squares_PF, taylor_PF, rows, 45)


def by_hand(score: str, neuron: int) -> float:
    h_T, down_D = torch.cat(TASKS)[:, neuron], WEIGHTS.down_DF[:, neuron]
    if score == "magnitude":
        assert WEIGHTS.gate_FD is not None
        rows = (WEIGHTS.gate_FD[neuron], WEIGHTS.up_FD[neuron], down_D)
        return sum(float(row.square().sum().sqrt()) for row in rows)
    if score == "activation":
        return float(h_T.abs().mean())
    if score == "wanda":
        return float(down_D.abs().mean() * h_T.square().mean().sqrt())
    if score == "wifv":
        return float((h_T - h_T.mean()).square().mean() * down_D.square().sum())
    return float((h_T * torch.cat(SLOPES)[:, neuron]).abs().mean())


@pytest.mark.parametrize("score", sorted({*prune.SCORES} - {"random"}))
def test_the_neurons_of_the_highest_score_over_all_tokens_stay(score: str) -> None:
    wanted = sorted(sorted(range(12), key=lambda neuron: by_hand(score, neuron))[-5:])
    assert prune.choose_neurons(profile(), WEIGHTS, score, 5, 0).tolist() == wanted


def test_random_draws_by_the_seed() -> None:
    drawn = [prune.choose_neurons(profile(), WEIGHTS, "random", 5, seed).tolist() for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] != drawn[3]
    assert all(sorted(set(kept)) == kept and len(kept) == 5 for kept in drawn)


def made(tmp_path: Path, model_type: str, changes: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Prune a tiny model into tmp_path / "out"."""
    dense = save_dense(tmp_path / "dense", model_type, **(changes or {}))
    return modmoe.convert(dense, tmp_path / "out", tasks=write_tasks(tmp_path / "tasks"), **{**OPTIONS, **options})


def kept_of(tmp_path: Path) -> list[Tensor]:
    found = load_file(tmp_path / "out" / "analysis" / "neurons.safetensors")
    return [found[f"layers.{layer}.kept_N"] for layer in range(2)]


def down_of(model: Any, model_type: str, layer: int) -> Any:
    family = FAMILIES[model_type]
    return model.get_submodule(f"{family.layers}.{layer}.{family.down}")


def reloaded(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [("llama", torch.bfloat16), *((model_type, torch.float32) for model_type in ("gpt2", "phi3", "opt"))],
    ids=str,
)
def test_plain_transformers_loads_the_dense_model_without_those_neurons(
    tmp_path: Path, model_type: str, dtype: torch.dtype
) -> None:
    found = made(tmp_path, model_type, {"dtype": dtype})
    dense, pruned, family = reloaded(tmp_path / "dense"), reloaded(tmp_path / "out"), FAMILIES[model_type]
    for layer, kept_N in enumerate(kept_of(tmp_path)):
        assert len(kept_N) == KEPT
        weight = down_of(dense, model_type, layer).weight.data
        weight = weight.T if family.transposed else weight
        weight[:, ~torch.isin(torch.arange(NEURONS), kept_N)] = 0
        small = down_of(pruned, model_type, layer).weight
        assert sorted(small.shape) == sorted((KEPT, 32))
    with torch.no_grad():
        torch.testing.assert_close(pruned(token_ids()).logits, dense(token_ids()).logits, rtol=1e-9, atol=1e-9)
    assert type(pruned) is type(dense)
    assert Checkpoint(tmp_path / "out").dtype(f"{family.layers}.1.{family.down}.weight") == dtype
    assert found["parameters"]["stored"] == pruned.num_parameters()
    assert found["parameters"]["dense"] == dense.num_parameters()
    assert found["verified"]["max_abs_logit_diff_silenced"] <= 1e-8


def hidden_of(tmp_path: Path, model_type: str, batches: Any, layer: int, on_down: Any = None) -> Tensor:
    """Return the dense model's activations in a layer over all calibration tokens, [T, F]."""
    model, rows = load(tmp_path / "dense", device="cpu"), []
    for turn in [Turn(0, 0, batch) for items in batches.values() for batch in items]:

        def keep(at: int, hidden: Tensor, turn: Turn) -> None:
            if at == layer:
                rows.append(turn.real_rows(hidden).double())

        with torch.no_grad(), watched(model, FAMILIES[model_type], turn, on_hidden=keep, on_down=on_down):
            model(input_ids=turn.batch.input_ids_BT, attention_mask=turn.batch.attention_mask_BT)
    return torch.cat(rows)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the analysis and what was pruned."""
    found: dict[str, Any] = {}
    plain = prune.prune_layers

    def pruning(recipe: Any, analysis: Any, *args: Any) -> Any:
        found.update(analysis=analysis, pruned=plain(recipe, analysis, *args))
        return found["pruned"]

    monkeypatch.setattr(prune, "prune_layers", pruning)
    return found


@pytest.mark.parametrize(
    ("model_type", "changes"), [("llama", {"mlp_bias": False}), ("granite", {"mlp_bias": True}), ("gpt2", {})]
)
def test_compensation_is_the_mean_output_of_what_is_left_out(
    tmp_path: Path, seen: dict[str, Any], model_type: str, changes: dict[str, Any]
) -> None:
    found = made(tmp_path, model_type, changes, recipe=RECIPES / "flap.yaml")
    pruned, batches = reloaded(tmp_path / "out"), seen["analysis"].batches
    mean_LF = [hidden_of(tmp_path, model_type, batches, layer).mean(0) for layer in range(2)]
    kept_LN = kept_of(tmp_path)

    def held(layer: int, hidden: Tensor, _: Turn) -> Tensor:
        return mean_LF[layer].expand_as(hidden).index_copy(-1, kept_LN[layer], hidden[..., kept_LN[layer]])

    runner, batch = WholeModel(reloaded(tmp_path / "dense"), FAMILIES[model_type]), next(iter(batches.values()))[0]
    wanted = runner.logits(batch, on_hidden=held)
    found_logits = WholeModel(pruned, FAMILIES[model_type]).logits(batch)
    counted = batch.attention_mask_BT.bool()
    torch.testing.assert_close(found_logits[counted], wanted[counted], rtol=1e-4, atol=1e-4)
    plain = runner.logits(batch, on_hidden=lambda layer, h, _: held(layer, h, _) - held(layer, 0 * h, _))
    assert float((plain - wanted)[counted].abs().max()) > 0.01
    assert (found["compensation"], found["refit"], found["score"]) == (True, False, "wifv")
    assert found["parameters"]["stored"] == pruned.num_parameters()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_refit_solves_the_normal_equations_on_what_pruned_layers_leave(
    tmp_path: Path, seen: dict[str, Any], model_type: str, has_bias: bool
) -> None:
    made(tmp_path, model_type, refit=True, compensation=has_bias)
    pruned, ffns = reloaded(tmp_path / "out").float(), seen["analysis"].ffns
    for layer, kept_N in enumerate(kept_of(tmp_path)):

        def before(at: int, hidden: Tensor, _: Turn, layer: int = layer) -> Tensor | None:
            small = down_of(pruned, model_type, at)
            return small(hidden[..., kept_of(tmp_path)[at]]) if at < layer else None

        hidden_TF = hidden_of(tmp_path, model_type, seen["analysis"].batches, layer, before)
        small, weights = down_of(pruned, model_type, layer), ffns[layer]
        down_DN = (small.weight.T if model_type == "gpt2" else small.weight).detach().double()
        change_ND = (down_DN - weights.down_DF[:, kept_N]).T
        added_D = small.bias.detach().double() - weights.down_bias_D
        kept_TN = hidden_TF[:, kept_N]
        missing_TD = hidden_TF.index_fill(1, kept_N, 0) @ weights.down_DF.double().T
        left_TD = missing_TD - kept_TN @ change_ND - added_D
        if has_bias:
            assert float(left_TD.mean(0).abs().max()) < 1e-4
            kept_TN = kept_TN - kept_TN.mean(0)
        else:
            assert not bool(added_D.any())
        ridge = layerwise._RIDGE * kept_TN.square().sum(0).mean()
        torch.testing.assert_close(kept_TN.T @ left_TD, ridge * change_ND, rtol=1e-2, atol=1e-2)
        assert float(left_TD.square().sum()) < 0.9 * float(missing_TD.square().sum())


def test_a_lost_neuron_shows_in_the_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = prune.prune_plan

    def wrong(source: Any, pruned: Any) -> Any:
        order_N = pruned[1].kept_N.roll(1)
        plan = plain(source, pruned)
        name = "model.layers.1.mlp.up_proj.weight"
        plan.ops[name] = Take(name, order_N)
        return plan

    monkeypatch.setattr(prune, "prune_plan", wrong)
    with pytest.raises(PlanError, match="with silenced neurons the logits differ"):
        made(tmp_path, "llama")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_and_inspect_say_what_it_comes_to(tmp_path: Path) -> None:
    plan = made(tmp_path, "qwen2", dry_run=True)
    assert not (tmp_path / "out").exists()
    found = modmoe.convert(tmp_path / "dense", tmp_path / "out", tasks=write_tasks(tmp_path / "tasks"), **OPTIONS)
    assert plan["parameters"] == {key: found["parameters"][key] for key in ("dense", "stored")}
    assert (plan["neurons"], plan["neurons_before"], plan["dry_run"]) == (KEPT, NEURONS, True)
    # fine-tuning writes what transformers knows of the configuration
    reloaded(tmp_path / "out").to(torch.float32).save_pretrained(tmp_path / "tuned")
    for directory in ("out", "tuned"):
        about = inspect(str(tmp_path / directory))
        assert (about["method"], about["model_type"], about["num_experts"]) == ("prune", "qwen2", 0)
        assert about["sparsity"]["ffn"] == pytest.approx(1 - KEPT / NEURONS)
        assert about["sparsity"]["total"] == pytest.approx(
            1 - about["parameters"]["stored"] / plan["parameters"]["dense"], abs=1e-6
        )
    assert modmoe.load(tmp_path / "out").config.intermediate_size == KEPT


@pytest.mark.parametrize(
    ("model_type", "options", "words"),
    [
        ("llama", {"score": "wands"}, "no score of neurons 'wands'. Did you mean 'wanda'"),
        ("llama", {"score": "output_norm"}, "no score of neurons 'output_norm'"),
        ("qwen2", {"compensation": True}, "'qwen2' has no bias in its FFNs .* granite, llama"),
        ("llama", {"score": "taylor", "by_layer": True}, "calibration.by_layer"),
        ("llama", {"num_modules": 8}, "--num-modules: does not go with --method prune"),
        ("llama", {"fit_bytes": 10**9}, "--fit-bytes: does not go with --method prune"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(
    tmp_path: Path, model_type: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ModmoeError, match=words):
        made(tmp_path, model_type, dry_run=True, **options)


def test_pruning_a_task_alone_is_a_modular_conversion_of_single_neurons(tmp_path: Path) -> None:
    made(tmp_path, "llama", method="modular", recipe=RECIPES / "seap.yaml", num_modules=NEURONS)
    tied = load(tmp_path / "out", dtype=torch.float64)
    ffns = LazyFFNs(Checkpoint(tmp_path / "dense"), FAMILIES["llama"], 2)
    score_LPF = [
        neuron_scores("wifv", one, ffns[layer])
        for layer, one in enumerate(load_profiles(tmp_path / "out" / "analysis"))
    ]
    for task in range(3):
        dense = reloaded(tmp_path / "dense")
        for layer, score_PF in enumerate(score_LPF):
            left_out = score_PF[task].argsort()[: NEURONS - KEPT]
            dense.model.layers[layer].mlp.down_proj.weight.data[:, left_out] = 0
        tied.set_expert(task)
        with torch.no_grad():
            torch.testing.assert_close(tied(token_ids()).logits, dense(token_ids()).logits, rtol=1e-9, atol=1e-9)
