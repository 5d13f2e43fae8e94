"""The acts: compares what is wanted with what runs and takes one step at a time. Decides nothing."""
