"""A plan as text for people and as JSON for programs."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from torchtune_kd.plan.memory import CONTEXT_BYTES, GIB, USABLE, Memory, fits
from torchtune_kd.plan.planner import RunPlan
from torchtune_kd.plan.timing import (
    ACHIEVED_BANDWIDTH,
    ACHIEVED_FLOPS,
    ACHIEVED_LINK,
    DEVICES_PER_NODE,
    FLOAT8_TIME,
    SECONDS_PER_OPERATION,
)

_PARTS = {
    "teacher weights": "teacher weights and tables",
    "student weights": "student weights and tables",
    "gathered": "gathered and in transit (FSDP2)",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations of a microbatch",
    "loss": "loss and both heads' logits",
    "temporary": "temporary",
}
_KINDS = {
    "cache": " (from a cache)",
    "base": " (the student, adapters off)",
    "ema": " (the student's average, fp32)",
}
_PHASES = {
    "teacher": "teacher, forward",
    "student": "student, forward",
    "loss": "loss and heads",
    "backward": "backward",
    "optimizer": "optimizer",
}


def assumptions(plan: RunPlan) -> list[str]:
    """Say what the figures rest on, a sentence each."""
    settings = plan.settings
    said = [
        f"every sequence has {plan.sequence} tokens, and every token is valid",
        "a microbatch does what it does in a run, followed on the meta device; attention keeps no S x S scores",
    ]
    if specialists := [each for each in plan.teachers if each.datasets]:
        said.append(
            f"FLOPs and times take a microbatch's rows in equal shares for the {len(specialists)} teachers, memory the "
            "worst case, in which one of them has all; a teacher without a row runs on one that does not count"
        )
    if plan.missing_tokenizer:
        said.append(f"the tokenizer fits the models: {', '.join(plan.missing_tokenizer)} is not there to be checked")
    if settings.compile:
        said.append("compile: True is not modelled: fused layers keep and move less")
    if settings.torch_device.type == "cuda":
        said.append("the loss runs in Triton kernels, without a workspace of their own")
    if plan.request.memory_bytes is not None:
        said.append(
            f"of a device's memory {USABLE:.0%} less {CONTEXT_BYTES / GIB:.0f} GiB can be used: the rest is for the "
            "runtime (CUDA's context, NCCL, libraries) and fragmentation"
        )
    if plan.devices:
        said.append(
            f"an operation reaches {ACHIEVED_FLOPS:.0%} of the device's dense {settings.dtype} peak or "
            f"{ACHIEVED_BANDWIDTH:.0%} of its memory bandwidth, and takes {SECONDS_PER_OPERATION * 1e6:.0f} us at least"
        )
    if any(each.float8_head for each in plan.teachers) and plan.devices and settings.dtype == "bf16":
        without = [device.name for device in plan.devices if not device.float8]
        said.append(
            f"the product of the teacher's head in 8-bit floats takes {FLOAT8_TIME:g} of the time of one in bf16, as "
            "measured on an H200" + (f"; {', '.join(without)} emulates it in fp32" if without else "")
        )
    if plan.layout.processes > 1 and plan.devices:
        said.append(
            f"links reach {ACHIEVED_LINK:.0%} of their peak; layers and gradients travel behind the computation; nodes "
            f"have {DEVICES_PER_NODE} devices and {plan.request.network_bandwidth:g} GB/s a device between them"
        )
    return said


def as_dict(plan: RunPlan) -> dict[str, Any]:
    """Return the plan in plain values: bytes, FLOPs and seconds, per device; per optimizer step where it says so."""
    layout, settings, memory, room = plan.layout, plan.settings, plan.memory, plan.request.memory_bytes
    seconds = {
        name: {"total": time.total, "exposed_communication": time.exposed, **time.phases}
        for name, time in plan.times.items()
    }
    return {
        "processes": layout.processes,
        "shards": layout.shards,
        "replicas": layout.replicas,
        "batch_size": settings.batch_size,
        "sequence_length": plan.sequence,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "tokens_per_step": plan.tokens_per_step,
        "dtype": settings.dtype,
        "device_memory": room,
        "parameters": asdict(plan.parameters),
        "teachers": [asdict(each) for each in plan.teachers],
        "ensemble": plan.ensemble,
        "torchtune_kd": {
            "memory": {
                "total": memory.total,
                "peak_phase": memory.peak_phase,
                "most": _most(memory),
                "at_peak": memory.at_peak,
                "phases": memory.phases,
            },
            "fits": None if room is None or memory.total is None else fits(memory.total, room),
            "largest_batch_size": plan.largest_batch,
            "flops_per_step": plan.flops,
            "communication_per_step": asdict(plan.communication),
            "seconds_per_step": None if plan.why_no_times else seconds,
            "cache_bytes_per_token": plan.stored_bytes,
        },
        "why_no_times": plan.why_no_times,
        "devices": [asdict(device) for device in plan.devices],
        "assumptions": assumptions(plan),
    }


def as_text(plan: RunPlan) -> str:
    """Write the plan as a page."""
    layout, settings, counts = plan.layout, plan.settings, plan.parameters
    shared = f", weights sharded over {layout.shards}" if layout.shards > 1 else ""
    shared += f" and copied {layout.replicas} times" if layout.replicas > 1 else ""
    lines = [
        "Computed from the config alone: nothing is loaded, trained or measured.",
        f"{layout.processes} device{'s' * (layout.processes > 1)}{shared}; {settings.dtype}; {settings.batch_size} x "
        f"{plan.sequence} tokens a microbatch, {settings.gradient_accumulation_steps} a step, "
        f"{plan.tokens_per_step:,} tokens a step in all",
        "",
        f"parameters: teacher{'s' * (len(plan.teachers) > 1)} {counts.teacher:,}, student {counts.student:,}, of which "
        f"{counts.trained:,} are trained" + (f" ({counts.adapters:,} in adapters)" if counts.adapters else ""),
        "",
        *_teacher_lines(plan),
        *_memory_lines(plan),
        "",
        *_flops_lines(plan.flops),
    ]
    if layout.processes > 1:
        lines += ["", *_communication_lines(plan)]
    if plan.stored_bytes is not None:
        lines += ["", _cache_line(plan, plan.stored_bytes)]
    if plan.devices:
        lines += ["", *_time_lines(plan)]
    if plan.why_no_times:
        lines += ["", f"The expected time of a step is left out: {plan.why_no_times}."]
    return "\n".join([*lines, "", "Assumed:", *(f"- {said}" for said in assumptions(plan))])


def _teacher_lines(plan: RunPlan) -> list[str]:
    """Name each teacher, where there are several or the student is one."""
    if len(plan.teachers) < 2 and all(each.kind in ("live", "cache") for each in plan.teachers):
        return []
    shared = all(each.share is not None for each in plan.teachers)
    rows = []
    for each in plan.teachers:
        said = f"{each.share:.3g}" if each.share is not None else ", ".join(map(str, each.datasets))
        rows.append((each.name + _KINDS.get(each.kind, ""), [said, f"{each.parameters:,}", _gib(each.bytes)]))
    title = "teachers" if plan.ensemble is None else f"teachers, mean of {plan.ensemble}"
    return [*_table(title, rows, "share" if shared else "datasets", "parameters", "GiB"), ""]


def _memory_lines(plan: RunPlan) -> list[str]:
    memory, most = plan.memory, _most(plan.memory)
    several = {"loss": "loss and all heads' logits"} if len(plan.teachers) > 1 else {}
    rows = []
    for part, label in (_PARTS | several).items():
        cells = [_gib(most.get(part)), _gib(memory.at_peak.get(part, 0))]
        if any(cell not in ("0.00", "") for cell in cells):
            rows.append((label, cells))
        if part == "student weights" and plan.parameters.adapters:
            rows.append(("  of which adapters", [_gib(memory.adapters)] * 2))
    rows.append(("highest point of a step", [f"in {memory.peak_phase}:", _gib(memory.total, "unknown")]))
    lines = _table("memory per device, GiB", rows, "most", "at highest")
    room = plan.request.memory_bytes
    if room is not None:
        if plan.largest_batch is None:
            said = "unknown, since this optimizer's state is"
        else:
            verdict = "fits" if fits(memory.total, room) else "does not fit"
            said = f"{verdict}, at most batch_size={plan.largest_batch}"
        lines += ["", f"in {room / GIB:.1f} GiB of device memory: {said}"]
    return lines


def _cache_line(plan: RunPlan, stored: int) -> str:
    """Say what is read of teachers instead of computed."""
    read = stored * plan.tokens_per_step / plan.layout.processes
    caches = sum(each.cache_bytes_per_token is not None for each in plan.teachers)
    said = (
        f"from {'caches' if caches > 1 else 'the cache'}: {stored:,} bytes a token, {stored * 1e6 / 1e9:,.1f} GB for "
        "each million on the disk, and "
        f"{read / 1e6:,.0f} MB to be read per step and device"
    )
    if len(plan.devices) == 1:
        said += f", {read / 1e6 / plan.times[plan.devices[0].name].total:,.0f} MB/s"
    return said


def _flops_lines(flops: dict[str, int]) -> list[str]:
    rows = [(label, [_tera(flops.get(phase, 0))]) for phase, label in _PHASES.items() if phase != "optimizer"]
    return _table("TFLOP per step and device", [*rows, ("together", [_tera(sum(flops.values()))])])


def _communication_lines(plan: RunPlan) -> list[str]:
    whose = "teachers'" if len(plan.teachers) > 1 else "teacher's"
    labels = {
        "teacher_layers": f"{whose} layers, gathered",
        "student_layers": "student's layers, gathered",
        "heads": "embeddings, norms and heads, gathered",
        "gradients": "gradients, scattered",
        "replicas": "gradients, between copies",
        "total": "together",
    }
    rows = [(label, [_gib(getattr(plan.communication, name))]) for name, label in labels.items()]
    return _table("received per step and device, GiB", rows)


def _time_lines(plan: RunPlan) -> list[str]:
    rows = []
    for device in plan.devices:
        seconds = plan.times[device.name].total
        room = device.memory or plan.request.memory_bytes
        fitting = room is None or plan.memory.total is None or fits(plan.memory.total, room)
        cells = [f"{seconds:.2f}", f"{plan.tokens_per_step / seconds:,.0f}"] if fitting else ["no room", ""]
        rows.append((f"{device.name} ({_peaks(device, plan.settings.dtype)})", cells))
    lines = _table("expected seconds per step", rows, "seconds", "tokens/s")
    if len(plan.devices) == 1:
        (device,) = plan.devices
        time = plan.times[device.name]
        of_phases = [(label, [f"{time.phases.get(phase, 0.0):.3f}"]) for phase, label in _PHASES.items()]
        of_phases.append(("waiting for other devices", [f"{time.exposed:.3f}"]))
        lines += ["", *_table(f"seconds per step on {device.name}", of_phases)]
    return [*lines, "", *(f"{device.name}: {device.source}" for device in plan.devices)]


def _most(memory: Memory) -> dict[str, int | None]:
    """Return the most that each part takes at any time; weights count adapters, which are also given alone."""
    return {
        "teacher weights": memory.teacher,
        "student weights": memory.student,
        "adapters": memory.adapters,
        "gathered": memory.gathered,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "loss": memory.loss,
    }


def _peaks(device: Any, dtype: str) -> str:
    return f"{device.tflops[dtype]:g} TFLOP/s, {device.bandwidth:g} GB/s"


def _gib(size: int | None, unknown: str = "") -> str:
    return unknown if size is None else f"{size / GIB:,.2f}"


def _tera(flops: int) -> str:
    return f"{flops / 1e12:,.1f}" if flops >= 1e13 or not flops else f"{flops / 1e12:.3g}"


def _table(title: str, rows: Iterable[tuple[str, Sequence[str]]], *columns: str) -> list[str]:
    rows = list(rows)
    first = max(len(title), *(len(label) for label, _ in rows)) + 2
    widths = [
        max(14, *(len(cell) + 2 for cell in column)) for column in zip(*(cells for _, cells in rows), strict=True)
    ]

    def line(label: str, cells: Sequence[str]) -> str:
        return label.ljust(first) + "".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=False))

    rule = "-" * (first + sum(widths))
    return [line(title, columns).rstrip(), rule, *(line(label, cells) for label, cells in rows)]
