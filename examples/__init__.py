"""Clips to try the service on, and the demonstration that uses them."""
