"""Any published image-text model, frozen, as the eyes of a reflector (World-Env section 3.4).

A folder that `AutoModelForImageTextToText` reads (LLaVA-1.5, Idefics3, SmolVLM2, Qwen2.5-VL,
Qwen3-VL) is loaded as it lies there: nothing is downloaded, no remote code runs, no pickle is
opened. It is shown the first frame o_1, the frame o_t and the instruction, and what comes out is
the final hidden state of the prompt's last token, `[N, E]`.

o_1 does not change within an episode: where it comes first in the prompt and the model attends
causally, its keys and values are computed once (`begin`) and read with every frame (`go_on`).
`ImageText.why_anew` says why another model or prompt does without. Pictures are not cut into tiles.
"""

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from inspect import signature

import torch
import torch.nn.functional as F
import transformers as hf
from PIL import Image
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from worldenv.config import ReflectorConfig
from worldenv.models.folder import digest
from worldenv.models.vlm_files import load_config, load_model, load_processor, reading
from worldenv.runtime.errors import UserError

CAUSAL = ("llava", "idefics3", "smolvlm", "qwen2_5_vl", "qwen3_vl")
"""Families (model_type) of which the tests hold that a kept prefix changes nothing."""
_CACHE = (  # what the library calls the argument, since version 5.24 and before
    "cache" if "cache" in signature(hf.LlamaModel.forward).parameters else "past_key_values"
)
_SLOTS = re.compile(r"(\{first\}|\{now\})")


@dataclass(frozen=True)
class Layout:
    """A prompt as tokens, S of them; the same for all pictures of a size."""

    texts: dict[str, Tensor]  # [S] each: input_ids, and what else the model wants of them
    positions: Tensor  # [S], or [3, S] for positions in pictures
    split: int  # tokens before the first of o_t's pictures
    pictures: tuple[int, int]  # tokens of o_1's and of o_t's pictures

    def __len__(self) -> int:
        return self.positions.shape[-1]


@dataclass(frozen=True)
class Begun:
    """An episode whose first frame has been seen."""

    layout: Layout
    first: list[Image.Image]
    kept: list[tuple[Tensor, Tensor]] | None  # per layer keys and values [H, split, D]


class _Held(DynamicLayer):
    """One layer's prefixes of N rows: read by a forward pass, never grown."""

    def __init__(self, rows: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.rows, self.is_initialized = rows, True

    def get_seq_length(self) -> int:
        return self.rows[0][0].shape[-2]

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        held = (torch.stack([row[i] for row in self.rows]) for i in (0, 1))
        new = (key_states, value_states)
        keys, values = (torch.cat(pair, -2) for pair in zip(held, new, strict=True))
        return keys, values


class ImageText:
    """A frozen image-text model and its processor.

    Not a module: whoever holds it neither trains nor saves it. Safe to call from several threads.
    """

    def __init__(self, config: ReflectorConfig) -> None:
        """UserError naming file, key, expected and got, for what is no such folder."""
        self.digest = digest(config.folder)
        settings, processor = load_config(config.folder), load_processor(config.folder)
        model = load_model(config.folder, settings, getattr(torch, config.precision))
        self._hold(config, model, processor)

    @classmethod
    def on(cls, config: ReflectorConfig, model: hf.PreTrainedModel) -> "ImageText":
        """With a model of one's own, on `meta` for instance, and the folder's processor."""
        made = cls.__new__(cls)
        made.digest = ""
        made._hold(config, model, load_processor(config.folder))
        return made

    def _hold(
        self, config: ReflectorConfig, model: hf.PreTrainedModel, processor: hf.ProcessorMixin
    ) -> None:
        self.config, self.model, self.processor = config, model, processor
        self.size = self.model.config.get_text_config().hidden_size  # E
        self.image_token = getattr(self.model.config, "image_token_id", None)
        if self.image_token is None:
            raise UserError(
                f"{config.folder / 'config.json'}: image_token_id: expected the token that stands "
                f"for pictures, got none: a {self.model.config.model_type} model cannot be used."
            )
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "right"
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0, 1)
        self._pad = next(i for i in candidates if i is not None and i != self.image_token)
        self._layouts: dict[tuple, Layout] = {}
        self._lock = threading.Lock()  # tokenizers are not safe to share between threads
        self._turn = threading.Lock()  # a GPU holds the activations of one batch at a time

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.model.device

    @property
    def why_anew(self) -> str:
        """Why o_1 is encoded anew with every frame; empty where it is kept."""
        text = self.model.config.get_text_config()
        if not self.config.keep_first:
            return "reflector.keep_first is off"
        if self._slots[0] != "first":
            return "{now} comes before {first} in the prompt"
        if self.model.config.model_type not in CAUSAL:
            kind = self.model.config.model_type
            return f"of a {kind} model it is not known whether it attends causally"
        if set(getattr(text, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
            return "some of its layers attend to a window"
        return ""

    @property
    def _slots(self) -> list[str]:
        return [slot[1:-1] for slot in _SLOTS.findall(self.config.prompt)]

    # ------------------------------------------------------------ what is shown

    def shown(self, frames: Tensor) -> Tensor:
        """Of frames `[N, V, H, W, 3]` the views that the model sees."""
        return frames[:, :1] if self.config.views == "first" else frames

    def text(self, instruction: str, views: int) -> str:
        """The prompt in the model's own chat format, one placeholder for each picture."""
        content: list[dict] = []
        for piece in _SLOTS.split(self.config.prompt):
            if _SLOTS.fullmatch(piece):
                content += [{"type": "image"}] * views
            elif piece:
                words = piece.replace("{instruction}", instruction)
                content.append({"type": "text", "text": words})
        with reading(self.config.folder / "chat_template.jinja", "a chat template"):
            return self.processor.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=self.processor.chat_template,
                tokenize=False,
                add_generation_prompt=True,
            )

    def layout(self, instruction: str, views: int, height: int, width: int) -> Layout:
        """The prompt for pictures of a size, as tokens."""
        key = (instruction, views, height, width)
        with self._lock:
            if key not in self._layouts:
                self._layouts[key] = self._make_layout(*key)
            return self._layouts[key]

    def _make_layout(self, instruction: str, views: int, height: int, width: int) -> Layout:
        blank = Image.new("RGB", (width, height))
        prompt = self.text(instruction, views)
        count = 2 * views
        folder = self.config.folder
        with reading(folder, f"a processor and places for {count} pictures in {prompt[:80]!r}"):
            whole = self.processor(text=[prompt], images=[[blank] * count], return_tensors="pt")
        ids = whole["input_ids"]
        pictures = (ids[0] == self.image_token).nonzero()[:, 0]
        if not len(pictures) or len(pictures) % count:
            raise UserError(
                f"{folder}: expected the same number of tokens for each of {count} pictures, got "
                f"{len(pictures)} in all. Name another model."
            )
        of_one = len(pictures) // 2
        if hasattr(self.model.base_model, "get_rope_index"):
            wanted = signature(self.model.base_model.get_rope_index).parameters
            known = {k: v for k, v in whole.items() if k in wanted}
            with reading(folder, "a processor that fits its model"):
                positions = self.model.base_model.get_rope_index(**known)[0][:, 0]
        else:
            positions = torch.arange(ids.shape[1])
        texts = {k: v[0] for k, v in whole.items() if v.shape == ids.shape}
        del texts["attention_mask"]
        return Layout(texts, positions, int(pictures[of_one]), (of_one, of_one))

    def answers(self) -> tuple[int, int]:
        """The tokens by which the two `answers` begin, where an answer is due.

        After a prompt that ends in no white space the answer begins with a space, if the tokenizer
        takes that into the word.
        """
        prompt = self.text("do it", 1)
        with self._lock:
            tokenize = self.processor.tokenizer
            before = tokenize(prompt)["input_ids"]
            n = len(before)
            for gap in ("",) if prompt[-1:].isspace() else (" ", ""):
                both = [tokenize(prompt + gap + word)["input_ids"] for word in self.config.answers]
                first = [ids[n] for ids in both if len(ids) > n and ids[:n] == before]
                if len(set(first)) == 2:
                    return first[0], first[1]
        raise UserError(
            f"reflector.answers: expected two that begin with different tokens of "
            f"{self.config.folder}, got {self.config.answers!r}."
        )

    # ------------------------------------------------------------ what is seen

    def begin(self, first: Tensor, instruction: Sequence[str]) -> list[Begun]:
        """First frames `[N, V, H, W, 3]` uint8 and N instructions to N episodes that have begun."""
        shown = self.shown(first)
        _, views, height, width, _ = shown.shape
        layouts = [self.layout(words, views, height, width) for words in instruction]
        begun = [Begun(*pair, None) for pair in zip(layouts, map(_pictures, shown), strict=True)]
        if self.why_anew:
            return begun
        for rows in self._batches(range(len(begun)), lambda i: begun[i].layout.split):
            cache, chosen = DynamicCache(), [begun[i] for i in rows]
            parts = slice(0, chosen[0].layout.split)
            self._forward([b.layout for b in chosen], parts, [b.first for b in chosen], cache)
            for k, i in enumerate(rows):
                kept = [(layer.keys[k].clone(), layer.values[k].clone()) for layer in cache.layers]
                begun[i] = Begun(begun[i].layout, begun[i].first, kept)
        return begun

    def go_on(self, begun: Sequence[Begun], now: Tensor) -> Tensor:
        """Features `[N, E]` of N episodes at their frames now `[N, V, H, W, 3]` uint8."""
        pictures = [_pictures(frame) for frame in self.shown(now)]
        out = torch.empty(len(begun), self.size, dtype=self.model.dtype, device=self.device)
        first_first = self._slots[0] == "first"

        def length(i: int) -> int:
            return begun[i].layout.split if begun[i].kept else 0

        for rows in self._batches(range(len(begun)), length):
            layouts = [begun[i].layout for i in rows]
            if begun[rows[0]].kept:
                layers = zip(*(begun[i].kept for i in rows), strict=True)
                cache = Cache(layers=[_Held(layer) for layer in layers])
                seen = [pictures[i] for i in rows]
                parts = slice(length(rows[0]), None)
            else:
                cache, parts = None, slice(0, None)
                pairs = [(begun[i].first, pictures[i]) for i in rows]
                seen = [a + b if first_first else b + a for a, b in pairs]
            out[list(rows)] = self._forward(layouts, parts, seen, cache)
        return out

    def _batches(self, rows: Sequence[int], key: Callable[[int], int]) -> Iterator[list[int]]:
        """Rows of equal key together, at most `encode_batch` at once."""
        size = self.config.encode_batch
        for value in sorted({key(i) for i in rows}):
            same = [i for i in rows if key(i) == value]
            yield from (same[at : at + size] for at in range(0, len(same), size))

    @torch.no_grad()
    def _forward(
        self,
        layouts: Sequence[Layout],
        part: slice,  # of each prompt's tokens
        pictures: list[list[Image.Image]],  # those whose tokens are in that part
        cache: Cache | None,
    ) -> Tensor:
        """Final hidden state `[N, E]` of the last token; prompts are padded on the right."""
        lengths = [layout.positions[..., part].shape[-1] for layout in layouts]
        longest = max(lengths)
        given: dict[str, Tensor] = {}
        for name in layouts[0].texts:
            blank = self._pad if name == "input_ids" else 0
            given[name] = torch.stack(
                [
                    F.pad(one.texts[name][part], (0, longest - n), value=blank)
                    for one, n in zip(layouts, lengths, strict=True)
                ]
            )
        mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
        if cache is not None:
            given["position_ids"] = torch.stack(
                [
                    F.pad(one.positions[..., part], (0, longest - n))
                    for one, n in zip(layouts, lengths, strict=True)
                ],
                dim=layouts[0].positions.ndim - 1,
            )
            mask = F.pad(mask, (cache.get_seq_length(), 0), value=True)
        given |= {"attention_mask": mask.long(), **self._pixels(pictures)}
        given = {
            k: v.to(self.device, self.model.dtype if v.is_floating_point() else v.dtype)
            for k, v in given.items()
        }
        extra = {} if cache is None else {_CACHE: cache}
        turn = self._turn if self.device.type != "cpu" else nullcontext()
        with turn, reading(self.config.folder, "a processor that fits its model"):
            out = self.model.base_model(**given, use_cache=cache is not None, **extra)
        last = torch.tensor(lengths, device=self.device) - 1
        return out.last_hidden_state[torch.arange(len(lengths), device=self.device), last]

    def _pixels(self, pictures: list[list[Image.Image]]) -> dict[str, Tensor]:
        return dict(self.processor.image_processor(pictures, return_tensors="pt"))

    def odds(self, features: Tensor, answers: tuple[int, int]) -> Tensor:
        """How much likelier `[N]` the first of two tokens is than the second, as a logit."""
        logits = self.model.get_output_embeddings()(features)
        return (logits[:, answers[0]] - logits[:, answers[1]]).float()


def _pictures(views: Tensor) -> list[Image.Image]:
    """Views `[V, H, W, 3]` uint8 as the processors take them."""
    return [Image.fromarray(view) for view in views.cpu().numpy()]
