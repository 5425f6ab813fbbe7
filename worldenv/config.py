"""Configuration: one frozen dataclass per component, validated once, saved with every run.

Help text stands beside each field (tyro prints it). `from_dict` refuses unknown keys and names the
nearest one. Named combinations live in `presets.py`.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from worldenv.runtime.errors import UserError, nearest

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")


@dataclass(frozen=True)
class EnvConfig:
    """The real benchmark."""

    suite: Literal["libero_spatial", "libero_object", "libero_goal", "libero_10"] = "libero_spatial"
    """LIBERO suite."""
    tasks: tuple[int, ...] = (8,)
    """Task ids within the suite (0-9)."""
    assets: Path | None = None
    """Folder with LIBERO's assets. Unset: WORLDENV_LIBERO_ASSETS, else the primitive pack."""
    image_size: int = 64
    """Side of the square images the models see, in pixels (a divisor of 128)."""
    chunk: int = 8
    """Actions executed open loop per policy decision."""
    max_steps: int = 160
    """Control steps (20 Hz) after which an episode is truncated."""
    workers: int = 2
    """Simulator processes."""


@dataclass(frozen=True)
class CollectConfig:
    """Demonstrations and self-explored episodes (paper section 3.2)."""

    demonstrations: int = 5
    """Scripted demonstrations per task (init states 0, 1, ...)."""
    demonstration_noise: float = 0.25
    """Std of the correlated action noise added while demonstrating, relative to the action."""
    episodes: int = 160
    """Policy episodes per task in the first round."""
    refresh_episodes: int = 80
    """Policy episodes per task in each later round."""
    record_every: int = 4
    """Control steps between recorded frames of policy episodes (a divisor of env.chunk). Each chunk
    can begin at any of them, so that the world learns from more poses of the same episodes."""
    push: float = 0.053
    """Exploration noise: Laplace scale of a push, the same for all actions of a chunk (1 moves the
    hand by about a centimetre a step). The world must have seen what such pushes lead to. Without
    one (0), noise in every action by itself."""
    scale: float = 1.5
    """Without a push: multiple of the policy's Laplace scale."""
    fresh: float = 1.0
    """Fraction of policy episodes from freshly sampled placements; the others use starts 0-19. With
    half from those twenty starts the policy improved less on others."""
    hold_chunks: int = 1
    """Chunks recorded after success first fires: the world must see what success looks like."""
    held_out: float = 0.125
    """Fraction of policy episodes kept from training, to measure simulator and reflector on."""


@dataclass(frozen=True)
class PolicyConfig:
    """OpenVLA-OFT-shaped policy: vision tokens, proprio, language and action slots."""

    width: int = 256
    """Transformer width."""
    layers: int = 2
    """Transformer layers (bidirectional)."""
    heads: int = 4
    """Attention heads."""
    encoder_channels: int = 24
    """Channels of the first convolution of each camera's encoder (a multiple of 8)."""
    min_log_scale: float = -4.5
    """Lower clamp of the Laplace log-scale (units: log of normalised action)."""


@dataclass(frozen=True)
class SFTConfig:
    """Imitation of the demonstrations."""

    steps: int = 1000
    """Optimiser steps."""
    batch: int = 32
    """Samples per step."""
    lr: float = 1e-3
    """Peak learning rate (one-cycle)."""
    shift: int = 1
    """Random image shift in pixels; large shifts cost grasp precision."""
    scale_weight: float = 0.05
    """Weight of the Laplace likelihood that trains the scale head on detached means."""


@dataclass(frozen=True)
class SimulatorConfig:
    """Causal video denoiser over tokenizer latents, flow matching (paper section 3.3)."""

    tokenizer: Literal["patch", "autoencoder"] = "patch"
    """Pixel patches (no training) or a small convolutional autoencoder."""
    patch: int = 16
    """Pixels per token side."""
    latent_channels: int = 16
    """Channels of the autoencoder's latents (unused by the patch tokenizer)."""
    width: int = 256
    """Transformer width."""
    layers: int = 4
    """Transformer blocks."""
    heads: int = 4
    """Attention heads."""
    mlp_ratio: float = 3.0
    """Hidden width of the MLP over width."""
    window: int = 0
    """Past frames attended to through the cache, besides the last one on the channels. On two CPU
    cores a window of 2 makes the default simulator learn 1.7 times slower."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the transformer computes in when it generates; it trains in float32. bfloat16 is for
    processors that multiply it natively (`worldenv-doctor` says whether this one does)."""
    prediction: Literal["sample", "velocity"] = "sample"
    """The network's target: the clean frame, redrawn from the last one, or Wan's velocity."""
    steps: int = 1000
    """Optimiser steps in the first round."""
    refresh_steps: int = 300
    """Optimiser steps in each later round, from the last weights."""
    batch: int = 8
    """Windows per step."""
    frames: int = 3
    """Target frames per training window."""
    dynamics_batch: int = 256
    """Transitions per step that train the prediction of proprio alone."""
    balance: bool = True
    """Train as if there were as many failures as successes: a simulator that has seen mostly
    successes imagines one where a grasp is in doubt."""
    lr: float = 1.5e-3
    """Peak learning rate."""
    self_history_start: float = 0.4
    """Fraction of training after which predicted frames are used as history."""
    self_history: float = 0.6
    """Probability of a batch with predicted history, from then on."""
    pure_noise: float = 0.3
    """Fraction of targets trained at pure noise, which makes one-step sampling work."""
    tokenizer_steps: int = 1500
    """Optimiser steps of the autoencoder tokenizer (unused by the patch tokenizer)."""


@dataclass(frozen=True)
class ReflectorConfig:
    """Reward and termination head (paper section 3.4)."""

    width: int = 128
    """Hidden width of the head."""
    encoder_channels: int = 16
    """Channels of the first convolution of each camera's encoder (a multiple of 8)."""
    steps: int = 600
    """Optimiser steps in the first round. A third of 700 ended many episodes too early."""
    refresh_steps: int = 200
    """Optimiser steps in each later round, from the last weights."""
    batch: int = 48
    """Frames per step."""
    lr: float = 1e-3
    """Peak learning rate."""
    threshold: float = 0.7
    """eta: an episode ends as a success where the reward exceeds it, unless it is calibrated."""
    calibrate: bool = True
    """Choose eta anew in each round, such that the policy that explored succeeds as often in its
    imagination as it did in reality. With a fixed one some worlds call nearly everything a success,
    and nothing is learned there."""


@dataclass(frozen=True)
class PosttrainConfig:
    """PPO inside the learned world (paper section 3.5)."""

    rounds: int = 2
    """Rounds of (collect, simulator, reflector, post-train). Raising it continues a finished run;
    a later round's world has seen where the policy before it failed."""
    restart: bool = False
    """Whether each round post-trains the imitated policy anew: what was learned wrongly in a world
    too kind is forgotten. Otherwise rounds go on from each other: few iterations in each allow it.
    """
    iterations: int = 8
    """Iterations in the first round. Too many exploit the learned world: imagined success rises on,
    real success falls."""
    refresh_iterations: int = 4
    """Iterations in each later round."""
    contexts: int = 16
    """Contexts per draw."""
    draws: int = 3
    """Draws of contexts per iteration at most, without a critic: until half as many groups as
    contexts have both successes and failures (dynamic sampling, as in DAPO); others teach nothing.
    """
    group: int = 8
    """G, rollouts per context."""
    advantage: Literal["loop", "grpo", "gae", "loop-gae"] = "loop-gae"
    """Leave-one-out (the paper's: one advantage for a whole episode), group-normalised, a learned
    critic with GAE, or leave-one-out at the context and the critic from there on. A critic says
    which of an episode's decisions earned its reward."""
    reward: Literal["binary", "continuous"] = "binary"
    """Reward of an episode: R > eta, or R itself."""
    lr: float = 2e-5
    """Learning rate. With noise in every action by itself 1e-4 was seen to collapse within one
    iteration."""
    epochs: int = 1
    """Passes over the rollouts per iteration."""
    minibatch: int = 256
    """Chunks per optimiser step."""
    clip_low: float = 0.2
    """Lower clip of the ratio: 1 - clip_low."""
    clip_high: float = 0.2
    """Upper clip of the ratio: 1 + clip_high."""
    kl_weight: float = 0.0
    """Weight of the KL to the SFT policy."""
    entropy_weight: float = 0.0
    """Weight of the entropy bonus (only with a trainable scale)."""
    push: float = 0.053
    """Behaviour: Laplace scale of a push, the same for all actions of a chunk, and the only thing
    that is scored. 0: noise in every action by itself, as in the paper."""
    scale: float = 2.0
    """Without a push: multiple of the policy's Laplace scale, whose head is not trained here."""
    sampling_steps: int = 1
    """Denoising steps per imagined frame in the first round."""
    refresh_sampling_steps: int = 1
    """Denoising steps per imagined frame in each later round."""
    middle_contexts: float = 0.8
    """Fraction of contexts taken from real episodes on their way to a grasp: both cameras have seen
    where the object is, which from the first frame alone is imagined near where it usually is."""
    middle_from: int = 3
    """Chunks after which such a context may begin."""
    lost_contexts: float = 0.5
    """Fraction of contexts taken from real episodes that failed: there is most to gain."""
    max_clip_fraction: float = 0.5
    """Guard: an update beyond this is undone and the learning rate halved."""
    max_mu_change: float = 0.1
    """Guard: mean absolute change of mu per iteration beyond which the update is undone."""
    real_check_every: int = 4
    """Iterations between checks in the real benchmark on tuning starts (0: never)."""
    real_check_episodes: int = 60
    """Episodes of such a check per task (starts 0-19, without noise)."""
    keep_best: bool = True
    """Whether a round keeps the policy that did best in its checks, the one it began with included,
    rather than the last one."""
    require_fidelity: bool = True
    """Refuse to train inside a simulator that predicts no better than a still picture."""
    rows: int = 32
    """B, imagined environments running side by side."""
    gamma: float = 1.0
    """Discount (with a critic)."""
    gae_lambda: float = 0.9
    """GAE lambda (with a critic)."""

    @property
    def critic(self) -> bool:
        """Whether advantages need a learned critic."""
        return self.advantage in ("gae", "loop-gae")


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out evaluation in the real benchmark."""

    starts: tuple[int, int] = (20, 50)
    """Half-open range of benchmark init states; 0-19 are for tuning."""
    fixture_seeds: tuple[int, ...] = (1000, 2000, 3000)
    """Seeds of the fixture placement; every start runs once with each."""


@dataclass(frozen=True)
class Config:
    """The whole run."""

    preset: str = "default"
    """Name of the preset this configuration started from."""
    seed: int = 0
    """Seed of the whole pipeline."""
    run_dir: Path = Path("runs/default")
    """Folder for checkpoints, metrics, report and results."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    threads: int = 0
    """Threads to compute with (0: OMP_NUM_THREADS, or one for every usable core). Results do not
    depend on it."""
    env: EnvConfig = field(default_factory=EnvConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    simulator: SimulatorConfig = field(default_factory=SimulatorConfig)
    reflector: ReflectorConfig = field(default_factory=ReflectorConfig)
    posttrain: PosttrainConfig = field(default_factory=PosttrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        validate(self)

    @property
    def max_chunks(self) -> int:
        """Policy decisions per episode."""
        return -(-self.env.max_steps // self.env.chunk)

    def sampling_steps(self, number: int) -> int:
        """Denoising steps per imagined frame in round `number`."""
        rl = self.posttrain
        return rl.refresh_sampling_steps if number else rl.sampling_steps


def validate(config: Config) -> None:
    """Check what types cannot. Raises UserError naming the field, the value and the mend."""

    def require(ok: bool, name: str, expected: str, got: object) -> None:
        if not ok:
            raise UserError(f"config {name}: expected {expected}, got {got!r}")

    env, rl = config.env, config.posttrain
    require(bool(env.tasks), "env.tasks", "at least one task id", env.tasks)
    require(all(0 <= t < 10 for t in env.tasks), "env.tasks", "ids in 0..9", env.tasks)
    require(128 % env.image_size == 0, "env.image_size", "a divisor of 128", env.image_size)
    require(
        env.image_size % config.simulator.patch == 0,
        "simulator.patch",
        f"a divisor of image_size {env.image_size}",
        config.simulator.patch,
    )
    require(
        config.collect.record_every >= 1 and env.chunk % config.collect.record_every == 0,
        "collect.record_every",
        f"a divisor of env.chunk {env.chunk}",
        config.collect.record_every,
    )
    for name in ("policy", "simulator"):
        part = getattr(config, name)
        require(part.width % part.heads == 0, f"{name}.heads", "a divisor of width", part.heads)
    require(rl.group >= 2, "posttrain.group", "at least 2 rollouts per context", rl.group)
    require(rl.rounds >= 1, "posttrain.rounds", "at least 1", rl.rounds)
    for name, push in (("collect.push", config.collect.push), ("posttrain.push", rl.push)):
        require(push >= 0, name, "at least 0", push)
    lo, hi = config.evaluate.starts
    require(0 <= lo < hi <= 50, "evaluate.starts", "a range within 0..50", (lo, hi))


def to_dict(config: Any) -> dict:
    """JSON-ready nested dict of a config dataclass."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, tuple | list):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def from_dict(cls: type, values: dict, where: str = "config") -> Any:
    """Build config dataclass `cls` from a nested dict; unknown keys are refused by nearest name."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a table of fields, got {type(values).__name__}")
    hints = get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}
    kwargs = {}
    for key, value in values.items():
        if key not in names:
            hint = nearest(key, names)
            raise UserError(
                f"{where}: unknown key {key!r}" + (f"; did you mean {hint!r}?" if hint else "")
            )
        kind = hints[key]
        if dataclasses.is_dataclass(kind):
            value = from_dict(kind, value, f"{where}.{key}")
        elif isinstance(value, list):
            value = tuple(value)
        elif value is not None and "Path" in str(kind):
            value = Path(value)
        kwargs[key] = value
    return cls(**kwargs)


def load(path: Path) -> Config:
    """Read a config written by a run (`config.json`)."""
    try:
        values = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"no config at {path}; expected a run folder's config.json") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    return from_dict(Config, values)


def fingerprint(*parts: Any) -> str:
    """Short stable hash of configs and strings: decides whether an artifact matches."""
    plain = [to_dict(p) if dataclasses.is_dataclass(p) else p for p in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
