"""The policies: whole forward against a plain transcription, padding, token order, training."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from published import openvla as published
from published import openvla_plain as plain
from published.openvla_policy import ROBOT, look, policy, row
from safetensors.torch import load_file
from transformers import LlamaModel

from worldenv.ops import action_logprob
from worldenv.runtime.errors import UserError


def tensors_of(folder) -> dict:
    """Everything in the shards, in float64."""
    out = {}
    for path in folder.glob("model-*.safetensors"):
        out |= load_file(path)
    return {name: tensor.double() for name, tensor in out.items()}


def head_of(folder, name: str) -> dict:
    (path,) = folder.glob(f"{name}--*")
    found = torch.load(path, weights_only=True)
    return {k.removeprefix("module."): v.double() for k, v in found.items()}


def written(model, observation: dict, folder, views: int, proprio: bool) -> list:
    """Plain embeddings of each row up to the empty token, from the policy's own pixels and ids
    (which have tests of their own)."""
    tensors = tensors_of(folder)
    table = tensors["language_model.model.embed_tokens.weight"]
    rows = []
    for i, words in enumerate(observation["instruction"]):
        pixels = [x.double() for x in model.pixels(observation["image"][i : i + 1, :views])]
        ids = model.words.ids(words)
        parts = [table[1][None], plain.seen(pixels, tensors)]
        if proprio:
            state = model.units.state(observation["proprio"][i]).double()
            parts.append(plain.proprio_token(state, head_of(folder, "proprio_projector")))
        rows.append(torch.cat([*parts, table[torch.tensor(ids[1:])]]))
    return rows


@torch.no_grad()
def test_oft_is_the_published_computation(oft):
    model, observation = policy(oft), look()
    mu, log_scale, features = model.both(observation)
    assert mu.shape == log_scale.shape == (3, 2, 7)
    tensors, head = tensors_of(oft), head_of(oft, "action_head")
    for i, before in enumerate(written(model, observation, oft, 2, True)):
        end = tensors["language_model.model.embed_tokens.weight"][2][None]  # </s> is kept
        x = torch.cat([before, torch.zeros(14, 16).double(), end])
        said = plain.llama(x, tensors, heads=2)
        # One before each slot: the last slot is never read.
        at = said[len(before) - 1 : len(before) + 13]
        want = plain.action_head(at.view(2, 7 * 16), head)
        assert (mu[i] - want).abs().max() < 1e-5 * want.abs().max()
        assert (features[i] - at.mean(0)).abs().max() < 1e-5
    assert (log_scale == -2).all()
    assert torch.equal(model(observation)[0], mu)
    assert torch.equal(model.features(observation), features)


@torch.no_grad()
def test_token_policies_leave_the_end_out_and_see_one_image(tokens):
    model, observation = policy(tokens, "openvla-token"), look()
    logits, none = model(observation)
    assert none is None
    assert logits.shape == (3, 2, 7, 256)
    assert logits.dtype == torch.float32
    tensors = tensors_of(tokens)
    for i, before in enumerate(written(model, observation, tokens, 1, False)):
        x = torch.cat([before, torch.zeros(14, 16).double()])
        at = plain.llama(x, tensors, heads=2)[len(before) - 1 : len(before) + 13]
        want = (at @ tensors["language_model.lm_head.weight"].T)[:, 31744:32000]
        assert (logits[i].flatten(0, 1) - want).abs().max() < 1e-5 * want.abs().max()
    index = logits.argmax(-1)
    assert torch.equal(model.command(index), model.units.command(model.units.from_tokens(index)))
    assert action_logprob(logits, None, index, distribution=model.distribution).shape == (3, 2)


@torch.no_grad()
def test_the_first_openvla_writes_token_after_token(tokens):
    model = policy(tokens, "openvla-token", decode="autoregressive", robot=replace(ROBOT, chunk=1))
    observation = look()
    logits, _ = model(observation)
    tensors = tensors_of(tokens)
    table = tensors["language_model.model.embed_tokens.weight"]
    for i, x in enumerate(written(model, observation, tokens, 1, False)):
        for dim in range(7):
            said = plain.llama(x, tensors, heads=2, causal=True)[-1]
            want = (tensors["language_model.lm_head.weight"] @ said)[31744:32000]
            assert (logits[i, 0, dim] - want).abs().max() < 1e-5 * want.abs().max()
            x = torch.cat([x, table[31744 + want.argmax()][None]])
    with pytest.raises(UserError, match="parallel for training"):
        model.trainable_groups()


@torch.no_grad()
def test_llama_is_the_stock_class_seeing_both_ways(oft):
    """On transformers 5.0 `is_causal=False` in its config was ignored: a mask of numbers is not."""
    model, observation = policy(oft), look()
    taken = {}
    hook = model.language_model.model.register_forward_pre_hook(
        lambda module, args, kwargs: taken.update(kwargs), with_kwargs=True
    )
    said = model.slots(observation)
    hook.remove()
    x, mask = taken["inputs_embeds"], taken["attention_mask"]
    keep = mask[:, 0, 0] == 0
    assert keep.sum(1).tolist() != [keep.shape[1]] * 3  # some rows are padded
    for name in ("eager", "sdpa"):
        stock = LlamaModel._from_config(model.sizes.llama, attn_implementation=name).eval()
        stock.load_state_dict(model.language_model.model.state_dict())
        for i in range(3):
            alone = x[i : i + 1, keep[i]]
            full = torch.zeros(1, 1, alone.shape[1], alone.shape[1])
            hidden = stock(inputs_embeds=alone, attention_mask=full, use_cache=False)
            want = hidden.last_hidden_state[0, -16:-2]
            assert (said[i] - want).abs().max() <= 1e-5
    assert model.language_model.model.config.rms_norm_eps == 1e-6


@torch.no_grad()
@pytest.mark.parametrize("kind", ["openvla-oft", "openvla-token"])
def test_a_row_of_a_padded_batch_equals_itself_alone(oft, tokens, kind):
    model = policy(oft if kind == "openvla-oft" else tokens, kind)
    observation = look()
    together = model(observation)[0]
    for i in range(3):
        assert (model(row(observation, i))[0][0] - together[i]).abs().max() < 1e-5


@torch.no_grad()
def test_everything_that_is_seen_matters(oft):
    model, observation = policy(oft), look(1)
    mu = model(observation)[0]
    for change in (0, 1, "proprio", "instruction"):
        other = copy.deepcopy(observation)
        if change in (0, 1):
            other["image"][:, change] = 0
        elif change == "proprio":
            other["proprio"] += 0.2
        else:
            other["instruction"] = ["close it"]
        assert (model(other)[0] - mu).abs().max() > 1e-4, change
    with pytest.raises(UserError, match="sees 2 cameras, got 1"):
        model({**observation, "image": observation["image"][:, :1]})


@torch.no_grad()
def test_images_of_another_size_are_resized(oft):
    model, observation = policy(oft), look(1, size=40)
    assert model(observation)[0].isfinite().all()


def test_heads_alone_are_trained_and_the_scale_trains_nothing_else(oft):
    model = policy(oft, precision="bfloat16")
    mu, log_scale = model(look(1))
    log_scale.sum().backward()
    touched = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None}
    assert touched == {"scale_head"}
    mu.square().sum().backward()
    groups = model.trainable_groups()
    assert groups["adapter"] == []
    names = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert names == {"action_head", "proprio_projector", "scale_head"}
    assert {p.dtype for p in groups["heads"]} == {torch.float32}
    assert all(p.grad is not None for p in groups["heads"])
    assert model.projector.fc1.weight.dtype == torch.bfloat16
    frozen = policy(oft, train=False)
    assert frozen.trainable_groups() == {"adapter": [], "heads": []}
    assert frozen.action_head.dtype == torch.bfloat16  # as on disk


def test_the_head_of_a_token_policy_is_its_vocabulary(tokens):
    model = policy(tokens, "openvla-token", lora_rank=2)
    logits, _ = model(look(1))
    logits.sum().backward()
    groups = model.trainable_groups()
    assert groups["heads"] == [model.language_model.lm_head.weight]
    assert groups["heads"][0].grad[31744:32000].any()
    assert not groups["heads"][0].grad[:31744].any()
    assert len(groups["adapter"]) == 2 * (23 * 4 + 26 * 4 + 3 + 2 * 7)


def test_imitation_disturbs_what_is_seen(shallow):
    model, observation = policy(shallow), look(2)
    draw = lambda noise: model.augmented(  # noqa: E731
        observation, torch.Generator().manual_seed(1), 4, noise
    )[0]
    once, still = draw(torch.full((8,), 0.1)), draw(torch.zeros(8))
    assert torch.equal(once, draw(torch.full((8,), 0.1)))
    assert not torch.equal(once, still)
    assert not torch.equal(still, model(observation)[0])
    bounds = model.units.action_low.clone()
    model.set_statistics(torch.zeros(8), torch.ones(8))
    assert torch.equal(model.units.action_low, bounds)


def test_a_copy_shares_what_is_not_trained(shallow):
    """As updates make a reference: parameters given in the memo are not copied."""
    model = policy(shallow)
    memo = {id(p): p for p in model.parameters()}
    twin = copy.deepcopy(model, memo)
    assert twin.words is model.words
    assert all(a is b for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    assert torch.equal(twin(look(1))[0], model(look(1))[0])


def test_the_scale_is_clamped(oft):
    model = policy(oft, min_log_scale=-1.5)
    assert (model(look(1))[1] == -1.5).all()


def test_activations_made_again_change_no_gradient(shallow):
    def gradients(model) -> dict:
        mu = model(look(1))[0]
        mu.square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    usual, again = policy(shallow), policy(shallow, checkpointing=True)
    calls = []
    for model in (usual, again):
        model.vision_backbone.requires_grad_(True)
    layer = again.language_model.model.layers[0].self_attn
    layer.register_forward_hook(lambda *_: calls.append(1))
    twin = copy.deepcopy(again)  # what is copied trains itself, not its original
    want, got = gradients(usual), gradients(again)
    assert len(calls) == 2
    assert want.keys() == got.keys()
    assert all(torch.equal(want[n], got[n]) for n in want)
    assert all(torch.equal(want[n], g) for n, g in gradients(twin).items())
    assert len(calls) == 4


def test_bfloat16_stays_near(oft):
    with torch.no_grad():
        exact = policy(oft)(look())[0]
        rough = policy(oft, precision="bfloat16")(look())[0]
    assert (rough - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_the_module_paths_are_the_published_ones(oft):
    own = set(policy(oft).state_dict())
    inner = {n for n in own if not re.match("action_head|proprio_projector|scale_head", n)}
    assert inner < set(published.shapes())
    assert {n for n in own if n.startswith("action_head")} == {
        f"action_head.{n}" for n in published.head_shapes()
    }


def test_imitation_targets_are_in_the_policys_units(oft, tokens):
    action = torch.zeros(1, 2, 7)
    action[..., 6] = -1
    assert policy(oft).normalise(action)[..., 6].eq(1).all()  # open
    index = policy(tokens, "openvla-token").normalise(action)
    assert index.dtype == torch.int64
    assert index[..., 6].eq(0).all()
