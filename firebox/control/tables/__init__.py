"""The rows. One file per resource; `base` holds what all share. Decides nothing."""
