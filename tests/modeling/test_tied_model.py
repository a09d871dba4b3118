"""What must hold of a tied model of every family, whatever the routing."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from modmoe.errors import CheckpointError
from modmoe.modeling.modular_ffn import ModularFFN
from modmoe.modeling.routing_modmoe import Pass, Within
from modmoe.models.families import FAMILIES
from modmoe.models.loading import load
from tests.reference import tied_ffn
from tests.support.packed_models import write_packed
from tests.support.planned import EXPERTS, NUM_MODULES, load_pair, write_tied
from tests.support.tiny import token_ids, tokenizer

ROUTINGS = ("token", "sequence", "task")
COMBINED = (("union", 1), ("union", 2), ("sum", 2))


def ffns(model) -> list[ModularFFN]:
    return [module for module in model.modules() if isinstance(module, ModularFFN)]


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family_pair(request, tmp_path_factory):
    return load_pair(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(
    scope="module", params=[(r, *c) for r in ROUTINGS for c in COMBINED], ids=lambda p: "-".join(map(str, p))
)
def routed(request, tmp_path_factory):
    """A tied Llama for each way of routing and combining, with compensation and an mlp router in places."""
    routing, combine, top_k = request.param
    directory = tmp_path_factory.mktemp("routed")
    _, model = load_pair(
        directory,
        routing=routing,
        combine=combine,
        top_k=top_k,
        routing_chunk=4,
        means=top_k == 1,
        kind="mlp" if combine == "sum" else "linear",
    )
    if routing == "task":
        model.set_expert("words")
    return model


@torch.no_grad()
def test_all_modules_on_is_the_dense_model(family_pair):
    dense, tied = family_pair
    with tied.all_modules():
        found = tied(token_ids()).logits
    wanted = dense(token_ids()).logits
    assert wanted.abs().max() > 0.1
    assert (found - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    assert (tied(token_ids()).logits - wanted).abs().max() > 1e-3, "the experts make no difference"


@torch.no_grad()
def test_left_out_modules_are_the_only_difference(tmp_path):
    dense, tied = load_pair(tmp_path, leave_out=True)
    size = tied.config.module_size
    assert tied.config.stored_modules == [ffn.up_proj.out_features // size for ffn in ffns(tied)]
    assert max(tied.config.stored_modules) < NUM_MODULES
    with tied.all_modules():
        found = tied(token_ids()).logits
    assert (found - dense(token_ids()).logits).abs().max() > 1e-3


def test_runs_equal_masked_equal_the_loop_with_gradients(routed):
    """Outputs and gradients of every way, at sizes that do not divide evenly."""
    model = copy.deepcopy(routed)
    state, ffn = model.routing_state, ffns(model)[0]
    x_TD = torch.randn(23, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    probe_TD = torch.randn_like(x_TD)

    def run(way):
        x = x_TD.clone().requires_grad_()
        ffn.zero_grad()
        if way == "loop":
            y = tied_ffn(ffn, x, *ffn._choose(x, x))
        else:
            state.way = way
            y = ffn(x)
        (y * probe_TD).sum().backward()
        grads = {name: p.grad.clone() for name, p in ffn.named_parameters() if p.grad is not None}
        return y.detach(), x.grad, grads

    wanted_y, wanted_x, wanted = run("loop")
    for way in ("masked", "runs"):
        y, x_grad, grads = run(way)
        torch.testing.assert_close(y, wanted_y, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(x_grad, wanted_x, rtol=1e-10, atol=1e-10)
        assert grads.keys() == wanted.keys()
        for name, grad in wanted.items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    if ffn.router is None:
        return
    assert max(grad.abs().max() for name, grad in wanted.items() if name.startswith("router")) > 1e-6
    # what is before the layer learns through the router only where the router weighs what it chose
    x = x_TD.clone().requires_grad_()
    ids_TK, weights_TK = ffn._choose(x, x)
    (tied_ffn(ffn, x, ids_TK, weights_TK.detach()) * probe_TD).sum().backward()
    weighs = ffn.combine == "sum" and ffn.top_k > 1
    assert torch.allclose(x.grad, wanted_x, rtol=1e-10, atol=1e-10) != weighs


@torch.no_grad()
def test_runs_equal_masked_in_every_family(family_pair):
    _, tied = family_pair
    outputs = {}
    for way in ("masked", "runs"):
        tied.set_ffn_way(way)
        outputs[way] = tied(token_ids()).logits
    tied.set_ffn_way("auto")
    torch.testing.assert_close(outputs["runs"], outputs["masked"], rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("way", ["masked", "runs"])
def test_a_token_changes_nothing_before_it(routed, way):
    ids = token_ids()
    changed = ids.clone()
    changed[:, 13] = (changed[:, 13] + 7) % 256
    routed.set_ffn_way(way)
    before, after = routed(ids, use_cache=False).logits, routed(changed, use_cache=False).logits
    routed.set_ffn_way("auto")
    assert torch.equal(before[:, :13], after[:, :13])
    assert not torch.equal(before[:, 13:], after[:, 13:])


@torch.no_grad()
def test_decoding_with_a_cache_is_the_whole_pass(routed):
    ids = token_ids()
    whole = routed(ids, use_cache=False).logits
    out = routed(ids[:, :9], use_cache=True)
    pieces = [out.logits]
    for begin, end in ((9, 10), (10, 13), (13, 14), (14, 21)):
        out = routed(ids[:, begin:end], past_key_values=out.past_key_values, use_cache=True)
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_padding_moves_nothing(routed):
    ids = token_ids()
    padding = torch.full((len(ids), 5), 258)
    real = torch.ones_like(ids)
    alone = routed(ids, use_cache=False).logits
    left = routed(
        torch.cat([padding, ids], 1),
        attention_mask=torch.cat([0 * padding, real], 1),
        position_ids=(torch.cat([0 * padding, real], 1).cumsum(1) - 1).clamp_min(0),
        use_cache=False,
    ).logits[:, 5:]
    right = routed(
        torch.cat([ids, padding], 1), attention_mask=torch.cat([real, 0 * padding], 1), use_cache=False
    ).logits[:, :-5]
    torch.testing.assert_close(left, alone, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(right, alone, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_documents_packed_in_one_row_are_routed_apart(tmp_path):
    """The router of a packed row starts anew where positions do; attention is kept apart by the caller's mask."""
    _, model = load_pair(tmp_path, routing="sequence", routing_chunk=4)
    ffn, state = ffns(model)[0], model.routing_state
    first_TD, second_TD = torch.randn(7, 32, dtype=torch.float64), torch.randn(10, 32, dtype=torch.float64)

    def run(x_TD, positions):
        with Within(Pass(state, (1, len(x_TD)), position_BT=torch.tensor([positions]))):
            return ffn(x_TD)

    packed = run(torch.cat([first_TD, second_TD]), [*range(7), *range(10)])
    torch.testing.assert_close(packed[:7], run(first_TD, list(range(7))))
    torch.testing.assert_close(packed[7:], run(second_TD, list(range(10))))


@torch.no_grad()
@pytest.mark.parametrize("extra", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "no-cache"])
def test_generate_in_a_batch_is_generate_alone(routed, extra):
    """Left-padded rows of a batch give what each gives alone, also where a sequence router reads the prompt."""
    prompts = [token_ids(1, 9, seed=3), token_ids(1, 5, seed=4)]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 258, "eos_token_id": None, **extra}
    alone = [routed.generate(p, attention_mask=torch.ones_like(p), **settings)[0, p.shape[1] :] for p in prompts]
    width = max(p.shape[1] for p in prompts)
    rows = torch.cat([torch.nn.functional.pad(p, (width - p.shape[1], 0), value=258) for p in prompts])
    batch = routed.generate(rows, attention_mask=(rows != 258).long(), **settings)[:, width:]
    for row, wanted in zip(batch, alone, strict=True):
        assert row.tolist() == wanted.tolist()


@torch.no_grad()
def test_a_sequence_router_reads_the_marked_prompt_and_keeps_its_choice(tmp_path):
    _, model = load_pair(tmp_path, routing="sequence", routing_chunk=4)
    ids, ffn = token_ids(1, 12), ffns(model)[0]
    chosen = []
    original = ffn._choose

    def watch(x, x_TD):
        ids_TK, weights_TK = original(x, x_TD)
        chosen.append(ids_TK[:, 0].tolist())
        return ids_TK, weights_TK

    ffn._choose = watch
    model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=258, eos_token_id=None)
    assert len(chosen[0]) == 12
    assert len({expert for step in chosen for expert in step}) == 1


def test_gradient_checkpointing_gives_the_same_gradients(routed):
    ids, grads = token_ids(), []
    names = torch.randint(0, 3, (len(ids),), generator=torch.Generator().manual_seed(0))
    extra = {"expert_ids": names} if routed.config.routing == "task" else {}
    for is_checkpointed in (False, True):
        model = copy.deepcopy(routed).train()
        if is_checkpointed:
            model.activation_checkpointing_enable()
        with model.record_router_logits():
            model(ids, labels=ids, use_cache=False, **extra).loss.backward()
            assert len(model.routing_state.logits) == (0 if routed.config.routing == "task" else 2)
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-9, atol=1e-12)


def test_the_router_learns_at_top_1(tmp_path):
    """A weight normalised to 1 would have no gradient; the value is 1 all the same."""
    _, model = load_pair(tmp_path)
    model.train()(token_ids(), labels=token_ids()).loss.backward()
    for ffn in ffns(model):
        assert ffn.router.weight.grad.abs().max() > 1e-6


@torch.no_grad()
@pytest.mark.parametrize("form", ["tied", "packed"])
def test_what_is_loaded_and_saved_is_loaded_by_transformers_alone(tmp_path, form):
    tied, packed = write_packed(tmp_path)
    model = load({"tied": tied, "packed": packed}[form])
    model.save_pretrained(tmp_path / "again")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert type(found).__module__.startswith("transformers_modules.")
    assert torch.equal(found(token_ids()).logits, model(token_ids()).logits)


@torch.no_grad()
def test_named_experts(tmp_path):
    _, model = load_pair(tmp_path, routing="task")
    ids = token_ids()
    with pytest.raises(ValueError, match="name the expert"):
        model(ids)
    with pytest.raises(ValueError, match="no expert 'maths'"):
        model.set_expert("maths")
    for wrong in (3, -1, True, 1.0, [0]):
        with pytest.raises(ValueError, match="no expert"):
            model.set_expert(wrong)
        with pytest.raises(ValueError, match="active modules"):
            model.set_active_modules(wrong if wrong != 3 else 99)
    assert model.routing_state.expert is None and model.routing_state.active_modules is None
    alone = []
    for name in EXPERTS:
        model.set_expert(name)
        alone.append(model(ids).logits)
    model.set_expert(None)
    mixed = model(ids, expert_ids=torch.tensor([2, 0, 1])).logits
    for row, expert in enumerate([2, 0, 1]):
        torch.testing.assert_close(mixed[row], alone[expert][row], rtol=1e-9, atol=1e-9)
    per_token = torch.zeros(ids.shape, dtype=torch.long)
    per_token[:, 10:] = 1
    found = model(ids, expert_ids=per_token).logits
    torch.testing.assert_close(found[:, :10], alone[0][:, :10], rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("routing", ["token", "task"])
def test_decode_compiles_without_a_graph_break(tmp_path, routing):
    """As transformers' own mixtures do: one token with a cache, in one graph."""
    _, model = load_pair(tmp_path, routing=routing)
    if routing == "task":
        model.set_expert("sums")
    ids = token_ids(1, 6)
    out = model(ids, use_cache=True)
    wanted = model(ids[:, :1], past_key_values=copy.deepcopy(out.past_key_values)).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found = compiled(input_ids=ids[:, :1], past_key_values=out.past_key_values).logits
    torch._dynamo.reset()
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_device_map_changes_nothing(tmp_path, place):
    """Whole on one device, or with a layer offloaded to disk, where matrices may not be sliced."""
    _, wanted = load_pair(tmp_path, means=True)
    layers = {f"model.layers.{number}": place if number else "cpu" for number in range(2)}
    others = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    model = type(wanted).from_pretrained(
        tmp_path / "tied", device_map={**layers, **others}, dtype=torch.float64, offload_folder=tmp_path / "offload"
    )
    torch.testing.assert_close(model(token_ids()).logits, wanted(token_ids()).logits, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_lora_goes_through_the_linear_layers(tmp_path):
    """PEFT's LoRA on the shared matrices is neither passed by in training nor in evaluation, and merges exactly."""
    from peft import LoraConfig, get_peft_model

    _, model = load_pair(tmp_path)
    before = model(token_ids()).logits
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["gate_proj", "up_proj", "down_proj"]))
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            weight.normal_(std=0.3)
    changed = wrapped(token_ids()).logits
    assert (changed - before).abs().max() > 1e-2
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(token_ids()).logits, changed, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("routing", ["token", "sequence"])
def test_trainers_of_other_libraries_train_it(tmp_path, routing):
    """TRL's own SFTTrainer calls the model's backbone past its head; the layers must know of the pass all the same."""
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    _, model = load_pair(tmp_path, routing=routing)
    model = model.float()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    arguments = SFTConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        bf16=False,
        disable_tqdm=True,
        activation_checkpointing=False,
    )
    rows = Dataset.from_list([{"text": f"row {number} of the text"} for number in range(8)])
    SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer()).train()
    for name, weight in model.named_parameters():
        if name.endswith(("router.weight", "up_proj.weight")):
            assert not torch.equal(weight, before[name]), name


@pytest.mark.parametrize(
    "name", ["ModMoELlamaForC{ausalLM", "ModMoELlamaModel", "ModMoEQwen3ForCausalLM", "ModMoE", "ModMoENoneForCausalLM"]
)
def test_a_class_that_is_none_of_its_type_is_refused(tmp_path, name):
    tied = write_tied(tmp_path)[1]
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
    with pytest.raises(CheckpointError, match=r"architectures names '.*', which is no causal LM of .* 'modmoe_llama'"):
        load(tied)
