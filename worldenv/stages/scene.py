"""What a learned world makes of real episodes: `measures` and `probe` put to work on a simulator.

`World` asks it: the episodes again by their real actions, nothing done, branches about events,
policies that act in it. What needs no true places (`frames`, `placings`) serves the fidelity stage
as well as a trial.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from worldenv.config import Config
from worldenv.data.camera import Camera
from worldenv.data.embodiment import Embodiment
from worldenv.data.episode import Episode
from worldenv.data.windows import FrameSequence
from worldenv.envs.imagined import first_frames, imagined_envs
from worldenv.envs.start import Start
from worldenv.models.policy import Policy
from worldenv.models.reflector import Reflector
from worldenv.models.simulator import Simulator
from worldenv.rl.noise import Noise
from worldenv.rl.rollout import rollout_shards
from worldenv.runtime.seeds import derive
from worldenv.stages import measures, thresholds
from worldenv.stages.measures import LEADS, Branch, Moment
from worldenv.stages.probe import Finder, names, truth
from worldenv.stages.reflector import score
from worldenv.stages.replay import replay


class World:
    """A simulator and a judge, asked about `real` episodes seen from their first frames."""

    def __init__(
        self,
        config: Config,
        robot: Embodiment,
        simulator: Simulator,
        reflector: Reflector,
        real: list[FrameSequence],
        number: int,
        imagined: list[FrameSequence] | None = None,
    ) -> None:
        """imagined: the episodes' replays, if they are there."""
        self.config, self.robot, self.number = config, robot, number
        self.simulator, self.reflector, self.real = simulator, reflector, real
        self.passes = config.sampling_steps(number)
        self.imagined = imagined or self.replayed(real, "replay")

    def replayed(
        self, shown: list[FrameSequence], *key: str | int, given: int = 1
    ) -> list[FrameSequence]:
        """Their imagined twins, `given` frames real; key: of the noise."""
        seed = derive(self.config.seed, "trial", self.number, *key)
        return replay(self.simulator, shown, self.passes, seed, given=given)

    def frames(self, still: int | None = None) -> dict:
        """Errors of pictures and of the hand, and the drift; still: of so many episodes only."""
        unmoved = measures.motionless(self.real[:still], self.robot, measures.DRIFT)
        return {
            "psnr": measures.pixel_errors(self.real, self.imagined, self.robot.views),
            "hand_error_cm": measures.hand_errors(self.real, self.imagined, self.robot),
            "drift_psnr": measures.drift(unmoved, self.replayed(unmoved, "drift")),
        }

    def placings(
        self, leads: Sequence[int] = LEADS, near: Callable[[Moment], bool] | None = None
    ) -> dict:
        """By lead: does the judge say of a branch what happened by its end? As imagined, on the
        same frames as they really were ("on_real": the judge's own error), and, of those that are
        `near`, as imagined ("near"). "auc" is what any threshold could do."""
        moments = measures.placings(self.real, score(self.reflector, self.real))
        return {
            str(lead): self._judged(measures.branches(self.real, moments, lead), lead, near)
            for lead in leads
        }

    def _judged(self, found: list[Branch], lead: int, near: Callable | None) -> dict:
        frames = [b.frames for b in found]
        truth = [bool(f.success[-1]) for f in frames]
        eta, real_eta = float(self.reflector.threshold), thresholds.of_reality(self.reflector)

        def highest(shown: list[FrameSequence]) -> list[float]:
            watched = [
                measures.after_first(self.real[b.moment.sequence], s)
                for b, s in zip(found, shown, strict=True)
            ]
            return [float(r[1:].max()) for r in score(self.reflector, watched)]

        def told_by(scores: list[float], above: float) -> dict:
            said = [r > above for r in scores]
            return {**measures.agreement(said, truth), "auc": measures.auc(scores, truth)}

        scores = highest(self.replayed(frames, "placing", lead, given=2))
        said = [r > eta for r in scores]
        told = {**told_by(scores, eta), "on_real": told_by(highest(frames), real_eta)}
        if near is not None:
            chosen = [k for k, b in enumerate(found) if truth[k] or near(b.moment)]
            told["near"] = measures.agreement([said[k] for k in chosen], [truth[k] for k in chosen])
        return told

    def succeeds(
        self, policy: Policy, episodes: Sequence[int], noise: Noise | None = None
    ) -> list[bool]:
        """Whether the policy's imagined episodes succeed, from the first frames of `episodes`."""
        envs = imagined_envs(
            self.simulator.for_generation(),
            self.reflector,
            first_frames(self.real),
            self.config.posttrain.rows,
            max_chunks=self.config.max_chunks,
            sampling_steps=self.passes,
        )
        key = (self.config.seed, "trial", self.number)
        done = rollout_shards(
            envs,
            policy.eval(),
            [Start(0, k, derive(*key, "world", k)) for k in episodes],
            seeds=[derive(*key, "imagined noise", k) for k in episodes],
            noise=noise,
            images=False,
        )
        return done.terminated.tolist()


class Things:
    """The things of one task's goal, in `episodes` whose true places are known: `numbers` are their
    places in world.real. camera: one that does not move, the `view`-th of the images."""

    def __init__(
        self, world: World, episodes: list[Episode], numbers: list[int], view: int, camera: Camera
    ) -> None:
        self.world, self.names = world, names(episodes[0])
        self.number = {k: i for i, k in enumerate(numbers)}
        self.real = [world.real[k] for k in numbers]
        self.imagined = [world.imagined[k] for k in numbers]
        size = world.robot.image_size
        self.true = [
            truth(e, s.steps.tolist(), camera, size)
            for e, s in zip(episodes, self.real, strict=True)
        ]
        self.seed = derive(world.config.seed, "trial", world.number, episodes[0].task)
        self.finder = Finder(episodes, view, camera, self.seed)

    def carried(self, moment: Moment) -> bool:
        """Whether the first thing had left its place by a moment's end."""
        return self.true[self.number[moment.sequence]].gone(0, moment.end) > measures.CARRIED

    def errors(self) -> dict:
        """By thing, as imagined and on the real frames; and how well what is painted over is missed
        ("painted_over")."""
        found = {
            kind: [self._find(i, s.images, slice(None)) for i, s in enumerate(shown)]
            for kind, shown in (("imagined", self.imagined), ("on_real", self.real))
        }
        said = {
            name: {
                kind: measures.thing_errors(self.true, places, k) for kind, places in found.items()
            }
            for k, name in enumerate(self.names)
        }
        return {**said, "painted_over": measures.rate(self.finder.hidden(self.seed))}

    def _find(self, episode: int, images: Tensor, rows: slice) -> measures.Places:
        true = self.true[episode]
        part = measures.Places(true.pixels[rows], true.scale[rows], true.seen[rows])
        return self.finder.find(episode, images, part)

    def grasps(self) -> dict[str, tuple[list, list, list]]:
        """By lead: what imagined branches about the last grasp show, what the probe sees in the
        same frames as they really were, and what happened."""
        moments = measures.grasps(self.real, self.world.robot)
        told = {}
        for lead in LEADS:
            found = measures.branches(self.real, moments, lead)
            frames = [b.frames for b in found]
            shown = self.world.replayed(frames, "grasp", lead, given=2)
            rows: tuple[list, list, list] = ([], [], [])
            for b, i in zip(found, shown, strict=True):
                k, cut = b.moment.sequence, slice(b.begin - 1, b.moment.end + 1)
                said, happened = measures.held(self.true[k], self._find(k, i.images, cut), b)
                seen, _ = measures.held(self.true[k], self._find(k, b.frames.images, cut), b)
                for row, value in zip(rows, (said, seen, happened), strict=True):
                    row.append(value)
            told[str(lead)] = rows
        return told


def fixed_camera(robot: Embodiment) -> int | None:
    """The place among the views of a camera that does not move."""
    return next((i for i, c in enumerate(robot.cameras) if c.mount == "world"), None)
