"""Inputs of one directional measurement: the recorded batches that made the step, and the step."""

import contextlib
import functools
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from lightning_curvature.directional.likelihood import OutputModel
from lightning_curvature.distributed.shards import fresh_shards, is_sharded
from lightning_curvature.distributed.together import attempted
from lightning_curvature.monitors.modules import Modules
from lightning_curvature.operators.differentiation import same_attention
from lightning_curvature.operators.micro_batches import Evaluation
from lightning_curvature.optimizers.line import Line
from lightning_curvature.optimizers.oscillation import Oscillation
from lightning_curvature.optimizers.update import ParameterUpdate
from lightning_curvature.replay.check import other_loss
from lightning_curvature.replay.frozen import Spoiled
from lightning_curvature.replay.isolation import parameters_replaced
from lightning_curvature.replay.objective import StepObjective
from lightning_curvature.replay.recording import RecordedBatch

Value = TypeVar("Value")


@dataclass
class Window:
    """The batches that made one optimizer step, with everything needed to evaluate their loss along it.

    Attributes:
        objective: repeats the recorded steps.
        records: the recorded batches; one, or several under gradient accumulation.
        precision: makes the context of a forward.
        segment: manual optimization: which of the optimizer steps of the last batch is measured.
        averaged: whether the loss is the mean over the records (else their sum).
        modules: of the parameters, where values by module are wanted.
        model: how the loss depends on the outputs; None where there are none.
        headed: whether its dependence is that of the head of the loss, which is evaluated by itself.
        base: loss and outputs of each record at θ_t.
        beside: copies at θ_t of the parameters that the loss reaches beside the outputs.
        oscillation: the part of the path that flips at each step, where it is wanted.
        unknown: why there is none.
        failure: where ranks gather parameters for each forward, the first error of an evaluation on this rank: it goes
            on with them, lest the others wait for it, and the results are NaN.
    """

    objective: StepObjective
    update: ParameterUpdate
    records: list[RecordedBatch]
    precision: Callable[[], contextlib.AbstractContextManager[object]]
    segment: int = 0
    averaged: bool = True
    modules: Modules | None = None
    model: OutputModel | None = None
    headed: bool = False
    base: list[Evaluation] = field(default_factory=list)
    beside: list[Tensor] = field(default_factory=list)
    oscillation: Oscillation | None = None
    unknown: str = ""
    failure: Exception | None = None
    _line: Line | None = None
    _repeated: bool = False
    _rehearsed: bool = False
    _checked: Tensor | None = None
    _expected: Tensor | None = None

    @cached_property
    def together(self) -> bool:
        """Whether ranks gather parameters for each forward, and so make the same number of them."""
        return is_sharded(self.update.parameters)

    @property
    def crossed(self) -> bool:
        """Whether evaluations elsewhere cross kinks, as far as is known."""
        sides, kinks = [record.sides for record in self.records], self.objective.kinks
        return None in sides or (kinks.lost and not self._repeated) or (kinks.closed and any(sides))

    def take_base(self, repeat: bool) -> None:
        """Set ``base`` to loss and outputs of the step itself; where ``repeat``, to those of one evaluation at θ_t.

        The first time in a fit the first record is evaluated once more, and must have the same loss.
        """
        if self.base:
            return
        expected, kinks = self._rehearse(repeat and not self.objective.compiled), self.objective.kinks
        kinks.repeated = self._repeated = repeat = repeat or kinks.repeated
        if repeat:
            with self.at(0.0):
                self.base = [self._looked_at(index) for index in range(len(self.records))]
        else:
            for index, record in enumerate(self.records):
                assert record.base is not None
                loss = record.loss(self.objective.module.automatic_optimization, self.segment_of(index))
                self.base.append(replace(record.base, loss=loss))
        self.check()
        self._checked = expected
        if not self.together:
            self.confirm()

    def confirm(self) -> None:
        """Raise unless the step that was evaluated once more had its loss, the first time in a fit.

        Where ranks gather parameters, not before all of them have come so far: one that has no step has other ones.
        """
        expected, self._checked = self._checked, None
        self.objective.confirm(expected, self.base[0].loss)

    def forget(self) -> None:
        """Let the next step be looked at like a first one, where not all ranks have learned from this one."""
        if self.together and self._rehearsed:
            self.objective.rewrites.checked = False
            self.objective.kinks.begin()

    def _rehearse(self, repeated: bool) -> Tensor | None:
        """Evaluate the first record once more, the first time in a fit, and learn of its kinks; return its loss.

        ``repeated``: the records are evaluated anyway, and show their kinks there.
        """
        objective, kinks, record, segment = self.objective, self.objective.kinks, self.records[0], self.segment_of(0)
        if objective.rewrites.checked:
            return None
        self._rehearsed = True
        looking, shown = None if repeated else kinks.looking(), record.sides is not None
        with self.at(0.0), self.precision(), same_attention(objective.module):
            rehearse = functools.partial(objective.rehearse, record, segment, looking if shown else None)
            expected = self.in_step(rehearse, self._lost)
            if looking is not None and not shown and expected is not None:
                # Code that was compiled runs as it was written: another rounding, and maybe other masks of dropout.
                loss = self._evaluate(0, looking).loss
                kinks.closed = other_loss(float(expected), float(loss), record.forward_dtype, ()) is not None
            # Derivatives that the step takes for itself would be those of the other side.
            kinks.closed |= objective.differentiates
        if looking is not None and expected is not None and self.failure is None:
            kinks.learn(record.sides, looking)
            self._expected = expected
            if not self.together or objective.compiled:
                self.find_hidden(self.hidden)
        return expected

    @property
    def hidden(self) -> bool:
        """Whether there are kinked operations, as far as is known, of which it is to be found out what they do."""
        return self._expected is not None and self.objective.kinks.compared(self.records[0].sides) is not None

    def find_hidden(self, hidden: bool, anywhere: Callable[[bool], bool] = bool) -> None:
        """Find out whether kinked operations that the graph leaves out move along the step, and the loss with them.

        Args:
            hidden: whether there are any; where ranks make forwards together, on any of them.
            anywhere: tells whether something is so on any of these ranks.
        """
        objective, kinks, record, segment = self.objective, self.objective.kinks, self.records[0], self.segment_of(0)
        expected, self._expected = self._expected, None
        if expected is None:
            return

        def loss(position: float, mode: contextlib.AbstractContextManager[object] | None) -> Tensor | None:
            with self.at(position), self.precision(), same_attention(objective.module):
                return attempted(lambda: objective.evaluate(record, segment, mode=mode).loss, lambda error: None)

        if hidden:
            compared = kinks.compared(record.sides)
            kinks.lost |= loss(1.0, compared) is None
            moved = set() if compared is None or kinks.lost else compared.moved
            if anywhere(bool(moved)):
                # Such as those of an accuracy that the step logs: what they return may be anything.
                without = loss(0.0, Spoiled(moved))
                kinks.lost |= without is None or not torch.equal(without, expected)
        kinks.leave()
        for one in self.records if kinks.smooth else ():
            one.sides = []

    def _looked_at(self, index: int) -> Evaluation:
        """Evaluate one record at θ_t and note the sides of its kinks."""
        looking, record = self.objective.kinks.looking(), self.records[index]
        with self.precision(), same_attention(self.objective.module):
            result = self._evaluate(index, looking)
        record.sides = self.objective.kinks.read([]) if looking is None else looking.sides
        return result

    def evaluations(self, on_sides: bool = False) -> Iterator[Evaluation]:
        """Yield loss and outputs of each record with the parameters as they are now: one pass.

        ``on_sides``: with each kink on the side on which it is at θ_t.
        """
        kinks = self.objective.kinks
        for index, record in enumerate(self.records):
            mode = kinks.on_sides(record.sides if on_sides and not self.crossed else None)
            with self.precision(), same_attention(self.objective.module):
                result = self._evaluate(index, mode)
            if self.failure is None:
                self.in_step(functools.partial(kinks.settle, mode), lambda: None)
            yield result

    def dual_evaluation(self, index: int, parameters: dict[int, Tensor]) -> Evaluation:
        """Return loss and outputs of one record with dual tensors in place of parameters, by ``id``."""
        with self.precision(), parameters_replaced(self.objective.module, parameters):
            return self._evaluate(index)

    def _evaluate(self, index: int, mode: contextlib.AbstractContextManager[object] | None = None) -> Evaluation:
        record, segment = self.records[index], self.segment_of(index)

        def instead() -> Evaluation:
            base = self.base[index] if index < len(self.base) else None
            return Evaluation(self._lost()) if base is None else replace(base, loss=self._lost())

        return self.in_step(lambda: self.objective.evaluate(record, segment, mode=mode), instead)

    def _lost(self) -> Tensor:
        return torch.full((), torch.nan, device=self.objective.device)

    def in_step(self, evaluate: Callable[[], Value], instead: Callable[[], Value]) -> Value:
        """Return what an evaluation gives; where ranks make them together and it fails, note that and go on."""
        try:
            return evaluate()
        except Exception as error:
            if not self.together:
                raise
            self.failure = self.failure or error.with_traceback(None)
        return instead()

    def check(self) -> None:
        """Raise where an evaluation has failed."""
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    def segment_of(self, index: int) -> int:
        """Return which of the optimizer steps of a record is measured."""
        # In manual optimization every earlier batch of the window ended without a step: segment 0.
        return self.segment if index == len(self.records) - 1 else 0

    @property
    def line(self) -> Line:
        """The line along which evaluations are made: that of the update, unless another is in force."""
        return self._line or self.update

    @contextlib.contextmanager
    def along(self, line: Line) -> Generator[None, None, None]:
        """Evaluate along another line through θ_t inside the block."""
        self._line = line
        try:
            yield
        finally:
            self._line = None

    @contextlib.contextmanager
    def at(self, position: float) -> Generator[None, None, None]:
        """Set the parameters to θ_t − position·d, or on the line in force, without gradients."""
        with self.line.at(position), fresh_shards(self.objective.module), torch.no_grad():
            yield

    def loss_at(self, position: float) -> Tensor:
        """Return this rank's loss at θ_t − position·d. One pass."""
        with self.at(position):
            return self.total(e.loss for e in self.evaluations())

    def total(self, terms: Iterable[Tensor]) -> Tensor:
        """Return the sum of one term a record, weighted as the loss weights the records, in float64."""
        weight = 1.0 / len(self.records) if self.averaged else 1.0
        return torch.stack([t.detach().double() for t in terms]).sum(0) * weight

    def scaled_total(self, terms: Iterable[Tensor]) -> Tensor:
        """Return the same sum of one mean over positions a record, each in units of the record's loss."""
        return self.total(scale * term for scale, term in zip(self._scales, terms, strict=True))

    @cached_property
    def outputs(self) -> list[tuple[Tensor, Tensor | None]]:
        """Outputs of each record at θ_t with the components last, and the weights of their positions if they differ."""
        model = self.model
        assert model is not None
        pairs = zip(self.records, self.base, strict=True)
        masks = [model.weights(record.batch) if b.mask is None else b.mask.reshape(-1) for record, b in pairs]
        return [(model.arrange(b.outputs), mask) for b, mask in zip(self.base, masks, strict=True)]

    @cached_property
    def residuals(self) -> list[Tensor]:
        """∂ℓ/∂z of each position's negative log-likelihood, (P, C), for each record at θ_t."""
        assert self.model is not None
        pairs = zip(self.base, self.records, strict=True)
        return [self.model.residual(base.outputs, record.batch) for base, record in pairs]  # type: ignore[arg-type]

    @cached_property
    def _scales(self) -> list[float]:
        """The loss of each record as a multiple of the mean negative log-likelihood of a position."""
        assert self.model is not None
        pairs = zip(self.base, self.outputs, strict=True)
        return [self.model.scale(base.outputs, mask) for base, (_, mask) in pairs]  # type: ignore[arg-type]
