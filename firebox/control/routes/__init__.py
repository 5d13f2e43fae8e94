"""HTTP to service calls and back. One file per resource; nothing here decides."""
