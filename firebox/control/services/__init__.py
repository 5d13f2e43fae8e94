"""The decisions: which request is right, what state follows. Touches rows and files, starts nothing."""
