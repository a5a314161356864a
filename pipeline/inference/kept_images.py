"""The images that a server has cached: vLLM keeps images by their uuid, so that each is usually sent once.

Later requests about an image send a name of 64 characters instead of the file, and the server does not decode it again:
decoding is single-threaded in vLLM, and the bottleneck for large photos.
"""

from collections import deque

# vLLM keeps 4 GB of prepared images, of 3 to 14 MB each in common sizes.
MAX_KEPT_IMAGES = 256
RECENT_NAMES = 64
MIN_MISSES = 16  # of the recent names, before names are given up


class KeptImages:
    """The images that a server got recently, by Request.shown, so that a request can name them.

    A server drops images by its own rules, and several processes behind one address do not share them. It refuses an unknown
    name, and gets the image again. Names are given up for good when most of the recent ones were missed.
    """

    def __init__(self) -> None:
        self._latest: dict[str, None] = {}
        self._hits: deque[bool] = deque(maxlen=RECENT_NAMES)

    def __contains__(self, shown: str) -> bool:
        return shown in self._latest

    @property
    def is_worth_it(self) -> bool:
        """Whether fewer recent names were missed than MIN_MISSES, or than were hit."""
        hits = sum(self._hits)
        return len(self._hits) - hits < max(MIN_MISSES, hits)

    def add(self, shown: str) -> None:
        """Record that the server has answered a request about these images."""
        self._latest.pop(shown, None)  # it becomes the latest
        self._latest[shown] = None
        if len(self._latest) > MAX_KEPT_IMAGES:
            del self._latest[next(iter(self._latest))]

    def hit(self, shown: str) -> None:
        """Record that the server had these images."""
        self._hits.append(True)
        self.add(shown)

    def miss(self, shown: str) -> None:
        """Record that the server did not have these images."""
        self._hits.append(False)
        self._latest.pop(shown, None)
