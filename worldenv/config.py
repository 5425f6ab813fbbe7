"""Configuration: one frozen dataclass per component, validated once, saved with every run.

Help text and range stand beside each field: tyro prints the one, `fields.check` holds every value
to the other, from the command line as from a `config.json`. A part's `rules` say what its fields
require of each other, `Config.rules` what the parts do. Named combinations live in `presets.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from worldenv.fields import Range, check, from_dict, named
from worldenv.gate import GateConfig, without_older
from worldenv.published import PublishedPolicy, PublishedReflector, PublishedSimulator, Rule
from worldenv.ranges import (
    Batch,
    Channels,
    Count,
    Device,
    Episodes,
    Factor,
    FixtureSeeds,
    Fraction,
    FromZero,
    Layers,
    Noise,
    Passes,
    Preset,
    Rate,
    Seed,
    Sharded,
    Shards,
    StartRange,
    Threshold,
    Weight,
    Width,
)
from worldenv.runtime import strict_json
from worldenv.runtime.errors import UserError
from worldenv.sources import CollectConfig, DataConfig, EnvConfig
from worldenv.teachers import DistillConfig

LARGEST_FILE = 1 << 20  # bytes; a config.json has four thousand


@dataclass(frozen=True)
class PolicyConfig(PublishedPolicy):
    """OpenVLA-OFT-shaped policy: vision tokens, proprio, language and action slots."""

    width: Width = 256
    """Transformer width."""
    layers: Layers = 2
    """Transformer layers (bidirectional)."""
    heads: Width = 4
    """Attention heads."""
    encoder_channels: Channels = 24
    """Channels of the first convolution of each camera's encoder (a multiple of 8)."""
    min_log_scale: Annotated[float, Range(-20, 0)] = -4.5
    """Lower clamp of the Laplace log-scale (units: log of normalised action)."""

    def rules(self) -> Iterator[Rule]:
        """What its fields require of each other."""
        yield from super().rules()
        yield self.width % self.heads == 0, "heads", f"a divisor of width {self.width}"


@dataclass(frozen=True)
class SFTConfig:
    """Imitation of the demonstrations."""

    steps: Count = 1000
    """Optimiser steps."""
    batch: Shards = 32
    """Samples per step."""
    lr: Rate = 1e-3
    """Peak learning rate (one-cycle)."""
    head_lr: Rate | None = None
    """Peak learning rate of the heads, where a policy trains these apart; unset: lr."""
    micro_batch: FromZero = 0
    """Samples per forward and backward pass, a divisor of batch; gradients add up. 0: as many as
    there are to a thread, on a GPU the whole batch."""
    shift: Annotated[int, Range(0, 128)] = 1
    """Random image shift in pixels; large shifts cost grasp precision."""
    scale_weight: Weight = 0.05
    """Weight of the Laplace likelihood that trains the scale head on detached means."""

    def rules(self) -> Iterator[Rule]:
        """What its fields require of each other."""
        whole = not self.micro_batch or self.batch % self.micro_batch == 0
        yield whole, "micro_batch", f"0 or a divisor of batch {self.batch}"


@dataclass(frozen=True)
class SimulatorConfig(PublishedSimulator):
    """Causal video denoiser over tokenizer latents, flow matching (paper section 3.3)."""

    patch: Annotated[int, Range(1, 128)] = 16
    """Pixels per token side: for a published tokenizer a multiple of the pixels of a latent. Wan's
    denoisers take two latents a side: 16 with the VAE of 2.1, 32 with that of 2.2."""
    latent_channels: Annotated[int, Range(1, 4096)] = 16
    """Channels of the autoencoder's latents (unused by the patch tokenizer)."""
    width: Annotated[int, Range(2, 16384)] = 256
    """Transformer width."""
    layers: Layers = 4
    """Transformer blocks."""
    heads: Width = 4
    """Attention heads."""
    mlp_ratio: Annotated[float, Range(0.5, 64)] = 3.0
    """Hidden width of the MLP over width."""
    window: Annotated[int, Range(0, 1000)] = 0
    """Past frames attended to through the cache, besides the last one on the channels. On two CPU
    cores a window of 2 makes the default simulator learn 1.7 times slower."""
    history_gradient: bool = False
    """Train what past frames leave in the cache too, not only the use of it. Needs a window."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the transformer computes in when it generates; the small one trains in float32, a Wan in
    this. bfloat16 is for processors that multiply it natively (`worldenv-doctor` says so)."""
    prediction: Literal["sample", "velocity"] = "sample"
    """The network's target: the clean frame, redrawn from the last one, or Wan's velocity."""
    action_map: bool = False
    """Draw the predicted next pose of the hand where the cameras see it, as the paper does, on
    further columns of the tokens (results/action-map says what that brings)."""
    ray_maps: bool = False
    """Beside the action map, how the cameras move: origin and direction of every pixel's ray."""
    luck: int = 0
    """Which of many first weights and orders of batches (an experiment)."""
    steps: Count = 1000
    """Optimiser steps in the first round."""
    refresh_steps: Count = 300
    """Optimiser steps in each later round, from the last weights."""
    batch: Shards = 8
    """Windows per step."""
    frames: Annotated[int, Range(1, 1000)] = 3
    """Target frames per training window."""
    dynamics_batch: Shards = 256
    """Transitions per step that train the prediction of proprio alone."""
    dynamics_beta: Annotated[float, Range(1e-4, 10.0)] = 0.1
    """Errors of that prediction above so many standard deviations count linearly (smooth L1). Less
    is nearer to the median: some motions, as against an obstacle, no proprio foretells."""
    explored: bool = True
    """Train on the policy's own episodes as well, not on demonstrations alone (to learn what they
    are worth)."""
    balance: bool = True
    """Train as if each task had as many failures as successes: a simulator that has seen mostly
    successes imagines one where a grasp is in doubt."""
    lr: Rate = 1.5e-3
    """Peak learning rate."""
    self_history_start: Fraction = 0.4
    """Fraction of training after which predicted frames are used as history."""
    self_history: Fraction = 0.6
    """Probability of a batch with predicted history, from then on."""
    pure_noise: Fraction = 0.3
    """Fraction of targets trained at pure noise, which makes one-step sampling work."""
    tokenizer_steps: Count = 1500
    """Optimiser steps of the autoencoder tokenizer (unused by the patch tokenizer)."""

    def rules(self) -> Iterator[Rule]:
        """What its fields require of each other."""
        yield from super().rules()
        heads = f"a divisor of half the width {self.width}: positions turn pairs of numbers"
        yield self.width % (2 * self.heads) == 0, "heads", heads
        cached = self.kind != "wan" or self.window > 0
        yield cached, "window", "at least 1 for a Wan, which sees the past through its cache alone"
        halved = self.tokenizer != "autoencoder" or self.patch.bit_count() == 1
        yield halved, "patch", "a power of two for the autoencoder, which halves"
        needless = self.history_gradient and not self.window
        yield not needless, "history_gradient", "False without a window: nothing is remembered"
        yield self.action_map or not self.ray_maps, "ray_maps", "false without action_map"


@dataclass(frozen=True)
class ReflectorConfig(PublishedReflector):
    """Reward and termination head (paper section 3.4)."""

    width: Width = 128
    """Hidden width of the head."""
    encoder_channels: Channels = 16
    """Channels of the first convolution of each camera's encoder (a multiple of 8)."""
    steps: Count = 600
    """Optimiser steps in the first round. A third of 700 ended many episodes too early."""
    refresh_steps: Count = 200
    """Optimiser steps in each later round, from the last weights."""
    batch: Shards = 48
    """Frames per step."""
    lr: Rate = 1e-3
    """Peak learning rate."""
    explored: bool = True
    """Train on the policy's own episodes and on replays of them. Without, and with calibrate off:
    a judge of demonstrations alone and of replays of these."""
    threshold: Threshold = 0.7
    """eta: imagined or real, an episode has succeeded above this reward, unless calibrated."""
    calibrate: bool = True
    """Choose two eta in each round: in imagination the policy that explored is to succeed as often
    as it did in reality (else some worlds call nearly everything a success and nothing is learned
    there); of real episodes few are to be stopped too early, few missed."""


@dataclass(frozen=True)
class PosttrainConfig:
    """PPO inside the learned world (paper section 3.5)."""

    world: Literal["learned", "real"] = "learned"
    """Where episodes are rolled out: in the learned world, or in the benchmark itself, by whose
    success they are rewarded (what the learned one is compared with: nothing is explored then and
    no world or judge is trained; evaluation is by the benchmark's word alone)."""
    beside: tuple[str, ...] = ()
    """Folders of runs on the same episodes whose worlds imagine a share of the groups (an
    experiment)."""
    rounds: Annotated[int, Range(1, 1000)] = 1
    """Rounds of (collect, simulator, reflector, post-train). Raising it continues a finished run;
    a later round's world has seen where the policy before it failed."""
    restart: bool = False
    """Whether each round post-trains the imitated policy anew: what was learned wrongly in a world
    too kind is forgotten. Otherwise rounds go on from each other: few iterations each allow it."""
    iterations: Count = 8
    """Iterations in the first round. More were no better: imagined success rises on, real success
    does not (results/stopping)."""
    refresh_iterations: Count = 4
    """Iterations in each later round."""
    contexts: Batch = 16
    """Contexts per draw."""
    draws: Passes = 3
    """Draws of contexts per iteration at most, without a critic: until half as many groups as
    contexts have both successes and failures (dynamic sampling, as in DAPO); others teach nothing.
    """
    group: Annotated[int, Range(2, 10_000)] = 8
    """G, rollouts per context."""
    advantage: Literal["loop", "grpo", "gae", "loop-gae"] = "loop-gae"
    """Leave-one-out (the paper's: one advantage for a whole episode), group-normalised, a learned
    critic with GAE, or leave-one-out at the context and the critic from there on. A critic says
    which of an episode's decisions earned its reward."""
    reward: Literal["binary", "continuous"] = "binary"
    """Reward of an episode: R > eta, or R itself."""
    lr: Rate = 2e-5
    """Learning rate. With noise in every action by itself 1e-4 was seen to collapse within one
    iteration."""
    head_lr: Rate | None = None
    """Learning rate of the heads, where a policy trains these apart; unset: lr."""
    epochs: Passes = 1
    """Passes over the rollouts per iteration."""
    critic_epochs: Passes = 5
    """The critic's passes over them: a head on the policy's features, it takes next to no time."""
    minibatch: Batch = 256
    """Chunks per optimiser step at most; an iteration's are divided evenly."""
    micro_batch: FromZero = 0
    """Chunks per forward and backward pass of the policy at most; gradients add up. 0: as many as
    there are to a thread, on a GPU the whole minibatch."""
    clip_low: Fraction = 0.2
    """Lower clip of the ratio: 1 - clip_low."""
    clip_high: Weight = 0.2
    """Upper clip of the ratio: 1 + clip_high."""
    kl_weight: Weight = 0.0
    """Weight of the KL to the SFT policy."""
    entropy_weight: Weight = 0.0
    """Weight of the entropy bonus (only with tokens or a trainable scale)."""
    push: Noise = 0.053
    """Behaviour: Laplace scale of a push, the same for all actions of a chunk, and the only thing
    that is scored. 0: noise in every action by itself, as in the paper."""
    scale: Factor = 2.0
    """Without a push: multiple of the policy's Laplace scale, whose head is not trained here."""
    temperature: Factor = 1.0
    """Of tokens: what their logits are divided by, where they are drawn and where scored."""
    sampling_steps: Passes = 1
    """Denoising steps per imagined frame in the first round."""
    refresh_sampling_steps: Passes = 1
    """Denoising steps per imagined frame in each later round."""
    middle_contexts: Fraction = 0.8
    """Fraction of contexts taken from real episodes on their way to a grasp: both cameras have seen
    where the object is, which from the first frame alone is imagined near where it usually is."""
    middle_from: FromZero = 3
    """Chunks after which such a context may begin."""
    lost_contexts: Fraction = 0.5
    """Fraction of contexts taken from real episodes that failed: there is most to gain."""
    task_gap: Fraction = 0.25
    """Of several tasks, only those are trained in where the policy that explored succeeds in
    imagination within so much of how often it really did. A rule of one seed, which the next did
    not bear out (results/lab-notes.md). 1: all of them are."""
    false_stops: Fraction = 0.0
    """Of imagined episodes, those in which the reflector wrongly says success, on purpose."""
    max_clip_fraction: Fraction = 0.5
    """Guard: an update beyond this is undone and the learning rate halved."""
    max_mu_change: Rate = 0.1
    """Guard: mean absolute change of mu per iteration (of tokens: of the log-probability of one)
    beyond which the update is undone."""
    real_check_every: FromZero = 0
    """Iterations between checks in the real benchmark on tuning starts (0: never). Each costs as
    many real episodes as a quarter of what the world is learned from."""
    real_check_episodes: Episodes = 60
    """Episodes of such a check per task (starts 0-19, without noise)."""
    keep_best: bool = True
    """With checks, whether a round keeps the policy that did best in them, the one it began with
    included, rather than the last one."""
    snapshot_every: FromZero = 0
    """Iterations between policies left in checkpoints/iterations-N (0: none), to be ranked by
    `worldenv-eval --simulator`."""
    rows: Batch = 32
    """B, imagined environments running side by side."""
    gamma: Fraction = 1.0
    """Discount (with a critic)."""
    gae_lambda: Fraction = 0.9
    """GAE lambda (with a critic)."""

    @property
    def critic(self) -> bool:
        """Whether advantages need a learned critic."""
        return self.advantage in ("gae", "loop-gae")

    def rules(self) -> Iterator[Rule]:
        """What its fields require of each other."""
        learned = self.world == "learned"
        yield learned or self.rounds == 1, "rounds", "1 in the real world: nothing to refresh"
        checked = "0 in the real world, where every iteration is a check"
        yield learned or not self.real_check_every, "real_check_every", checked


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out evaluation in the real benchmark."""

    starts: StartRange = (20, 50)
    """Half-open range of the benchmark's numbered starts; LIBERO's 0-19 are for tuning."""
    fixture_seeds: FixtureSeeds = (1000, 2000, 3000)
    """Seeds of the fixture placement; every start runs once with each."""
    sampled: bool = False
    """Evaluate both policies a second time, acting with the noise of post-training."""

    def rules(self) -> Iterator[Rule]:
        """What its fields require of each other."""
        first, end = self.starts
        yield first < end, "starts", "a range of at least one start, its end not included"


@dataclass(frozen=True)
class Config:
    """The whole run."""

    preset: Preset = "default"
    """Name of the preset this configuration started from."""
    seed: Seed = 0
    """Seed of the whole pipeline."""
    run_dir: Path = Path("runs/default")
    """Folder for checkpoints, metrics, report and results."""
    device: Device = "auto"
    """auto, cpu, cuda or cuda:N."""
    threads: Annotated[int, Range(0, 1024)] = 0
    """Threads to compute with (0: OMP_NUM_THREADS, or one for every usable core). Results do not
    depend on it."""
    shards: Annotated[int, Range(0, 4096)] = 0
    """Shards that every batch is cut into, each with random numbers of its own and computed by one
    rank (0: 4 on a CPU, 1 on a GPU). Results depend on them; there may be as many ranks."""
    fsdp: Sharded = ()
    """Models (policy, simulator, reflector) whose parameters, gradients and moments the ranks share
    out while they train, by FSDP2; others are whole on every rank. `--plan` says which must be."""
    env: EnvConfig = field(default_factory=EnvConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)
    data: DataConfig = field(default_factory=DataConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    simulator: SimulatorConfig = field(default_factory=SimulatorConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    reflector: ReflectorConfig = field(default_factory=ReflectorConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    posttrain: PosttrainConfig = field(default_factory=PosttrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        check(self, named)

    def rules(self) -> Iterator[Rule]:
        """What the parts require of each other."""
        env, collect = self.env, self.collect
        patch = self.simulator.patch
        yield (
            env.image_size % patch == 0,
            "simulator.patch",
            f"a divisor of {env.image_size} pixels",
        )
        divisor = f"a divisor of env.chunk {env.chunk}"
        yield env.chunk % collect.record_every == 0, "collect.record_every", divisor
        tokens = self.policy.distribution == "categorical"
        for name, part in (("collect", collect), ("posttrain", self.posttrain)):
            wish = "0 for a policy whose actions are tokens, which explore by temperature"
            yield not (tokens and part.push), f"{name}.push", wish
        for part, name in _CUT if self.shards else ():
            whole = getattr(getattr(self, part), name) % self.shards == 0
            yield whole, f"{part}.{name}", f"a multiple of shards {self.shards}"
        for holds, expected in self._sharded():
            yield holds, "fsdp", expected
        first = collect.episodes * len(env.tasks)
        rl = self.posttrain
        passes = {rl.sampling_steps, rl.refresh_sampling_steps}
        yield from self.distill.fits(self.simulator.kind, passes)
        yield from self.gate.fits(first, collect.held_out)

    def _sharded(self) -> Iterator[tuple[bool, str]]:
        """Which models can be."""
        sim, fsdp = self.simulator, self.fsdp
        policy = "no policy beside posttrain.kl_weight: its reference shares the weights, whole"
        yield "policy" not in fsdp or not self.posttrain.kl_weight, policy
        judge = "no reflector but a small one: of others little or nothing is trained"
        yield "reflector" not in fsdp or self.reflector.kind == "small", judge
        yield "simulator" not in fsdp or sim.kind != "wovr", "no WoVR: it is not trained"
        wan = "simulator" not in fsdp or sim.kind != "wan"
        precise = "no Wan in bfloat16: a part of each block stays in float32, and FSDP2 takes one "
        precise += "precision (--simulator.precision float32)"
        yield wan or sim.precision == "float32", precise
        yield wan or sim.text != "words", "no Wan that reads words: blocks read them out of turn"

    @property
    def learned(self) -> bool:
        """Whether there is a learned world, and a judge of it."""
        return self.posttrain.world == "learned"

    @property
    def max_chunks(self) -> int:
        """Policy decisions per episode."""
        return -(-self.env.max_steps // self.env.chunk)

    def sampling_steps(self, number: int) -> int:
        """Denoising steps per imagined frame in round `number`."""
        rl = self.posttrain
        return rl.refresh_sampling_steps if number else rl.sampling_steps


_CUT = (
    ("sft", "batch"),
    ("simulator", "batch"),
    ("simulator", "dynamics_batch"),
    ("distill", "batch"),
    ("reflector", "batch"),
    ("posttrain", "rows"),
)
"""Batches that are cut into shards."""


def load(path: Path) -> Config:
    """Read a config written by a run (`config.json`). UserError naming what is wrong with it."""
    try:
        values = strict_json.read(path, LARGEST_FILE)
    except FileNotFoundError:
        raise UserError(f"no config at {path}; expected a run folder's config.json") from None
    try:
        return from_dict(Config, without_older(values))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
