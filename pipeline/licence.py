"""What the licences of images allow. A version lists those of its images; `push` goes by this."""

FLICKR_TERMS = "flickr-terms"  # photos of Flickr: research and education, no redistribution
NTT_EVALUATION = "ntt-evaluation"  # SlideVQA: evaluation within one's own walls
STAY_HOME = (FLICKR_TERMS, NTT_EVALUATION)


def staying_home(licences: list[str]) -> list[str]:
    """Return those licences under which pixels may not be passed on."""
    return [licence for licence in licences if licence in STAY_HOME]
