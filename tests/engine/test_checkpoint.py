"""Checkpoints: what is written is what is read, and whatever happens to them is noticed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hieratok import files
from hieratok.engine import checkpoint
from hieratok.errors import CheckpointError

FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")


def tensors_of(step: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(3, 5, generator=generator)
    return {
        "model": {"weight": weight, "bias": torch.full((5,), float(step))},
        "ema": {"weight": weight / 2},
        "optimizer": {"weight:exp_avg": weight.bfloat16(), "weight:step": torch.tensor(float(step))},
        "rng": {"cpu": generator.get_state()},
    }


def save(folder: Path, *steps: int, keep: int = 2) -> Path:
    for step in steps:
        path = checkpoint.save(folder, step, tensors_of(step), {"step": step, "sums": {"loss": 0.1}}, keep)
    return path


def assert_is_whole(found: checkpoint.Checkpoint | None, step: int) -> None:
    assert found is not None and found.step == step
    expected = tensors_of(step)
    assert found.tensors.keys() == expected.keys()
    for name, part in expected.items():
        assert found.tensors[name].keys() == part.keys()
        for key, tensor in part.items():
            assert found.tensors[name][key].dtype == tensor.dtype
            assert torch.equal(found.tensors[name][key], tensor), f"{name}/{key}"
    assert found.state == {"step": step, "sums": {"loss": 0.1}}


def test_what_is_read_is_what_was_written(tmp_path):
    assert_is_whole(checkpoint.load(save(tmp_path, 10)), 10)


def test_transposed_and_attached_tensors_are_kept_by_value(tmp_path):
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    path = checkpoint.save(tmp_path, 1, {"model": {"w": weight.T}}, {}, keep=2)
    assert checkpoint.load(path).tensors["model"]["w"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_older_ones_are_removed_until_as_many_as_asked_for_are_left(tmp_path):
    save(tmp_path, 10, 20, 30, 40, keep=3)
    assert checkpoint.all_steps(tmp_path) == [20, 30, 40]


def test_the_new_one_is_never_the_one_removed_whatever_lies_in_the_folder(tmp_path):
    save(tmp_path, 10, 20, 30, 40, keep=4)
    for step in (20, 30, 40):
        (tmp_path / f"step-{step:08d}" / "model.safetensors").write_bytes(b"")
    save(tmp_path, 15, keep=2)  # gone on from 10, with fewer to keep than before
    newest, warnings = checkpoint.newest_valid(tmp_path)
    assert_is_whole(newest, 15)
    assert len(warnings) == 3


def test_writing_a_step_again_replaces_a_damaged_one(tmp_path):
    path = save(tmp_path, 10, 20)
    (path / "state.json").unlink()
    assert_is_whole(checkpoint.load(save(tmp_path, 20)), 20)


def test_what_is_no_checkpoint_is_left_alone(tmp_path):
    for name in ("step-7", "notes", "step-00000099x"):
        (tmp_path / name).mkdir()
    save(tmp_path, 10, 20, 30)
    assert checkpoint.all_steps(tmp_path) == [20, 30]
    assert all((tmp_path / name).is_dir() for name in ("step-7", "notes", "step-00000099x"))


def test_an_empty_or_missing_folder_has_none(tmp_path):
    assert checkpoint.newest_valid(tmp_path) == (None, [])
    assert checkpoint.newest_valid(tmp_path / "nowhere") == (None, [])


# Damage


def cut_to(length: Callable[[int], int]) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, length(path.stat().st_size))


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "emptied": cut_to(lambda n: 0),
    "cut to 4 bytes": cut_to(lambda n: 4),
    "cut in half": cut_to(lambda n: n // 2),
    "short of its last byte": cut_to(lambda n: n - 1),
    "with a byte too many": grow,
    "with one bit flipped": flip,
    "deleted": Path.unlink,
    "a folder": make_folder,
}


# What a flipped bit or a byte too many does to the manifest is tested byte by byte, and by fuzzing, below.
CASES = [(file, kind) for file in (*FILES, checkpoint.MANIFEST) for kind in DAMAGE
         if file != checkpoint.MANIFEST or "byte too" not in kind and "bit" not in kind]  # fmt: skip


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_damage_is_noticed_the_file_is_named_and_the_one_before_is_used(tmp_path, name, damage):
    path = save(tmp_path, 10, 20)
    DAMAGE[damage](path / name)
    with pytest.raises(CheckpointError, match=rf"step-00000020.{name}"):
        checkpoint.load(path)
    newest, warnings = checkpoint.newest_valid(tmp_path)
    assert_is_whole(newest, 10)
    assert len(warnings) == 1 and name in warnings[0]


def test_two_files_that_changed_places_are_noticed(tmp_path):
    path = save(tmp_path, 10)
    (path / "model.safetensors").rename(path / "other")
    (path / "ema.safetensors").rename(path / "model.safetensors")
    (path / "other").rename(path / "ema.safetensors")
    with pytest.raises(CheckpointError, match="model.safetensors"):
        checkpoint.load(path)


def test_a_file_of_another_step_is_noticed(tmp_path):
    path = save(tmp_path, 10, 20)
    shutil.copy(tmp_path / "step-00000010" / "ema.safetensors", path / "ema.safetensors")
    with pytest.raises(CheckpointError, match=r"ema.safetensors does not match the SHA-256"):
        checkpoint.load(path)


def test_when_all_are_damaged_the_error_names_each(tmp_path):
    save(tmp_path, 10, 20)
    (tmp_path / "step-00000010" / "model.safetensors").unlink()
    (tmp_path / "step-00000020" / "state.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.newest_valid(tmp_path)
    assert "step-00000010/model.safetensors" in str(caught.value)
    assert "step-00000020/state.json" in str(caught.value)


def test_a_checkpoint_of_a_later_format_is_refused(tmp_path):
    path = save(tmp_path, 10)
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    (path / checkpoint.MANIFEST).write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(CheckpointError, match="format 2; this version reads format 1"):
        checkpoint.load(path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> tuple[Path, bytes]:
    """A checkpoint, and its manifest as it should be."""
    path = save(tmp_path_factory.mktemp("sound"), 10)
    return path, (path / checkpoint.MANIFEST).read_bytes()


def test_a_flipped_bit_anywhere_in_the_manifest_is_noticed_or_changes_nothing(sound):
    path, manifest = sound
    noticed = 0
    for place in range(len(manifest)):
        flipped = bytearray(manifest)
        flipped[place] ^= 1
        (path / checkpoint.MANIFEST).write_bytes(flipped)
        try:
            found = checkpoint.load(path)
        except CheckpointError:
            noticed += 1
        else:
            assert_is_whole(found, 10)
    assert noticed > 0.9 * len(manifest)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=8,
)
ENTRIES = st.dictionaries(
    st.sampled_from([*FILES, "manifest.json", "../../x.safetensors", "", ".", "..", "\0", "a" * 300]) | st.text(),
    JSON | st.fixed_dictionaries({"bytes": JSON, "sha256": JSON}),
    max_size=4,
)
MANIFESTS = st.binary(max_size=200) | JSON.map(lambda v: json.dumps(v).encode()) | st.builds(
    lambda form, step, files: json.dumps({"format": form, "step": step, "files": files}).encode(),
    st.just(1) | JSON, JSON, ENTRIES | JSON,
)  # fmt: skip


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(MANIFESTS)
@example(b"[" * 100_000)
@example(b'{"format": 1, "step": Infinity, "files": {}}')
@example(b'{"format": 1, "step": ' + b"9" * 5000 + b', "files": {}}')
@example(b'{"format": 1, "step": 10, "files": {}}')
@example(b"\xff\xfe")
def test_whatever_the_manifest_says_the_error_is_one_of_ours(sound, data):
    path, _ = sound
    (path / checkpoint.MANIFEST).write_bytes(data)
    with pytest.raises(CheckpointError):
        checkpoint.load(path)


# Files that could run code


class Canary:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return open, (self.path, "w")


def add_to_manifest(path: Path, name: str, data: bytes) -> None:
    """The file and a true entry for it."""
    (path / name).write_bytes(data)
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "extra.pt", "extra.pkl", "extra.bin", "extra"])
def test_a_pickle_is_refused_by_name_and_never_executed(tmp_path, name):
    bait, canary = pickle.dumps(Canary(tmp_path / "canary")), tmp_path / "canary"
    pickle.loads(bait).close()
    assert canary.exists()  # the bait works
    canary.unlink()
    path = save(tmp_path / "checkpoints", 10)
    add_to_manifest(path, name, bait)
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(path)
    assert not canary.exists()


def test_a_torch_file_is_refused_and_never_executed(tmp_path):
    path = save(tmp_path / "checkpoints", 10)
    torch.save({"weight": Canary(tmp_path / "canary")}, tmp_path / "bait.pt")
    add_to_manifest(path, "model.pt", (tmp_path / "bait.pt").read_bytes())
    with pytest.raises(CheckpointError, match="model.pt is of a kind that checkpoints do not hold"):
        checkpoint.load(path)
    assert not (tmp_path / "canary").exists()


def test_a_file_that_the_manifest_does_not_name_is_not_read(tmp_path):
    path = save(tmp_path, 10)
    (path / "extra.pt").write_bytes(b"whatever")
    assert_is_whole(checkpoint.load(path), 10)


# A full disk


def test_a_full_disk_at_any_write_leaves_the_older_ones_whole_and_says_so(tmp_path, monkeypatch):
    save(tmp_path, 10, 20)
    sync, calls = os.fsync, 0
    for point in range(1, 20):
        left = point

        def full(descriptor: int) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            try:
                save(tmp_path, 30)
                break
            except CheckpointError as error:
                calls += 1
                assert "step-00000030 could not be written (No space left on device; " in str(error)
                assert "MB free" in str(error) and "--resume" in str(error)
        assert {10, 20} <= set(checkpoint.all_steps(tmp_path))
        assert_is_whole(checkpoint.load(tmp_path / "step-00000010"), 10)
        assert_is_whole(checkpoint.load(tmp_path / "step-00000020"), 20)
        assert not list(tmp_path.glob(".step-*"))
    assert calls == len(FILES) + 1 + 2  # the manifest, the new folder and the one around it


def test_a_folder_that_cannot_be_made_is_a_checkpoint_error_too(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(CheckpointError, match="could not be written"):
        save(tmp_path / "run" / "checkpoints", 10)


# Being killed

KILLED = """
import json, os, resource, shutil, signal, sys
from pathlib import Path
import torch
from hieratok.engine import checkpoint
from hieratok.errors import CheckpointError

folder = Path(sys.argv[1])
CALLS = ("mkdir", "fsync", "rename", "unlink", "rmdir")


def save(step):
    tensors = {"model": {"w": torch.full((1000,), float(step))}, "ema": {"w": torch.full((3,), float(step))}}
    checkpoint.save(folder, step, tensors, {"step": step}, keep=2)


def watch(kill_at):
    called = []
    for name in CALLS:
        def patched(*args, _name=name, _own=getattr(os, name), **kwargs):
            called.append(_name)
            if len(called) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return _own(*args, **kwargs)
        setattr(os, name, patched)
    return called


def attempt(step, kill_at):
    "A save in a process of its own; what it called, or None where it was killed."
    shutil.rmtree(folder, ignore_errors=True)
    for earlier in (10, 20):
        save(earlier)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        called = watch(kill_at)
        save(step)
        os.write(write, " ".join(called).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) == (not text), status
    return text.split() if text else None


def look(step, call):
    newest, _ = checkpoint.newest_valid(folder)
    left = len(list(folder.glob(".step-*")))
    values = sorted({v for part in newest.tensors.values() for v in part["w"].unique().tolist()})
    save(40)
    after = sorted(p.name for p in folder.iterdir())
    return {"step": step, "call": call, "newest": newest.step, "values": values, "left": left, "after": after}


found = []
for step in (20, 30):
    calls = attempt(step, 0)
    for number, call in enumerate(calls, start=1):
        assert attempt(step, number) is None
        found.append(look(step, call))

# A limit on the size of files, set to a part of the model's: the system itself refuses the write halfway.
attempt(30, 1)
child = os.fork()
if child == 0:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    try:
        save(30)
    except CheckpointError as error:
        os._exit(7 if "File too large" in str(error) else 8)
    os._exit(9)
found.append({"refused": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), **look(30, "write")})
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> list[dict]:
    """For every system call of a save: what was found after the process was killed right before it."""
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder / "checkpoints")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_save_killed_at_any_moment_leaves_the_previous_or_the_new_one_whole(killed):
    saves = [case for case in killed if case["step"] == 30 and case["call"] != "write"]
    assert [case["call"] for case in saves].count("fsync") == 6  # 3 files, the manifest and two folders
    assert {case["newest"] for case in saves} == {20, 30}
    for case in saves:
        assert case["values"] == [case["newest"]], case
    published = [case["call"] for case in saves].index("rename")
    assert all(case["newest"] == 20 for case in saves[: published + 1])
    assert all(case["newest"] == 30 for case in saves[published + 1 :])


def test_a_step_written_again_and_killed_leaves_it_or_the_one_before_it_whole(killed):
    again = [case for case in killed if case["step"] == 20]
    assert {"rmdir", "rename"} <= {case["call"] for case in again}
    assert all(case["newest"] in (10, 20) and case["values"] == [case["newest"]] for case in again)


def test_what_a_killed_save_left_behind_is_removed_by_the_next(killed):
    assert any(case["left"] for case in killed)
    for case in killed:
        assert "step-00000040" in case["after"] and len(case["after"]) == 2, case


def test_a_write_that_the_system_cuts_short_is_refused_with_the_reason(killed):
    case = killed[-1]
    assert case["refused"] == 7
    assert case["newest"] == 20 and case["left"] == 0


# Optimizers and files


def test_an_optimizer_goes_on_as_if_it_had_not_been_saved():
    def build() -> tuple[torch.nn.Linear, torch.optim.AdamW, dict]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        return model, optimizer, {p: n for n, p in model.named_parameters()}

    def step(model: torch.nn.Linear, optimizer: torch.optim.AdamW) -> None:
        optimizer.zero_grad()
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()

    model, optimizer, names = build()
    step(model, optimizer)
    other, restored, other_names = build()
    other.load_state_dict(model.state_dict())
    saved = {key: value.clone() for key, value in checkpoint.optimizer_tensors([optimizer], names).items()}
    assert set(saved) == {f"{p}:{s}" for p in ("weight", "bias") for s in ("step", "exp_avg", "exp_avg_sq")}
    checkpoint.restore_optimizers([restored], other_names, saved)
    for _ in range(3):
        step(model, optimizer)
        step(other, restored)
    assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)


def test_an_optimizer_of_another_model_is_refused():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(CheckpointError, match="'blocks.0.weight', which this model has not"):
        checkpoint.restore_optimizers([optimizer], {model.weight: "weight"}, {"blocks.0.weight:step": torch.ones(())})


def test_a_file_is_replaced_in_one_step_even_after_a_crash_left_its_draft(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("old")
    (tmp_path / f".run.json.{os.getpid()}.tmp").write_text("draft")
    files.write_atomically(path, b"new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_a_failed_replacement_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    path.write_text("old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_atomically(path, b"new")
    assert path.read_text() == "old"
