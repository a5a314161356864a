"""What a server has of the images that were sent to it: vLLM keeps them by their uuid, so that one is usually sent once.

The tasks of an image then send a name of 64 characters instead of the file, and the server neither decodes it again nor waits
for it: its one thread for that is what large photos wait for first.
"""

from collections import deque

# The last ones that a server got. vLLM keeps 4 GB of prepared images, of 3 to 14 MB each in sizes that are usual here.
MAX_KEPT_IMAGES = 256
JUDGED_NAMES, MIN_MISSED_NAMES = 64, 16  # the last ones, and how many of them are missed at least before names are given up
PAUSE_ANSWERS = 512  # about images, before names are tried again


class KeptImages:
    """The images that a server has got of late, and so can be named to it (by Request.shown).

    A server forgets images by rules of its own, and several processes behind one address do not share them: it then refuses a
    name, and gets the image again. If it has refused most of the last names, none is sent for a while.
    """

    def __init__(self) -> None:
        self._latest: dict[str, None] = {}
        self._known: deque[bool] = deque(maxlen=JUDGED_NAMES)
        self._pause = 0

    def __contains__(self, shown: str) -> bool:
        return shown in self._latest

    @property
    def is_worth_it(self) -> bool:
        """Whether names have been known more often than not of late, as far as is known."""
        known = sum(self._known)
        return len(self._known) - known < max(MIN_MISSED_NAMES, known)

    def add(self, shown: str) -> None:
        """Note that the server has answered a request about these images."""
        self._latest.pop(shown, None)  # it becomes the latest
        self._latest[shown] = None
        if len(self._latest) > MAX_KEPT_IMAGES:
            del self._latest[next(iter(self._latest))]
        if not self.is_worth_it:
            self._pause += 1
            if self._pause == PAUSE_ANSWERS:
                self._known.clear()
                self._pause = 0

    def forget(self, shown: str) -> None:
        """Note that the server may not have these images."""
        self._latest.pop(shown, None)

    def count(self, *, is_known: bool) -> None:
        """Note whether the server knew images by their names."""
        self._known.append(is_known)
