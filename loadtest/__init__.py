"""Measurements: of the model, of the server under load, and the reports on them."""
