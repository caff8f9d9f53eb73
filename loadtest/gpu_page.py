"""The figures of a GPU host as a page of Markdown, with our goals and what became of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]

REHEARSAL = "rehearsal on a CPU: no figure means anything"
OURS = "TorchScript", "ONNX"
BUSY = 0.9  # of a core: above it the load generator may be what limits
COLUMNS = {  # of each section: title, key of a row or key with a format
    "contenders": {"contender": "contender", "model on the GPU, MB": "model_mb:.1f"},
    "agreement": {
        "contender": "contender",
        "clips": "clips",
        "sent": "how",
        "cosine, least": "cosine:.7f",
        "relative L2 error, largest": "error:.1e",
    },
    "products": {"precision": "precision", "size": "size", "TFLOP/s": "tflops:.3g"},
    "model": {
        "clips": "clips",
        "of, s": "seconds:g",
        "contender": "contender",
        "ms": "ms:.2f",
        "with copy of inputs, ms": "with_copy_ms:.2f",
        "times real time": "times_real_time:,.0f",
        "SpeechBrain's time / this": "ratio_speechbrain:.2f",
        "CPU's time / this": "ratio_cpu:.1f",
        "TFLOP/s": "tflops:.3g",
        "of the best product": "fraction:.2f",
        "work memory, MB": "work_mb:.1f",
    },
    "profile": {
        "contender": "contender",
        "clips": "clips",
        "of, s": "seconds:g",
        "kernels": "kernels",
        "on the GPU, ms": "gpu_ms:.2f",
        "call returns after, ms": "call_ms:.2f",
        "waits and copies in the call": "waits",
        "copies on the GPU": "copies",
        "most expensive": "top",
    },
    "served": {
        "model": "model",
        "precision": "precision",
        "clips": "clips",
        "clients": "clients",
        "clips/s": "clips_per_s:,.0f",
        "s of audio/s": "audio_per_s:,.0f",
        "p50, ms": "p50_ms:.1f",
        "p95, ms": "p95_ms:.1f",
        "p99, ms": "p99_ms:.1f",
        "mean batch": "mean_batch:.1f",
        "queue, ms": "queue_ms:.1f",
        "compute, ms": "compute_ms:.1f",
        "right": "right",
        "wrong": "wrong",
        "errors": "errors",
        "GPU, MB": "gpu_memory_mb:,.0f",
        "GPU, busy": "gpu_utilisation:.0%",
        "load generator, busiest core": "generator_cpu:.0%",
    },
}
TITLES = {
    "contenders": "Contenders",
    "agreement": "Agreement with the CPU, on speech",
    "products": "Square matrix products",
    "model": "The model in process",
    "profile": "Kernels",
    "served": "Served by Triton",
}
NOTES = {
    "agreement": (
        "Against TorchScript FP32 on this host's CPU, each clip alone. TF32 is not served: it is here to compare."
    ),
    "model": (
        "Medians over the rounds, all contenders in turn within each, every call after one that is not timed; "
        "inputs on the device, the device synchronised before and after. Ratios: medians of the ratios within a"
        " round; above 1 this contender is faster. SpeechBrain: `encode_batch` of one batch of equal lengths, "
        "with PyTorch's defaults, under which convolutions may use TF32. TFLOP/s: twice the "
        "multiply-accumulates of the model's matrix products and no other work, over all of its time. Work "
        "memory: the peak that torch allocated beyond model and inputs, without cuBLAS's workspace; ONNX "
        "Runtime's is not seen by torch."
    ),
    "profile": "From torch.profiler, which itself costs time.",
    "served": (
        "Closed loop over gRPC on the same host: every client sends its next clip when it has the reply to the "
        "last. Every reply is compared with TorchScript FP32 on the CPU. Mean batch, queue and compute from "
        "Triton's statistics; GPU memory is all that is in use on the GPU, the highest seen."
    ),
}
ANCHOR = (
    "For comparison, a published figure of another system: WeSpeaker's ECAPA-TDNN on Triton, on a T4, in FP16, "
    "with clips of a fixed 2.02 s: 2,647 to 2,726 clips a second. Another GPU, and another model of that name."
)
LIMITS = (
    "What this does not show: another GPU, driver or clock; the GPU's clocks are left as they are. Clients on "
    "other hosts and their network; the load generator shares the CPU with the server. NVIDIA's container, "
    "whose C++ backends are other code than what serves with the wheel. Random weights are as fast as trained "
    "ones, but say nothing of how well voices are told apart, nor is every rounding the same."
)


def page(data: Row) -> str:
    """The whole page, of however many sections there are."""
    gpu, packages = data["gpu"], data["packages"]
    head = {
        "GPU": ", ".join(f"{key} {value}" if key != "name" else str(value) for key, value in gpu.items()),
        "CUDA": data["cuda"],
        "packages": ", ".join(f"{name} {version}" for name, version in packages.items()),
        "CPU": f"{data['cpu']}, {data['cores']} cores, {data['threads']} threads",
        "model": ", ".join(f"{key} {data['model'][key]}" for key in ("source", "weights_sha256", "max_seconds")),
        "commit": data["commit"],
        "command": f"`{data['command']}`",
        "rounds": data["rounds"],
    }
    lines = [f"# {gpu['name']}, {data['date']}", ""]
    lines += [f"**{REHEARSAL}**", ""] if data["rehearsal"] else []
    lines += ["**Interrupted: what follows is not all.**", ""] if data.get("interrupted") else []
    lines += [f"- {key}: {value}" for key, value in head.items() if value is not None]
    rows = [dict(zip(("goal", "measured", "verdict"), goal, strict=True)) for goal in goals(data)]
    lines += ["", "## Goals", "", table({"goal": "goal", "measured": "measured", "": "verdict"}, rows)]
    lines += [f"\n{fault}" for fault in faults(data)]
    lines += [f"\n{section(name, found)}" for name, found in data["sections"].items()]
    return "\n".join([*lines, "", ANCHOR, "", LIMITS, ""])


def section(name: str, found: Row) -> str:
    """A section: its table, what was not measured, and why it ended early if it did."""
    done = [row for row in found["rows"] if "failed" not in row]
    lines = [f"## {TITLES[name]}", ""]
    lines += [table(COLUMNS[name], done), ""] if done else []
    for row in found["rows"]:
        if "failed" in row:
            what = ", ".join(str(row[key]) for key in ("model", "contender", "precision", "how") if key in row)
            size = f", {row['clips']} x {row['seconds']:g} s" if "seconds" in row else ""
            lines.append(f"- {what}{size}: not measured: {row['failed']}")
        elif row.get("generator_cpu", 0) > BUSY:
            lines.append(
                f"- {row['model']} {row['precision']}, {row['clips']}, {row['clients']} clients: the load generator "
                f"was busy for {row['generator_cpu']:.0%} of a core per process, and may be what limited"
            )
    lines += [f"- the section ended early: {found['failed']}"] if "failed" in found else []
    lines += ["", NOTES[name]] if name in NOTES else []
    return "\n".join(lines).rstrip() + "\n"


def table(columns: dict[str, str], rows: Iterable[Row]) -> str:
    """A Markdown table; what a row lacks is a dash."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = (_cell(row.get(key.partition(":")[0]), key.partition(":")[2]) for key in columns.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: Any, how: str) -> str:
    if value is None:
        return "—"
    if isinstance(value, dict):
        return ", ".join(f"{count} {name}" for name, count in value.items()) or "none"
    if isinstance(value, list):  # kernels
        return ", ".join(f"`{kernel['kernel'][:60]}` {kernel['share']:.0%}" for kernel in value[:3])
    return format(value, how)


def goals(data: Row) -> list[tuple[str, str, str]]:
    """Each goal, what was measured, and whether it is reached."""
    found = {name: [r for r in part["rows"] if "failed" not in r] for name, part in data["sections"].items()}
    model = [row for row in found.get("model", []) if row["format"] in OURS]
    agreed = [row for row in found.get("agreement", []) if row["contender"].startswith(OURS)]
    one, many = ([row for row in model if (row["clips"], row["seconds"]) == size] for size in ((1, 5.0), (32, 5.0)))
    served = "fp32", "fp16"

    def of(rows: list[Row], *precisions: str) -> list[Row]:
        return [row for row in rows if row["precision"] in precisions]

    ten = [row for row in model if (row["clips"], row["seconds"]) == (1, 10.0)]
    held = [row for row in found.get("contenders", []) if row.get("format") == "TorchScript"]
    return [
        _goal("5 s clip in the model < 4 ms", min, of(one, *served), "ms", "{:.2f} ms", lambda v: v < 4),
        _goal("32 x 5 s, FP16 < 8 ms", min, of(many, "fp16"), "ms", "{:.2f} ms", lambda v: v < 8),
        _goal("32 x 5 s, TF32 < 15 ms", min, of(many, "tf32"), "ms", "{:.2f} ms", lambda v: v < 15),
        _goal(
            "FP16 >= 40,000 times real time",
            max,
            of(model, "fp16"),
            "times_real_time",
            "{:,.0f}",
            lambda v: v >= 40_000,
        ),
        _goal("cosine of CPU and GPU >= 0.9999", min, of(agreed, *served), "cosine", "{:.7f}", lambda v: v >= 0.9999),
        _goal("model memory < 200 MB", max, of(held, *served), "model_mb", "{:.1f} MB", lambda v: v < 200),
        _goal(
            "work memory of a 10 s clip <= 100 MB", max, of(ten, *served), "work_mb", "{:.1f} MB", lambda v: v <= 100
        ),
    ]


def _goal(
    name: str, pick: Callable[..., Row], rows: list[Row], key: str, how: str, reached: Callable[[float], bool]
) -> tuple[str, str, str]:
    """Judge the row that `pick` chooses by `key`; one that is not a number is chosen first, and reaches nothing."""
    rows = [row for row in rows if row.get(key) is not None]
    if not rows:
        return name, "—", "not measured"
    bad = [row for row in rows if row[key] != row[key]]
    chosen = bad[0] if bad else pick(rows, key=lambda row: row[key])
    size = f", {chosen['clips']} x {chosen['seconds']:g} s" if "seconds" in chosen else ""
    return (
        name,
        f"{how.format(chosen[key])} ({chosen['contender']}{size})",
        "reached" if reached(chosen[key]) else "not reached",
    )


def faults(data: Row) -> list[str]:
    """What makes the run a failure: sections that ended early, and wrong replies."""
    found = [f"{TITLES[name]}: {part['failed']}" for name, part in data["sections"].items() if "failed" in part]
    wrong = sum(row.get("wrong", 0) for row in data["sections"].get("served", {"rows": []})["rows"])
    return [*found, *([f"{wrong} replies of the server were WRONG"] if wrong else [])]
