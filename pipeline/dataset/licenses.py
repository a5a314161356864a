"""Licenses of images. A version lists those of its images; `push` redistributes pixels only if they allow it.

Pixels whose license nobody has stated are pushed to a private repository, unless the user says that they are public.
"""

UNKNOWN = "unknown"  # files of a user, of which no license was stated
FLICKR_TERMS = "flickr-terms"  # photos of Flickr: research and education, no redistribution
NTT_EVALUATION = "ntt-evaluation"  # SlideVQA: internal evaluation only
GATED = "gated"  # on the Hub, with access granted by the owner to each user
UNDECLARED = "undeclared"  # on the Hub, without a declared license
KNOWN_LICENSES = (  # by the Hub's names, of those that let pixels be passed on
    "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0",
    "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0", "apache-2.0", "mit", "odc-by",
    "odbl", "pddl",
)  # fmt: skip
NON_REDISTRIBUTABLE = (FLICKR_TERMS, NTT_EVALUATION, GATED, UNDECLARED)


def non_redistributable(licenses: list[str]) -> list[str]:
    """Return the licenses under which pixels may not be redistributed."""
    return [name for name in licenses if name.partition(",")[0] in NON_REDISTRIBUTABLE]
