"""Renders the API reference from the docstrings: `python docs/api.py build/api` (`make api`)."""

import sys
from pathlib import Path

import ecapa_triton
import pdoc
from ecapa_triton import _async_client, _scoring, audio


def place(name: str) -> tuple[bool, bool, bool]:
    """Clients first, errors last."""
    value = getattr(ecapa_triton, name)
    is_error = isinstance(value, type) and issubclass(value, ecapa_triton.EcapaError)
    return is_error, name != "SpeakerClient", not name.endswith("Client")


ecapa_triton.__all__.sort(key=place)
page = pdoc.doc.Module(ecapa_triton)
# pdoc finds the docstring of a plain value only in the module that defines it.
for name, module in ("SAMPLE_RATE", audio), ("Audio", audio), ("Embedding", _scoring), ("Long", _async_client):
    page.members[name].docstring = pdoc.doc.Module(module).members[name].docstring
pdoc.render.configure(docformat="google", show_source=False, search=False)
folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
(folder / "index.html").write_text(pdoc.render.html_module(page, {page.fullname: page}))
