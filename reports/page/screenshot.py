"""A picture of a page, taken by Chromium without a screen: ``python -m reports.page.screenshot DIR OUT.png [VIEW]``.

DIR is where ``winnow-report`` wrote; VIEW is what stands after the # in the page's address: ``cell=ID``, or
filters such as ``corpus=mixed``.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from harness.errors import WinnowError
from reports.page.embed import PAGE

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str | None:
    """The path of the first of ``BROWSERS`` that is installed."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def browser_options() -> list[str]:
    """For runs without a screen; root may not use the browser's sandbox."""
    return ["--headless=new", "--hide-scrollbars", "--disable-gpu", *(["--no-sandbox"] if os.geteuid() == 0 else [])]


def take(
    folder: Path, picture: Path, view: str = "", width: int = 1400, height: int = 1500, seconds: int = 120
) -> None:
    """Writes the page's upper part, ``width`` x ``height`` pixels, as PNG.

    Raises WinnowError where there is no page or no browser, or the browser fails or takes longer than ``seconds``.
    """
    page, browser = folder / PAGE, find_browser()
    if not page.is_file():
        raise WinnowError(f"no {PAGE} in {folder}: run `winnow-report` and give the folder that it wrote to")
    if browser is None:
        raise WinnowError(f"none of {', '.join(BROWSERS)} is installed: `apt-get install chromium`")
    picture.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        size = [f"--window-size={width},{height}", f"--user-data-dir={profile}", f"--screenshot={picture.resolve()}"]
        address = page.resolve().as_uri() + (f"#{view}" if view else "")
        try:
            done = subprocess.run(
                [browser, *browser_options(), *size, address], capture_output=True, text=True, timeout=seconds
            )
        except subprocess.TimeoutExpired as error:
            raise WinnowError(f"{browser} took longer than {seconds} s") from error
    if done.returncode or not picture.is_file():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise WinnowError(f"{browser} ended with {done.returncode} and took no picture: {last}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m reports.page.screenshot", description=__doc__)
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("picture", metavar="OUT.png", type=Path)
    parser.add_argument("view", metavar="VIEW", nargs="?", default="")
    options = parser.parse_args(arguments)
    try:
        take(options.folder, options.picture, options.view)
    except WinnowError as error:
        print(f"screenshot: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
