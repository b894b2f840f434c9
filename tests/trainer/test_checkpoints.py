"""A checkpoint counts only if it is whole."""

import json
import logging
import os
import shutil

import pytest
import torch
from trainer_helpers import losses, make_trainer, train, weights
from transformers import Trainer

from hf_mars.trainer.checkpoint_saving import MarsCheckpointCallback, rotate
from hf_mars.trainer.checkpoints import (
    MANIFEST,
    UNFINISHED,
    CheckpointError,
    begin,
    check_whole,
    fault,
    finish,
    leave_branch,
    newest_whole,
    read_manifest,
)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def flip(path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 16] = bytes(byte ^ 0xFF for byte in content[middle : middle + 16])
    path.write_bytes(bytes(content))


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "cut": cut,
    "empty": lambda path: path.write_bytes(b""),
    "zeros": zeros,
    "flipped": flip,
}
NEEDED = ("trainer_state.json", "scheduler.pt", "optimizer.pt", "rng_state.pth", "model.safetensors")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's folder with checkpoint-2, checkpoint-4 and checkpoint-6; the run."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, train(folder, save_strategy="steps", save_steps=2)


@pytest.fixture
def run_dir(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "run")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*NEEDED, "training_args.bin", "config.json"])
def test_a_damaged_file_is_noticed_and_the_checkpoint_before_is_taken(saved, run_dir, name, damage):
    DAMAGES[damage](run_dir / "checkpoint-6" / name)
    search = newest_whole(run_dir)
    assert search.checkpoint == run_dir / "checkpoint-4"
    assert [path.name for path, why in search.passed_over if name in why] == ["checkpoint-6"]


def test_adapters_need_their_configuration(run_dir):
    folder = run_dir / "checkpoint-6"
    (folder / "mars_manifest.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    assert fault(folder) == "adapter_config.json is missing"
    (folder / "adapter_config.json").write_text("{}")
    assert fault(folder) is None


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "zeros"])
@pytest.mark.parametrize("name", NEEDED)
def test_so_it_is_without_a_manifest(run_dir, name, damage):
    """As stock Trainers and earlier versions leave checkpoints."""
    for manifest in run_dir.glob(f"*/{MANIFEST}"):
        manifest.unlink()
    assert newest_whole(run_dir).checkpoint == run_dir / "checkpoint-6"
    DAMAGES[damage](run_dir / "checkpoint-6" / name)
    search = newest_whole(run_dir)
    assert search.checkpoint == run_dir / "checkpoint-4"
    if damage != "missing" or name not in ("optimizer.pt", "model.safetensors"):
        assert name in search.passed_over[0][1]


def test_flipped_bytes_without_a_manifest_are_seen_where_the_format_has_checksums(run_dir):
    (run_dir / "checkpoint-6" / MANIFEST).unlink()
    flip(run_dir / "checkpoint-6" / "optimizer.pt")
    assert "optimizer.pt" in fault(run_dir / "checkpoint-6")


def test_the_manifest(saved):
    folder = saved[0] / "checkpoint-6"
    manifest = read_manifest(folder)
    assert (manifest["step"], manifest["world_size"], manifest["engine"]) == (6, 1, "NO")
    assert manifest["optimizer"] == "mars_adamw"
    assert manifest["files"].keys() == {path.name for path in folder.iterdir()} - {MANIFEST}
    assert all("sha256" in entry for entry in manifest["files"].values())
    assert not (folder / UNFINISHED).exists()


def test_checksums_of_large_files_on_request_alone(saved, run_dir, monkeypatch):
    monkeypatch.setattr("hf_mars.trainer.checkpoints.SMALL", 5000)
    folder = run_dir / "checkpoint-6"
    finish(folder, {})
    assert "sha256" not in read_manifest(folder)["files"]["optimizer.pt"]
    flip(folder / "model.safetensors")
    assert fault(folder) is None
    shutil.copy(saved[0] / "checkpoint-6" / "model.safetensors", folder)
    finish(folder, {}, checksums="full")
    flip(folder / "model.safetensors")
    assert "model.safetensors" in fault(folder)


def test_checkpoint_checksums_are_checked(tmp_path):
    with pytest.raises(ValueError, match="checkpoint_checksums must be 'small' or 'full', got 'some'"):
        make_trainer(tmp_path, checkpoint_checksums="some")


def test_transformers_mark_is_honoured(run_dir):
    (run_dir / "checkpoint-6" / UNFINISHED).touch()
    assert newest_whole(run_dir).checkpoint == run_dir / "checkpoint-4"


def test_resuming_takes_the_newest_whole_one_and_says_so(saved, run_dir, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    cut(run_dir / "checkpoint-6" / "trainer_state.json")
    trainer = train(run_dir, resume=True)
    assert f"takes {run_dir / 'checkpoint-4'} and passes over checkpoint-6 (trainer_state.json has" in caplog.text
    assert losses(trainer) == losses(saved[1])
    assert all(map(lambda a, b: a.equal(b), weights(trainer), weights(saved[1])))


def test_a_broken_one_that_is_named_is_refused(run_dir):
    (run_dir / "checkpoint-6" / "scheduler.pt").unlink()
    with pytest.raises(CheckpointError, match=r"scheduler.pt is missing; the newest whole .* is .*checkpoint-4$"):
        train(run_dir, resume=str(run_dir / "checkpoint-6"))
    for step in (2, 4):
        shutil.rmtree(run_dir / f"checkpoint-{step}")
    with pytest.raises(CheckpointError, match=r"no whole checkpoint in .*; not whole: checkpoint-6 .scheduler.pt"):
        train(run_dir, resume=True)


def test_a_later_one_that_is_not_whole_is_no_branch(run_dir, caplog):
    """Also where only a checksum tells."""
    damaged = run_dir / "checkpoint-6" / "scheduler.pt"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 255
    damaged.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        leave_branch(run_dir / "checkpoint-2")
    assert "checkpoint-4 stays where it is, on a branch that is left" in caplog.text


def test_a_branch_that_was_left_is_not_gone_back_to(run_dir, caplog):
    """Before and after the first save of the run that went on from an earlier step."""
    trainer = make_trainer(run_dir, save_strategy="steps", save_steps=2, max_steps=4)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=str(run_dir / "checkpoint-2"))
    assert "checkpoint-4, checkpoint-6 stay where they are, on a branch that is left" in caplog.text
    search = newest_whole(run_dir)
    assert search.checkpoint == run_dir / "checkpoint-4"
    assert [(path.name, why) for path, why in search.passed_over] == [
        ("checkpoint-6", "of a branch that was left for an earlier step")
    ]
    shutil.rmtree(run_dir / "checkpoint-4")  # as if the run had been killed before its first save
    assert newest_whole(run_dir).checkpoint == run_dir / "checkpoint-2"


def test_a_save_that_is_cut_off_leaves_no_whole_checkpoint_of_two_runs(run_dir, monkeypatch):
    """Even where it is a second one to the same folder."""
    trainer = make_trainer(run_dir, save_strategy="steps", save_steps=2)

    class CutOff(BaseException):
        pass

    def cut_off(folder):
        raise CutOff

    monkeypatch.setattr(trainer, "_save_rng_state", cut_off)
    with pytest.raises(CutOff):
        trainer.train(resume_from_checkpoint=str(run_dir / "checkpoint-2"))
    assert (run_dir / "checkpoint-4" / "optimizer.pt").exists()
    assert fault(run_dir / "checkpoint-4") == "was not saved to its end"
    assert newest_whole(run_dir).checkpoint == run_dir / "checkpoint-2"


def test_rotation_spares_the_last_whole_one(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1)
    seen = []
    save_state = trainer._save_rng_state

    def spy(folder):
        seen.append(sorted(path.name for path in tmp_path.glob("checkpoint-*") if fault(path) is None))
        save_state(folder)

    monkeypatch.setattr(trainer, "_save_rng_state", spy)
    trainer.train()
    assert seen == [[], ["checkpoint-2"], ["checkpoint-4"]]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]


def test_rotation_leaves_what_is_not_whole(run_dir):
    """Of a run that was given up, beside which a new one saves."""
    (run_dir / "checkpoint-2" / "optimizer.pt").unlink()
    os.utime(run_dir / "checkpoint-2", (1e9, 1e9))
    rotate(run_dir, 1, None)
    assert sorted(path.name for path in run_dir.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]


def test_rotation_deletes_nothing_while_the_newest_is_broken(run_dir):
    (run_dir / "checkpoint-6" / "optimizer.pt").unlink()
    os.utime(run_dir / "checkpoint-6", (2e9, 2e9))
    rotate(run_dir, 1, None)
    assert len(list(run_dir.glob("checkpoint-*"))) == 3


def test_a_symbolic_link_is_neither_written_through_nor_emptied(run_dir, tmp_path, caplog):
    kept = shutil.move(run_dir / "checkpoint-6", tmp_path / "kept")
    (run_dir / "checkpoint-6").symlink_to(kept)
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    rotate(run_dir, 1, None)
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    with caplog.at_level(logging.WARNING):
        train(run_dir, resume=None, save_strategy="steps", save_steps=6)
    assert "is a symbolic link" in caplog.text
    assert fault(run_dir / "checkpoint-6") is None and not (run_dir / "checkpoint-6").is_symlink()
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before


def test_a_full_disk_is_one_sentence_and_leaves_the_checkpoint_before(run_dir, monkeypatch):
    trainer = make_trainer(run_dir, save_strategy="steps", save_steps=2)

    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "_save_rng_state", full)
    with pytest.raises(CheckpointError, match=r"checkpoint-4 could not be saved .*No space left.*checkpoint-2$"):
        trainer.train(resume_from_checkpoint=str(run_dir / "checkpoint-2"))


def test_the_callback_for_other_trainers(tmp_path):
    trainer = make_trainer(tmp_path, Trainer, save_strategy="steps", save_steps=3)
    trainer.add_callback(MarsCheckpointCallback(trainer))
    trainer.train()
    assert [fault(tmp_path / f"checkpoint-{step}") for step in (3, 6)] == [None, None]
    assert read_manifest(tmp_path / "checkpoint-6")["step"] == 6


def test_every_process_s_random_state_is_asked_for(run_dir):
    folder = run_dir / "checkpoint-6"
    for rank in range(3):
        shutil.copy(folder / "rng_state.pth", folder / f"rng_state_{rank}.pth")
    (folder / "rng_state.pth").unlink()
    (folder / MANIFEST).unlink()
    assert fault(folder) is None
    (folder / "rng_state_1.pth").unlink()
    assert fault(folder) == "rng_state_1.pth is missing"


def test_a_manifest_of_a_later_version_is_not_guessed_at(run_dir):
    path = run_dir / "checkpoint-6" / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match="its format is 99"):
        check_whole(path.parent)


def test_begin_takes_the_proof_away(run_dir):
    begin(run_dir / "checkpoint-6")
    assert read_manifest(run_dir / "checkpoint-6") is None
    assert fault(run_dir / "checkpoint-6") == "was not saved to its end"


def test_a_run_that_has_all_its_steps_takes_no_other(tmp_path):
    """Killed after its last checkpoint, before its end."""
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    done = make_trainer(tmp_path, **settings)
    done.train()
    again = make_trainer(tmp_path, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3 and again.is_finished and not done.is_finished
    assert losses(again) == losses(done)
    assert all(torch.equal(a, b) for a, b in zip(weights(again), weights(done), strict=True))
