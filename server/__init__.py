"""Real Triton as a child process: `python -m server`, or TritonServer in code."""

from server.triton import ServerError, TritonServer

__all__ = ["ServerError", "TritonServer"]
