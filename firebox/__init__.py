"""Firebox: a training-API server for your own machines."""

__version__ = "0.1.0"
