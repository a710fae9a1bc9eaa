"""Which checkpoint a run starts from, and what a new run may replace."""

import json
import re
import shutil
from pathlib import Path

_NAME = re.compile(r"checkpoint-(\d+)")


def find_checkpoint(output_dir: Path, resume: str | None, *, overwrite: bool) -> str | None:
    """Directory of the checkpoint to resume from, None for a run from the start.

    Args:
        output_dir: the run's directory.
        resume: "true" for the newest complete checkpoint of `output_dir`, a directory, or "false".
        overwrite: a run from the start may replace the run that `output_dir` holds.

    Raises:
        ValueError: there is nothing to resume from, the checkpoint lacks what an exact resume
            needs, or a run from the start would mix with the run that is there.
    """
    if resume is None or resume.lower() == "false":
        existing = [p.name for p in output_dir.glob("*.safetensors")]
        existing += [p.name for p in _checkpoints(output_dir)]
        if existing and not overwrite:
            raise ValueError(
                f"output_dir: {output_dir} holds {existing[-1]} of a run; name "
                f"--resume_from_checkpoint true, --overwrite_output_dir true or another directory"
            )
        return None
    if resume.lower() != "true":
        if not Path(resume).is_dir():
            raise ValueError(
                f"resume_from_checkpoint: expected true, false or the directory of a checkpoint, "
                f"got {resume!r}, which is none"
            )
        if missing := _missing(Path(resume)):
            raise ValueError(f"resume_from_checkpoint: {resume} lacks {missing}")
        return resume
    for checkpoint in reversed(_checkpoints(output_dir)):
        missing = _missing(checkpoint)
        if not missing:
            return str(checkpoint)
        print(f"{checkpoint} lacks {missing}, trying the one before", flush=True)
    raise ValueError(f"resume_from_checkpoint: no complete checkpoint in {output_dir}")


def remove_run(output_dir: Path) -> None:
    """Remove the checkpoints and results that a run from the start replaces.

    The rest it writes over.
    """
    for checkpoint in _checkpoints(output_dir):
        shutil.rmtree(checkpoint)
    if (output_dir / "eval").is_dir():
        shutil.rmtree(output_dir / "eval")


def _checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints by step."""
    found = [p for p in output_dir.iterdir() if p.is_dir() and _NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def _missing(checkpoint: Path) -> str | None:
    """What a checkpoint lacks; one that was being written when its run was killed ends early."""
    # save_only_model leaves out the first two; the last is what the trainer writes last.
    if not (checkpoint / "scheduler.pt").is_file():
        return "scheduler.pt"
    if not any(checkpoint.glob("rng_state*.pth")):
        return "rng_state.pth"
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "a readable trainer_state.json"
    return None
