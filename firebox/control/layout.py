"""Where everything lies below the data directory. The only place that joins these paths."""

from __future__ import annotations

from pathlib import Path


class Layout:
    """Paths of one data directory; identifiers passed in have been checked, so none can climb out."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock = root / "server.lock"
        self.server_file = root / "server.json"
        self.api_key = root / "api_key"
        self.database = root / "firebox.db"
        self.run = root / "run"
        self.staging = root / "staging"
        self.shapes = root / "shapes"

    def create(self) -> None:
        """Make the directory, readable by its owner only, and what a server expects inside."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.root.chmod(0o700)
        for folder in (self.run, self.staging):
            folder.mkdir(mode=0o700, exist_ok=True)

    def models(self, account: str) -> Path:
        return self.root / "models" / account

    def model(self, account: str, model: str) -> Path:
        return self.models(account) / model

    def jobs(self, account: str) -> Path:
        return self.root / "jobs" / account

    def job(self, account: str, job: str) -> Path:
        return self.jobs(account) / job

    def job_log(self, account: str, job: str) -> Path:
        return self.job(account, job) / "log"

    def deployment_log(self, account: str, deployment: str) -> Path:
        return self.root / "deployments" / account / deployment / "log"
