"""The flight recorder: what was wrong with each skipped step, and when to stop.

A skipped step is run again under observation, so that one that succeeds costs nothing; buffers and
gradients of the trainer stay as they were.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from ignite.engine import Events
from torch import nn

from pipeline import distributed
from pipeline.errors import STOPS, InputError
from pipeline.files import append_line, load, save
from pipeline.precision import StepStats, buffers_kept
from pipeline.training.prefetch import Batch
from pipeline.training.trainer import MixedPrecisionTrainer, StepEvents

log = logging.getLogger(__name__)

Record = dict[str, Any]  # for JSON

# What to try, by the stage of a step at which a tensor was not finite; in the order of time.
ADVICE: dict[str | None, str] = {
    "input": "The network's input is not finite: look at the voxels of these cases and at your "
    "own transforms; mend them or leave the cases out, with another output_dir.",
    "forward": "An activation left the range of {mode}: look at normalization and the range of "
    "the images, or lower learning_rate{other}.",
    "statistics": "A layer's running statistics left the range of float32: look at normalization "
    "and at the range of these cases' images.",
    "loss": "Only the loss is not finite: look at the cases' labels, and lower learning_rate.",
    "backward": "Only gradients left the range of {mode}: lower learning_rate{other}.",
    "not replayed": "The batch could not be run again, see the warning before; lower batch_size.",
    None: "Run again, the step was finite: only the norm of its gradients overflowed (lower "
    "learning_rate), or something outside network and loss spoilt them.",
}


class FlightRecorder:
    """Records every skipped step, and stops training when skipping cannot end well.

    `overflow.jsonl` in `run_dir` gets one line per skipped step, again for a step taken again. For
    the first `overflow_keep` of them `overflow/step_<step>.pt` keeps the weights for
    `--replay_step`. Training stops after `max_consecutive_skips` (at least 1) skipped steps in a
    row, or when the loss scale has fallen below 1, or when the whole run has not applied one.
    """

    def __init__(
        self, run_dir: str | Path, *, max_consecutive_skips: int = 10, overflow_keep: int = 5
    ) -> None:
        self.run_dir, self.overflow_keep = Path(run_dir), overflow_keep
        self.max_consecutive_skips = max_consecutive_skips
        self._recent: deque[Record] = deque(maxlen=max_consecutive_skips)

    def attach(self, trainer: MixedPrecisionTrainer) -> None:
        """Listen to steps of `trainer`."""
        trainer.add_event_handler(Events.STARTED, self._begin)
        trainer.add_event_handler(StepEvents.STEP_COMPLETED, self._after_step)

    def _begin(self, trainer: MixedPrecisionTrainer) -> None:
        """Remove the records of a run that had no checkpoint yet and begins anew."""
        if trainer.progress.step == 0 and distributed.is_main():
            (self.run_dir / "overflow.jsonl").unlink(missing_ok=True)
            shutil.rmtree(self.run_dir / "overflow", ignore_errors=True)

    def _after_step(self, trainer: MixedPrecisionTrainer) -> None:
        stats, progress = trainer.last_step, trainer.progress
        assert stats is not None
        if stats.applied:
            return
        try:
            found = first_non_finite(trainer, trainer.group, stats.loss_scale)
        except Exception as error:  # of any kind: the step is skipped, training may go on
            log.warning("The skipped step could not be run again: %s", error)
            found = _describe(trainer.group, "not replayed")
        of_ranks = distributed.all_gather_object(found)
        if distributed.is_main():
            self._record(trainer, stats, _merge_ranks(of_ranks))
            scale = trainer.scaler.get_scale() if trainer.scaler else 1.0
            skips, steps = progress.consecutive_skips, trainer.steps_per_epoch
            # in vain: the weights are still those of the start
            in_vain = progress.skipped_steps == trainer.state.max_epochs * steps
            if skips >= self.max_consecutive_skips or scale < 1 or in_vain:
                trainer.stop(diagnosis(list(self._recent)[-skips:], scale, skips))
        trainer.agree()

    def _record(self, trainer: MixedPrecisionTrainer, stats: StepStats, found: Record) -> None:
        """Write a line about the step, and its weights if there is room for them."""
        step = trainer.progress.step
        path = self.run_dir / "overflow" / f"step_{step:09d}.pt"
        is_kept = path.exists() or len([*path.parent.glob("step_*.pt")]) < self.overflow_keep
        loss, norm = (x if math.isfinite(x) else str(x) for x in (stats.loss, stats.grad_norm))
        record = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "step": step,
            "epoch": (step - 1) // trainer.steps_per_epoch + 1,
            "precision": trainer.precision.mode,
            "loss_scale": stats.loss_scale,
            "loss": loss,
            "grad_norm": norm,
            **found,
            "kept": str(path.relative_to(self.run_dir)) if is_kept else None,
        }
        if is_kept:
            path.parent.mkdir(exist_ok=True)
            first = trainer.progress.samples - round(stats.sums[0])
            weights = trainer.network.state_dict()
            save({**record, "first_sample": first, "network": weights}, path)
        self._recent.append(record)
        append_line(self.run_dir / "overflow.jsonl", json.dumps(record))
        rank = "" if distributed.size() == 1 or found["rank"] is None else f", rank {found['rank']}"
        log.warning(
            "Step %d skipped: not finite first in %s (%s), cases %s, loss scale %g%s",
            step, found["first_module"], found["stage"],
            ", ".join(found["non_finite_cases"]) or "none", stats.loss_scale, rank,
        )  # fmt: skip


def replay_kept(trainer: MixedPrecisionTrainer, run_dir: Path, step: int) -> Record:
    """Rebuild a kept step's batch from its sample numbers, and look for its fault again.

    The trainer, of the same config, gets the kept weights; `InputError` if there are none. Returns
    what `first_non_finite` says, the precisions of then and now, and whether stage and module are
    the `same_as_recorded`.
    """
    path = run_dir / "overflow" / f"step_{step:09d}.pt"
    if not path.is_file():
        expected = f"expected a skipped step whose weights are in {path.parent}, got {step}"
        raise InputError(f"replay_step: {expected}. Choose one of them.")
    kept, loader = load(path, trainer.state.device), cast(Any, trainer.data_loader)
    trainer.network.load_state_dict(kept["network"])
    loader.sampler.start = kept["first_sample"]
    batches = [batch for _, batch in zip(range(trainer.accumulation_steps), loader, strict=False)]
    scale = kept["loss_scale"] if trainer.scaler else 1.0
    found = first_non_finite(trainer, batches, scale)
    return {
        "step": step,
        "recorded_in": kept["precision"],
        "replayed_in": trainer.precision.mode,
        "loss_scale": scale,
        "same_as_recorded": all(found[key] == kept[key] for key in ("stage", "first_module")),
        **found,
    }


def _describe(
    group: Sequence[Batch], stage: str | None = None, module: str | None = None, cases: Any = ()
) -> Record:
    return {
        "samples": [n for b in group if "number" in b for n in b["number"].tolist()],
        "case_ids": [case for batch in group for case in batch.get("case_id", [])],
        "origins": [origin.tolist() for batch in group for origin in batch.get("origin", [])],
        "stage": stage,
        "first_module": module,
        "non_finite_cases": [*cases],
    }


def _merge_ranks(found: list[Record]) -> Record:
    """Merge the descriptions of all ranks, with stage and module of the `rank` that was first."""
    order = [list(ADVICE).index(one["stage"]) for one in found]
    rank = order.index(min(order))
    of_all = ("samples", "case_ids", "origins", "non_finite_cases")
    whole = {key: [value for one in found for value in one[key]] for key in of_all}
    return {**found[rank], **whole, "rank": rank if found[rank]["stage"] else None}


def diagnosis(records: list[Record], scale: float, skips: int) -> str:
    """Explain why training stops, from records of the latest of `skips` skipped steps in a row."""
    mode, step = records[-1]["precision"], records[-1]["step"]
    found = Counter((r["stage"], r["first_module"]) for r in records)
    cases = Counter(case for r in records for case in r["non_finite_cases"] or r["case_ids"])
    listed = ", ".join(f"{case} ({count}x)" for case, count in cases.most_common(5))
    where = ", ".join(f"{m or 'nowhere'} ({s or 'finite'}, {n}x)" for (s, m), n in found.items())
    low = f" and a loss scale of {scale:g}" if scale < 1 else ""
    weights = "the weights are those of the last applied step"
    other = ", or train with amp_dtype=bfloat16 or amp=false, which reach to 3e38 (float16: 65504)"
    advice = ADVICE[found.most_common(1)[0][0][0]]
    return (
        f"step {step}: expected finite loss and gradients, got {skips} skipped steps "
        f"in a row{low}. {STOPS}; {weights if step > skips else 'no step was applied'}.\n"
        f"  first module not finite: {where}\n"
        f"  cases: {listed}{' and more' if len(cases) > 5 else ''}\n"
        f"  what to try: {advice.format(mode=mode, other=other if mode == 'float16' else '')}\n"
        "  details: overflow.jsonl in the run directory. Changed as advised, the command goes "
        "on from the newest checkpoint, or anew where there is none yet."
    )


def _compute_gradients(
    trainer: MixedPrecisionTrainer,
    batches: Sequence[Batch],
    autocast: Callable[[], contextlib.AbstractContextManager],
    loss_scale: float,
    probe: NonFiniteProbe | None = None,
) -> list[torch.Tensor]:
    """Compute this rank's gradients of a group's mean loss, float32, one per trained parameter.

    The loss is multiplied by `loss_scale` before the backward pass, and they are divided after it.
    """
    network, parts_of_loss = trainer.network, len(batches) * distributed.size()
    parameters = [p for p in network.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    with buffers_kept(network), distributed.local_only(network):
        for batch in batches:
            with probe.watch(batch) if probe else contextlib.nullcontext():
                loss = trainer.forward(batch, autocast())
                if probe:
                    probe.see("loss", "loss_function", loss.detach())
                scaled = loss * (loss_scale / parts_of_loss)
                parts = torch.autograd.grad(scaled, parameters, materialize_grads=True)
            torch._foreach_add_(total, parts)
    torch._foreach_div_(total, loss_scale)
    return total


def first_non_finite(
    trainer: MixedPrecisionTrainer, batches: Sequence[Batch], loss_scale: float
) -> Record:
    """Run a group once more, forward and backward, and find what was not finite first.

    The trainer has the weights and `loss_scale` is that of the step in question.

    Returns:
        For JSON: `samples`, `case_ids` and `origins` of the group; `stage` of `ADVICE`, `None` if
        all was finite; `first_module`, whose output (in `backward`: the gradient of whose output or
        weights; in `statistics`: a buffer of which) was not finite, `image` for the input,
        `loss_function` for the loss; and `non_finite_cases` of that tensor.
    """
    probe = NonFiniteProbe(trainer.network)
    _compute_gradients(trainer, batches, trainer.precision.autocast, loss_scale, probe)
    for stage, name, batch, flags in probe.notes:
        if flags.any():
            cases = zip(batch.get("case_id", []), flags.tolist(), strict=False)
            return _describe(batches, stage, name, [case for case, bad in cases if bad])
    return _describe(batches)


def underflow_fraction(trainer: MixedPrecisionTrainer) -> float:
    """Return the share of this rank's gradient elements that are zero, but not in float32.

    Call it between backward pass and optimizer step. TF32 follows the run's setting.
    """
    scale = trainer.scaler.get_scale() if trainer.scaler else 1.0
    lowered = _compute_gradients(trainer, trainer.group, trainer.precision.autocast, scale)
    exact = _compute_gradients(trainer, trainer.group, contextlib.nullcontext, 1.0)
    lost = sum(((a == 0) & (b != 0)).sum() for a, b in zip(lowered, exact, strict=True))
    return float(lost) / max(sum(gradient.numel() for gradient in exact), 1)


class NonFiniteProbe:
    """Notes stage, module, micro-batch and a flag for each sample of a network's tensors."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self._batch = network, Batch()
        self.notes: list[tuple[str, str, Batch, torch.Tensor]] = []

    @contextlib.contextmanager
    def watch(self, batch: Batch) -> Iterator[None]:
        """Look at everything that the network does with a micro-batch inside."""
        self._batch = batch
        with contextlib.ExitStack() as hooks:
            hooks.enter_context(self.network.register_forward_pre_hook(self._input))
            for name, module in self.network.named_modules():
                look = partial(self._output, name or "network")
                hooks.enter_context(module.register_forward_hook(look))
                for parameter in module.parameters(recurse=False):
                    if parameter.requires_grad:
                        look = partial(self.see, "backward", name or "network")
                        hooks.enter_context(parameter.register_hook(look))
            yield

    def _input(self, network: nn.Module, args: tuple) -> None:
        for image in args:
            self.see("input", "image", image, by_sample=True)

    def _output(self, name: str, module: nn.Module, args: tuple, output: Any) -> None:
        for tensor in output if isinstance(output, list | tuple) else [output]:
            self.see("forward", name, tensor, by_sample=True)
            if getattr(tensor, "requires_grad", False):  # before a ReLU in place takes it over
                tensor.register_hook(partial(self.see, "backward", name, by_sample=True))
        for buffer in module.buffers(recurse=False):
            self.see("statistics", name, buffer)

    def see(self, stage: str, name: str, tensor: Any, *, by_sample: bool = False) -> None:
        """Note which samples of a tensor are not finite; all of them if it has no batch axis."""
        if not isinstance(tensor, torch.Tensor) or tensor.numel() == 0:
            return
        bad, samples = ~tensor.detach().isfinite(), len(self._batch["image"])
        by_sample = by_sample and tensor.dim() > 0 and len(tensor) == samples
        flags = bad.reshape(samples, -1).any(1) if by_sample else bad.any().expand(samples)
        self.notes.append((stage, name, self._batch, flags))
