"""A picture of demonstrations: a row for each episode, moments from left to right."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from xdfast.atomic import write_whole
from xdfast.robot.demos.convert import resize_frames
from xdfast.robot.demos.errors import DemoError
from xdfast.robot.demos.open import Demonstrations

__all__ = ["contact_sheet"]

_GAP, _LABEL = 4, 84  # pixels between pictures, and for the text beside a row
_PAPER, _INK = (255, 255, 255), (40, 40, 40)


def contact_sheet(
    demos: Demonstrations, out: str | Path, *, rows: int = 10, columns: int = 8, height: int = 96
) -> Path:
    """Writes a PNG: ``columns`` moments, first and last included, of the first ``rows`` episodes; a line for each camera.

    Args:
        demos: what to show.
        out: the file, ending in ``.png``.
        rows: episodes at most.
        columns: moments, at least 2.
        height: pixels of each picture; the width follows.

    Raises:
        DemoError: an episode is not sound, or the file cannot be written.
    """
    from PIL import Image, ImageDraw

    out = Path(out).expanduser()
    if out.suffix.lower() != ".png":
        raise DemoError(f"{out} is not the name of a PNG; end it in .png")
    if rows < 1 or columns < 2 or height < 8:
        raise DemoError(f"rows={rows}, columns={columns}, height={height}: at least 1 row, 2 columns and 8 pixels")
    widths = {camera: max(1, round(height * w / h)) for camera, (h, w) in demos.image_sizes.items()}
    episodes = min(rows, len(demos))
    lines = [(i, camera) for i in range(episodes) for camera in demos.cameras]
    sheet = Image.new(
        "RGB", (_LABEL + columns * (max(widths.values()) + _GAP) + _GAP, len(lines) * (height + _GAP) + _GAP), _PAPER
    )
    draw = ImageDraw.Draw(sheet)
    for line, (i, camera) in enumerate(lines):
        if camera == demos.cameras[0]:
            episode = demos.episode(i)
        moments = np.linspace(0, len(episode) - 1, columns).round().astype(int)
        top = _GAP + line * (height + _GAP)
        text = f"episode {i}\n{camera[:12]}\n{len(episode)} steps"
        if episode.success is not None:
            text += "\nsuccess" if episode.success.any() else "\nno success"
        draw.multiline_text((_GAP, top), text, fill=_INK, spacing=2)
        for column, frame in enumerate(resize_frames(episode.images[camera][moments], (height, widths[camera]))):
            sheet.paste(Image.fromarray(frame), (_LABEL + column * (max(widths.values()) + _GAP), top))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, lambda aside: sheet.save(aside, format="PNG"))
    except OSError as error:
        raise DemoError(f"cannot write {out}: {error}; name another file") from error
    return out
