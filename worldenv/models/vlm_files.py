"""Image-text folders read: the model, and its processor where torchvision is not installed.

The library's own `AutoProcessor` wants torchvision wherever a family can show videos. None are
shown here, so the processor is put together from its image processor and its tokenizer.
"""

import sys
from contextlib import contextmanager
from inspect import signature
from pathlib import Path

import torch
import transformers as hf
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from worldenv.models.folder import AGAIN, few, read_json
from worldenv.models.weights import Shards, finite
from worldenv.runtime.errors import UserError, nearest

_LOCAL = {"local_files_only": True, "trust_remote_code": False}
_LIBRARY = (
    *(OSError, ValueError, ImportError, TypeError, KeyError, AttributeError, RuntimeError),
    *(SafetensorError, StrictDataclassError, TemplateError),
)
"""What the library raises for folders that are not whole."""


class reading:
    """A context in which what the library finds wrong with a folder becomes a UserError.

    Its tokenizers raise `Exception` itself, which is not caught where it is a defect of ours: those
    have a class.
    """

    def __init__(self, where: Path, what: str) -> None:
        self.where, self.what = where, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        ours = isinstance(error, UserError | torch.OutOfMemoryError)
        if not ours and (kind is Exception or isinstance(error, _LIBRARY)):
            said = " ".join(str(error).split())[:300]
            raise UserError(
                f"{self.where}: expected {self.what} that transformers {hf.__version__} can read, "
                f"got {type(error).__name__}: {said}. {AGAIN}"
            ) from error


def load_config(folder: Path) -> hf.PreTrainedConfig:
    """A folder's configuration. UserError if it is of no image-text model."""
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        guess = nearest(str(kind), MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
        raise UserError(
            f"{folder / 'config.json'}: model_type: expected an image-text model such as llava, "
            f"idefics3, smolvlm, qwen2_5_vl or qwen3_vl, got {kind!r}"
            f"{f' (nearest: {guess})' if guess else ''}. Name the folder of such a model."
        )
    with reading(folder / "config.json", "a configuration"):
        return hf.AutoConfig.from_pretrained(folder, **_LOCAL)


def load_model(folder: Path, config: hf.PreTrainedConfig, dtype: torch.dtype) -> hf.PreTrainedModel:
    """A folder's model, frozen. UserError naming tensors that are missing, left over, of another
    shape, or not finite.
    """
    Shards(folder)  # whole, one, and no pickles: the library's own words are of other kinds
    with reading(folder, "weights"), _quiet():
        model, told = hf.AutoModelForImageTextToText.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told, and refused below
            **_LOCAL,
        )
    wrong = [f"missing {name}" for name in sorted(told["missing_keys"])]
    wrong += [f"unexpected {name}" for name in sorted(told["unexpected_keys"])]
    wrong += [
        f"{name}: expected {list(asked)}, got {list(got)}"
        for name, got, asked in sorted(told["mismatched_keys"])
    ]
    if wrong:
        raise UserError(
            f"{folder}: its weights do not fit its config.json: {few(wrong, '; ')}. {AGAIN}"
        )
    for name, weight in model.named_parameters():
        finite(weight, name, folder)
    return model.requires_grad_(False).eval()


def load_processor(folder: Path) -> hf.ProcessorMixin:
    """A folder's processor. UserError naming the file that is missing."""
    settings = read_json(folder / "processor_config.json", {})
    images = read_json(folder / "preprocessor_config.json", {})
    texts = read_json(folder / "tokenizer_config.json", {})
    if not images and not settings:
        raise UserError(
            f"{folder / 'preprocessor_config.json'}: expected the settings of a processor of "
            f"pictures, got no such file: without it nobody knows what the model saw. {AGAIN}"
        )
    tokenizers = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((folder / name).is_file() for name in tokenizers):
        raise UserError(f"{folder / 'tokenizer.json'}: expected a tokenizer, got none. {AGAIN}")
    names = [said.get("processor_class") for said in (images, settings, texts)]
    name = next((n for n in names if n), None)
    found = getattr(hf, str(name), None)
    if not (isinstance(found, type) and issubclass(found, hf.ProcessorMixin)):
        raise UserError(
            f"{folder / 'preprocessor_config.json'}: processor_class: expected a processor of "
            f"transformers {hf.__version__}, got {name!r}. {AGAIN}"
        )
    with reading(folder / "preprocessor_config.json", "a processor of pictures"):
        picture = hf.AutoImageProcessor.from_pretrained(folder, backend="pil", **_LOCAL)
    with reading(folder / "tokenizer.json", "a tokenizer"):
        tokenizer = hf.AutoTokenizer.from_pretrained(folder, **_LOCAL)
    with reading(folder / "processor_config.json", "a processor"):
        processor = _assembled(found, picture, tokenizer, settings)
    if hasattr(picture, "do_image_splitting"):
        picture.do_image_splitting = False
    processor.chat_template = _chat_template(folder, texts)
    return processor


def _assembled(
    kind: type[hf.ProcessorMixin],
    picture: hf.BaseImageProcessor,
    tokenizer: hf.PreTrainedTokenizerBase,
    settings: dict,
) -> hf.ProcessorMixin:
    """A processor of pictures and text, its processor of videos left out."""

    class PicturesOnly(kind):
        def check_argument_for_proper_class(self, argument_name, argument):
            if argument_name == "video_processor":
                return type(argument)
            return super().check_argument_for_proper_class(argument_name, argument)

    parts = {"image_processor": picture, "tokenizer": tokenizer}
    if "video_processor" in kind.get_attributes():
        parts["video_processor"] = None
    wanted = set(signature(kind.__init__).parameters) - {*parts, "self", "chat_template", "kwargs"}
    with _without_number_words(kind):
        return PicturesOnly(**parts, **{k: v for k, v in settings.items() if k in wanted})


@contextmanager
def _without_number_words(kind: type):
    """SmolVLM's processor is not made without num2words, by which only videos' prompts are made."""
    module = sys.modules[kind.__module__]
    lacks = getattr(module, "num2words", True) is None
    if lacks:
        module.num2words = _no_videos
    try:
        yield
    finally:
        if lacks:
            module.num2words = None


def _no_videos(*_: object) -> str:
    raise AssertionError("no videos are shown")


def _chat_template(folder: Path, texts: dict) -> str:
    """Where published folders keep it: a file of its own, JSON, or the tokenizer's settings."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    said = read_json(folder / "chat_template.json", {}).get("chat_template") or texts.get(
        "chat_template"
    )
    if not isinstance(said, str):
        raise UserError(
            f"{path}: expected the chat format that the model was trained on, got none, nor a "
            f"chat_template.json. {AGAIN}"
        )
    return said


@contextmanager
def _quiet():
    """Without the library's bar of loaded tensors."""
    shows = hf.utils.logging.is_progress_bar_enabled()
    hf.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shows:
            hf.utils.logging.enable_progress_bar()
