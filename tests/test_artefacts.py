"""Files are written whole or not at all, outputs are checked before any work, and plans come back as they were."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from locum.errors import OutputError, PlanError
from locum.files import (
    NOTES,
    check_output,
    clear,
    fingerprint,
    provenance,
    read_tensors,
    sweep,
    watched,
    whole,
    write_tensors,
    write_text,
)
from locum.plans.plan import DROPPED, KEPT, LayerPlan, Plan
from locum.plans.plan_file import load_plan, save_plan
from making.checkpoints import tree

KINDS = pytest.mark.parametrize("kind", ["file", "folder"])


def write(path, kind, text):
    (path / "a.txt" if kind == "folder" else path).write_text(text)


def read(path, kind):
    return (path / "a.txt" if kind == "folder" else path).read_text()


# --- whole ------------------------------------------------------------------------------------------------------


@KINDS
def test_what_is_written_takes_the_name_and_nothing_else_stays(tmp_path, kind):
    path = tmp_path / "new" / "out"
    with whole(path, kind) as scratch:
        write(scratch, kind, "one")
        assert not path.exists()
    assert read(path, kind) == "one"
    assert [p.name for p in path.parent.iterdir()] == ["out"]


@KINDS
def test_the_old_output_is_replaced_as_a_whole(tmp_path, kind):
    path = tmp_path / "out"
    with whole(path, kind) as scratch:
        write(scratch, kind, "one")
        if kind == "folder":
            (scratch / "b.txt").write_text("only in the first")
    with whole(path, kind) as scratch:
        write(scratch, kind, "two")
        assert read(path, kind) == "one"
    assert read(path, kind) == "two"
    assert not (path / "b.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@KINDS
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError, MemoryError])
@pytest.mark.parametrize("existing", [True, False])
def test_an_error_leaves_everything_as_it_was(tmp_path, kind, error, existing):
    path = tmp_path / "out"
    if existing:
        with whole(path, kind) as scratch:
            write(scratch, kind, "old")
    before = tree(tmp_path)
    with pytest.raises(error), whole(path, kind) as scratch:
        write(scratch, kind, "half of the new")
        raise error()
    assert tree(tmp_path) == before


@KINDS
def test_a_leftover_of_a_killed_run_is_no_obstacle(tmp_path, kind):
    path = tmp_path / "out"
    leftover = tmp_path / f".out.part-{os.getpid()}"
    leftover.mkdir()
    (leftover / "x").write_text("x")
    with whole(path, kind) as scratch:
        write(scratch, kind, "one")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def dead():
    """The number of a process that is gone."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@KINDS
def test_what_killed_processes_left_goes_and_what_others_write_stays(tmp_path, kind, dead):
    names = [f".out.part-{dead}", f".out.old-{dead}", f".out.part-{os.getppid()}", f".outer.part-{dead}", ".out.part-x"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
    with whole(tmp_path / "out", kind) as scratch:
        write(scratch, kind, "one")
    # The only copy of an output had the name again before it was replaced.
    assert {p.name for p in tmp_path.iterdir()} == {"out", *names[2:]}


def test_an_output_whose_run_was_killed_while_replacing_it_comes_back(tmp_path, dead):
    old = tmp_path / f".out.old-{dead}"
    old.mkdir()
    (old / "a.txt").write_text("old")
    sweep(tmp_path / "out")
    assert tree(tmp_path) == {"out": b"", "out/a.txt": b"old"}
    clear(tmp_path / "out")
    clear(tmp_path / "out")
    assert tree(tmp_path) == {}


def test_half_of_a_folder_that_is_removed_is_never_found(tmp_path, monkeypatch):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "a.txt").write_text("a")

    def press(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("locum.files.shutil.rmtree", press)
        with pytest.raises(KeyboardInterrupt):
            clear(tmp_path / "state")
    assert not (tmp_path / "state").exists()
    clear(tmp_path / "state")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("system", ["exchanges", "renames"])
def test_a_folder_is_replaced_with_and_without_an_exchange(tmp_path, system, monkeypatch):
    renamed = []
    real = os.replace
    monkeypatch.setattr("locum.files.os.replace", lambda *pair: (renamed.append(pair), real(*pair)))
    if system == "renames":
        monkeypatch.setattr("locum.files._exchange", lambda one, two: False)
    for text in ("one", "two"):
        with whole(tmp_path / "out", "folder") as scratch:
            write(scratch, "folder", text)
    if system == "exchanges" and len(renamed) > 1:
        pytest.skip("this file system cannot exchange two folders")
    assert len(renamed) == (3 if system == "renames" else 1)
    assert tree(tmp_path) == {"out": b"", "out/a.txt": b"two"}


@KINDS
def test_a_link_stays_a_link(tmp_path, kind):
    (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "there" / "real")
    for text in ("one", "two"):
        with whole(tmp_path / "out", kind) as scratch:
            write(scratch, kind, text)
        assert (tmp_path / "out").is_symlink() and read(tmp_path / "there" / "real", kind) == text
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["real"]


@KINDS
def test_content_is_on_the_disk_before_it_has_the_name(tmp_path, kind, monkeypatch):
    done, real_sync, real_replace = [], os.fsync, os.replace

    def sync(handle):
        done.append(os.path.realpath(f"/proc/self/fd/{handle}"))
        real_sync(handle)

    def replace(*pair):
        done.append("renamed")
        real_replace(*pair)

    monkeypatch.setattr("locum.files.os.fsync", sync)
    monkeypatch.setattr("locum.files.os.replace", replace)
    with whole(tmp_path / "out", kind) as scratch:
        write(scratch, kind, "one")
    inside = [str(scratch / "a.txt")] if kind == "folder" else []
    assert done == [*inside, str(scratch), "renamed", str(tmp_path)]


def test_a_pipe_that_appears_while_an_output_is_written_stays(tmp_path):
    with pytest.raises(OutputError, match="never replaced"), whole(tmp_path / "out") as scratch:
        scratch.write_text("new")
        os.mkfifo(tmp_path / "out")
    assert (tmp_path / "out").is_fifo() and len(list(tmp_path.iterdir())) == 1


@KINDS
@pytest.mark.parametrize("before", ["nothing", "something"])
@pytest.mark.parametrize("name", ["out", "out.json"])
def test_what_another_program_puts_at_a_watched_output_stays(tmp_path, kind, before, name):
    path = tmp_path / name
    if before == "something":
        with whole(path, kind) as scratch:
            write(scratch, kind, "old")
    beside = tmp_path / ("out.2.json" if (kind, name) == ("file", "out.json") else f"{name}.2")
    with watched(path):
        clear(path)
        (tmp_path / "theirs").mkdir() if kind == "folder" else None
        write(tmp_path / "theirs", kind, "theirs")
        os.replace(tmp_path / "theirs", path)
        said = f"another program has written {path}.*--force; the result is {beside}"
        with pytest.raises(OutputError, match=said), whole(path, kind) as scratch:
            write(scratch, kind, "ours")
    assert read(path, kind) == "theirs" and read(beside, kind) == "ours"
    assert {p.name for p in tmp_path.iterdir()} == {name, beside.name}
    with whole(path, kind) as scratch:  # the run is over
        write(scratch, kind, "new")
    assert read(path, kind) == "new"


@KINDS
def test_a_watched_output_is_written_again_by_its_own_run(tmp_path, kind):
    path = tmp_path / "out"
    with watched(path):
        for text in ("one", "two"):
            with watched(path), whole(path, kind) as scratch:  # a stage inside a stage
                write(scratch, kind, text)
        clear(path)
        with whole(path, kind) as scratch:  # what somebody removed is nobody's
            write(scratch, kind, "three")
    assert read(path, kind) == "three" and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_fills_an_empty_watched_folder_stays(tmp_path):
    (tmp_path / "out").mkdir()
    with watched(tmp_path / "out"):
        (tmp_path / "out" / "photo").write_text("theirs")
        with pytest.raises(OutputError, match="another program"), whole(tmp_path / "out", "folder") as scratch:
            write(scratch, "folder", "ours")
    assert tree(tmp_path) == {"out": b"", "out/photo": b"theirs", "out.2": b"", "out.2/a.txt": b"ours"}


@KINDS
def test_a_file_that_was_never_written_is_no_output(tmp_path, kind):
    if kind == "file":
        with pytest.raises(FileNotFoundError), whole(tmp_path / "out"):
            pass
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """64 KiB of memory as a disk, where this may be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "locum-test", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot mount a small disk here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_an_output_error_and_leaves_nothing(small_disk):
    (small_disk / "old").write_text("old")
    with pytest.raises(OutputError, match=r"no space left for .*text"):
        write_text(small_disk / "text", "x" * 200_000)
    with pytest.raises(OutputError, match=r"no space left for .*weights"), whole(small_disk / "weights") as scratch:
        save_file({"x": torch.zeros(100_000)}, scratch)
    with (
        pytest.raises(OutputError, match=r"no space left for .*model"),
        whole(small_disk / "model", "folder") as scratch,
    ):
        (scratch / "config.json").write_text("{}")
        save_file({"x": torch.zeros(100_000)}, scratch / "model.safetensors")
    assert [p.name for p in small_disk.iterdir()] == ["old"]
    assert (small_disk / "old").read_text() == "old"


def test_a_full_device_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="no space left"), whole(tmp_path / "out"), open("/dev/full", "w") as full:
        full.write("x" * 100_000)
    assert list(tmp_path.iterdir()) == []


def test_a_full_quota_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="no space left"), whole(tmp_path / "out"):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")


def test_a_disk_that_fills_up_while_a_folder_is_copied_is_an_output_error(tmp_path):
    failed = [("a", "b", str(OSError(errno.ENOSPC, "No space left on device", "b")))]
    with pytest.raises(OutputError, match="no space left"), whole(tmp_path / "out", "folder"):
        raise shutil.Error(failed)


# --- check_output -----------------------------------------------------------------------------------------------


def locum_folder(path):
    path.mkdir()
    (path / NOTES).write_text("{}")
    return path


def test_a_new_output_is_accepted_and_nothing_is_made(tmp_path):
    assert check_output(tmp_path / "a" / "b" / "out", False) == tmp_path / "a" / "b" / "out"
    assert check_output(str(tmp_path / "folder"), False, "folder") == tmp_path / "folder"
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_needs_force(tmp_path):
    (tmp_path / "file").write_text("x")
    locum_folder(tmp_path / "folder")
    for name, kind in (("file", "file"), ("folder", "folder")):
        with pytest.raises(OutputError, match=f"{name} exists already.*--force"):
            check_output(tmp_path / name, False, kind)
        assert check_output(tmp_path / name, True, kind) == tmp_path / name
    (tmp_path / "empty").mkdir()
    assert check_output(tmp_path / "empty", False, "folder") == tmp_path / "empty"


def test_force_never_replaces_what_is_not_ours_or_in_use(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "1.jpg").write_bytes(b"")
    with pytest.raises(OutputError, match="not made by Locum"):
        check_output(photos, True, "folder")
    model = locum_folder(tmp_path / "model")
    for inputs in ([model], [model / "plan.json"], [str(model)]):
        with pytest.raises(OutputError, match="in use"):
            check_output(model, True, "folder", inputs=inputs)


def test_a_file_is_no_folder_and_the_other_way_round(tmp_path):
    (tmp_path / "file").write_text("x")
    locum_folder(tmp_path / "folder")
    for force in (True, False):
        with pytest.raises(OutputError, match="is a file, and a folder is to be written"):
            check_output(tmp_path / "file", force, "folder")
        with pytest.raises(OutputError, match="is a folder, and a file is to be written"):
            check_output(tmp_path / "folder", force, "file")


def test_an_output_below_a_file_or_where_nothing_may_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file, not a folder"):
        check_output(tmp_path / "file" / "out", False)
    with pytest.raises(OutputError, match="cannot write"):
        check_output("/proc/locum-test", False)


@pytest.mark.parametrize("force", [True, False])
def test_pipes_and_devices_are_no_outputs(tmp_path, force):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for name in ("pipe", "link"):
        with pytest.raises(OutputError, match=rf"{name} is a device, pipe or socket, which is never replaced"):
            check_output(tmp_path / name, force)
    (tmp_path / "file").write_text("")
    (tmp_path / "to-file").symlink_to(tmp_path / "file")
    assert check_output(tmp_path / "to-file", True) == tmp_path / "to-file"


def test_names_that_cannot_be_written_later(tmp_path):
    with pytest.raises(OutputError, match=r"x\\xff is not a name in UTF-8.*rename it"):
        check_output(os.fsdecode(os.fsencode(tmp_path) + b"/x\xff"), False)
    with pytest.raises(OutputError, match="has 201 bytes; allowed: 200"):
        check_output(tmp_path / ("x" * 201), False)
    for kind in ("file", "folder"):
        name = tmp_path / (kind.ljust(200, "x"))
        with whole(name.with_name(f".{name.name}.statistics.safetensors"), kind) as scratch:
            write(scratch, kind, "its neighbours have longer names")


# --- plans ------------------------------------------------------------------------------------------------------


def test_a_plan_comes_back_as_it_was(tmp_path):
    plan = Plan("olmoe", "f", (LayerPlan("x", (KEPT, DROPPED)),), "by hand", {"a": 1}, {"seed": 3})
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan


def test_plans_that_cannot_be_read_name_their_file(tmp_path):
    with pytest.raises((OutputError, PlanError), match=r"nowhere\.json"):
        load_plan(tmp_path / "nowhere.json")
    for content in (b"{", b"\xff\xfe", b"[]", b"{}"):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises((OutputError, PlanError), match=r"bad\.json"):
            load_plan(tmp_path / "bad.json")


# --- provenance -------------------------------------------------------------------------------------------------


def test_provenance_says_who_made_it():
    known = provenance(seed=3)
    assert {"torch", "transformers", "safetensors", "locum"} <= known["versions"].keys()
    assert known["seed"] == 3 and known["time"].endswith("Z") and known["command"]
    json.dumps(known)


def test_fingerprints_keep_their_parts_apart():
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
    assert fingerprint("é") == fingerprint("é".encode())
    assert len(fingerprint(b"")) == 16


# --- tensors with a checksum ----------------------------------------------------------------------------------------


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, 4, generator=generator)
    return {
        "a": drawn,
        "b": drawn.bfloat16().T.contiguous(),
        "c": torch.tensor(2.5),
        "d": torch.empty(0, 3),
        "e": drawn > 0,
    }


def test_tensors_come_back_with_their_notes(tensors, tmp_path):
    write_tensors(tmp_path / "a.st", tensors, {"said": "ä"})
    found, notes = read_tensors(tmp_path / "a.st")
    assert notes == {"said": "ä"} and found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert os.listdir(tmp_path) == ["a.st"]


def test_any_byte_that_changed_is_found(tensors, tmp_path):
    file = tmp_path / "a.st"
    write_tensors(file, tensors, {"said": "yes"})
    written, start = file.read_bytes(), 8 + int.from_bytes(file.read_bytes()[:8], "little")
    places = [*range(start, len(written)), written.index(b"yes")]
    assert len(places) > 80
    for place in places:
        file.write_bytes(written[:place] + bytes([written[place] ^ 1]) + written[place + 1 :])
        with pytest.raises(SafetensorError, match="have changed since they were written"):
            read_tensors(file)


def test_what_has_no_checksum_is_read(tensors, tmp_path):
    save_file(tensors, tmp_path / "a.st", {"said": "yes"})
    assert read_tensors(tmp_path / "a.st")[1] == {"said": "yes"}
