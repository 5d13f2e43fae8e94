"""The REST resources: what exists, what is wanted, and the processes that make it so."""
