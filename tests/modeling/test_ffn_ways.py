"""The ways of computing the tied FFN: equal to the loop, and reading no more than is on."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from modmoe.modeling import modular_ffn, ways_modmoe
from modmoe.modeling.modular_ffn import ModularFFN
from modmoe.modeling.routing_modmoe import Pass, RoutingState, Within
from modmoe.modeling.sequences_modmoe import SequenceMemory
from modmoe.modeling.ways_modmoe import FEW_TOKENS, LEFT_ROWS, MANY_RUNS, Layout, by_runs, gather_token
from tests.reference import modules_of, tied_ffn

WIDTH, STORED, SIZE, EXPERTS, EACH = 10, 7, 3, 5, 4
# one token, few, and as many as are sorted
TOKENS = (1, 7, FEW_TOKENS + 5)
# and as many as go choice by choice, weights on the right
MANY = LEFT_ROWS + 9
COMBINED = (("union", 1), ("union", 2), ("sum", 2), ("sum", 3))


def make_ffn(routing: str = "token", combine: str = "union", top_k: int = 1, **changes: Any) -> ModularFFN:
    """Return a random layer in float64 whose experts share the first module and rank theirs at random."""
    config = SimpleNamespace(
        **{
            "hidden_size": WIDTH,
            "stored_modules": [STORED],
            "module_size": SIZE,
            "num_experts": EXPERTS,
            "num_experts_per_tok": top_k,
            "modules_per_expert": EACH,
            "shared_modules": 1,
            "routing": routing,
            "combine": combine,
            "routing_chunk": 4,
            "ffn_biases": [],
            "ffn_gated": True,
            "ffn_activation": "silu",
            "ffn_dropout": 0.0,
            "router_hidden": 0,
            "compensation": False,
            "left_out_means": False,
            **changes,
        }
    )
    ffn = ModularFFN(config, 0, RoutingState([str(number) for number in range(EXPERTS)])).double().eval()
    draw = torch.Generator().manual_seed(5)
    for weight in ffn.parameters():
        torch.nn.init.normal_(weight, std=0.4, generator=draw)
    ffn.membership.zero_()
    for expert in range(EXPERTS):
        others = 1 + torch.randperm(STORED - 1, generator=draw)
        ffn.ranking[expert] = torch.cat([torch.zeros(1, dtype=torch.long), others[: ffn.ranking.shape[1] - 1]])
        ffn.membership[expert, ffn.ranking[expert].long()] = True
    return ffn


def inputs(ffn: ModularFFN, tokens: int) -> Tensor:
    return torch.randn(tokens, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens))


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the compiler out; it keeps the meaning."""
    monkeypatch.setattr(modular_ffn, "compiled_gather", lambda: gather_token)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("combine", "top_k"), COMBINED)
@pytest.mark.parametrize(("routing", "active"), [("token", None), ("token", 2), ("sequence", None), ("task", 2)])
def test_every_way_is_the_loop(
    uncompiled: None, routing: str, combine: str, top_k: int, tokens: int, active: int | None
) -> None:
    ffn = make_ffn(
        routing,
        combine,
        top_k,
        compensation=top_k == 2,
        left_out_means=combine == "sum",
        ffn_biases=["gate", "up", "down"][: top_k + 1],
    )
    ffn.state.active_modules = active
    x_TD = inputs(ffn, tokens)
    if routing == "task":
        ffn.state.expert = 3

    def run(way: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        x = x_TD.clone().requires_grad_()
        ffn.zero_grad()
        ffn.state.way = way
        y = tied_ffn(ffn, x, *ffn._choose(x, x)) if way == "loop" else ffn(x)
        (y * y.detach().cos()).sum().backward()
        return y.detach(), x.grad, {name: p.grad.clone() for name, p in ffn.named_parameters() if p.grad is not None}

    wanted = run("loop")
    for way in ("masked", "runs", "gather", "auto"):
        torch.testing.assert_close(run(way), wanted, rtol=1e-10, atol=1e-11)
        with torch.no_grad():
            torch.testing.assert_close(ffn(x_TD), wanted[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("is_alike", [True, False])
@pytest.mark.parametrize("combine", ["union", "sum"])
def test_many_tokens_are_the_dense_product_masked(combine: str, is_alike: bool) -> None:
    ffn = make_ffn(combine=combine, top_k=2, ffn_biases=["gate", "up"])
    x_TD = inputs(ffn, MANY)
    if is_alike:
        x_TD = x_TD[:1].expand(MANY, -1).contiguous()
    ids_TK, weights_TK = ffn._choose(x_TD, x_TD)
    found, wanted = ffn._sliced(x_TD, ids_TK, weights_TK), ffn._masked(x_TD, ids_TK, weights_TK)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)
    found_grads, wanted_grads = (
        torch.autograd.grad(y.square().sum(), list(ffn.parameters()), retain_graph=True) for y in (found, wanted)
    )
    torch.testing.assert_close(found_grads, wanted_grads, rtol=1e-9, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("gated", [True, False])
def test_a_gathered_token_with_and_without_a_gate(uncompiled: None, gated: bool) -> None:
    for width, size in ((10, 3), (12, 4), (6, 2)):
        ffn = make_ffn(hidden_size=width, module_size=size, ffn_gated=gated, ffn_biases=["up"])
        x_TD = torch.randn(1, width, dtype=torch.float64)
        ffn.state.way = "gather"
        torch.testing.assert_close(ffn(x_TD), tied_ffn(ffn, x_TD, *ffn._choose(x_TD, x_TD)), rtol=1e-12, atol=1e-12)


class Watch(TorchDispatchMode):
    """Notes which neurons products read, and which operations hand a number or a shape to the host."""

    HOST = ("_local_scalar_dense", "nonzero", "unique", "equal", "is_nonzero")

    def __init__(self, ffn: ModularFFN) -> None:
        super().__init__()
        self.weights = {p.untyped_storage().data_ptr(): name for name, p in ffn.named_parameters()}
        self.read: dict[str, list[int]] = {}
        self.host: list[str] = []
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.calls.append(name)
        if any(word in name for word in self.HOST):
            self.host.append(name)
        if name in ("mm", "mv", "addmm", "addmm_", "addmv"):
            for tensor in args:
                weight = self.weights.get(tensor.untyped_storage().data_ptr()) if isinstance(tensor, Tensor) else None
                if weight is not None and weight.endswith("proj.weight"):
                    width = STORED * SIZE if weight.startswith("down") else WIDTH
                    offset = tensor.storage_offset()
                    begin = offset % width if weight.startswith("down") else offset // width
                    neurons = tensor.numel() // WIDTH
                    self.read.setdefault(weight, []).extend(range(begin, begin + neurons))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_each_module_that_is_on_is_read_once_and_no_other(tokens: int, top_k: int) -> None:
    ffn = make_ffn(top_k=top_k)
    x_TD = inputs(ffn, tokens)
    ids_TK, _ = ffn._choose(x_TD, x_TD)
    on = {module for expert in ids_TK.flatten().tolist() for module in modules_of(ffn, expert)}
    wanted = [module * SIZE + neuron for module in sorted(on) for neuron in range(SIZE)]
    with Watch(ffn) as watch:
        ffn(x_TD)
    assert set(watch.read) == {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}
    for name, neurons in watch.read.items():
        assert sorted(neurons) == wanted, name


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(("count", "products"), [(MANY_RUNS - 1, MANY_RUNS - 1), (MANY_RUNS, 1)])
def test_one_token_with_many_short_runs_reads_down_whole(gated: bool, first: int, count: int, products: int) -> None:
    stored = 2 * MANY_RUNS + 1
    ffn = make_ffn(stored_modules=[stored], ffn_gated=gated, ffn_biases=["up"])
    x_1D, given_1D = inputs(ffn, 1).requires_grad_(), torch.ones(1, WIDTH, dtype=torch.float64)
    runs = [(module, module + 1) for module in range(first, first + 2 * count, 2)]
    scale_1S = torch.linspace(0.5, 2, stored, dtype=torch.float64)[None]
    on_F = torch.zeros(stored)
    on_F[[begin for begin, _ in runs]] = 1
    wanted = given_1D + F.linear(ffn._hidden(x_1D) * (scale_1S * on_F).repeat_interleave(SIZE, 1), ffn.down_proj.weight)
    with Watch(ffn) as watch:
        by_runs(ffn, x_1D.detach(), runs, scale_1S)
    made = ("mm", "mv", "addmm_", "addmm")
    assert sum(name in made for name in watch.calls) == (1 + gated) * count + products
    torch.testing.assert_close(by_runs(ffn, x_1D, runs, scale_1S, given_1D.clone()), wanted, rtol=1e-12, atol=1e-12)
    weights = [x_1D, *(weight for name, weight in ffn.named_parameters() if "proj" in name)]
    found_grads, wanted_grads = (
        torch.autograd.grad(y.square().sum(), weights) for y in (given_1D + by_runs(ffn, x_1D, runs, scale_1S), wanted)
    )
    torch.testing.assert_close(found_grads, wanted_grads, rtol=1e-9, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 50])
def test_a_named_expert_costs_its_products_and_nothing_that_waits_for_the_device(tokens: int) -> None:
    ffn = make_ffn("task")
    ffn.state.expert, x_TD = 2, inputs(ffn, tokens)
    ffn(x_TD)
    with Watch(ffn) as watch:
        ffn(x_TD)
    assert watch.host == []
    runs = ffn.layout().runs(ffn.layout().set_E[2])
    products = [name for name in watch.calls if name in ("mm", "mv", "addmm", "addmm_")]
    assert len(products) == 3 * len(runs)
    assert {"sort", "topk", "scatter", "index"}.isdisjoint(watch.calls)


@torch.no_grad()
@pytest.mark.parametrize(("combine", "top_k"), COMBINED)
def test_one_token_compiles_to_one_graph_that_gathers(
    monkeypatch: pytest.MonkeyPatch, combine: str, top_k: int
) -> None:
    ffn = make_ffn(combine=combine, top_k=top_k)
    for way in ("masked", "runs"):
        monkeypatch.delitem(ModularFFN._WAYS, way)
    torch._dynamo.reset()
    compiled = torch.compile(ffn, backend="aot_eager", fullgraph=True, dynamic=False)
    # other experts, the same graph: what is chosen is data
    for seed in range(6):
        x_TD = torch.randn(1, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        wanted = tied_ffn(ffn, x_TD, *ffn._choose(x_TD, x_TD))
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            found = compiled(x_TD)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()


@torch.no_grad()
def test_models_with_modules_of_several_sizes_gather_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(gather_token, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(modular_ffn, "compiled_gather", lambda: compiled)
    for width, size in ((12, 4), (12, 2), (12, 6), (10, 3), (24, 8)):
        ffn = make_ffn(hidden_size=width, module_size=size)
        x_TD = torch.randn(1, width, dtype=torch.float64)
        ffn.state.way = "gather"
        torch.testing.assert_close(ffn(x_TD), tied_ffn(ffn, x_TD, *ffn._choose(x_TD, x_TD)), rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()


@pytest.mark.parametrize("why", ["training", "hook", "lora", "autocast"])
def test_what_sits_on_the_linear_layers_is_heeded(why: str) -> None:
    ffn = make_ffn()
    x_TD = inputs(ffn, 3)
    ids_TK, weights_TK = ffn._choose(x_TD, x_TD)
    assert ffn._way(x_TD) == "runs"
    if why == "training":
        ffn.train()
    elif why == "hook":
        ffn.up_proj.register_forward_hook(lambda *_: None)
    elif why == "lora":
        ffn.down_proj = torch.nn.Sequential(ffn.down_proj)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            assert ffn._way(x_TD) == "masked"
        return
    assert ffn._way(x_TD) == "masked"
    torch.testing.assert_close(ffn(x_TD), ffn._masked(x_TD, ids_TK, weights_TK))
    for asked in ("runs", "gather"):  # training alone may be asked to read slices
        ffn.state.way = asked
        assert ffn._way(x_TD) == ("runs" if why == "training" else "masked")


@pytest.mark.parametrize("limit", ["MOST_CHOICES", "_KEYS"])
@pytest.mark.parametrize(("combine", "top_k"), [("union", 2), ("sum", 2), ("sum", 3)])
@pytest.mark.parametrize("active", [None, 2])
def test_many_choices_go_module_by_module(
    monkeypatch: pytest.MonkeyPatch, combine: str, top_k: int, active: int | None, limit: str
) -> None:
    monkeypatch.setattr(ways_modmoe, limit, 2)
    gone = []
    by_module = ways_modmoe.by_module
    monkeypatch.setattr(ways_modmoe, "by_module", lambda *args: gone.append(len(args[1])) or by_module(*args))
    ffn = make_ffn("token", combine, top_k, compensation=True, ffn_biases=["gate", "up", "down"])
    ffn.state.active_modules, ffn.state.way = active, "runs"
    found = []
    for way in (None, "runs"):
        x_TD = inputs(ffn, MANY).requires_grad_()
        ffn.zero_grad()
        y_TD = tied_ffn(ffn, x_TD, *ffn._choose(x_TD, x_TD)) if way is None else ffn(x_TD)
        (y_TD * y_TD.detach().cos()).sum().backward()
        found.append([y_TD.detach(), x_TD.grad, *(p.grad.clone() for p in ffn.parameters() if p.grad is not None)])
    assert gone == [MANY]
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("is_apart", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_plans_cover_what_was_chosen_and_nothing_twice(seed: int, is_apart: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    layout = Layout([torch.randperm(12, generator=draw)[:5].tolist() for _ in range(6)], 12)
    assert sorted(layout.order_E) == list(range(6))
    set_C = tuple(layout.set_E[expert] for expert in layout.order_E)
    found = [
        (number, module)
        for who, what in layout.plan(set_C, is_apart=is_apart)
        for ranges in who
        for number in range(*ranges)
        for run in what
        for module in range(*run)
    ]
    wanted = [(number, module) for number, chosen in enumerate(set_C) for module in range(12) if chosen >> module & 1]
    assert sorted(found) == wanted
    assert layout.plan(set_C, is_apart=is_apart) is layout.plan(set_C, is_apart=is_apart)


def test_a_fixed_choice_needs_no_router_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ffn = make_ffn("sequence", "sum", 2)
    memory: dict[int, SequenceMemory] = {}
    x_TD = inputs(ffn, 6)
    with torch.no_grad():
        with Within(Pass(ffn.state, (1, 6), prompt_tokens=4, memory=memory)):
            ids_TK, weights_TK = ffn._choose(x_TD, x_TD)
        with Within(Pass(ffn.state, (1, 2), memory=memory)) as run:
            again = ffn._choose(x_TD[:2], x_TD[:2])
            run.logits = {}
            ffn._choose(x_TD[:2], x_TD[:2])
            assert len(run.logits) == 1, "what is recorded needs the router"
            run.logits = None
            monkeypatch.setattr(ffn.router, "forward", None)
            torch.testing.assert_close(ffn._choose(x_TD[:2], x_TD[:2]), again)
            torch.testing.assert_close(again, (ids_TK[:2], weights_TK[:2]))
            run.prompt_tokens = 2
            with pytest.raises(TypeError):
                ffn._choose(x_TD[:2], x_TD[:2])


def test_a_cut_expert_has_the_first_of_its_ranking() -> None:
    ffn = make_ffn()
    x_TD = inputs(ffn, 40)
    ids_TK, weights_TK = ffn._choose(x_TD, x_TD)
    outputs = []
    for active in range(1, EACH + 1):
        ffn.state.active_modules = active
        smaller = make_ffn(modules_per_expert=active)
        smaller.load_state_dict({name: w for name, w in ffn.state_dict().items() if name != "ranking"}, strict=False)
        smaller.ranking.copy_(ffn.ranking[:, :active])
        smaller.membership.zero_().scatter_(1, smaller.ranking.long(), True)
        outputs.append(ffn(x_TD))
        torch.testing.assert_close(outputs[-1], smaller._sliced(x_TD, ids_TK, weights_TK), rtol=1e-12, atol=1e-12)
        assert all(set(modules_of(smaller, e)) <= set(ffn.ranking[e].tolist()) for e in range(EXPERTS))
    assert all((one - two).abs().max() > 1e-3 for one, two in pairwise(outputs))


def test_a_ranking_that_is_not_of_the_experts_modules_becomes_the_order_of_storage() -> None:
    ffn = make_ffn()
    for broken in (torch.full_like(ffn.ranking, -442478864), torch.zeros_like(ffn.ranking)):
        ffn.ranking.copy_(broken)
        ffn.check_ranking()
        assert [sorted(row) for row in ffn.ranking.tolist()] == ffn.ranking.tolist()
        assert torch.equal(torch.zeros_like(ffn.membership).scatter(1, ffn.ranking.long(), True), ffn.membership)
    kept = ffn.ranking.flip(1)
    ffn.ranking.copy_(kept)
    ffn.check_ranking()
    assert torch.equal(ffn.ranking, kept)
