"""Checkpoints: bit-exact resume in a fresh process, and what a kill in the middle of a save leaves behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
import torch
import trainer_harness
from trainer_harness import Driver

from firebox.trainer.checkpoint import list_checkpoints
from firebox.trainer.engine import Engine
from firebox.wire.training import LoadState, SaveForSampler, SaveState

_RESUME = """
import sys, msgspec, torch
from firebox.wire.worker import TrainerSpec
from firebox.wire.training import LoadState
from trainer_harness import Driver
driver = Driver(msgspec.json.decode(sys.argv[1], type=TrainerSpec), int(sys.argv[2]))
driver.do(LoadState(ref="cross_job://first/half", optimizer=True))
driver.step()
driver.backward(4)
driver.step()
from safetensors.torch import save_file
save_file(driver.state(), sys.argv[3])
"""


@pytest.mark.parametrize("rank", [0, 4])
def test_resume_with_pending_gradients_in_a_new_process_is_bit_exact(make_spec, tmp_path: Path, rank: int):
    from safetensors.torch import load_file

    driver = Driver(make_spec("first", lora_rank=rank), rank)
    for seed in (1, 2):
        driver.backward(seed)
        driver.step()
    driver.backward(3)
    driver.do(SaveState(name="half"))
    command = [sys.executable, "-c", _RESUME, msgspec.json.encode(make_spec("second", lora_rank=rank)).decode()]
    subprocess.run(
        [*command, str(rank), str(tmp_path / "out")], cwd=Path(trainer_harness.__file__).parent, check=True, timeout=120
    )
    driver.step()
    driver.backward(4)
    driver.step()
    straight, resumed = driver.state(), load_file(tmp_path / "out")
    assert straight.keys() == resumed.keys()
    assert any(name.startswith("optimizer/") for name in straight)
    for name, tensor in straight.items():
        if name != "rng":
            assert torch.equal(tensor, resumed[name]), name
    assert straight["counters"].tolist() == [4, 0, 0]


def test_loading_weights_alone_starts_the_optimizer_anew(make_spec):
    driver = Driver(make_spec(), 0)
    driver.backward(1)
    driver.step()
    driver.backward(2)
    driver.do(SaveState(name="one"))
    saved = driver.state()
    driver.step()
    driver.do(LoadState(ref="one", optimizer=False))
    loaded = driver.state()
    assert loaded["counters"].tolist() == [0, 0, 0]
    assert not [name for name in loaded if name.startswith(("optimizer/", "gradients/"))]
    assert all(torch.equal(t, loaded[n]) for n, t in saved.items() if n.startswith("weights/"))


def test_references_that_cannot_be_loaded(make_spec, tmp_path: Path):
    driver = Driver(make_spec(), 0)
    driver.do(SaveState(name="good"))
    driver.do(SaveForSampler(name="snap-1"))
    before = driver.state()
    assert "good exists already" in driver.error(SaveState(name="good"))
    assert "snap-1 exists already" in driver.error(SaveForSampler(name="snap-1"))
    assert "sampler snapshot" in driver.error(LoadState(ref="snap-1", optimizer=True))
    for ref in ("/etc/passwd", "../good", "Good", "cross_job://other", "cross_job://../x/good", "file:///x"):
        assert "path" in driver.error(LoadState(ref=ref, optimizer=True))
    adapter = Driver(make_spec("lora", lora_rank=4), 4)
    assert "another model" in adapter.error(LoadState(ref="cross_job://job/good", optimizer=True))
    shard = next((tmp_path / "jobs/job/checkpoints/good").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert shard.name in driver.error(LoadState(ref="good", optimizer=True))
    assert all(torch.equal(t, driver.state()[n]) for n, t in before.items() if n != "rng")


_SAVE_FOREVER = """
import sys, torch
from pathlib import Path
from firebox.trainer.checkpoint import save_checkpoint
from firebox.weights.manifest import CheckpointManifest
tensors = {f"weights/{i}": torch.randn(1_000_000) for i in range(40)}
print("saving", flush=True)
for i in range(1000):
    manifest = CheckpointManifest(name=f"next-{i}", base_model="m", step=1, created_at=f"{i:04}", files=[])
    save_checkpoint(Path(sys.argv[1]), tensors, manifest)
"""


@pytest.mark.parametrize("delay_s", [0.01, 0.1, 0.25])
def test_a_kill_in_the_middle_of_a_save_leaves_only_whole_checkpoints(make_spec, tmp_path: Path, delay_s: float):
    spec = make_spec()
    driver = Driver(spec, 0)
    driver.do(SaveState(name="before"))
    checkpoints = Path(spec.job_dir) / "checkpoints"
    with subprocess.Popen([sys.executable, "-c", _SAVE_FOREVER, spec.job_dir], stdout=subprocess.PIPE) as saver:
        assert saver.stdout is not None
        saver.stdout.readline()
        deadline = time.monotonic() + 60
        while not list(checkpoints.glob(".next-*")):
            assert time.monotonic() < deadline, "the save never began"
            time.sleep(0.001)
        time.sleep(delay_s)
        saver.send_signal(signal.SIGKILL)
    for name in list_checkpoints(Path(spec.job_dir)):
        if name != "before":
            assert "another model" in driver.error(LoadState(ref=name, optimizer=True))  # whole, so it was read
    driver.do(LoadState(ref="before", optimizer=True))
    Engine(spec)
    assert not list(checkpoints.glob(".*"))
