"""Fields of the configuration that choose a published model and say how it is adapted.

`config.py` takes them into its components; everything is checked there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from worldenv.fields import Items, Range

Rule = tuple[bool, str, str]
"""Whether it holds, the field it is about, and what was expected of that."""


@dataclass(frozen=True)
class PublishedPolicy:
    """Which policy, and what only published ones have."""

    kind: Literal["small", "openvla-oft", "openvla-token"] = "small"
    """The small policy, trained from nothing; OpenVLA-OFT with its L1 head; or OpenVLA that writes
    actions as tokens. Published ones are read from `folder`."""
    folder: Path | None = None
    """Folder of the published policy, as downloaded."""
    unnorm_key: str | None = None
    """Whose statistics the policy's units are in: a key of dataset_statistics.json, without or with
    its _no_noops. Unset: the only one there is."""
    images: Annotated[int, Range(1, 16)] | None = None
    """How many of the cameras, in order, a published policy sees. Unset: all for openvla-oft, the
    first for openvla-token."""
    proprio: bool = True
    """Whether an openvla-oft policy was trained with a proprio projector."""
    crop: Annotated[float, Range(0, 1, above=True)] = 0.9
    """Share of the image's area that is cropped from its centre and enlarged again, as policies
    trained with image augmentation expect; 1 for others."""
    decode: Literal["parallel", "autoregressive"] = "parallel"
    """How openvla-token policies write: all slots of a chunk at once (SimpleVLA-RL, RLinf), or one
    after the other (the first OpenVLA; chunks of 1, acts but is not post-trained)."""
    lora_rank: Annotated[int, Range(0, 1024)] = 32
    """Rank of the adapters that train a published backbone (0: its heads alone are trained)."""
    adapter: Literal["merged", "apply"] = "merged"
    """The folder's lora_adapter: merged into its shards already (as published), or to be applied to
    them, of rank `lora_rank`."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Of a published policy's frozen weights; what is trained is float32."""
    checkpointing: bool = False
    """Whether a published policy computes its activations again in the backward pass: a third more
    time, a fraction of the memory."""

    @property
    def reads(self) -> tuple[Path, ...]:
        """What on the disk it is built from."""
        return () if self.kind == "small" else (self.folder,)

    @property
    def distribution(self) -> Literal["laplace", "categorical"]:
        """Of its actions."""
        return "categorical" if self.kind == "openvla-token" else "laplace"

    @property
    def large(self) -> bool:
        """Whether memory suffices for one of it alone, and only the run's device is fast enough for
        it to act."""
        return self.kind != "small"

    def rules(self) -> Iterator[Rule]:
        """What its fields require of each other."""
        needed = f"the folder of a published {self.kind} policy"
        yield self.kind == "small" or self.folder is not None, "folder", needed
        parallel = self.kind == "openvla-token" or self.decode == "parallel"
        yield parallel, "decode", f"parallel, for kind {self.kind}"


@dataclass(frozen=True)
class PublishedSimulator:
    """Which simulator and which tokenizer, and what only published ones have."""

    kind: Literal["small", "wan", "wovr"] = "small"
    """Trained from nothing; a published Wan (2.1 T2V 1.3B, 2.2 TI2V 5B); or one of WoVR's
    simulators of LIBERO (RLinf-Wan-LIBERO-*), which generates eight frames at a time."""
    folder: Path | None = None
    """Folder of the published model, as downloaded (unused by the small one)."""
    text: Literal["constant", "words"] = "constant"
    """What a Wan is told: nothing (an empty text costs one vector a layer), or `prompt`."""
    prompt: Path | None = None
    """Safetensors file with one tensor [n, 4096]: the text as Wan's text encoder embeds it."""
    shift: Annotated[float, Range(0, 1000, above=True)] | None = None
    """Of the sampling schedule: above 1, more passes at high noise. Unset: 1 for the small one, 5
    for Wan (what TI2V 5B and WoVR use; 3 suits the 1.3B)."""

    tokenizer: Literal["patch", "autoencoder", "wan-vae", "kl-vae", "tiny-vae"] = "patch"
    """Pixel patches (no training), a small convolutional autoencoder, or a published one: Wan's
    video VAE, Stable Diffusion's AutoencoderKL, AutoencoderTiny."""
    tokenizer_folder: Path | None = None
    """Where the published one lies: a pipeline's folder, its vae folder, or Wan2.x_VAE.pth."""
    tokenizer_precision: Literal["float32", "bfloat16"] = "float32"
    """What a published tokenizer computes in."""

    @property
    def reads(self) -> tuple[Path, ...]:
        """What on the disk it is built from."""
        named = (
            self.folder if self.kind != "small" else None,
            self.prompt if self.kind == "wan" and self.text == "words" else None,
            self.tokenizer_folder,
        )
        return tuple(path for path in named if path is not None)

    def rules(self) -> Iterator[Rule]:
        """What its fields require of each other."""
        needed = f"the folder of a published {self.kind}"
        yield self.kind == "small" or self.folder is not None, "folder", needed
        prompt = "the file of the text, where text is words"
        yield self.text != "words" or self.prompt is not None, "prompt", prompt
        named = (self.tokenizer_folder is not None) == self.tokenizer.endswith("-vae")
        expected = f"a folder for a published tokenizer, none for another ({self.tokenizer!r})"
        yield named, "tokenizer_folder", expected


@dataclass(frozen=True)
class PublishedReflector:
    """Which reflector, and what only those of published image-text models have."""

    kind: Literal["small", "vlm", "prompted", "wovr"] = "small"
    """A convolutional encoder trained with its head, a head on the hidden state of a frozen
    image-text model, that model's own answer to the prompt, without a head, or the reward network
    that comes with WoVR's simulators."""
    folder: Path | None = None
    """Folder of the image-text model, as published (vlm, prompted), or of WoVR's (wovr)."""
    tasks: Annotated[tuple[str, ...], Items(least=0)] = ()
    """Instructions in the order of the reward network's embedding of tasks (wovr, for
    libero_goal: all ten, sorted)."""
    prompt: str = (
        "{first}{now}These are the first and the latest picture of a robot at work. Its task: "
        "{instruction}. Has the task been done? Answer Yes or No."
    )
    """What the image-text model is asked: {first} and {now} stand for the pictures of the first
    and of the latest frame, once each, {instruction} for the task."""
    answers: tuple[str, str] = ("Yes", "No")
    """The answers that mean success and failure (prompted)."""
    views: Literal["first", "all"] = "first"
    """Which cameras the image-text model sees."""
    use_proprio: bool = False
    """Whether the head on an image-text model sees the proprio too (vlm)."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """What the image-text model computes in."""
    keep_first: bool = True
    """Keep the image-text model's keys and values of an episode's first frame, where that changes
    nothing: half the work, for the memory that `models.vlm_cost` says."""
    encode_batch: Annotated[int, Range(1, 10**6)] = 16
    """Frames that the image-text model sees at once."""

    @property
    def reads(self) -> tuple[Path, ...]:
        """What on the disk it is built from."""
        return () if self.kind == "small" else (self.folder,)

    def rules(self) -> Iterator[Rule]:
        """What its fields require of each other."""
        needed = f"the folder of a published model, for kind {self.kind}"
        yield self.kind == "small" or self.folder is not None, "folder", needed
        slots = ("{first}", "{now}", "{instruction}")
        once = all(self.prompt.count(slot) == 1 for slot in slots)
        yield once, "prompt", "{first}, {now} and {instruction}, once each"
