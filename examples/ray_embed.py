"""A corpus too large for one machine: Ray distributes the files over workers, which share one server or several.

    pip install 'ecapa-triton[ray]'
    python examples/ray_embed.py 127.0.0.1:8001 paths.txt embeddings 4   # 4 workers; a cluster's by RAY_ADDRESS

`paths.txt` has one path a line, valid on the workers. The job writes Parquet files with the columns of `SCHEMA` into
the folder `embeddings`, which must not exist; a file that cannot be embedded has the reason in `error` and does not
stop the job. Each worker keeps 32 requests in flight and half a core busy with reading: four fill a server's queue of
128. Ray Data restarts a worker that dies, and embeds its 1,000 paths again.
"""

import sys

import pyarrow as pa
import ray
from ecapa_triton import EcapaError, SpeakerClient

NUMBERS = pa.list_(pa.float32())  # [192]; Parquet cannot read back a missing list of fixed size
SCHEMA = pa.schema({"path": "string", "seconds": "float32", "embedding": NUMBERS, "model": "string", "error": "string"})


class Embed:
    """One worker with its own client."""

    def __init__(self, url: str) -> None:
        self.client = SpeakerClient(url, timeout=60, max_in_flight=32)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Embed a block of paths."""
        paths = block["text"].to_pylist()
        outcomes = self.client.utterances(paths)
        rows = [{"error": str(one)} if isinstance(one, EcapaError) else vars(one) for one in outcomes]
        return pa.Table.from_pylist([{"path": path, **row} for path, row in zip(paths, rows, strict=True)], SCHEMA)


if len(sys.argv) != 5:
    sys.exit("usage: python examples/ray_embed.py URL LIST FOLDER WORKERS")
url, manifest, out, workers = sys.argv[1:]
blocks = ray.data.read_text(manifest).repartition(target_num_rows_per_block=1000)
pool = ray.data.ActorPoolStrategy(size=int(workers))
blocks = blocks.map_batches(Embed, fn_constructor_args=[url], batch_format="pyarrow", compute=pool, num_cpus=0.5)
blocks.write_parquet(out)
