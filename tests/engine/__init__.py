"""The project's images and compose files in a real Docker engine: `make test-containers`."""
