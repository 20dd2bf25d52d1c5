"""The flight recorder: what was wrong with each skipped step, and when to stop.

`overflow.jsonl` in the run directory gets one line per skipped step, again for a step taken again.
For the first few of them `overflow/step_<step>.pt` keeps the weights for `--replay_step`. A step
that failed is run again under observation, so that one that succeeds costs nothing; buffers and
gradients of the trainer stay as they were.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from torch import nn

from pipeline import distributed
from pipeline.errors import STOPS, InputError
from pipeline.files import append_line, load, save
from pipeline.precision import StepStats
from pipeline.training.progress import EPOCH_END_PENDING
from pipeline.training.snapshot import buffers_kept
from pipeline.training.trainer import MixedPrecisionTrainer, StepEvents

log = logging.getLogger(__name__)

Batch = dict[str, Any]


# What to try, by the stage of a step at which a tensor was not finite; in the order of time.
ADVICE: dict[str | None, str] = {
    "weights": "The weights themselves are not finite: an earlier step with finite gradients "
    "was too long. Lower learning_rate.",
    "input": "The network's input is not finite: look at the voxels of these cases and at your "
    "own transforms; mend them or leave the cases out, with another output_dir.",
    "forward": "An activation left the range of {mode}: in an early module look at "
    "normalization and the range of the images, in a later one lower learning_rate{other}.",
    "statistics": "A layer's running statistics left the range of float32, though its output "
    "did not: look at normalization and at the range of these cases' images.",
    "loss": "Only the loss is not finite: look at the cases' labels, and lower learning_rate.",
    "backward": "Only gradients left the range of {mode}: lower learning_rate{other}.",
    "not replayed": "The batch could not be run again, see the warning before. For lack of "
    "memory: lower batch_size.",
    None: "Run again, the step was finite: only the norm of its gradients overflowed (lower "
    "learning_rate), or something outside network and loss spoilt them.",
}


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
        self.run_dir, self.overflow_keep = Path(run_dir), overflow_keep
        self.max_consecutive_skips = max_consecutive_skips
        self._recent: deque[dict[str, Any]] = deque(maxlen=max_consecutive_skips)

    def attach(self, trainer: MixedPrecisionTrainer) -> None:
        """Listen to steps of `trainer`."""
        trainer.add_event_handler(Events.STARTED, self.set_aside)
        trainer.add_event_handler(StepEvents.STEP_COMPLETED, self.after_step)
        trainer.add_event_handler(Events.EXCEPTION_RAISED, self.name_step)

    def set_aside(self, trainer: MixedPrecisionTrainer) -> None:
        """Rename the records of a run that had no checkpoint yet and begins anew."""
        for name in ("overflow.jsonl", "overflow") if distributed.is_main() else ():
            path, former = self.run_dir / name, self.run_dir / f"{name}.former"
            if trainer.progress.step == 0 and path.exists():
                shutil.rmtree(former, ignore_errors=True)
                path.replace(former)

    def name_step(self, trainer: MixedPrecisionTrainer, error: Exception) -> None:
        """Add to an exception that ends training where it was raised."""
        step = trainer.progress.step
        cases = [case for batch in trainer.group for case in batch.get("case_id", [])]
        note = f"step {step + 1}, cases {', '.join(cases) or 'unknown'}"
        if trainer.progress.phase == EPOCH_END_PENDING:
            note = f"validation after step {step}"
        if not hasattr(error, "__notes__"):  # ignite fires the event at each of its levels
            error.add_note(note)
        raise error

    def after_step(self, trainer: MixedPrecisionTrainer) -> None:
        """Record the step if it was skipped, and stop if it was one too many."""
        stats = trainer.last_step
        assert stats is not None
        if stats.applied:
            return
        try:
            found = first_non_finite(trainer, trainer.group, stats.loss_scale)
        except Exception as error:  # of any kind: the step is skipped, training may go on
            log.warning("The skipped step could not be run again: %s", error)
            found = describe(trainer.group, "not replayed")
        of_ranks = distributed.all_gather_object(found)
        if distributed.is_main():
            self._record(trainer, stats, merge_ranks(of_ranks))
            self._stop_if_hopeless(trainer)
        trainer.agree()

    def _record(
        self, trainer: MixedPrecisionTrainer, stats: StepStats, found: dict[str, Any]
    ) -> None:
        """Write a line about the step, and its weights if there is room for them."""
        loss, norm = (x if math.isfinite(x) else str(x) for x in (stats.loss, stats.grad_norm))
        record = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "step": trainer.progress.step,
            "epoch": (trainer.progress.step - 1) // trainer.steps_per_epoch + 1,
            "precision": trainer.precision.mode,
            "loss_scale": stats.loss_scale,
            "loss": loss,
            "grad_norm": norm,
            **found,
            "kept": self._keep(trainer, stats, found),
        }
        self._recent.append(record)
        append_line(self.run_dir / "overflow.jsonl", json.dumps(record))
        log.warning(
            "Step %d skipped: not finite first in %s (%s), cases %s, loss scale %g%s",
            record["step"], record["first_module"], record["stage"],
            ", ".join(record["non_finite_cases"]) or "none", record["loss_scale"],
            "" if distributed.size() == 1 or record["rank"] is None else f", rank {record['rank']}",
        )  # fmt: skip

    def _keep(
        self, trainer: MixedPrecisionTrainer, stats: StepStats, found: dict[str, Any]
    ) -> str | None:
        path = self.run_dir / "overflow" / f"step_{trainer.progress.step:09d}.pt"
        if len(list(path.parent.glob("step_*.pt"))) >= self.overflow_keep and not path.exists():
            return None
        path.parent.mkdir(exist_ok=True)
        content = {
            "first_sample": trainer.progress.samples - round(stats.sums[0]),
            "loss_scale": stats.loss_scale,
            "precision": trainer.precision.mode,
            "network": trainer.network.state_dict(),
            "found": [found["stage"], found["first_module"]],
        }
        save(content, path)
        return str(path.relative_to(self.run_dir))

    def _stop_if_hopeless(self, trainer: MixedPrecisionTrainer) -> None:
        progress = trainer.progress
        scale = trainer.scaler.get_scale() if trainer.scaler else 1.0
        length = trainer.state.max_epochs * trainer.steps_per_epoch
        in_vain = progress.skipped_steps == length  # the weights are still those of the start
        if progress.consecutive_skips >= self.max_consecutive_skips or scale < 1 or in_vain:
            records = list(self._recent)[-progress.consecutive_skips :]
            trainer.stop(diagnosis(records, scale, progress.consecutive_skips))


def replay_kept(trainer: MixedPrecisionTrainer, run_dir: Path, step: int) -> dict[str, Any]:
    """Rebuild a kept step's batch from its sample numbers, and look for its fault again.

    The trainer, of the same config, gets the kept weights.

    Returns:
        What `describe` says, the precisions of then and now, and whether stage and module are the
        `same_as_recorded`.

    Raises:
        InputError: If the step's weights were not kept, or are another network's.
    """
    path = run_dir / "overflow" / f"step_{step:09d}.pt"
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
    found = first_non_finite(trainer, batches, scale)
    return {
        "step": step,
        "recorded_in": kept["precision"],
        "replayed_in": trainer.precision.mode,
        "loss_scale": scale,
        "same_as_recorded": [found["stage"], found["first_module"]] == kept["found"],
        **found,
    }


def describe(
    group: Iterable[Batch],
    stage: str | None = None,
    module: str | None = None,
    cases: Iterable[str] = (),
    largest: Mapping[str, float | None] | None = None,
) -> dict[str, Any]:
    """Return a group of micro-batches, and where its numbers stopped being finite, for JSON.

    Args:
        stage: Of `ADVICE`; `None` if everything was finite.
        module: Name of the first module whose output (in `backward`: the gradient of whose output
            or weights; in `weights` and `statistics`: a weight or buffer of which) was not finite;
            `image` for the input, `loss_function` for the loss.
        cases: Those of the micro-batch whose part of that tensor was not finite.
        largest: Name of each module without children to its output's largest finite |activation|,
            `None` where there was none.
    """
    return {
        "samples": [n for b in group if "number" in b for n in b["number"].tolist()],
        "case_ids": [case for batch in group for case in batch.get("case_id", [])],
        "origins": [origin.tolist() for batch in group for origin in batch.get("origin", [])],
        "stage": stage,
        "first_module": module,
        "non_finite_cases": [*cases],
        "max_abs_activation": largest or {},
    }


def merge_ranks(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge what `describe` returns on each rank into one description of the step.

    Stage, module and activations are of the `rank` whose stage is the earliest; without one `rank`
    is `None`.
    """
    order = [list(ADVICE).index(one["stage"]) for one in found]
    rank = order.index(min(order))
    of_all = ("samples", "case_ids", "origins", "non_finite_cases")
    whole = {key: [value for one in found for value in one[key]] for key in of_all}
    return {**found[rank], **whole, "rank": rank if found[rank]["stage"] else None}


def diagnosis(records: list[dict[str, Any]], scale: float, skips: int) -> str:
    """Explain why training stops: which cases, which module first, what to try.

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
    other = ", or train with amp_dtype=bfloat16 or amp=false, which reach to 3e38 (float16: 65504)"
    advice = ADVICE[stage].format(mode=mode, other=other if mode == "float16" else "")
    if stage == "backward" and mode == "float16" and scale > 1 and not applied:
        advice = "The loss scale is still too high for this loss: begin with "
        advice += f"--precision#init_scale {scale:g}."
    return (
        f"step {last['step']}: expected finite loss and gradients, got {skips} skipped steps "
        f"in a row{low}. {STOPS}; {weights}.\n"
        f"  first module not finite: {where}\n"
        f"  cases: {listed}{' and more' if len(cases) > 5 else ''}\n"
        f"  what to try: {advice}\n"
        "  details: overflow.jsonl in the run directory. Changed as advised, the command goes "
        "on from the newest checkpoint, or anew where there is none yet."
    )


def gradients(
    trainer: MixedPrecisionTrainer,
    batches: Sequence[Batch],
    autocast: Callable[[], contextlib.AbstractContextManager],
    loss_scale: float = 1.0,
    probe: NonFiniteProbe | None = None,
) -> list[torch.Tensor]:
    """Compute gradients of an accumulation group's mean loss; those in the parameters stay.

    Each of several ranks computes those of its own share of the group's loss.

    Args:
        autocast: Makes the context of a forward pass.
        loss_scale: Factor on the loss before the backward pass, divided out afterwards.
        probe: Notes what is not finite on the way.

    Returns:
        One float32 tensor per trained parameter of the network, zero where it takes no part.
    """
    network, parts_of_loss = trainer.network, len(batches) * distributed.size()
    parameters = [p for p in network.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    with buffers_kept(network), distributed.local_only(network), probe or contextlib.nullcontext():
        for batch in batches:
            if probe:
                probe.batch = batch
            loss = trainer.forward(batch, autocast(), {})
            if probe:
                probe.see("loss", "loss_function", loss.detach())
            scaled = loss * (loss_scale / parts_of_loss)
            parts = torch.autograd.grad(scaled, parameters, allow_unused=True)
            for whole, part in zip(total, parts, strict=True):
                if part is not None:
                    whole += part
    torch._foreach_div_(total, loss_scale)
    return total


def first_non_finite(
    trainer: MixedPrecisionTrainer, batches: Sequence[Batch], loss_scale: float
) -> dict[str, Any]:
    """Run a group once more, forward and backward, and `describe` what was not finite first.

    The trainer has the weights and `loss_scale` is that of the step in question.
    """
    probe = NonFiniteProbe(trainer.network)
    gradients(trainer, batches, trainer.precision.autocast, loss_scale, probe)
    return describe(batches, *probe.finding())


def underflow_fraction(trainer: MixedPrecisionTrainer) -> float:
    """Return the share of this rank's gradient elements that are zero, but not in float32.

    Call it between backward pass and optimizer step. TF32 follows the run's setting.
    """
    scale = trainer.scaler.get_scale() if trainer.scaler else 1.0
    lowered = gradients(trainer, trainer.group, trainer.precision.autocast, scale)
    exact = gradients(trainer, trainer.group, contextlib.nullcontext)
    pairs = zip(lowered, exact, strict=True)
    lost = sum(((gradient == 0) & (reference != 0)).sum() for gradient, reference in pairs)
    return float(lost) / max(sum(reference.numel() for reference in exact), 1)


class NonFiniteProbe:
    """Hooks on a network that note, in order of time, which tensors are not finite.

    The notes stay on the device until `finding` is called.

    Args:
        network: Is observed inside a `with` block; its own name is `network`.

    Attributes:
        batch: The micro-batch that is being run.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.batch: Batch = {}
        self._notes: list[tuple[str, str, Batch, torch.Tensor]] = []
        self._largest: dict[str, torch.Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> NonFiniteProbe:
        self._handles.append(self.network.register_forward_pre_hook(self._input))
        for name, module in self.network.named_modules():
            look = partial(self._output, name or "network")
            self._handles.append(module.register_forward_hook(look))
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad:
                    look = partial(self.see, "backward", name or "network")
                    self._handles.append(parameter.register_hook(look))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _input(self, network: nn.Module, args: tuple) -> None:
        for name, module in network.named_modules():
            for parameter in module.parameters(recurse=False):
                self.see("weights", name or "network", parameter.detach())
        for image in _floating(args):
            self.see("input", "image", image, by_sample=True)

    def _output(self, name: str, module: nn.Module, args: tuple, output: Any) -> None:
        for tensor in _floating(output if isinstance(output, list | tuple) else [output]):
            activation = tensor.detach()
            self.see("forward", name, activation, by_sample=True)
            if next(module.children(), None) is None:  # others repeat their last child
                largest = activation.abs().where(activation.isfinite(), -1).amax().float()
                self._largest[name] = torch.maximum(self._largest.get(name, largest), largest)
            if tensor.requires_grad:  # before a ReLU in place, whose own tensor it then is
                tensor.register_hook(partial(self.see, "backward", name, by_sample=True))
        for buffer in _floating(module.buffers(recurse=False)):
            self.see("statistics", name, buffer)

    def see(self, stage: str, name: str, tensor: torch.Tensor, *, by_sample: bool = False) -> None:
        """Note which samples of `tensor` are not finite; all of them if it has no batch axis."""
        bad, samples = ~tensor.isfinite(), len(self.batch["image"])
        by_sample = by_sample and tensor.dim() > 0 and len(tensor) == samples
        flags = bad.reshape(samples, -1).any(1) if by_sample else bad.any().expand(samples)
        self._notes.append((stage, name, self.batch, flags))

    def finding(self) -> tuple[str | None, str | None, list[str], dict[str, float | None]]:
        """The first note of something not finite, as arguments of `describe`."""
        values = {name: value.item() for name, value in self._largest.items()}
        largest = {name: value if value >= 0 else None for name, value in values.items()}
        for stage, name, batch, flags in self._notes:
            if flags.any():
                cases = zip(batch.get("case_id", []), flags.tolist(), strict=False)
                return stage, name, [case for case, bad in cases if bad], largest
        return None, None, [], largest


def _floating(values: Iterable[Any]) -> list[torch.Tensor]:
    """The floating-point tensors among `values` that have an element."""
    return [
        value
        for value in values
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel()
    ]
