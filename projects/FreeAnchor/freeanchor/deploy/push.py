"""A trained model on the Hugging Face Hub: `freeanchor push RUN OWNER/REPO`.

The repository gets a model card and what `hf://OWNER/REPO` needs: model.safetensors, config.yaml
and thresholds.json.
"""

import tempfile
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import build_model

from ..checkpoint import (
    Checkpointer,
    copy_thresholds,
    described_config,
    find,
    read_thresholds,
    write_checkpoint,
)
from ..errors import FreeAnchorError, first_line
from ..visualization import Run, read_metrics
from .checkpoints import class_names, find_checkpoint

__all__ = ["push", "write_package"]

_FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_MANY_CLASSES = 100


def push(source: str | Path, repository: str, public: bool = False) -> str:
    """Put a trained model on the Hub, with the token that `hf auth login` or HF_TOKEN gave.

    Args:
        source: see :func:`freeanchor.deploy.find_checkpoint`.
        repository: OWNER/REPO, made if it is not there.
        public: whether everybody may see it. Otherwise a new one is private, and one that is
            public is refused.

    Returns:
        Its address.

    Raises:
        FreeAnchorError: huggingface_hub is missing, the model cannot be read, or the Hub refuses.
    """
    try:
        import huggingface_hub
    except ImportError as e:
        raise FreeAnchorError("push needs huggingface_hub: pip install huggingface_hub") from e
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise FreeAnchorError(f"{repository} is not of the form OWNER/REPO")
    with tempfile.TemporaryDirectory() as folder:
        write_package(source, repository, Path(folder))
        api = huggingface_hub.HfApi()
        try:
            address = str(api.create_repo(repository, private=not public, exist_ok=True))
            is_private = api.repo_info(repository).private
            if is_private or public:
                api.upload_folder(
                    repo_id=repository, folder_path=folder, commit_message="Add the model"
                )
        except Exception as e:  # of the library, the net or the Hub
            reason = first_line(e)
            if token := huggingface_hub.get_token():
                reason = reason.replace(token, "(the token)")
            raise FreeAnchorError(f"{repository} cannot be pushed to: {reason}") from e
    if not is_private and not public:
        raise FreeAnchorError(
            f"{repository} is there already and public: add --public if everybody may see the model"
        )
    return address


def write_package(source: str | Path, repository: str, folder: Path) -> None:
    """Write the files of a repository.

    Args:
        source: see :func:`freeanchor.deploy.find_checkpoint`.
        repository: its name, for the card.
        folder: where they go.
    """
    cfg = find_checkpoint(source)
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    Checkpointer(model, cfg).load(cfg.MODEL.WEIGHTS, checkpointables=[])
    state = model.state_dict()
    write_checkpoint(folder / "model.safetensors", state, described_config(cfg))
    copy_thresholds(Path(find(cfg.MODEL.WEIGHTS)).parent, folder, state)
    records = read_metrics(Path(source) / "metrics.json")
    card = _card(repository, cfg, records, read_thresholds(folder, state))
    # Where the files were on this machine is nobody's concern.
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = "", "output"
    (folder / "config.yaml").write_text(cfg.dump())
    (folder / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")


def _card(repository: str, cfg: CfgNode, records: list[dict[str, float]], thresholds: Any) -> str:
    """The model card, in Markdown, from what the run left."""
    names = class_names(cfg)
    shown = [_plain(x) for x in names[:_MANY_CLASSES]]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    iterations = int(records[-1]["iteration"]) if records else 0
    lines = [
        "---",
        "# Say under which license the model may be used:",
        "# license: ",
        "library_name: detectron2",
        "pipeline_tag: object-detection",
        "tags: [freeanchor, detectron2, object-detection]",
        "---",
        f"# {repository.rpartition('/')[2]}",
        "",
        f"A {cfg.MODEL.META_ARCHITECTURE} detector, trained with FreeAnchor for Detectron2: "
        f"{iterations or 'an unknown number of'} iterations of {cfg.SOLVER.IMS_PER_BATCH} images, "
        f"data {_plain(', '.join(cfg.DATASETS.TRAIN)) or 'unknown'}. config.yaml has all keys.",
        "",
        f"Classes: {', '.join(shown)}{more}.",
        "",
        *_results(cfg, records),
    ]
    if thresholds is not None:
        scores = ", ".join(f"{_plain(k)} {v:.2f}" for k, v in thresholds.classes.items())
        lines += [
            f"Recommended scores (best F1 on {_plain(thresholds.dataset)}), used by default: "
            f"{scores}.",
            "",
        ]
    lines += [
        "```",
        f"freeanchor predict hf://{repository} picture.jpg",
        "```",
        "",
        "```python",
        "from freeanchor.deploy import Predictor",
        "",
        f'(found,) = Predictor("hf://{repository}")(["picture.jpg"])',
        "```",
        "",
    ]
    return "\n".join(lines)


def _results(cfg: CfgNode, records: list[dict[str, float]]) -> list[str]:
    """Tables of the last evaluation on each data set."""
    lines = []
    for name in cfg.DATASETS.TEST:
        evaluated = Run("", cfg, records).evaluated(name)
        if not evaluated:
            continue
        last = evaluated[-1]
        # The training may have gone on behind it, and so the weights.
        iteration = int(last["iteration"])
        when = f", after {iteration} iterations" if iteration < records[-1]["iteration"] else ""
        figures = [(x, last[f"bbox/{x}"]) for x in _FIGURES if f"bbox/{x}" in last]
        figures += [
            (_plain(k.removeprefix("bbox/")), v)
            for k, v in last.items()
            if k.startswith("bbox/AP-")
        ]
        lines += [f"On {_plain(name)}{when}, in %:", "", "| figure | value |", "|---|---|"]
        lines += [f"| {label} | {value:.1f} |" for label, value in figures]
        lines += [""]
    return lines


def _plain(text: str) -> str:
    """Text that is no markup, in one line."""
    text = " ".join(text.split())
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in text)
