"""Serves the model repository on a real Triton: `python -m server --help`.

On a bare host this launcher supervises the server: it restarts a tritonserver or gateway that died. In containers it
runs with `--no-restart` and exits instead; compose or Kubernetes then restarts the container.
"""

import argparse
import itertools
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

from server import gateway
from server.options import ADMIN, DEFAULT_REQUESTS, GROUPS, Limits, ServerError, Tls, check_keys
from server.triton import TritonServer

# After restarts that failed: seconds before the next one, doubled each time, and how many there are in a row.
FIRST_PAUSE, LAST_PAUSE, ATTEMPTS = 0.5, 30.0, 10
STOPPING = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
# Options of the launcher alone; the others have the names of TritonServer's parameters.
OWN = {"gateway", "max_requests", "max_request_mb", "max_requests_per_address", "max_connection_age"}
OWN |= {"restart", "tls_cert", "tls_key", "tls_client_ca", "keys"}


class _Stop(BaseException):
    """A signal to stop has arrived, or a second one."""


def main(arguments: list[str]) -> int:
    """Runs the server until a signal stops it.

    Args:
        arguments: The command line without the program's name.

    Returns:
        The exit status: 0 after an orderly stop, 1 after a failure.
    """
    options, extra = _parse(arguments)
    server: TritonServer | gateway.LoneGateway
    limits = None
    if options.gateway in ("on", "only") or (options.gateway == "auto" and not options.sockets and gateway.find()):
        limits = _limits(options)
    tls = Tls(options.tls_cert, options.tls_key, options.tls_client_ca) if options.tls_cert else None
    keys: dict[str, list[str]] = {}
    for group, key in itertools.chain.from_iterable(options.keys):
        keys.setdefault(group, []).append(key)
    if options.gateway == "only":
        assert limits is not None
        server = gateway.LoneGateway(
            options.sockets,
            limits,
            address=options.address,
            metrics_address=options.metrics_address,
            ports={
                "grpc": options.grpc_port,
                "http": options.http_port,
                "gateway metrics": options.gateway_metrics_port,
            },
            tls=tls,
            keys=keys,
            exit_timeout=options.exit_timeout,
        )
    else:
        own = {name: value for name, value in vars(options).items() if name not in OWN}
        server = TritonServer(**own, limits=limits, tls=tls, keys=keys, extra=extra)
    warnings = []
    if limits is None and options.gateway == "auto" and not options.sockets:
        warnings.append("nginx is not installed, so requests have no limits: apt install nginx-light")
    for number in STOPPING:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores it
            signal.signal(number, _on_signal)
    try:
        try:
            _serve(server, warnings, options.restart)
        except _Stop:
            return _stop(server, options.exit_timeout)
    except _Stop:
        server.stop(0)
        print("error: stopped by a second signal, requests in flight got no reply", file=sys.stderr)
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
    finally:
        server.stop()  # also when standard output is closed and a print failed
    return 1


def _serve(server: TritonServer | gateway.LoneGateway, warnings: list[str], restart: bool) -> NoReturn:
    """Serves until a signal (`_Stop`) or a failure (`ServerError`) that no restart mends."""
    started, failures = False, 0  # failures: restarts in a row that failed
    while True:
        try:
            _start(server, warnings)
            started, failures = True, 0
            server.wait()
        except ServerError as error:
            if not started or not restart or failures == ATTEMPTS:
                raise
            server.stop()
            pause = min(FIRST_PAUSE * 2 ** (failures - 1), LAST_PAUSE) if failures else 0
            when = f" in {pause:g} s" if pause else ""
            print(f"error: {error}; starting again{when}", file=sys.stderr, flush=True)
            time.sleep(pause)
            failures += 1


def _stop(server: TritonServer | gateway.LoneGateway, seconds: float) -> int:
    """The exit status after a signal."""
    print(f"stopping: requests in flight have {seconds:g} s; a second signal ends the server now", flush=True)
    if not server.stop():
        if isinstance(server, TritonServer):
            what = f"tritonserver did not stop within {seconds:g} s and was killed; its log: {server.log_path}"
        else:
            what = f"the gateway had not passed on all replies within {seconds:g} s and was killed"
        print(f"error: {what}", file=sys.stderr)
        return 1
    print("stopped")
    return 0


def _start(server: TritonServer | gateway.LoneGateway, warnings: list[str]) -> None:
    begin = time.monotonic()
    server.start()
    for warning in [*warnings, *server.warnings]:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    if isinstance(server, TritonServer):
        print(f"device {server.chosen}")
    if server.limits is not None:
        one = f"{server.limits.per_address} of one address"
        print(f"limits {server.limits.requests} requests in flight of {server.limits.request_mb} MB each, {one}")
    if server.tls is not None:
        print(f"TLS, client certificate {'required' if server.tls.client_ca else 'not required'}")
    if server.keys:
        print(f"key required for {', '.join(server.keys)}")
    ready = f"ready in {time.monotonic() - begin:.1f} s: "
    if isinstance(server, TritonServer):
        ready += f"Triton {server.version} on {server.device} serves {', '.join(server.models)} at "
        places = {"grpc": server.grpc_url, "http": server.http_url, "metrics": server.metrics_url}
        if server.limits is not None:
            places["gateway metrics"] = server.gateway_metrics_url
    else:
        ready += "the gateway listens at "
        places = server.places
    ready += ", ".join(f"{api} {place}" for api, place in places.items())
    print(f"{ready}, on all addresses of this host" if server.is_open else ready, flush=True)


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    end = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m server",
        description="Serves the model repository on a real Triton until SIGTERM or Ctrl-C.",
        epilog="Options after -- are passed on to tritonserver, for example: -- --log-verbose=1",
    )
    argument = parser.add_argument
    repository = "model repository to serve (default: %(default)s)"
    argument("--repository", type=Path, default=Path("model_repository"), metavar="DIR", help=repository)
    argument(
        "--models", type=_list, metavar="NAME,NAME", help="serve only these, each exported (default: all exported)"
    )
    argument("--device", choices=["auto", "cpu", "gpu"], default="auto", help="auto (default): a GPU if one is usable")
    argument("--gpus", type=_numbers, metavar="N,N", help="run on the GPUs with these numbers (default: all)")
    text = "fp16: the float16 files, on GPUs only; int8: the int8 files of the model ecapa, on CPUs only"
    argument("--precision", choices=["fp32", "fp16", "int8"], default="fp32", help=text)
    threads = "threads of each model instance on the CPU (default: as many as cores)"
    argument("--threads", type=_positive, metavar="N", help=threads)
    for option, port, what in (
        ("http", 8000, "HTTP"),
        ("grpc", 8001, "gRPC"),
        ("metrics", 8002, "Triton's metrics"),
        ("gateway-metrics", 8003, "the gateway's metrics and of /ready"),
    ):
        text = f"port of {what} (default: %(default)s; 0: any free port)"
        argument(f"--{option}-port", type=int, default=port, metavar="PORT", help=text)
    text = (
        "Triton's HTTP and gRPC APIs listen on unix sockets in this folder, for a gateway that another launcher runs; "
        "with --gateway off or only"
    )
    argument("--sockets", type=Path, metavar="DIR", help=text)
    argument("--address", default="127.0.0.1", help="address of HTTP and gRPC (default: %(default)s)")
    metrics = "address of the metrics (default: %(default)s)"
    argument("--metrics-address", default="127.0.0.1", metavar="ADDRESS", help=metrics)
    argument("--tls-cert", type=Path, metavar="FILE", help="certificate for HTTP and gRPC, PEM; with --tls-key")
    argument("--tls-key", type=Path, metavar="FILE", help="its private key, PEM")
    text = "require a client certificate of these authorities, PEM"
    argument("--tls-client-ca", type=Path, metavar="FILE", help=text)
    text = (
        f"require the key in this file for these groups of Triton's APIs: {', '.join(GROUPS)}; "
        f"admin means the last {len(ADMIN)}, which are closed unless they have a key; "
        "of several lines or options for a group each is accepted, so that a key can be replaced"
    )
    argument(
        "--key-file", type=_key_file, action="append", default=[], dest="keys", metavar="GROUP,...=FILE", help=text
    )
    text = "the same with the key in the environment variable NAME; unset or empty: no key for these groups"
    argument("--key-env", type=_key_variable, action="append", dest="keys", metavar="GROUP,...=NAME", help=text)
    text = (
        "nginx in front of Triton, for TLS, keys and the limits below; auto (default): where nginx is installed; "
        "only: no Triton, but a gateway in front of the one that listens in --sockets"
    )
    argument("--gateway", choices=["auto", "on", "off", "only"], default="auto", help=text)
    defaults = f"{DEFAULT_REQUESTS['CPU']} on a CPU, {DEFAULT_REQUESTS['GPU']} on GPUs"
    text = f"limit of inference requests in flight over each API; one more gets UNAVAILABLE (default: {defaults})"
    argument("--max-requests", type=_positive, metavar="N", help=text)
    text = "limit of requests of one address, in flight or being sent (default: %(default)s)"
    argument("--max-requests-per-address", type=_positive, default=Limits.per_address, metavar="N", help=text)
    text = "limit of the size of a request (default: %(default)s)"
    argument("--max-request-mb", type=_positive, default=Limits.request_mb, metavar="MB", help=text)
    text = (
        "seconds after which a connection ends once its requests are answered, so that its client looks up the "
        "server's name again (default: %(default)s)"
    )
    argument("--max-connection-age", type=_positive, default=Limits.connection_age, metavar="SECONDS", help=text)
    for name, seconds, purpose in ("start", 120, "to load and warm the models"), ("exit", 30, "for requests in flight"):
        text = f"seconds {purpose} (default: %(default)s)"
        argument(f"--{name}-timeout", type=float, default=seconds, metavar="SECONDS", help=text)
    text = "start again on the same ports when tritonserver or one of its processes dies (default: --restart)"
    argument("--restart", action=argparse.BooleanOptionalAction, default=True, help=text)
    text = "append Triton's log here, - is standard output (default: a temporary file, kept only after a failure)"
    argument("--log", type=Path, metavar="FILE", help=text)
    options = parser.parse_args(list(filter(None, arguments[:end])))  # Compose leaves empty ones
    limits = _limits(options)
    if options.gateway == "off" and (limits != Limits(None) or options.tls_cert or options.keys):
        parser.error("limits, keys and TLS need nginx: leave out --gateway off")
    if options.sockets and options.gateway not in ("off", "only"):
        parser.error("--sockets goes with --gateway off, or --gateway only")
    if options.gateway == "only" and not options.sockets:
        parser.error("--gateway only needs --sockets: the folder in which Triton listens")
    if (options.tls_cert is None) != (options.tls_key is None) or (options.tls_client_ca and not options.tls_cert):
        parser.error("--tls-cert and --tls-key go together, and --tls-client-ca with them")
    if options.device == "cpu" and options.gpus is not None:
        parser.error("--gpus is for --device gpu or auto, not cpu")
    return options, arguments[end + 1 :]


def _limits(options: argparse.Namespace) -> Limits:
    return Limits(
        options.max_requests, options.max_request_mb, options.max_requests_per_address, options.max_connection_age
    )


def _numbers(text: str) -> list[int] | None:
    if text == "all":
        return None
    if not all(number.isdecimal() for number in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r}: expected all, or numbers of GPUs such as 0,1")
    return [int(number) for number in text.split(",")]


def _list(text: str) -> list[str]:
    return text.split(",")


def _key_file(text: str) -> list[tuple[str, str]]:
    names, _, path = text.partition("=")
    try:
        keys = Path(path).read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeError) as error:  # the message omits the path: it may be the key itself, by mistake
        reason = getattr(error, "strerror", None) or "it is not text"
        raise argparse.ArgumentTypeError(f"{names}: {reason}: expected a file that holds the key") from error
    return _keys(names, [key.strip() for key in keys if key.strip()] or [""])


def _key_variable(text: str) -> list[tuple[str, str]]:
    names, _, variable = text.partition("=")
    if not variable:
        raise argparse.ArgumentTypeError("expected groups and a variable, such as inference=INFERENCE_KEY")
    key = os.environ.get(variable, "")
    return _keys(names, [one.strip() for one in key.split("\n") if one.strip()] or [""]) if key else []


def _keys(names: str, keys: list[str]) -> list[tuple[str, str]]:
    groups = [group for name in names.split(",") for group in (ADMIN if name == "admin" else [name])]
    try:
        check_keys(dict.fromkeys(groups, keys))
    except ServerError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return [(group, key) for group in groups for key in keys]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of 1 or more")
    return int(text)


def _on_signal(number: int, frame: FrameType | None) -> NoReturn:
    for again in STOPPING:
        if signal.getsignal(again) is _on_signal:
            signal.signal(again, _on_second_signal)
    raise _Stop


def _on_second_signal(number: int, frame: FrameType | None) -> NoReturn:
    for again in STOPPING:
        signal.signal(again, signal.SIG_IGN)
    raise _Stop


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
