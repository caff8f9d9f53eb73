"""A corpus too large for one machine: Ray spreads the files over workers, all of which ask one server or several.

    pip install 'ecapa-triton[ray]'
    python examples/ray_embed.py 127.0.0.1:8001 paths.txt embeddings 4   # 4 workers; a cluster's by RAY_ADDRESS

`paths.txt` has a path a line, as the workers see them. Into the folder `embeddings`, which must be a new one, come
Parquet files with the columns of `SCHEMA`; a file that cannot be embedded has its reason in `error` and does not stop
the job. Each worker keeps 32 clips in flight and half a core busy with reading: four fill a server's queue of 128. A
worker that dies is started again, and its 1,000 paths are embedded again: Ray Data does both by itself.
"""

import sys

import pyarrow as pa
import ray
from ecapa_triton import EcapaError, SpeakerClient

NUMBERS = pa.list_(pa.float32())  # [192]; of fixed size, a missing one could not be read back from Parquet
SCHEMA = pa.schema({"path": "string", "seconds": "float32", "embedding": NUMBERS, "model": "string", "error": "string"})


class Embed:
    """One worker, with a client of its own for as long as it lives."""

    def __init__(self, url: str) -> None:
        self.client = SpeakerClient(url, timeout=60, max_in_flight=32)

    def __call__(self, block: pa.Table) -> pa.Table:
        """The rows of a block of paths."""
        paths = block["text"].to_pylist()
        outcomes = self.client.utterances(paths)
        rows = [{"error": str(one)} if isinstance(one, EcapaError) else vars(one) for one in outcomes]
        return pa.Table.from_pylist([{"path": path, **row} for path, row in zip(paths, rows, strict=True)], SCHEMA)


url, manifest, out, workers = sys.argv[1:]
blocks = ray.data.read_text(manifest).repartition(target_num_rows_per_block=1000)
pool = ray.data.ActorPoolStrategy(size=int(workers))
blocks = blocks.map_batches(Embed, fn_constructor_args=[url], batch_format="pyarrow", compute=pool, num_cpus=0.5)
blocks.write_parquet(out)
