"""Attacks on pages, cards and terminals, from lists of DOMPurify, OWASP and terminal emulators."""

HTML = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>",
    "<svg><animate onbegin=alert(1) attributeName=x dur=1s>", "<svg/onload=alert(1)>",
    "<math><mtext></p><script>alert(1)</script>", "<iframe srcdoc='<script>parent.alert(1)</script>'>",
    "<a href=javascript:alert(1)>x</a>", "<form action=javascript:alert(1)><input type=submit>",
    "<details open ontoggle=alert(1)>", "<!--><img src=x onerror=alert(1)>-->",
    "</script><script>alert(1)</script>",
    "</title></style></textarea></noscript></template><img src=x onerror=alert(1)>",
    "'\"><img src=x onerror=alert(1)>", "{{ 7*7 }}${7*7}<%= 7*7 %>{% raw %}",
    "<style>@import 'http://evil.example/x.css'</style>", "<base href=http://evil.example/>",
    "<meta http-equiv=refresh content='0;url=http://evil.example'>", "<object data=javascript:alert(1)>",
    "\u2028alert(1)//", "&lt;script&gt;alert(1)&lt;/script&gt;", "<ScRiPt\x0b>alert(1)</sCrIpT>", "__proto__",
    "constructor",
)  # fmt: skip
MARKDOWN = (
    "[x](javascript:alert(1))", "![x](http://evil.example/pixel.png)",
    "![x][1]\n\n[1]: http://evil.example/pixel.png", "<http://evil.example>",
    "http://evil.example and www.evil.example and evil@evil.example", "`x`<img src=x onerror=alert(1)>",
    "``` \n</code></pre><script>alert(1)</script>", "````\n\n<img src=x onerror=alert(1)>\n\n````",
    "\n---\nlicense: mit\n---\n", "\n\n# A heading", "x | y | z\n|---|---|\n| a | b |",
    "*\n  - a list\n> a quote", "\\`\\<img src=x onerror=alert(1)>", "[^1]: a footnote [^1]",
    "$$\\href{javascript:alert(1)}{x}$$", "~~~\n<script>alert(1)</script>\n~~~",
)  # fmt: skip
TERMINAL = (
    "\x1b]52;c;cm0gLXJmIC8=\x07", "\x1b]0;title\x07", "\x1b[2J\x1b[1;1H",
    "\x1b]8;;http://evil.example\x1b\\click\x1b]8;;\x1b\\", "\x1bP+q544e\x1b\\", "\x9b31mred",
    "\x9d52;c;AAAA\x9c", "over\rwritten", "\x08\x08\x08\x08", "\x07\x07", "\u202egpj.exe", "\u2066a\u2069",
    "\x1b[6n\x1b[c", "\x1b_Gi=1;AAAA\x1b\\", "\ud800", "\x00",
)  # fmt: skip
ALL = (*HTML, *MARKDOWN, *TERMINAL)
