"""What the client costs: does the bulk command reach the server's throughput, and what would shared memory save?

Both are measured in rounds in which all take turns, after a turn that does not count. Every reply is compared: with
SpeechBrain's embedding of the clip alone or, where the server was not started here, with its own first reply.
Ratios and differences are medians of those within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import secrets
import shlex
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import grpc
import numpy as np
import tritonclient.utils.shared_memory as shm
from ecapa_triton import EcapaError, protocol
from ecapa_triton import audio as audio_module
from ecapa_triton._manifest import SUFFIXES
from ecapa_triton.protocol import CHANNEL_ARGS
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from . import load, machine
from .clips import MAX_ERROR, SAMPLE_RATE, SAMPLES, Array, Clips, Deck, distances, speech
from .gpu_page import reason
from .load import LoadError, Round, Sent, Timing
from .run import first_replies
from .scenarios import Level
from .target import OURS, Target, TargetError, link, reach

Row: TypeAlias = dict[str, Any]
Answer: TypeAlias = Callable[[list[Array]], Array]  # from waveforms to the right embeddings, float32 [n, E]

COMMAND = Path(sysconfig.get_path("scripts")) / "ecapa-triton"
GOAL = 0.95  # of the load generator's throughput, for the bulk command
CLIPS, CLIPS_OF_LARGE = 500, 120  # of the bulk command, with the shipped model and with others
SHORTEST = 2.0  # s, of the load generator
TIMEOUT = 60.0  # s, of a request
NGINX, DIRECT, SHARED = "gRPC through nginx", "gRPC straight to Triton", "shared memory"
DECK, CLIENTS = 8, 8  # clips of one length, and who sends them at once
SLOT = 640_000  # bytes of shared memory for each client: 10 s of float32 at 16 kHz
REGION = f"ecapa-triton-client-{os.getpid()}"
FIGURES = "clips_per_s", "audio_per_s", "p50_ms", "mean_batch", "generator_cpu", "wrong"
PACKAGES = "locust", "grpcio", "tritonclient", "nvidia-pytriton", "onnxruntime", "soundfile", "soxr", "numpy"

NOTHING = "nothing"  # a model that only says with which samples a clip begins and ends
NOTHING_ONNX = """<ir_version: 10, opset_import: ["": 18]>
nothing (float[S] waveform, int32[B, 1] lengths) => (float[B, 2] edges) {
    rows = Constant <value: tensor = int32 {0}> ()
    one = Constant <value: tensor = int32 {1}> ()
    end = CumSum (lengths, rows)
    first = Sub (end, lengths)
    last = Sub (end, one)
    places = Concat <axis = 1> (first, last)
    edges = Gather (waveform, places)
}"""
NOTHING_CONFIG = """
name: "nothing"
backend: "onnxruntime"
max_batch_size: 8
input { name: "waveform" data_type: TYPE_FP32 dims: [ -1 ] allow_ragged_batch: true }
batch_input { kind: BATCH_ITEM_SHAPE target_name: "lengths" data_type: TYPE_INT32 source_input: "waveform" }
output { name: "edges" data_type: TYPE_FP32 dims: [ 2 ] }
dynamic_batching { }
instance_group { count: 1 kind: KIND_CPU }
"""


def run(options: argparse.Namespace) -> None:
    """Measure, print the page, write it to `DATE-NAME-client.md` and the figures to `.json`.

    Raises:
        TargetError: nothing can be measured.
        LoadError: a reply was wrong, or there was none.
    """
    begun = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=options.out).close()  # a bad path costs nobody minutes of load
    with tempfile.TemporaryDirectory() as name:
        folder, local = Path(name), None
        try:
            with ExitStack() as stack:
                if options.target:
                    target = reach("target", options.target, options.model or "ecapa")
                else:
                    from .local import Local

                    local = Local(options, folder, stack)
                    if not local.targets:
                        raise TargetError("; ".join(local.not_measured.values()))
                    (target,) = local.targets
                model = next(model for model, name in target.contenders.items() if name == OURS)
                bound = MAX_ERROR["fp16" if target.models()[model].precision == "fp16" else "fp32"]
                answer = local.reference if local else partial(first_replies, target, model)
                about = target.describe(local.sha256 if local else {})
                bulk = Bulk(options, folder, target, model, bound, answer).measure()
            ways = measure_ways(options, folder, target, model, bound, answer) if local else None
        except (EcapaError, InferenceServerException, grpc.FutureTimeoutError) as error:
            raise LoadError(reason(error)) from error
    data = {
        "kind": "client",
        **machine.describe(
            machine.installed(*PACKAGES),
            commit=machine.commit(),
            command=" ".join(["python -m loadtest", *map(shlex.quote, options.words)]),
            took_s=time.monotonic() - begun,
        ),
        "source": local.source if local else None,
        "references": "SpeechBrain" if local else "the first replies",
        "bound": bound,
        "target": about,
        "bulk": bulk,
        "ways": ways,
    }
    path = options.out / f"{data['date'][:10]}-{target.name}-client.json"
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    page = markdown(data)
    path.with_suffix(".md").write_text(page, encoding="utf-8")
    print(f"\n{page}\n{path}\n{path.with_suffix('.md')}")
    if wrong := sum(row["wrong"] for row in _rows(data)):
        raise LoadError(f"{wrong} replies were WRONG: see {path}")


def _clips(waveforms: list[Array], answer: Answer, bound: float) -> Clips:
    clips = Clips(waveforms, answer(waveforms))
    if not clips.apart() > 2 * bound:
        raise TargetError("two clips have so much the same embedding that an exchange would not be seen")
    return clips


def _figures(one: Round, users: int) -> Row:
    found = load.figures(Level("clients", None, users=users), [one])
    if found["errors"] or found["refused"]:
        raise LoadError(f"{found['refused']} requests were refused, failed: {found['errors'] or 'none'}")
    return {name: found[name] for name in FIGURES} | {"compared": len(one.requests)}


class Bulk:
    """The bulk command on audio files, and the load generator on the same clips as requests made beforehand."""

    def __init__(
        self, options: argparse.Namespace, folder: Path, target: Target, model: str, bound: float, answer: Answer
    ) -> None:
        self.folder, self.target, self.model, self.bound = folder, target, model, bound
        self.rounds, self.in_flight = options.rounds, options.in_flight
        audio = options.audio or SAMPLES
        count = options.clips or (CLIPS if options.target or options.source == "mini" else CLIPS_OF_LARGE)
        files = sorted(path for path in audio.rglob("*") if path.suffix.lower() in SUFFIXES)[:count]
        if not files:
            raise TargetError(f"{audio} has no audio files: give a folder that has some with --audio")
        if not COMMAND.exists():
            raise TargetError(f"{COMMAND} is missing: pip install -e '.[loadtest]'")
        waveforms = [audio_module.read(path, max_samples=protocol.USUAL.max_samples).waveform for path in files]
        self.clips = _clips(waveforms, answer, bound)
        self.clips.save(folder / "clips.npz")
        deck = Deck(range(len(files)), seed=0)  # as the load generator deals them
        self.order = [deck.draw() for _ in range(count)]
        self.seconds = sum(len(waveforms[number]) for number in self.order) / SAMPLE_RATE
        (folder / "audio").mkdir()
        for place, number in enumerate(self.order):
            (folder / "audio" / f"{place:06d}-{files[number].name}").symlink_to(files[number].absolute())

    def measure(self) -> Row:
        """All rounds."""
        warm_up = self.command("warm-up")
        rounds: list[Row] = []
        for turn in range(self.rounds):
            one: Row = {}
            for name in ("command", "generator") if turn % 2 == 0 else ("generator", "command"):
                one[name] = self.command(str(turn)) if name == "command" else self.generator(warm_up["seconds"])
            rounds.append(one)
            told = ", ".join(f"{name} {row['clips_per_s']:.1f} clips/s" for name, row in one.items())
            print(f"bulk, round {turn + 1} of {self.rounds}: {told}", flush=True)
        about = {"clips": len(self.order), "files": len(self.clips.waveforms), "audio_s": self.seconds}
        return {**about, "in_flight": self.in_flight, "warm_up": {"command": warm_up}, "rounds": rounds}

    def command(self, name: str) -> Row:
        """`ecapa-triton embed`, from its start to its end; `started_` without the time until it begins to embed."""
        output = self.folder / f"{name}.npz"
        words = [COMMAND, "embed", self.folder / "audio", "-o", output, "--in-flight", self.in_flight, "--json"]
        words += ["--url", self.target.url, "--model", self.model]
        before, used, begun = self.target.statistics(self.model), _cpu_of_children(), time.perf_counter()
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
        took, used = time.perf_counter() - begun, _cpu_of_children() - used
        counts = self.target.statistics(self.model) - before
        if done.returncode != 0:
            raise LoadError((done.stderr.strip().splitlines() or [f"ecapa-triton ended with {done.returncode}"])[-1])
        with np.load(output) as written:
            places, rows = [int(Path(file).name[:6]) for file in written["files"]], written["embeddings"]
        if sorted(places) != list(range(len(self.order))):
            raise LoadError(f"ecapa-triton embed wrote {len(places)} embeddings of {len(self.order)} files")
        right = self.clips.embeddings[[self.order[place] for place in places]]
        inside = json.loads(done.stdout)["elapsed"]
        return {
            "seconds": took,
            "start_s": took - inside,
            "clips_per_s": len(places) / took,
            "audio_per_s": self.seconds / took,
            "started_clips_per_s": len(places) / inside,
            "started_audio_per_s": self.seconds / inside,
            "cpu_ms_per_clip": used / len(places) * 1e3,
            "mean_batch": counts["inferences"] / max(1, counts["executions"]),
            "wrong": int((~(distances(rows, right) <= self.bound)).sum()),  # NaN too
            "compared": len(rows),
        }

    def generator(self, seconds: float) -> Row:
        """Locust, for as long as the command takes."""
        timing, level = Timing(max(SHORTEST, seconds), 0.0), Level("mixed", None, users=self.in_flight)
        clips = self.folder / "clips.npz"
        found = load.drive(level, self.target, self.model, self.bound, clips, timing, self.folder)
        figures = _figures(found, self.in_flight)
        return figures | {"cpu_ms_per_clip": figures["generator_cpu"] * 1e3 / (figures["clips_per_s"] or np.inf)}


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@dataclass(frozen=True)
class Load:
    """What is sent on each way: to `model`, whose output `reply` must be the clips' embeddings."""

    model: str
    reply: str
    clips: Clips
    users: int
    seconds: float
    bound: float

    def drive(self, way: Way, warm_up: bool = False) -> Row:
        """A closed loop. A request's time begins with the waveform and ends with its embedding."""
        sent: list[Sent] = []
        begin = time.time()
        end = begin if warm_up else begin + self.seconds

        def user(slot: int) -> None:
            deck = Deck(range(len(self.clips.waveforms)), seed=slot)
            while True:
                number = deck.draw()
                waveform, right = self.clips.waveforms[number], self.clips.embeddings[[number]]
                start, clock = time.time(), time.perf_counter()
                reply = way.ask(self.model, self.reply, waveform, slot)
                took = time.perf_counter() - clock
                (error,) = distances(reply, right).tolist()
                result = "right" if error <= self.bound else "WrongReply"  # NaN too
                sent.append(Sent(start, took, 1, len(waveform) / SAMPLE_RATE, self.users, result, error))
                if time.time() >= end:
                    return

        with ThreadPoolExecutor(self.users) as pool:
            list(pool.map(user, range(self.users)))
        return _figures(Round(begin, end, sent), self.users)


@dataclass(frozen=True)
class Way:
    """How clips get to Triton: by a connection and, if there is one, in a region of shared memory."""

    triton: Any
    region: Any = None

    def ask(self, model: str, output: str, waveform: Array, slot: int) -> Array:
        """Send a clip, float32 `[samples]`, from the client whose part of the region is `slot`."""
        if self.region is None:
            tensor = InferInput("waveform", [1, len(waveform)], "FP32")
            tensor.set_data_from_numpy(waveform[np.newaxis])
        else:
            tensor = InferInput("waveform", [1, len(waveform)], "FP32")
            shm.set_shared_memory_region(self.region, [waveform], slot * SLOT)
            tensor.set_shared_memory(REGION, waveform.nbytes, slot * SLOT)
        outputs = [InferRequestedOutput(output)]
        reply: Array = self.triton.infer(model, [tensor], outputs=outputs, client_timeout=TIMEOUT).as_numpy(output)
        return reply


def measure_ways(
    options: argparse.Namespace, folder: Path, target: Target, model: str, bound: float, answer: Answer
) -> Row:
    """Each way to one Triton of this machine: the transport alone, and what it matters to the model."""
    import onnx
    from ecapa_triton.protocol import GRPC_KEY_HEADER

    from server import Limits, gateway
    from server.triton import TritonServer, choose_ports

    from .local import model_files

    link(folder / "ways", model, model_files(target.local.repository / model))
    (folder / "ways" / NOTHING / "1").mkdir(parents=True)
    (folder / "ways" / NOTHING / "config.pbtxt").write_text(NOTHING_CONFIG, encoding="utf-8")
    onnx.save(onnx.parser.parse_model(NOTHING_ONNX), folder / "ways" / NOTHING / "1" / "model.onnx")

    loads = {}
    for name, waveforms in ("640 kB", speech([10] * DECK)), ("320 kB", speech([5] * DECK)):
        edges = Clips(waveforms, np.stack([waveform[[0, -1]] for waveform in waveforms]))
        loads[name] = Load(NOTHING, "edges", edges, 1, options.seconds / 3, 0.0)
    clips = _clips(loads["640 kB"].clips.waveforms, answer, bound)
    for name, users in ("one", 1), ("eight", CLIENTS):
        loads[name] = Load(model, "embedding", clips, users, options.seconds, bound)

    key, rounds = secrets.token_urlsafe(), []
    with ExitStack() as stack:
        server = stack.enter_context(TritonServer(folder / "ways", device="cpu", keys={"shared-memory": key}))
        direct = stack.enter_context(_connect(server.grpc_url))
        ways = {DIRECT: Way(direct), SHARED: Way(direct, stack.enter_context(_region(direct, {GRPC_KEY_HEADER: key})))}
        if gateway.find():
            ports = choose_ports({api: ("127.0.0.1", 0) for api in ("grpc", "http")})
            front, http = (f"{host}:{port}" for host, port in ports.values())
            (folder / "nginx").mkdir()
            behind = {"grpc": (front, server.grpc_url), "http": (http, server.http_url)}
            nginx = gateway.Gateway(folder / "nginx", Limits(128), None, **behind)
            stack.callback(nginx.stop)
            ways = {NGINX: Way(stack.enter_context(_connect(front)))} | ways
        warm_up = {
            level: {name: one.drive(way, warm_up=True) for name, way in ways.items()} for level, one in loads.items()
        }
        for turn in range(options.rounds):
            names = list(ways)
            names = names[turn % len(names) :] + names[: turn % len(names)]  # nobody always runs behind the same other
            rounds.append({level: {name: one.drive(ways[name]) for name in names} for level, one in loads.items()})
            told = ", ".join(f"{name} {row['p50_ms'] or 0:.2f} ms" for name, row in rounds[-1]["640 kB"].items())
            print(f"ways, round {turn + 1} of {options.rounds}: {told}", flush=True)
    return {"ways": list(ways), "seconds": options.seconds, "warm_up": warm_up, "rounds": rounds}


@contextmanager
def _connect(address: str) -> Iterator[Any]:
    """A connection as the client's, once somebody listens there."""
    with grpc.insecure_channel(address) as channel:
        grpc.channel_ready_future(channel).result(TIMEOUT)
    with InferenceServerClient(address, channel_args=CHANNEL_ARGS) as triton:
        yield triton


@contextmanager
def _region(triton: Any, headers: dict[str, str]) -> Iterator[Any]:
    """Shared memory that Triton knows, with room for every client."""
    region = shm.create_shared_memory_region(REGION, f"/{REGION}", CLIENTS * SLOT, create_only=True)
    try:
        triton.register_system_shared_memory(REGION, f"/{REGION}", CLIENTS * SLOT, headers=headers)
        yield region
    finally:
        shm.destroy_shared_memory_region(region)


def _rows(data: Row) -> list[Row]:
    """All that was measured, and the turns that do not count."""
    bulk, ways = ([found["warm_up"], *found["rounds"]] if found else [] for found in (data["bulk"], data["ways"]))
    return [row for one in [*bulk, *(level for one in ways for level in one.values())] for row in one.values()]


def markdown(data: Row) -> str:
    """The page of a run; without figures where a reply was wrong."""
    about, served = data["target"], next(iter(data["target"]["models"].values()))
    packages = ", ".join(f"{name} {number}" for name, number in data["packages"].items())
    compared, wrong = (sum(row[key] for row in _rows(data)) for key in ("compared", "wrong"))
    page = f"""# What the client costs, {data["date"][:10]}

{data["cpu"]}, {data["cores"]} cores, shared by server and clients; {data["source"] or about["url"]};
Triton {about["server_version"]}, backend {served["backend"]}; Python {data["python"]}, {packages}.
Commit {data["commit"]}, `{data["command"]}`, {data["took_s"]:,.0f} s.

{compared:,} replies compared with {data["references"]}, {f"**{wrong:,} WRONG**" if wrong else "none wrong"}.
Medians of {len(data["bulk"]["rounds"])} rounds in which all took turns. Ratios and differences: medians of those within
a round and, in brackets, the least and the largest.
"""
    if wrong:
        return f"{page}\nSo no figure counts.\n"
    return page + _bulk_page(data["bulk"]) + (_ways_page(data["ways"]) if data["ways"] else "")


def _bulk_page(bulk: Row) -> str:
    def figures(*path: str) -> list[float]:
        return [one[path[0]][path[1]] for one in bulk["rounds"]]

    def cells(who: str, begun: str = "") -> str:
        rates = [median(figures(who, f"{begun}{what}_per_s")) for what in ("clips", "audio")]
        ratio = _ratios(figures(who, f"{begun}audio_per_s"), figures("generator", "audio_per_s"))
        batch, cpu = (median(figures(who, what)) for what in ("mean_batch", "cpu_ms_per_clip"))
        return f"{rates[0]:.1f} | {rates[1]:.1f} | {batch:.2f} | {cpu:.1f} | {_spread(ratio)}"

    ratio = median(_ratios(figures("command", "started_audio_per_s"), figures("generator", "audio_per_s")))
    return f"""
## Bulk

{bulk["clips"]} audio files ({bulk["files"]} different ones), {bulk["audio_s"]:,.0f} s of audio, {bulk["in_flight"]}
requests under way. The load generator sends the same clips, made into requests beforehand.

| | clips/s | s of audio/s | mean batch | its own CPU, ms a clip | of the load generator |
|---|---:|---:|---:|---:|---:|
| `ecapa-triton embed`, start of Python included | {cells("command")} |
| the same, once it has started | {cells("command", "started_")} |
| load generator | {cells("generator")} |

The command takes {median(figures("command", "start_s")):.1f} s to start, which its CPU time has in both rows.
Once it has started it is to reach {GOAL} of the load generator: {"reached" if ratio >= GOAL else "not reached"}.
"""


def _ways_page(found: Row) -> str:
    ways, usual = found["ways"], found["ways"][0]

    def figures(level: str, way: str, key: str = "p50_ms") -> list[float]:
        return [one[level][way][key] for one in found["rounds"]]

    def row(level: str, words: str, key: str = "p50_ms") -> str:
        return f"| {words} | " + " | ".join(f"{median(figures(level, way, key)):.2f}" for way in ways) + " |"

    def saved(some: list[float], others: list[float]) -> str:
        ms = [a - b for a, b in zip(some, others, strict=True)]
        share = [100 * part for part in _ratios(ms, figures("one", usual))]
        return f"{_spread(ms)} ms a request, {_spread(share)} % of what a clip of 10 s takes"

    clips_per_s = [
        _ratios(figures("eight", way, "clips_per_s"), figures("eight", usual, "clips_per_s")) for way in ways
    ]
    return f"""
## Ways to one Triton on this machine

A request's time begins with the waveform in the client's memory and ends with the reply; with shared memory it includes
the copy into the region, which was registered once. `nothing` is a model that does no work.

| | {" | ".join(ways)} |
|---|{"---:|" * len(ways)}
{row("640 kB", "`nothing`, 640 kB, one client, ms")}
{row("320 kB", "`nothing`, 320 kB, one client, ms")}
{row("one", "the model, 10 s, one client, ms")}
{row("eight", f"the model, 10 s, {CLIENTS} clients, clips/s", "clips_per_s")}
| times the clips/s of {usual} | {" | ".join(map(_spread, clips_per_s))} |

In place of {usual}:

- shared memory, the transport alone, saves {saved(figures("640 kB", usual), figures("640 kB", SHARED))};
- shared memory, with the model, saves {saved(figures("one", usual), figures("one", SHARED))};
- half the bytes (int16) save at most {saved(figures("640 kB", usual), figures("320 kB", usual))}: to make int16
  of a waveform, and float32 of it again, costs some of that.

What this does not show: clients on another machine, where there is no shared memory and the network counts; more cores,
on which server and clients do not take each other's time; other backends: with the wheel's, a clip is copied once more,
into the memory of the model's process.
"""


def _ratios(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x / y for x, y in zip(a, b, strict=True)]


def _spread(values: list[float]) -> str:
    return f"{median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"
