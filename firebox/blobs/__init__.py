"""Objects under a URL: get, put, list and commit on `file://` and `s3://`.

Empty on purpose: checkpoints and snapshots are directories on a disk that every process of a job sees, and
`firebox.weights.manifest` commits those. The room is for the day an artifact has to leave the machine.
"""
