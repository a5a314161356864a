"""Write captions of drawn scenes."""

from pipeline.scenes.scene import Scene

STYLES = ("brief", "detailed")
NUMBER_WORDS = ("no", "one", "two", "three", "four")


def caption(scene: Scene, style: str) -> str:
    """Describe a scene. `brief` is one sentence without places, and `detailed` states each object's place."""
    names = [f"{thing.size} {thing.color} {thing.shape}" for thing in scene.objects]
    if style == "brief":
        *first, last = [f"a {name}" for name in names]
        listed = f"{', '.join(first)} and {last}" if first else last
        return f"{listed.capitalize()} on a {scene.background} background."
    count = f"{NUMBER_WORDS[len(names)].capitalize()} {'object' if len(names) == 1 else 'objects'}"
    pairs = zip(names, scene.objects, strict=True)
    sentences = [f"A {name} is at the {thing.place}." for name, thing in pairs]
    return " ".join([f"{count} on a {scene.background} background.", *sentences])
