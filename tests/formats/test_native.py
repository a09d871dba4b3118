"""A native export computes what the tied model computes, from every source to every target in every type."""

from __future__ import annotations

import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from modmoe.errors import ExportError
from modmoe.exports.converted import export
from modmoe.formats.names import CLIENTS
from modmoe.formats.native.gates import Gate, choose_gate, router_factor
from modmoe.formats.native.plan import native_export
from modmoe.formats.native.targets import TARGETS
from modmoe.formats.proof import reload, verify
from modmoe.models.loading import load
from modmoe.storage.checkpoint import Checkpoint
from tests.support.native_models import (
    CASES,
    NEW_TOKENS,
    PAIRS,
    compute_without_modmoe,
    members,
    sample_ids,
    tied_models,
    write_export,
)
from tests.support.native_models import rows as every_row
from tests.support.tiny import token_ids

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """Return what writes, once, the tied model of a family and a case."""
    return tied_models(tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")
def matrix(tied, tmp_path_factory):
    """Every source, target, case and type: what the tied model computes, what its export does, and what was said."""
    home = tmp_path_factory.mktemp("matrix")
    exports, wanted, rows = {}, {}, []
    for source, target, case, dtype in every_row():
        directory = tied(source, case)
        try:
            said = write_export(home / f"{len(rows)}", directory, target, TYPES[dtype])
        except ExportError as error:
            assert target == "glm4_moe" and "sigmoids" in str(error)
            continue
        key = (source, case, dtype)
        if key not in wanted:
            kinds = [TYPES[dtype]] if dtype == "float32" else [torch.bfloat16, torch.float32]
            model = load(directory, dtype=TYPES[dtype])
            wanted[key] = reload.compute(model, sample_ids(), NEW_TOKENS, kinds)
        rows.append((source, target, case, dtype))
        exports[rows[-1]] = said
    kinds = [["float32"] if row[3] == "float32" else ["bfloat16", "float32"] for row in rows]
    computed = compute_without_modmoe([home / f"{number}" for number in range(len(rows))], kinds, home)
    found = dict(zip(rows, computed, strict=True))
    return SimpleNamespace(rows=rows, exports=exports, wanted=wanted, found=found)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_source_and_target(matrix, source, target):
    rows = [row for row in matrix.rows if row[:2] == (source, target)]
    assert {row[3] for row in rows} == set(TYPES)
    if source == TARGETS[target].sources[0]:
        assert len({row[2] for row in rows}) == len(CASES) - 2 * (target == "glm4_moe")
    for row in rows:
        wanted = matrix.wanted[source, row[2], row[3]]
        exact = matrix.exports[row].tolerance is None
        for name, (logits_BTV, tokens_BG) in zip(("bfloat16", "float32")[-len(wanted) :], wanted, strict=True):
            difference_BTV = (matrix.found[row][f"{name}.logits"] - logits_BTV).abs().float()
            scale = float(logits_BTV.abs().max())
            if name == "bfloat16":
                assert difference_BTV.mean() <= 2e-2 * scale, row
            elif exact:
                assert difference_BTV.max() <= 1e-5 * scale, row
                assert torch.equal(matrix.found[row][f"{name}.tokens"], tokens_BG), row
            else:
                # half of what a wrong factor would make, and a twentieth where nothing was rounded
                assert difference_BTV.mean() <= (1e-3 if row[3] == "float32" else 3e-3) * scale, row


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_names_are_those_that_transformers_saves(tied, target, tmp_path):
    """Whoever reads what ``save_pretrained`` writes reads an export: names and shapes are the same."""
    source = TARGETS[target].sources[0]
    write_export(tmp_path / "out", tied(source, "one with a core"), target)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "saved")
    made, saved = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "saved")
    assert {name: made.shape(name) for name in made} == {name: saved.shape(name) for name in saved}
    ours = {key: value for key, value in made.config.items() if key != "transformers_version"}
    assert ours.items() <= {**ours, **saved.config}.items()
    assert model.config.model_type == target


def client_weights(target, gate, client, logits_TE, top_k):
    """Return what a client multiplies experts by, weights_TE, as a row and its sources say."""
    says = gate.settings.get("norm_topk_prob", target.renormalises)
    renormalises = target.whatever_config.get(client, says)
    probs_TE = logits_TE.sigmoid() if target.probs == "sigmoid" else logits_TE.softmax(-1)
    if target.probs == "chosen" and client == "transformers":
        ids_TK = logits_TE.topk(top_k).indices
        weights_TK = logits_TE.gather(1, ids_TK).softmax(-1)
    else:
        weights_TK, ids_TK = probs_TE.topk(top_k)
        if renormalises:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return torch.zeros_like(logits_TE).scatter(1, ids_TK, weights_TK * gate.settings.get("routed_scaling_factor", 1.0))


@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("client", CLIENTS)
def test_gates_are_those_of_the_tied_model_whoever_runs_it(target, client):
    """The coefficient of each chosen expert, in float32, for every number of experts and of chosen ones."""
    row = TARGETS[target]
    if client not in row.clients:
        return
    logits_TE = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    for experts, top_k, weighted, copied in itertools.product((5, 8), (1, 2, 3), (False, True), (False, True)):
        weighted, copied = weighted and top_k > 1, copied and row.shared is None
        gate = choose_gate(row, client, num_experts=experts, top_k=top_k, weighted=weighted, copied=copied)
        if isinstance(gate, str):
            assert weighted
            continue
        wanted_TK, ids_TK = logits_TE[:, :experts].softmax(-1).topk(top_k)
        wanted_TK = wanted_TK / wanted_TK.sum(-1, keepdim=True) if weighted else torch.ones_like(wanted_TK)
        cold_TE = logits_TE[:, :experts] * 2.0 ** (gate.exponent or 0)
        weights_TE = client_weights(row, gate, client, cold_TE, top_k)
        chosen_TK = weights_TE.gather(1, ids_TK)
        assert (chosen_TK > 0).float().mean() > 0.999, "other experts are chosen"
        bound = 5e-3 if gate.is_relative else 1e-6
        assert (chosen_TK[(chosen_TK > 0).all(1)] * gate.own - wanted_TK[(chosen_TK > 0).all(1)]).abs().max() < bound
        if copied and not weighted:
            # the core counts once: exactly, wherever the client can make weights sum to 1
            renormalises = row.whatever_config.get(client, row.renormalises) is not False
            assert (weights_TE.sum(1) * gate.core - 1).abs().max() < (1e-6 if renormalises else bound)


def test_a_factor_that_is_no_power_of_two_is_folded_where_nothing_rounds():
    """Of 3 chosen among 8, 1/8 without renormalising is as good as 1/3 and exact in bfloat16; GLM has a setting."""
    three = {"num_experts": 8, "top_k": 3, "weighted": False}
    assert choose_gate(TARGETS["qwen3_moe"], "vllm", **three).own == 8
    assert choose_gate(TARGETS["qwen3_moe"], "llama.cpp", **three).own == 3, "llama.cpp renormalises"
    assert choose_gate(TARGETS["qwen2_moe"], "llama.cpp", **three).own == 8, "llama.cpp does not"
    assert choose_gate(TARGETS["flex_olmo"], "vllm", **three).own == 8, "vLLM does not"
    assert choose_gate(TARGETS["glm4_moe"], "vllm", **three).own == 1
    rounded = choose_gate(TARGETS["mixtral"], "vllm", **three)
    assert rounded.own == 3 and rounded.rounds_in(torch.bfloat16) and not rounded.rounds_in(torch.float32)


def test_a_router_with_large_logits_is_made_colder():
    gate = Gate(exponent=-10, is_relative=True)
    router_ED = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    factor = router_factor(gate, router_ED, torch.ones(32))
    assert math.log2(factor) % 1 == 0
    assert router_factor(gate, router_ED * 64, torch.ones(32)) == factor / 64
    assert router_factor(gate, router_ED, torch.full((32,), 0.25)) == factor * 4
    assert 2**-10.5 < factor * router_ED.norm(dim=-1).max() < 2**-8.9
    assert router_factor(gate, torch.zeros(4, 32), None) == 2**-10
    assert router_factor(Gate(exponent=-40), router_ED, None) == 2**-40


@torch.no_grad()
def test_llama_cpp_computes_a_qwen2_moe_layer_as_the_tied_one(tied):
    """Sigmoid as silu(x) / x, which is NaN for a zero gate; no renormalising, whatever the configuration says."""
    for case in ("union of two with a core", "one with a core", "union of three"):
        directory = tied("qwen2", case)
        plan = native_export(Checkpoint(directory), "qwen2_moe", "llama.cpp").plan
        assert plan.config["norm_topk_prob"] is False
        source, config = Checkpoint(directory), plan.config
        made = {name: op.make(source) for name, op in plan.ops.items() if ".layers.1.mlp." in name}
        layer = {name.partition(".mlp.")[2]: tensor for name, tensor in made.items()}
        model = load(directory)
        x_TD = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))

        def ffn(x_ND, prefix, layer=layer):
            gate, up, down = (layer[f"{prefix}.{role}_proj.weight"] for role in ("gate", "up", "down"))
            return (F.silu(x_ND @ gate.T) * (x_ND @ up.T)) @ down.T

        weights_TK, ids_TK = (x_TD @ layer["gate.weight"].T).softmax(-1).topk(config["num_experts_per_tok"])
        gate_T1 = x_TD @ layer["shared_expert_gate.weight"].T
        y_TD = F.silu(gate_T1) / gate_T1 * ffn(x_TD, "shared_expert")
        for expert in range(config["num_experts"]):
            weight_T1 = (weights_TK * (ids_TK == expert)).sum(1, keepdim=True)
            y_TD += weight_T1 * ffn(x_TD, f"experts.{expert}")
        wanted_TD = model.model.layers[1].mlp(x_TD)
        assert (y_TD - wanted_TD).abs().max() <= 1e-2 * wanted_TD.abs().max()


def test_a_single_expert_is_piled_up_too(tmp_path):
    from tests.support import planned

    single = members("core")[:1]
    _, directory = planned.write_tied(tmp_path, "granite", members_EM=single, changes={"mlp_bias": False})
    said = write_export(tmp_path / "out", directory, "auto")
    made = Checkpoint(tmp_path / "out")
    assert made.shape("model.layers.0.block_sparse_moe.input_linear.weight") == (1, 36, 32)
    assert said.target == "granitemoeshared" and made.config["shared_intermediate_size"] == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(token_ids()).logits, load(directory)(token_ids()).logits, rtol=0, atol=1e-4)


def test_an_export_tells_sizes_and_reasons_and_is_proved(tied, tmp_path):
    lines = []
    result = export(
        str(tied("mistral", "union of three")),
        str(tmp_path / "out"),
        form="native",
        target="mixtral",
        client="vllm",
        dtype="bfloat16",
        progress=lambda message, *_: lines.append(message),
    )
    before, after = result["bytes_before"], result["bytes_after"]
    assert f"native: {before:,} bytes become {after:,}" in lines
    assert lines.index(f"native: {before:,} bytes become {after:,}") < lines.index("writing, bytes")
    made = Checkpoint(tmp_path / "out")
    assert after == sum(made[name].nbytes for name in made)
    assert result["client"] == "vllm"
    assert "their inverse 3 is folded into down, rounded to bfloat16" in result["why"]
    assert 0 < result["verified"]["max_abs_logit_diff"] < 0.5
    assert result["verified"]["by_dtype"]["float32"]["tolerance"] > 0


@torch.no_grad()
@pytest.mark.parametrize(("factor", "holds"), [(1.0, True), (0.8, False)])
def test_a_wrong_factor_is_beyond_the_tolerance(tied, tmp_path, monkeypatch, factor, holds):
    from modmoe.formats.native import model

    def changed(*arguments, **options):
        gate = choose_gate(*arguments, **options)
        return dataclasses.replace(gate, own=gate.own * factor)

    monkeypatch.setattr(model, "choose_gate", changed)
    directory = tied("mistral", "union of three")
    made = native_export(Checkpoint(directory), "mixtral")
    write_export(tmp_path / "out", directory, "mixtral")
    computed = []
    for path, options in ((directory, {}), (tmp_path / "out", {"experts_implementation": "eager"})):
        model = load(path) if not options else AutoModelForCausalLM.from_pretrained(path, **options)
        computed += reload.compute(model, sample_ids(), 1, [torch.float32])
    if holds:
        assert verify._compare(*computed, torch.float32, made.tolerance)["greedy_tokens_equal"]
        with pytest.raises(ExportError, match="logits differ"):
            verify._compare(*computed, torch.float32)
        return
    with pytest.raises(ExportError, match="logits differ"):
        verify._compare(*computed, torch.float32, made.tolerance)
