"""The front door: who is asking, which worker answers, and the bytes in between."""
