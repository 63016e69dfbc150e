"""The style sheet of the report. It names no font and no image that would have to be fetched."""

LIGHT = """
--page:#faf9f6;--card:#fff;--ink:#20242b;--soft:#5d6470;--faint:#8b919b;--rule:#e5e2da;--grid:#efede7;
--proxy:#2f6db3;--gold:#b07d14;--base:#80858e;--sft:#23877b;--ppo:#7444b8;--plain:#3d4a63;
--ramp-from:#d5c6ec;--ramp-to:#6a35b5;--good:#1e7d4f;--good-bg:#edf7f1;--bad:#b3372f;--bad-bg:#fcf0ee;
--unsure:#96650a;--unsure-bg:#fdf6e7;--none:#5d6470;--none-bg:#f3f2ee;--limit:#c0584f;
--p0:#5b84b8;--p1:#23877b;--p2:#8a68c4;--p3:#c58a2c;--p4:#b8605a;--p5:#6f7a8c;
"""
DARK = """
--page:#14161a;--card:#1b1e24;--ink:#e7e6e2;--soft:#a9afb9;--faint:#7d848f;--rule:#2d3139;--grid:#262a31;
--proxy:#78aeea;--gold:#deb04c;--base:#9ba1ab;--sft:#54bdae;--ppo:#b18cf0;--plain:#b4c0d8;
--ramp-from:#453560;--ramp-to:#c9a9ff;--good:#5cc893;--good-bg:#182a21;--bad:#f08a80;--bad-bg:#311d1c;
--unsure:#e6b450;--unsure-bg:#2d2617;--none:#a9afb9;--none-bg:#22252b;--limit:#e0837a;
--p0:#6f9bd3;--p1:#45a99b;--p2:#a184dc;--p3:#d3a04b;--p4:#d07d76;--p5:#8791a2;
"""

RULES = """
*{box-sizing:border-box}
html{color-scheme:light dark;scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:15.5px/1.55 ui-sans-serif,system-ui,-apple-system,"Segoe UI",
Roboto,"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1120px;margin:0 auto;padding:40px 32px 72px}
header .over{margin:0;color:var(--faint);font-size:12.5px;letter-spacing:.08em;text-transform:uppercase}
h1{margin:2px 0 4px;font-size:34px;line-height:1.15;font-weight:650;letter-spacing:-.02em;overflow-wrap:anywhere}
header .facts{margin:0;color:var(--soft)}
nav{display:flex;flex-wrap:wrap;gap:2px 18px;margin:18px 0 0;font-size:13.5px}
nav a{color:var(--soft);text-decoration:none;border-bottom:1px solid transparent}
nav a:hover{color:var(--ink);border-color:var(--ink)}
section{margin-top:56px;scroll-margin-top:16px}
h2{margin:0 0 6px;font-size:21px;line-height:1.25;font-weight:640;letter-spacing:-.012em}
h3{margin:0 0 10px;font-size:15.5px;font-weight:620}
h4{margin:0 0 8px;font-size:12.5px;font-weight:640;letter-spacing:.02em}
p{margin:0 0 12px}
small{font-size:.82em;color:var(--faint);font-weight:400}
code,pre{font-family:ui-monospace,"SF Mono",SFMono-Regular,Menlo,Consolas,monospace;font-size:12.5px}
.intro{max-width:74ch;margin:0 0 20px;color:var(--soft)}
.note{margin:10px 0 0;color:var(--faint);font-size:13px;max-width:92ch}
.absent{margin:8px 0;padding:12px 16px;border:1px dashed var(--rule);border-radius:10px;color:var(--soft)}
.verdict{margin-top:28px;padding:26px 28px;border:1px solid var(--rule);border-left:5px solid var(--tone);
border-radius:14px;
background:var(--tone-bg)}
.verdict.good{--tone:var(--good);--tone-bg:var(--good-bg)}.verdict.bad{--tone:var(--bad);--tone-bg:var(--bad-bg)}
.verdict.unsure{--tone:var(--unsure);--tone-bg:var(--unsure-bg)}.verdict.none{--tone:var(--none);
--tone-bg:var(--none-bg)}
.headline{display:flex;gap:18px;align-items:flex-start}
.icon{flex:none;width:46px;height:46px;fill:none;stroke:var(--tone);stroke-width:2;stroke-linecap:round;
stroke-linejoin:round}
.icon circle{stroke-width:1.5}
.word{margin:0;color:var(--tone);font-weight:680;font-size:14px;letter-spacing:.02em}
.sentence{margin:1px 0 0;font-size:22px;line-height:1.36;font-weight:520;letter-spacing:-.008em;max-width:46em;
text-wrap:pretty;overflow-wrap:anywhere}
.verdict .scroll{margin-top:20px}
.verdict table.checks{width:auto;min-width:min(100%,640px)}
.yes{color:var(--good);font-weight:700}.no{color:var(--bad);font-weight:700}
.pointer{margin:16px 0 0;font-size:14px}.pointer a{color:var(--ink);text-underline-offset:3px}
.gaps{margin:18px 0 0;padding-left:20px;color:var(--soft);font-size:14px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(158px,1fr));gap:1px;margin-top:20px;
background:var(--rule);
border:1px solid var(--rule);border-radius:14px;overflow:hidden}
.tile{display:flex;flex-direction:column;padding:16px 18px;background:var(--card)}
.tile span{color:var(--soft);font-size:13px}
.tile b{font-size:26px;line-height:1.3;font-weight:620;letter-spacing:-.02em}
.tile small{letter-spacing:0;font-size:14px}
.tile em{color:var(--faint);font-size:12.5px;font-style:normal}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,312px),1fr));gap:16px}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:16px 28px;align-items:start}
.pair h3{margin-top:22px}
.chart{margin:0;padding:14px 14px 8px;background:var(--card);border:1px solid var(--rule);border-radius:12px}
.chart figcaption{display:flex;flex-wrap:wrap;align-items:baseline;justify-content:space-between;gap:0 10px;font-size:13.5px;
margin:0 2px 4px}
.chart figcaption b{font-weight:620;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.values{font-size:12.5px;text-align:right;margin-left:auto}
.chart svg{display:block;width:100%;height:auto;overflow:visible}
.chart.empty p{color:var(--faint);font-size:13px;margin:4px}
.last{font-weight:620}.key{margin-left:10px;color:var(--soft);white-space:nowrap}.key .last{color:var(--ink)}
.swatch{display:inline-block;width:11px;height:3px;border-radius:2px;margin-right:6px;vertical-align:middle;
background:var(--c)}
.proxy{--c:var(--proxy)}.gold{--c:var(--gold)}.base{--c:var(--base)}.sft{--c:var(--sft)}.ppo{--c:var(--ppo)}
.plain{--c:var(--plain)}.soft{--c:var(--faint)}
svg text{font-size:10.5px;fill:var(--faint);font-family:inherit}
svg .label{fill:var(--soft)}
.grid{stroke:var(--grid)}.axis{stroke:var(--rule)}
.line{fill:none;stroke:var(--c);stroke-width:1.9;stroke-linejoin:round;stroke-linecap:round}
.line.raw{stroke-width:1;opacity:.36}
.dot,.hover circle,.bar circle{fill:var(--c)}.dot.raw{opacity:.36}
.limit{stroke:var(--limit);stroke-dasharray:3 4;opacity:.8}
svg .limit-text{fill:var(--limit);font-size:9.5px}
.hover rect{fill:transparent}.hover circle{opacity:0;stroke:var(--card);stroke-width:1.2}
.hover:hover rect{fill:var(--ink);opacity:.06}.hover:hover circle{opacity:1}
.trail{fill:none;stroke:var(--ppo);stroke-width:1;opacity:.3}
.version{fill:color-mix(in srgb,var(--ramp-to) var(--at),var(--ramp-from));stroke:var(--card);stroke-width:.7}
.version:hover{stroke:var(--ink);stroke-width:1.5}
.mark{fill:var(--c);stroke:var(--card);stroke-width:1.6}
.whisker{stroke:var(--c);stroke-width:2.2;stroke-linecap:round}
.level{stroke:var(--c);stroke-dasharray:5 4}
svg .mark-text{fill:var(--c);font-size:12px;font-weight:680;paint-order:stroke;stroke:var(--card);stroke-width:3px;
stroke-linejoin:round}
.ramp{display:flex;flex-wrap:wrap;align-items:center;gap:4px 10px;color:var(--soft);font-size:13px}
.ramp i{width:110px;height:8px;border-radius:4px;background:linear-gradient(90deg,var(--ramp-from),var(--ramp-to))}
.ramp em{font-style:normal;color:var(--faint);margin-left:14px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14.5px}
th{padding:6px 14px 6px 0;text-align:left;color:var(--soft);font-weight:560;font-size:13px;
border-bottom:1px solid var(--rule)}
td{padding:8px 14px 8px 0;border-bottom:1px solid var(--grid);vertical-align:middle}
tr:last-child td{border-bottom:0}
.num{text-align:right;white-space:nowrap}
th span,h4{color:var(--c,var(--soft))}
.mean{font-weight:600}.ci{color:var(--faint);font-size:12.5px;margin-left:5px}
.verdict td,.verdict th{border-color:color-mix(in srgb,var(--tone) 16%,transparent)}
.verdict td:first-child{width:26px}
.bar{display:block;width:140px;height:18px;margin-left:auto}
.bar .null{stroke:var(--faint)}.bar .whisker{stroke-width:3;opacity:.55}
.card{margin-top:14px;padding:18px 20px;background:var(--card);border:1px solid var(--rule);border-radius:12px}
.gain{margin-left:6px;color:var(--faint);font-weight:450;font-size:13.5px}
.samples{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,250px),1fr));gap:20px 28px}
.one+.one{margin-top:14px;padding-top:14px;border-top:1px solid var(--grid)}
.text{margin:0 0 8px;white-space:pre-wrap;overflow-wrap:anywhere;
font-family:Charter,"Iowan Old Style","Source Serif 4",Georgia,
serif;font-size:16px;line-height:1.5}
.prompt{color:var(--faint)}
.scores{display:flex;flex-wrap:wrap;gap:2px 12px;margin:0;color:var(--faint);font-size:12.5px}
.scores b{font-weight:620;color:var(--c,var(--soft))}
.cut{color:var(--limit)}
.alarms{margin-top:14px;display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,430px),1fr));gap:14px}
.alarm{padding:16px 18px;border:1px solid var(--rule);border-left:4px solid var(--tone);border-radius:10px;
background:var(--card)}
.alarm.alarm{--tone:var(--bad)}.alarm.note{--tone:var(--unsure);margin:0;color:inherit;font-size:inherit}
.alarm h3{margin-bottom:4px}.alarm h3 span{display:block;color:var(--tone);font-size:12.5px;font-weight:660}
.alarm p{color:var(--soft);font-size:14px;overflow-wrap:anywhere}
.alarm dl{display:grid;grid-template-columns:auto 1fr;gap:4px 12px;margin:0;font-size:14px}
.alarm dt{color:var(--faint)}.alarm dd{margin:0}
.quiet{color:var(--good);font-weight:600}
.lanes{padding:8px 20px 14px;background:var(--card);border:1px solid var(--rule);border-radius:12px}
.stage{margin:14px 0 2px}
.lanes+.lanes{margin-top:14px}.stack{display:block;width:100%;height:22px;border-radius:5px;margin:8px 0 12px}
.keys{display:flex;flex-wrap:wrap;gap:4px 24px;margin:0;font-size:13.5px}
.keys svg{width:10px;height:10px;margin-right:7px}.keys b{font-weight:620}
.lane{display:grid;grid-template-columns:300px 1fr 64px 52px;gap:0 14px;align-items:center;min-height:26px;
font-size:13.5px}
.lane>span{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.lane svg{display:block;width:100%;height:14px;background:var(--grid);border-radius:3px}
.lane b{font-weight:500;text-align:right;white-space:nowrap}
.axis-row{margin-top:4px;color:var(--faint)}.axis-row b{font-weight:400;font-size:12px}
.marks{position:relative;height:20px;font-size:12px}
.marks span{position:absolute;top:2px;padding-left:4px;border-left:1px solid var(--rule);white-space:nowrap}
.m0{--c:var(--p0)}.m1{--c:var(--p1)}.m2{--c:var(--p2)}.m3{--c:var(--p3)}.m4{--c:var(--p4)}.m5{--c:var(--p5)}
.m6{--c:var(--proxy)}.m7{--c:var(--gold)}
.line.thin{stroke-width:1.2;opacity:.7}.edge{fill:none;stroke:var(--ink);stroke-dasharray:4 4;opacity:.5}
svg .place{fill:var(--card);font-size:10px;font-weight:680}
.thread .line{opacity:.75}.thread .first{stroke-width:3.4;opacity:1}.thread:hover .line{stroke:var(--ink);opacity:1}
.axis.strong{stroke:var(--faint)}
svg .halo{paint-order:stroke;stroke:var(--card);stroke-width:6px;stroke-linejoin:round}
table.members td{white-space:nowrap}table.members a{color:var(--ink)}
table.members td:first-child{max-width:330px;overflow:hidden;text-overflow:ellipsis}
svg.parallel{max-width:860px;margin:0 auto}.keys{margin:0 0 14px}.keys span{overflow-wrap:anywhere}
abbr{text-decoration:none}
table.short{width:auto;margin-top:18px}.short td{padding-right:32px}
.p0{fill:var(--p0)}.p1{fill:var(--p1)}.p2{fill:var(--p2)}.p3{fill:var(--p3)}.p4{fill:var(--p4)}.p5{fill:var(--p5)}
.lane rect:hover{fill:var(--ink)}
summary{cursor:pointer;color:var(--soft)}
pre{margin:10px 0 16px;padding:14px 16px;overflow-x:auto;background:var(--card);border:1px solid var(--rule);
border-radius:10px;
line-height:1.5}
table.stages{margin-bottom:22px}table.stages code{color:var(--soft);overflow-wrap:anywhere}
footer{margin-top:64px;padding-top:16px;border-top:1px solid var(--rule);color:var(--faint);font-size:13px}
@media(max-width:640px){
body{font-size:15px}main{padding:24px 16px 48px}h1{font-size:27px}section{margin-top:42px}
.verdict{padding:18px 16px;margin-top:20px}.headline{gap:12px}.icon{width:34px;height:34px}.sentence{font-size:18px}
.tiles{grid-template-columns:1fr 1fr}.tile{padding:12px 14px}.tile b{font-size:21px}
.ci{display:block;margin:0;font-size:11.5px}td,th{padding-right:10px}td:last-child,th:last-child{padding-right:0}
.bar{width:96px}
.lane{grid-template-columns:1fr auto 44px;padding:3px 0}.lane svg,.lane .marks{grid-row:2;grid-column:1/-1}
.ramp em{margin-left:0;width:100%}
.card{padding:14px 16px}.lanes{padding:4px 14px 12px}
}
"""

CSS = f":root{{{LIGHT}}}@media(prefers-color-scheme:dark){{:root{{{DARK}}}}}{RULES}".replace("\n", "")
