"""The figures of `bench` as lines on the terminal and as a page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:  # a GPU host may lack jinja2
    from .report import Page

Row: TypeAlias = dict[str, Any]

TITLES = {
    "load": "Contenders",
    "agreement": "Agreement with the CPU, on speech",
    "products": "Square matrix products",
    "speed": "Speed",
    "kernels": "Kernels",
}
COLUMNS = {  # keys of a section's rows, with formats; a title is a key without underscores
    "load": "contender model_mb:.1f",
    "agreement": "contender embedded clips cosine:.7f error:.1e",
    "products": "precision size tflops:.3g",
    "speed": "clips contender ms:.2f fastest_ms:.2f slowest_ms:.2f times_real_time:,.0f "
    "ratio_to_one_by_one:.2f ratio_to_padded:.2f ratio_to_cpu:.1f tflops:.3g of_best_product:.2f work_mb:.1f",
    "kernels": "contender clips kernels kernel_ms:.2f copies top",
}
NOTES = {
    "agreement": "Against float32 TorchScript on this host's CPU, each clip alone; errors are relative L2. "
    "SpeechBrain's padded batches change the embeddings of shorter clips.",
    "speed": "Medians over the rounds, all contenders in turn within each, every call after one that is not timed; "
    "inputs on the device, the device synchronised before and after. On the CPU ours runs in batches of the size that "
    "configs/cpu.pbtxt prefers, as the server joins single clips, and in one batch where that differs. Ratios compare "
    "with SpeechBrain one by one, SpeechBrain padded and the CPU: medians within a round; above 1 this contender is "
    "faster. SpeechBrain runs with PyTorch's defaults, under which convolutions may use TF32 on a GPU. TFLOP/s: twice "
    "the multiply-accumulates of the model's matrix products and of nothing else, over all of its time. Work memory: "
    "the peak that torch allocated beyond model and inputs; torch does not see ONNX Runtime's.",
    "kernels": "From torch.profiler, which costs time itself.",
}
LIMITS = (
    "Another machine, driver or clock. A server, its queue and its network, which python -m loadtest run measures. "
    "Random weights are as fast as trained ones, but say nothing about how well voices are told apart."
)


def page(data: Row) -> Page:
    """The page of a run, of however many sections there are."""
    from .report import Page, Section, Table

    facts = {
        "command": data["command"],
        "commit": data["commit"],
        "CPU": f"{data['cpu']}, {data['cores']} cores, {data['threads']} threads",
        "GPU": data.get("gpu"),
        "packages": ", ".join(f"{name} {version}" for name, version in data["packages"].items()),
        "model": f"{data['model']}, weights {data['weights'][:24]}",
        "rounds": data["rounds"],
    }
    sections = []
    for name, rows in data["sections"].items():
        done = [row for row in rows if "failed" not in row]
        columns = [column for column in _columns(name) if any(column[0] in row for row in done)]
        cells = [[_cell(row.get(key), how) for key, how in columns] for row in done]
        missing = "\n".join(f"- {line(name, row)}" for row in rows if "failed" in row)
        text = "\n\n".join(filter(None, [NOTES.get(name), missing]))
        if rows:
            sections.append(Section(TITLES[name], text, Table([key.replace("_", " ") for key, _ in columns], cells)))
    sections.append(Section("What this does not show", LIMITS))
    title = f"The model in process, {data['date'][:10]}"
    return Page(title, "", {key: str(value) for key, value in facts.items() if value}, sections)


def line(section: str, row: Row) -> str:
    """A row on the terminal."""
    cells = [(key, _cell(row[key], how)) for key, how in _columns(section) if key in row]
    text = "  ".join(cell if n < 2 else f"{key}={cell}" for n, (key, cell) in enumerate(cells))
    return f"{text}: not measured: {row['failed']}" if "failed" in row else text


def _columns(section: str) -> list[tuple[str, str]]:
    """Keys of a section's rows, with their formats."""
    return [(key, how) for key, _, how in (column.partition(":") for column in COLUMNS[section].split())]


def _cell(value: Any, how: str) -> str:
    if value is None:
        return "—"
    if isinstance(value, dict):
        return ", ".join(f"{count} {name}" for name, count in value.items()) or "none"
    if isinstance(value, list):  # kernels
        return ", ".join(f"{kernel['kernel'][:60]} {kernel['share']:.0%}" for kernel in value[:3])
    return format(value, how)
