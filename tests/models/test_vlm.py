"""Published image-text folders give the library's own features, alone, batched and cached; what is
no such folder is refused by name."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from worldenv.config import Config, ReflectorConfig
from worldenv.envs.libero.robot import embodiment
from worldenv.layouts import vlm as published
from worldenv.models.folder import digest
from worldenv.models.vlm import CAUSAL, ImageText
from worldenv.models.vlm_cost import cost
from worldenv.models.vlm_files import load_config, load_model, load_processor
from worldenv.runtime.errors import NonFiniteError, UserError
from worldenv.runtime.seeds import generator

WORDS = ("pick up the black bowl", "go", "open the drawer")
FAMILIES = tuple(published.FAMILIES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("vlm")
    return {family: published.write(root / family, family) for family in FAMILIES}


@pytest.fixture
def copied(folders, tmp_path):
    """A copy of a family's folder, to be damaged."""

    def copy(family: str = "qwen2_5_vl"):
        return shutil.copytree(folders[family], tmp_path / "model")

    return copy


def config(folder, **changes) -> ReflectorConfig:
    return ReflectorConfig(kind="vlm", folder=folder, precision="float32", **changes)


def pairs(size: int = 64):
    """First and later frames [3, V=2, H, W, 3] uint8."""
    shape = (2, 3, 2, size, size, 3)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator("pairs")).unbind(0)


def seen(model: ImageText, first, now, words=WORDS):
    return model.go_on(model.begin(first, words), now)


def directly(model: ImageText, first, now, words, views: int = 1):
    """As one would use the library by itself."""
    processor = model.processor
    pictures = [
        [Image.fromarray(v.numpy()) for v in (*a[:views], *b[:views])]
        for a, b in zip(first, now, strict=True)
    ]
    prompts = [model.text(sentence, views) for sentence in words]
    batch = processor(text=prompts, images=pictures, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model.model.model(**batch, use_cache=False).last_hidden_state
        logits = model.model(**batch, use_cache=False).logits
    last = batch["attention_mask"].sum(1) - 1
    rows = torch.arange(len(last))
    return hidden[rows, last], logits[rows, last]


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_the_librarys_own(family, folders):
    first, now = pairs()
    kept = ImageText(config(folders[family]))
    anew = ImageText.on(config(folders[family], keep_first=False), kept.model)
    hidden, _ = directly(anew, first, now, WORDS)
    batched = seen(anew, first, now)
    assert torch.equal(batched, hidden)
    assert not torch.allclose(hidden[0], seen(anew, now[:1], first[:1], WORDS[:1])[0], atol=1e-4)
    cached = seen(kept, first, now)
    assert (kept.why_anew, anew.why_anew) == ("", "reflector.keep_first is off")
    torch.testing.assert_close(cached, batched, rtol=0, atol=1e-6)
    for i in range(3):  # a row of a padded batch as alone
        alone = [x[i : i + 1] for x in (first, now, WORDS)]
        torch.testing.assert_close(seen(anew, *alone)[0], batched[i], rtol=0, atol=1e-6)
        torch.testing.assert_close(seen(kept, *alone)[0], cached[i], rtol=0, atol=1e-6)
    again = ImageText(config(folders[family]))
    assert torch.equal(seen(again, first, now), cached)


def test_every_family_that_keeps_its_prefix_is_tested():
    assert set(CAUSAL) == set(FAMILIES)


@pytest.mark.parametrize("family", ["llava", "idefics3"])
def test_the_processor_is_the_librarys_where_that_can_be_made(family, folders):
    own, theirs = load_processor(folders[family]), hf.AutoProcessor.from_pretrained(folders[family])
    picture = Image.fromarray(pairs()[0][0, 0].numpy())
    theirs.image_processor.do_image_splitting = False
    given = {"text": ["<image> do it"], "images": [[picture]], "return_tensors": "pt"}
    ours, wanted = own(**given), theirs(**given)
    assert set(ours) == set(wanted)
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("family", ["idefics3", "qwen3_vl"])
def test_all_views_are_shown_where_that_is_asked(family, folders):
    first, now = pairs()
    model = ImageText(config(folders[family], views="all", encode_batch=2))
    hidden, _ = directly(model, first, now, WORDS, views=2)
    torch.testing.assert_close(seen(model, first, now), hidden, rtol=0, atol=1e-6)


def test_a_prompt_may_put_the_instruction_first_or_the_latest_frame(folders):
    first, now = pairs()
    told = config(folders["qwen2_5_vl"], prompt="{instruction}: {first} became {now}, done?")
    kept = ImageText(told)
    anew = ImageText.on(replace(told, keep_first=False), kept.model)
    begun = kept.begin(first, WORDS)
    assert len({b.layout.split for b in begun}) == 3  # prefixes of unequal length
    assert all(b.kept for b in begun)
    torch.testing.assert_close(kept.go_on(begun, now), seen(anew, first, now), rtol=0, atol=1e-6)
    turned = ImageText.on(replace(told, prompt="{now}{first}{instruction}"), kept.model)
    assert turned.why_anew == "{now} comes before {first} in the prompt"
    hidden, _ = directly(turned, now, first, WORDS)
    assert torch.equal(seen(turned, first, now), hidden)


def test_a_window_of_attention_is_no_prefix(folders):
    model = ImageText(config(folders["qwen2_5_vl"]))
    model.model.config.get_text_config().layer_types = ["full_attention", "sliding_attention"]
    assert model.why_anew == "some of its layers attend to a window"
    model.model.config.model_type = "gemma3"
    assert "gemma3" in model.why_anew


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answers_are_read_from_the_librarys_logits(family, folders):
    first, now = pairs()
    asked = replace(config(folders[family], keep_first=False), kind="prompted")
    model = ImageText(asked)
    answers = model.answers()
    assert answers == tuple(model.processor.tokenizer("YN")["input_ids"][-2:])
    _, logits = directly(model, first, now, WORDS)
    expected = logits[:, list(answers)].softmax(-1)[:, 0]
    got = torch.sigmoid(model.odds(seen(model, first, now), answers))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match=r"answers: expected two that begin with different tokens"):
        ImageText.on(replace(asked, answers=("Yes", "Yeah")), model.model).answers()


def test_weights_are_held_in_the_precision_asked_for(folders):
    first, now = pairs()
    model = ImageText(replace(config(folders["smolvlm"]), precision="bfloat16"))
    assert {p.dtype for p in model.model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.model.parameters())
    rough = seen(model, first, now)
    assert rough.dtype == torch.bfloat16
    fine = seen(ImageText(config(folders["smolvlm"])), first, now)
    torch.testing.assert_close(rough.float(), fine, rtol=0, atol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cost_is_what_is_counted(family, folders):
    first, now = pairs()
    loaded = ImageText(config(folders[family])).model
    loaded.set_attn_implementation("eager")  # the fused one is not counted on a CPU
    for keep, kind in ((True, "vlm"), (False, "prompted")):
        asked = replace(config(folders[family], views="all", keep_first=keep), kind=kind)
        said = cost(asked, embodiment(64), WORDS[0])
        model = ImageText.on(asked, loaded)
        with FlopCounterMode(display=False) as beginning:
            begun = model.begin(first[:1], WORDS[:1])
        with FlopCounterMode(display=False) as going_on:
            features = model.go_on(begun, now[:1])
            if kind == "prompted":
                model.odds(features, (0, 1))
        assert said.flops == pytest.approx(going_on.get_total_flops(), rel=0.01)
        assert said.flops_first == pytest.approx(beginning.get_total_flops(), rel=0.01)
        assert said.tokens == len(begun[0].layout)
        held = [tensor for layer in begun[0].kept or [] for tensor in layer]
        assert said.row_bytes == sum(tensor.nbytes for tensor in held)
        assert bool(held) == keep
        assert said.weight_bytes == sum(p.nbytes for p in model.model.parameters())
        assert said.feature_bytes == features[0].nbytes


# ---------------------------------------------------------------- folders that are not whole


def change(path, **values):
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, **values}))


def with_weight(folder, act):
    """Save a shard's first matrix anew, as `act` makes it."""
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    name = next(n for n, t in tensors.items() if t.ndim == 2)
    tensors[name] = act(tensors[name].clone())
    save_file(tensors, path, metadata={"format": "pt"})


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


SHARD = "model-00002-of-00004.safetensors"
DAMAGED = {
    "no folder": (shutil.rmtree, "expected the folder of a published model"),
    "a missing shard": (without(SHARD), rf"expected 4 shards, .*; missing: {SHARD}"),
    "pickles alone": (
        lambda f: (f / SHARD).rename(f / "pytorch_model.bin"),
        r"pickles, which are not opened",
    ),
    "a shard cut short": (
        lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:40]),
        rf"{SHARD} \(40 bytes\) is cut short",
    ),
    "half of a shard": (
        lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:90_000]),
        rf"{SHARD} .* is cut short",
    ),
    "no config": (without("config.json"), r"expected config.json, got"),
    "another kind": (
        lambda f: change(f / "config.json", model_type="llama"),
        r"model_type: expected an image-text model .* got 'llama'",
    ),
    "a config cut short": (
        lambda f: (f / "config.json").write_text('{"model_type": "llava"'),
        r"config.json is not valid JSON",
    ),
    "no processor": (without("preprocessor_config.json"), r"preprocessor_config.json: expected"),
    "an unknown processor": (
        lambda f: change(f / "preprocessor_config.json", processor_class="MyProcessor"),
        r"processor_class: expected a processor of transformers .* got 'MyProcessor'",
    ),
    "no tokenizer": (without("tokenizer.json"), r"tokenizer.json: expected a tokenizer, got none"),
    "no chat format": (without("chat_template.jinja"), r"chat_template.jinja: expected the chat"),
    "NaN": (lambda f: with_weight(f, lambda t: t.fill_(torch.nan)), "expected finite weights"),
    "another shape": (
        lambda f: with_weight(f, lambda t: t[1:].clone()),
        r"do not fit its config.json: .*expected \[320, 32\], got \[319, 32\]",
    ),
    "a deeper config": (
        lambda f: change(
            f / "config.json",
            text_config={**json.loads((f / "config.json").read_text())["text_config"]}
            | {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3},
        ),
        r"do not fit its config.json: missing model.language_model.layers.2",
    ),
    "no place for pictures": (
        lambda f: (f / "chat_template.jinja").write_text("{{ messages[0]['role'] }}"),
        r"places for 2 pictures in 'user' .* number of images passed",
    ),
    "a chat format cut short": (
        lambda f: (f / "chat_template.jinja").write_text("{% for m in"),
        r"chat_template.jinja: expected a chat template .* TemplateSyntaxError",
    ),
    "a tokenizer with a hole": (
        lambda f: change(f / "tokenizer.json", model={"type": "BPE", "vocab": {"a": "b"}}),
        r"tokenizer.json: expected a tokenizer that",
    ),
    "a config of another type": (
        lambda f: change(f / "config.json", text_config=True),
        r"config.json: expected a configuration that",
    ),
    "a processor of other patches": (
        lambda f: change(f / "preprocessor_config.json", merge_size=1),
        r"expected a processor that fits its model .* got RuntimeError",
    ),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_folder_that_is_not_whole_is_refused_by_name(fault, copied):
    folder = copied()
    act, words = DAMAGED[fault]
    act(folder)
    blank = torch.zeros(1, 1, 64, 64, 3, dtype=torch.uint8)
    with pytest.raises(UserError, match=words) as caught:
        ImageText(config(folder)).begin(blank, ["do it"])
    assert str(folder) in str(caught.value)
    assert isinstance(caught.value, NonFiniteError) == (fault == "NaN")


def test_a_prompt_without_places_for_pictures_is_refused(folders):
    for prompt in ("{instruction}", "{first}{instruction}", "{first}{now}{now}{instruction}"):
        with pytest.raises(UserError, match=r"prompt: expected \{first\}, \{now\} and"):
            Config(reflector=config(folders["llava"], prompt=prompt))
    with pytest.raises(UserError, match="folder: expected the folder of a published model"):
        Config(reflector=ReflectorConfig(kind="prompted"))


def test_the_digest_tells_models_apart(folders, copied, tmp_path):
    folder = copied()
    own = digest(folder)
    assert own == digest(folders["qwen2_5_vl"])
    assert own != digest(published.write(tmp_path / "another", "qwen2_5_vl", seed=1))
    with_weight(folder, lambda t: t * 1.01)
    assert own != (changed := digest(folder))
    change(folder / "config.json", tie_word_embeddings=False)
    assert changed != digest(folder)


def test_a_single_file_is_read_too(folders, tmp_path):
    whole = shutil.copytree(folders["llava"], tmp_path / "whole")
    tensors = {k: v for p in whole.glob("*.safetensors") for k, v in load_file(p).items()}
    for path in [*whole.glob("*.safetensors"), whole / "model.safetensors.index.json"]:
        path.unlink()
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    read = [load_model(f, load_config(f), torch.float32) for f in (whole, folders["llava"])]
    one, many = read
    theirs = dict(many.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in one.named_parameters())
