"""The flight recorder: what was wrong with each skipped step, and when to stop.

`overflow.jsonl` in the run directory gets one line per skipped step; it is only ever appended to,
so a step that is taken again after a resume stands there again. For the first few of them
`overflow/step_<step>.pt` keeps the weights, so that the step can be replayed later.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections import Counter, deque
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ignite.engine import Events

from pipeline import distributed
from pipeline.errors import STOPS, InputError
from pipeline.files import load, save
from pipeline.precision import StepStats
from pipeline.training.replay import Finding, Stage, first_non_finite
from pipeline.training.trainer import MixedPrecisionTrainer, StepEvents

log = logging.getLogger(__name__)

ADVICE: dict[str | None, str] = {
    Stage.WEIGHTS: (
        "The weights themselves are not finite: an earlier step with finite gradients was too "
        "long. Lower learning_rate."
    ),
    Stage.INPUT: (
        "The network's input is not finite: look at the voxels of these cases and at your own "
        "transforms; mend them or leave the cases out, with another output_dir."
    ),
    Stage.FORWARD: (
        "An activation left the range of {mode}: in an early module look at normalization and the "
        "range of the images, in a later one lower learning_rate{other}."
    ),
    Stage.STATISTICS: (
        "A layer's running statistics left the range of float32, though its output did not: look "
        "at normalization and at the range of these cases' images."
    ),
    Stage.LOSS: "Only the loss is not finite: look at the cases' labels, and lower learning_rate.",
    Stage.BACKWARD: "Only gradients left the range of {mode}: lower learning_rate{other}.",
    Stage.NOT_REPLAYED: (
        "The batch could not be run again, see the warning before. For lack of memory: lower "
        "batch_size."
    ),
    None: (
        "Run again, the step was finite: only the norm of its gradients overflowed (lower "
        "learning_rate), or something outside network and loss spoilt them."
    ),
}
OTHER = ", or train with amp_dtype=bfloat16 or amp=false, which reach to 3e38 (float16: 65504)"


class FlightRecorder:
    """Records every skipped step, and stops training when skipping cannot end well.

    Training stops after `max_consecutive_skips` skipped steps in a row, or when the loss scale has
    fallen below 1, or when the whole run has not applied one.

    Args:
        run_dir: Gets `overflow.jsonl` and `overflow/`.
        max_consecutive_skips: At least 1.
        overflow_keep: Skipped steps whose weights are kept; 0 keeps none.
    """

    def __init__(
        self, run_dir: str | Path, *, max_consecutive_skips: int = 10, overflow_keep: int = 5
    ) -> None:
        self.run_dir = Path(run_dir)
        self.max_consecutive_skips = max_consecutive_skips
        self.overflow_keep = overflow_keep
        self._recent: deque[dict[str, Any]] = deque(maxlen=max_consecutive_skips)

    def attach(self, trainer: MixedPrecisionTrainer) -> None:
        """Listen to steps of `trainer`."""
        trainer.add_event_handler(Events.STARTED, self.set_aside)
        trainer.add_event_handler(StepEvents.STEP_COMPLETED, self.after_step)

    def set_aside(self, trainer: MixedPrecisionTrainer) -> None:
        """What a run left that had no checkpoint yet is not this run's."""
        for name in ("overflow.jsonl", "overflow") if distributed.is_main() else ():
            path, former = self.run_dir / name, self.run_dir / f"{name}.former"
            if trainer.progress.step == 0 and path.exists():
                if former.is_dir():
                    shutil.rmtree(former)
                path.replace(former)

    def after_step(self, trainer: MixedPrecisionTrainer) -> None:
        """Record the step if it was skipped, and stop if it was one too many."""
        stats = trainer.last_step
        assert stats is not None
        if stats.applied:
            return
        finding = self._find(trainer, stats.loss_scale)
        found = distributed.all_gather_object(describe(finding, trainer.group))
        if distributed.is_main():
            self._record(trainer, stats, found)
        trainer.agree()

    def _record(
        self, trainer: MixedPrecisionTrainer, stats: StepStats, found: list[dict[str, Any]]
    ) -> None:
        """Write down the step, tell of it, and stop training if it was one too many."""
        progress = trainer.progress
        record = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "step": progress.step,
            "epoch": (progress.step - 1) // trainer.steps_per_epoch + 1,
            "precision": trainer.precision.mode,
            "loss_scale": stats.loss_scale,
            "loss": _number(stats.loss),
            "grad_norm": _number(stats.grad_norm),
            **of_all_ranks(found),
        }
        if record["stage"] is None:
            record |= _gradients_tell(trainer)
        record["kept"] = self._keep(trainer, record)
        with open(self.run_dir / "overflow.jsonl", "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                torn = file.read() != b"\n"  # by a crash in the middle of a line
                file.write(b"\n" * torn)
            file.write(json.dumps(record).encode() + b"\n")
        log.warning(
            "Step %d skipped: not finite first in %s (%s), cases %s, loss scale %g%s",
            record["step"], record["first_module"], record["stage"],
            ", ".join(record["non_finite_cases"]) or "none", record["loss_scale"],
            "" if distributed.size() == 1 or record["rank"] is None else f", rank {record['rank']}",
        )  # fmt: skip
        self._recent.append(record)
        scale = trainer.scaler.get_scale() if trainer.scaler else 1.0
        length = trainer.state.max_epochs * trainer.steps_per_epoch
        in_vain = progress.skipped_steps == length  # the weights are still those of the start
        if progress.consecutive_skips >= self.max_consecutive_skips or scale < 1 or in_vain:
            records = list(self._recent)[-progress.consecutive_skips :]
            trainer.stop(diagnosis(records, scale, progress.consecutive_skips))

    def _find(self, trainer: MixedPrecisionTrainer, loss_scale: float) -> Finding:
        try:
            return first_non_finite(trainer, trainer.group, loss_scale)
        except Exception as error:  # of any kind: the step is skipped, training may go on
            log.warning("The skipped step could not be run again: %s", error)
            return Finding(Stage.NOT_REPLAYED)

    def _keep(self, trainer: MixedPrecisionTrainer, record: dict[str, Any]) -> str | None:
        path = kept_path(self.run_dir, trainer.progress.step)
        if len(list(path.parent.glob("step_*.pt"))) >= self.overflow_keep and not path.exists():
            return None
        path.parent.mkdir(exist_ok=True)
        assert trainer.last_step is not None
        content = {
            "first_sample": trainer.progress.samples - round(trainer.last_step.sums[0]),
            "loss_scale": trainer.last_step.loss_scale,
            "precision": trainer.precision.mode,
            "network": trainer.network.state_dict(),
            "found": [record["stage"] and str(record["stage"].value), record["first_module"]],
        }
        save(content, path)
        return str(path.relative_to(self.run_dir))


def kept_path(run_dir: Path, step: int) -> Path:
    """Where the weights of a skipped step are kept."""
    return run_dir / "overflow" / f"step_{step:09d}.pt"


def replay_kept(trainer: MixedPrecisionTrainer, run_dir: Path, step: int) -> dict[str, Any]:
    """Rebuild a kept step's batch from its sample numbers, and look for its fault again.

    Args:
        trainer: Of the same config; gets the kept weights.
        run_dir: Of the run that skipped the step.
        step: A skipped step whose weights were kept.

    Returns:
        `step`, the precisions of then and now, `loss_scale`, what `describe` says, and whether
        stage and module are the `same_as_recorded`.

    Raises:
        InputError: If the step's weights were not kept, or are another network's.
    """
    path = kept_path(run_dir, step)
    if not path.is_file():
        steps = [int(p.stem.removeprefix("step_")) for p in sorted(path.parent.glob("step_*.pt"))]
        raise InputError(
            f"replay_step: expected a skipped step whose weights were kept "
            f"({', '.join(map(str, steps)) or 'there is none'}), got {step}."
        )
    try:
        kept = load(path, trainer.state.device)
        trainer.network.load_state_dict(kept["network"])
    except Exception as error:  # torch and pickle raise many kinds
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path}: expected the weights of this network, got: {reason[:200]}. Use the run's "
            "config, and the file that the run wrote."
        ) from None
    loader: Any = trainer.data_loader
    loader.sampler.start = kept["first_sample"]
    batches = [batch for _, batch in zip(range(trainer.accumulation_steps), loader, strict=False)]
    scale = kept["loss_scale"] if trainer.scaler else 1.0
    finding = first_non_finite(trainer, batches, scale)
    return {
        "step": step,
        "recorded_in": kept["precision"],
        "replayed_in": trainer.precision.mode,
        "loss_scale": scale,
        "same_as_recorded": [finding.stage, finding.module] == kept["found"],
        **describe(finding, batches),
    }


def describe(finding: Finding, group: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """A finding and the batch it was made in, as plain values."""
    return {
        "samples": [n for b in group if "number" in b for n in b["number"].tolist()],
        "case_ids": [case for batch in group for case in batch.get("case_id", [])],
        "origins": [origin.tolist() for batch in group for origin in batch.get("origin", [])],
        "stage": finding.stage,
        "first_module": finding.module,
        "non_finite_cases": finding.case_ids,
        "max_abs_activation": finding.max_abs_activation,
    }


def of_all_ranks(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What `describe` says on each rank as one description of the step.

    Stage, module and activations are of the `rank` whose finding is the earliest in a step; where
    nothing was found that is `None`.
    """
    stages = list(Stage)
    order = [stages.index(one["stage"]) if one["stage"] else len(stages) for one in found]
    rank = order.index(min(order))
    of_all = ("samples", "case_ids", "origins", "non_finite_cases")
    whole = {key: [value for one in found for value in one[key]] for key in of_all}
    return {**found[rank], **whole, "rank": rank if found[rank]["stage"] else None}


def _gradients_tell(trainer: MixedPrecisionTrainer) -> dict[str, Any]:
    """Stage and module by the step's own gradients, where running it again found nothing.

    A kernel does not repeat itself then, or a handler was at work.
    """
    bad = [
        name
        for name, p in trainer.network.named_parameters()
        if p.grad is not None and not p.grad.isfinite().all()
    ]
    if not bad:
        return {}
    return {"stage": Stage.BACKWARD, "first_module": bad[-1].rpartition(".")[0]}


def diagnosis(records: list[dict[str, Any]], scale: float, skips: int) -> str:
    """Why training stops: which cases, which module first, what to try.

    Args:
        records: Of the latest skipped steps, at least one.
        scale: The loss scale now; 1 without a scaler.
        skips: Skipped steps in a row.
    """
    last = records[-1]
    mode, applied = last["precision"], last["step"] > skips
    found = Counter((r["stage"], r["first_module"]) for r in records)
    stage = found.most_common(1)[0][0][0]
    cases = Counter(case for r in records for case in r["non_finite_cases"] or r["case_ids"])
    listed = ", ".join(f"{case} ({count}x)" for case, count in cases.most_common(5))
    where = ", ".join(f"{m or 'nowhere'} ({s or 'finite'}, {n}x)" for (s, m), n in found.items())
    low = f" and a loss scale of {scale:g}" if scale < 1 else ""
    weights = "the weights are those of the last applied step" if applied else "no step was applied"
    advice = ADVICE[stage].format(mode=mode, other=OTHER if mode == "float16" else "")
    if stage == Stage.BACKWARD and mode == "float16" and scale > 1 and not applied:
        advice = (
            "The loss scale is still too high for this loss: begin with --precision#init_scale "
            f"{scale:g}."
        )
    return "\n".join(
        [
            f"step {last['step']}: expected finite loss and gradients, got {skips} skipped steps "
            f"in a row{low}. {STOPS}; {weights}.",
            f"  first module not finite: {where}",
            f"  cases: {listed}{' and more' if len(cases) > 5 else ''}",
            f"  what to try: {advice}",
            "  details: overflow.jsonl in the run directory. Changed as advised, the command goes "
            "on from the newest checkpoint, or anew where there is none yet.",
        ]
    )


def _number(value: float) -> float | str:
    """JSON has no NaN and no infinity: they become words."""
    return value if math.isfinite(value) else str(value)
