"""The checkpoints in the folder of a run: which there are, and which of them counts."""

import logging
from pathlib import Path

from ..errors import FileError
from .files import is_whole, remove_unfinished, replacing

__all__ = [
    "BEST",
    "LAST",
    "checkpoints_in",
    "keep_newest",
    "last_checkpoint",
    "newest_whole",
    "refuse_best_alone",
    "tag_last",
]

logger = logging.getLogger(__name__)

# The file with the name of the checkpoint that was written last.
LAST = "last_checkpoint"
# The best one by a metric, which is none to resume from.
BEST = "model_best"


def tag_last(folder: str | Path, name: str) -> None:
    """Say which checkpoint was written last."""
    with replacing(Path(folder) / LAST) as f:
        f.write(name.encode())


def last_checkpoint(folder: str | Path) -> Path | None:
    """What was written last, which need not be there any more; None if nothing tells."""
    try:
        name = Path((Path(folder) / LAST).read_text().strip()).name  # never outside the folder
    except (OSError, UnicodeDecodeError):
        return None
    return Path(folder) / name if name else None


def checkpoints_in(folder: str | Path) -> list[Path]:
    """What `--resume` takes, in this order: what was written last, and others from the newest."""
    files = [x for x in Path(folder).glob("model_*.pth") if x.stem != BEST]
    files.sort(key=_written, reverse=True)
    return [x for x in dict.fromkeys([last_checkpoint(folder), *files]) if x is not None]


def newest_whole(folder: str | Path) -> str:
    """The newest checkpoint that is not damaged, or if all are, the newest; empty without any."""
    found = checkpoints_in(folder)
    damaged: list[str] = []
    for path in found:
        if is_whole(path):
            if damaged:
                logger.warning(
                    f"{', '.join(damaged)}: gone, empty or damaged. The newest checkpoint that "
                    f"is whole is {path}"
                )
            return str(path)
        damaged.append(str(path))
    # What is wrong with the newest, as an error of the usual kind.
    return str(found[0]) if found else ""


def refuse_best_alone(folder: str | Path) -> None:
    """Refuse to start anew where the best model is all that is left of a run, and would be lost.

    Raises:
        FileError: there is nothing else.
    """
    best = Path(folder) / f"{BEST}.pth"
    if best.is_file() and not checkpoints_in(folder):
        raise FileError(
            f"there is no checkpoint to go on with in {folder}, only {best.name}: to train it "
            f"further, give MODEL.WEIGHTS {best} and another OUTPUT_DIR, without resuming"
        )


def keep_newest(folder: str | Path, count: int) -> None:
    """Remove all but the newest checkpoints of an iteration, and what was left half written."""
    remove_unfinished(folder)
    # The highest iteration need not be the newest: a run that went on from an earlier one, or with
    # more processes, counts from there.
    numbered = sorted(Path(folder).glob("model_" + "[0-9]" * 7 + ".pth"), key=_written)
    for path in numbered[: max(0, len(numbered) - count)]:
        path.unlink(missing_ok=True)


def _written(path: Path) -> tuple[int, str]:
    return path.stat().st_mtime_ns, path.name  # of the same second, where disks know no less
