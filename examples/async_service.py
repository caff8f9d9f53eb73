"""An asyncio service that identifies speakers for many callers at once, each with a deadline.

    python examples/async_service.py 127.0.0.1:8001 voices.npz 9000   # the voices that login.py enrolled
    nc -N 127.0.0.1 9000 < samples/anna_2.flac                        # the bytes of a file in, a line out

It listens on loopback only: a public service would also limit the bytes of one caller.
"""

import asyncio
import sys

from ecapa_triton import AsyncSpeakerClient, EcapaError, Gallery, OverloadedError

if len(sys.argv) != 4:
    sys.exit("usage: python examples/async_service.py URL GALLERY PORT")
url, voices, port = sys.argv[1:]
client, gallery = AsyncSpeakerClient(url), Gallery.load(voices)


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Reply to one caller; at the deadline the request is cancelled on the server, too."""
    try:
        recording = await asyncio.wait_for(reader.read(), timeout=5)
        line = gallery.identify(await asyncio.wait_for(client.utterance(recording), timeout=5)).name or "unknown"
    except (OverloadedError, asyncio.TimeoutError):
        line = "busy: try again later"
    except EcapaError as exc:  # most likely an AudioError
        line = f"{type(exc).__name__}: {exc}"
    writer.write(f"{line}\n".encode())
    writer.close()


async def main() -> None:
    """Serve until Ctrl-C."""
    async with client, await asyncio.start_server(serve, "127.0.0.1", int(port)) as server:
        await server.serve_forever()


asyncio.run(main())
