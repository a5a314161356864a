"""What the licences of images allow. A version lists those of its images; `push` goes by this."""

FLICKR_TERMS = "flickr-terms"  # photos of Flickr: research and education, no redistribution
NTT_EVALUATION = "ntt-evaluation"  # SlideVQA: evaluation within one's own walls
GATED = "gated"  # on the Hub, where its owner lets people in one by one
UNDECLARED = "undeclared"  # on the Hub, without a word about it
STAY_HOME = (FLICKR_TERMS, NTT_EVALUATION, GATED, UNDECLARED)


def non_redistributable(licences: list[str]) -> list[str]:
    """Return those licences under which pixels may not be passed on."""
    return [name for name in licences if name.partition(",")[0] in STAY_HOME]
