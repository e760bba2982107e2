"""What a run writes down and says of each step: one step late, where a GPU would wait for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megalite.core.errors import RunError
from megalite.train import console, flops
from megalite.train.arrival import OF_PAIRS, Arrival
from megalite.train.build import Engine
from megalite.train.loop import Reduced
from megalite.train.metrics import Metrics, peak_memory_gb


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A step, and what of it is known without waiting."""

    step: int
    samples: int
    """Of the run, with this step's."""
    size: int
    """Tokens, masked or not."""
    lr: float
    began: float
    """On the monotonic clock."""
    peak_mem_gb: float
    loss_scale: float | None
    arrival: Arrival


def due(step: int, interval: int) -> bool:
    """Whether what comes every `interval` steps, or never if 0, comes after this one."""
    return interval > 0 and step % interval == 0


class StepLog:
    """Takes each step in; `tell` writes and says what it has.

    late: a step is told once the next one is under way, which then need not wait for that.
    tokens: of the steps before. peak: a GPU's TFLOP/s, if known. metrics: on rank 0 alone.
    say: prints on rank 0.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        late: bool,
        step: int,
        samples: int,
        tokens: int,
        peak: float | None,
        metrics: Metrics | None,
        say: Callable[[str], None],
    ):
        self._engine, self._late, self._peak = engine, late, peak
        self._metrics, self._say = metrics, say
        of_all = None if peak is None else peak * engine.mesh.world_size
        self._progress = console.Progress(engine.config, step, samples, peak=of_all)
        self._told = tokens
        self._untold: list[Taken] = []
        self._arrived = 0.0
        """When the last one told had ended."""
        self._skipped = 0
        """Steps that changed nothing, since the last line on the screen."""

    @property
    def tokens(self) -> int:
        """Unmasked ones of all steps; on a GPU it waits for those that are not told."""
        return self._told + sum(taken.arrival.tokens for taken in self._untold)

    def add(
        self, found: Reduced, *, step: int, samples: int, size: int, lr: float, began: float
    ) -> bool:
        """Take in a step (see Taken) and tell what may be told; as `tell`."""
        engine = self._engine
        taken = Taken(
            step=step,
            samples=samples,
            size=size,
            lr=lr,
            began=began,
            peak_mem_gb=peak_memory_gb(engine.device),
            loss_scale=None if engine.optimizer.scaler is None else found.loss_scale,
            arrival=Arrival(found, engine.device, prefers=engine.config.data.prefers),
        )
        self._untold.append(taken)
        return self.tell(but=int(self._late))

    def tell(self, *, but: int = 0) -> bool:
        """Write down and say what is untold, but for that many steps; whether a rank was told to
        stop before one of them. Raises RunError for a loss or a norm that is no number.
        """
        asked = False
        while len(self._untold) > but:
            asked |= self._tell(self._untold.pop(0))
        return asked

    def _tell(self, taken: Taken) -> bool:
        step, scale, config = taken.step, taken.loss_scale, self._engine.config
        numbers = taken.arrival.read()
        loss, norm = numbers["loss"], numbers["norm"]
        # Of a loss that is scaled, update has skipped what overflowed.
        skipped = scale is not None and not console.is_number(norm)
        if not console.is_number(loss) or not (console.is_number(norm) or skipped):
            raise RunError(
                f"step {step}: loss {loss}, gradient norm {norm} (lower --lr, or raise "
                "--warmup-steps; earlier checkpoints are intact)"
            )
        self._skipped += skipped
        self._told += taken.arrival.tokens
        seconds = self._seconds(taken)
        mesh = self._engine.mesh
        mesh.log.doing("write metrics")
        if self._metrics is not None:
            rate = taken.size / seconds
            self._metrics.write(
                step,
                tokens=self._told,
                samples=taken.samples,
                loss=loss,
                lr=taken.lr,
                grad_norm=None if skipped else norm,
                step_ms=1000 * seconds,
                tokens_per_s=rate,
                **flops.rates(config.model, rate / mesh.world_size, self._peak),
                peak_mem_gb=taken.peak_mem_gb,
                loss_scale=scale,
                skipped=int(skipped),
                **{name: numbers[name] for name in OF_PAIRS if name in numbers},
            )
        train = config.train
        if due(step, train.log_interval) or step in (1, train.train_steps):
            words = self._progress.line(
                step, samples=taken.samples, loss=loss, norm=norm, lr=taken.lr
            )
            self._say(words + console.scaling(scale, self._skipped))
            self._skipped = 0
        return numbers["stop"] > 0

    def _seconds(self, taken: Taken) -> float:
        """How long a step took: since the one before had ended, if it was launched before that."""
        assert taken.arrival.at is not None
        before, self._arrived = self._arrived, taken.arrival.at
        return self._arrived - max(taken.began, before)
