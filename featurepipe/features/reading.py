"""Opening a source as asked for, and reading images from one that may fail for a moment, or go away in the middle of a night."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pyarrow as pa

from featurepipe.errors import FeaturepipeError, Reject, SourceError, Unavailable
from featurepipe.features.options import SourceOptions
from featurepipe.images import Source, open_source
from featurepipe.images.regions import Payload, split_region
from featurepipe.store import open_arrays

WAITS = (0.2, 1.0, 3.0)
"""Seconds before each further try of an image that cannot be read now."""
PATIENCE = 32
"""So many images in a row may be tried again in vain; then nothing is, since it does not help."""
DOUBT = 64
"""So many unreadable images in a row raise the question whether the source is still there."""
RELIEF = 8
"""An image that can be read weighs as much as so many that cannot."""
PROBES = 16
"""Images from all over the listing that answer the question; one that is readable may be chance."""
GONE = ("missing", "unreadable")
"""Codes of the reasons that all images of a source have when it is gone."""


def opened(source: Any, options: SourceOptions) -> Source:
    """Opens a source as asked for, with all that can read image arrays; raises as `featurepipe.images.open_source`."""
    return open_source(
        source,
        array_readers={".h5": open_arrays, ".hdf5": open_arrays},
        only_under=options.only_under,
        path_column=options.path_column,
        boxes=options.boxes,
        images=options.images,
        frames=options.frames,
    )


class PatientReader:
    """Reads images for several threads: tries again for a while, and notices when the source as a whole has gone.

    A disk that fails, a server that is busy and a share that hiccups are all over in seconds, so an image is tried
    again in the thread that reads it. As soon as that proves useless it is given up, since no night is long enough to
    wait for every image of a broken disk.

    A share that was unmounted leaves an empty folder, where every image is missing. So when nearly all of many images in a
    row cannot be read, a few from all over the listing are tried; if none of those can be read either, the source is gone,
    and none of this is the images' fault.

    Args:
        source: where the images are.
        locators: of every image listed.

    Attributes:
        tried_again: how many images were readable only at a further try.
    """

    def __init__(self, source: Source, locators: pa.ChunkedArray) -> None:
        self._source, self._locators = source, locators
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._patience = PATIENCE
        self._doubt, self._limit = 0, DOUBT
        self._read_any = False
        self.tried_again = 0

    def __call__(self, locator: bytes) -> Payload:
        """Reads one image.

        Raises:
            Reject: it cannot be read.
            SourceError: nothing can be read any more.
        """
        try:
            payload = self._patiently(locator)
        except Reject as reject:
            if str(reject).startswith(GONE) and self._is_doubtful():
                self.check(str(reject))
            raise
        with self._lock:
            self._read_any = True
            self._doubt = max(0, self._doubt - RELIEF)
        return payload

    def close(self) -> None:
        """Ends all waiting; images that are being tried again are rejected at once."""
        self._closed.set()

    def check_at_end(self) -> None:
        """Looks whether the source is there, if the last images could not be read while earlier ones could.

        Raises:
            SourceError: it has gone.
        """
        if self._read_any and self._doubt:
            self.check("the last images could not be read")

    def check(self, reason: str) -> None:
        """Looks whether the source is there, by reading some of its images.

        Args:
            reason: what raises the question.

        Raises:
            SourceError: it has gone.
        """
        picked = np.unique(np.linspace(0, len(self._locators) - 1, PROBES).astype(int)).tolist()
        readable = sum(self._is_readable(self._locators[place].as_py()) for place in picked)
        if readable <= len(picked) // PROBES:
            raise SourceError(
                f"{self._source.location}: nearly no image can be read any more, neither one after another nor "
                f"{len(picked)} picked all over ({reason}). Is it still mounted? Everything computed so far is kept"
            )
        with self._lock:
            self._doubt, self._limit = 0, 2 * self._limit

    def _patiently(self, locator: bytes) -> Payload:
        try:
            return self._source.read(locator)
        except (Unavailable, SourceError) as error:
            return self._again(locator, error)

    def _again(self, locator: bytes, error: FeaturepipeError) -> Payload:
        """Tries again what failed with ``error``, for as long as that helps now and then."""
        for wait in WAITS if self._patience > 0 else ():
            if self._closed.wait(wait):
                break
            try:
                payload = self._source.read(locator)
            except (Unavailable, SourceError) as latest:
                error = latest
            else:
                with self._lock:
                    self._patience = PATIENCE
                    self.tried_again += 1
                return payload
        with self._lock:
            self._patience -= 1
        raise error

    def _is_doubtful(self) -> bool:
        with self._lock:
            self._doubt += 1
            return self._doubt == self._limit  # so that one thread asks

    def _is_readable(self, locator: bytes) -> bool:
        try:
            self._source.read(split_region(locator)[0])  # the image: that a box is wrong is no matter of the source
        except Exception:  # noqa: BLE001  # whatever it is, this image cannot be read
            return False
        return True
