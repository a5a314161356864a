from pipeline.progress import NullProgress


class Notes(NullProgress):
    """Records messages and warnings, in order."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str, *, transient: bool = False) -> None:
        self.texts.append(text)

    def warn(self, text: str) -> None:
        self.texts.append(f"warning: {text}")
