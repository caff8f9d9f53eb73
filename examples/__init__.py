"""Examples of the client, and the demonstration."""
