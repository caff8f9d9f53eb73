"""Faults put in on purpose: a reply is the right embedding of the clip that was sent, or an error, or NaN."""
