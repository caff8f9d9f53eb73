"""A real Triton as a child process: `python -m server`, or TritonServer in code."""

from server.options import Limits, ServerError, Tls
from server.triton import TritonServer

__all__ = ["Limits", "ServerError", "Tls", "TritonServer"]
