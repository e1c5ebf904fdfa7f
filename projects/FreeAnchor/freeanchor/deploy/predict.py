"""Detections in files, videos and cameras: `freeanchor predict MODEL SOURCE ...`."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from ..errors import FreeAnchorError, check_folder
from .outputs import WRITERS, Detected
from .predictor import Predictor
from .sources import find_sources

__all__ = ["predict"]


def predict(
    load: Callable[[], Predictor], sources: Sequence[str], out: Path, formats: Sequence[str]
) -> int:
    """Detect in all images of some sources, and write what is found.

    Unreadable images and videos are reported and left out.

    Args:
        load: makes the model, once the sources are known to be there.
        sources: see :func:`freeanchor.deploy.sources.find_sources`.
        out: folder to be written to.
        formats: some of :data:`freeanchor.deploy.outputs.WRITERS`.

    Returns:
        The number of unreadable images and videos.

    Raises:
        FreeAnchorError: a source is not there, or something cannot be written.
        KeyboardInterrupt: by Ctrl-C, with what was found until then written, unless it is how a
            source without a known end is ended.
    """
    check_folder(out)
    errors = []

    def say(text: str) -> None:
        # Names of files may hold what is no character.
        tqdm.write(f"freeanchor predict: {text}".encode(errors="backslashreplace").decode())

    def on_error(error: FreeAnchorError) -> None:
        errors.append(error)
        say(str(error))

    found = find_sources(sources, on_error, say)
    predictor = load()
    lengths = [x.length for x in found]
    total = None if None in lengths else sum(filter(None, lengths))
    is_ended = False
    with ExitStack() as stack:
        names = predictor.class_names
        writers = [stack.enter_context(WRITERS[x](out, names)) for x in dict.fromkeys(formats)]
        bar = stack.enter_context(tqdm(total=total, unit="image"))
        try:
            for source in found:
                stream = predictor.stream(source.images, on_error)
                for number, (image, pixels, instances) in enumerate(stream):
                    name, frame = (source.name, number) if source.name else (str(image), -1)
                    for writer in writers:
                        writer.write(Detected(name, pixels, instances, frame, source.frame_rate))
                    bar.update()
        except KeyboardInterrupt:
            say(f"ended; what was found until then is in {out}")
            is_ended = True
    if is_ended and total is not None:  # else it is how one ends a camera
        raise KeyboardInterrupt
    return len(errors)
