"""What goes in: where images come from, what identifies them, and how they become pixels.

Listing and reading work without torch; only :mod:`featurepipe.images.decode` imports it, so it is not imported here.
"""

from featurepipe.images.listing import SCHEMA
from featurepipe.images.memory import MemorySource
from featurepipe.images.open import open_source
from featurepipe.images.regions import key_of
from featurepipe.images.source import Source

__all__ = ["SCHEMA", "MemorySource", "Source", "key_of", "open_source"]
