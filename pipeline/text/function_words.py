"""The function words of English, which no image shows. Numbers are none: an image may show three dogs."""

_WORDS = """
a about above across after against all along alongside also although am among amongst an and another any are aren't around
as at be because been before behind being below beneath beside besides between beyond both but by can cannot could did do
does doing down during each either else etc even ever every except few for from had has have having he her here hers herself
him himself his how i if in indeed inside into is isn't it it's its itself just like many may me might mine more most much
must my near neither no nor not of off on once only onto opposite or other others our ours out outside over own past per
perhaps quite rather really same shall she should simply since so some such than that that's the their theirs them
themselves then there there's therefore these they this those though through throughout thus to too toward towards under
underneath unless until unto up upon us versus very via was we were what when where whereas whether which while who whom
whose why will with within without would yet you your yours yourself
"""
FUNCTION_WORDS = frozenset(_WORDS.split())
