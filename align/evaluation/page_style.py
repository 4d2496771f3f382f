"""The looks of the report page."""

STYLE = """
:root{--paper:#fbfaf8;--card:#fff;--ink:#1c2024;--soft:#5c6670;--faint:#8b949e;--line:#e6e2db;--grid:#efece6;
--good:#1a7f5a;--bad:#b83a4b;--even:#a5adb5;--wash:#f4f1ec;
--c0:#56606b;--c1:#2f6fde;--c2:#d9822b;--c3:#2b9d83;--c4:#a2559e;--c5:#c74a54;--c6:#7b8b2d;--c7:#4a5fa8}
@media (prefers-color-scheme:dark){:root{--paper:#14171a;--card:#1b1f23;--ink:#e8eaed;--soft:#a9b2bb;--faint:#79838d;
--line:#2d3339;--grid:#262b30;--good:#4cc79a;--bad:#f0808d;--even:#69737c;--wash:#20252a;
--c0:#a3adb7;--c1:#79a8ff;--c2:#f0a861;--c3:#5fd0b5;--c4:#cf93cc;--c5:#ef8890;--c6:#b4c365;--c7:#93a5ea}}
*{box-sizing:border-box}html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.55 ui-sans-serif,system-ui,-apple-system,"Segoe UI",
"Helvetica Neue",Arial,"Noto Sans","Noto Sans CJK SC","PingFang SC",sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1080px;margin:0 auto;padding:0 28px 72px}
header{padding:56px 0 20px}
.eyebrow{margin:0;color:var(--faint);font-size:12px;letter-spacing:.09em;text-transform:uppercase;font-weight:600}
h1{margin:6px 0 8px;font-size:34px;line-height:1.18;letter-spacing:-.022em;font-weight:680;overflow-wrap:anywhere}
.lede{margin:0;color:var(--soft);max-width:70ch}
nav{display:flex;flex-wrap:wrap;gap:6px 20px;padding:14px 0;border-bottom:1px solid var(--line);margin-bottom:8px}
nav a{color:var(--soft);text-decoration:none;font-size:14px}nav a:hover{color:var(--ink)}
a:focus-visible,summary:focus-visible,.scroll:focus-visible{outline:2px solid var(--c1);outline-offset:3px;
border-radius:4px}
section{padding-top:36px;scroll-margin-top:8px}
h2{margin:0 0 4px;font-size:20px;letter-spacing:-.012em;font-weight:660}
h3{margin:26px 0 8px;font-size:15px;font-weight:640;overflow-wrap:anywhere}
.note{margin:0 0 14px;color:var(--soft);font-size:14px;max-width:76ch}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:20px 22px}
.forest{display:grid;grid-template-columns:minmax(120px,230px) 1fr minmax(150px,auto);column-gap:20px;
align-items:center}
.forest .group{display:contents}.forest .who{font-weight:600;overflow-wrap:anywhere;line-height:1.25;padding:8px 0}
.forest .who small{display:block;color:var(--faint);font-weight:400;font-size:12.5px}
.forest .number{text-align:right;white-space:nowrap}.number b{font-size:19px;font-weight:660;letter-spacing:-.01em}
.number small,td small{color:var(--faint);font-size:12.5px}
.rule{grid-column:1/-1;border-top:1px solid var(--grid)}
svg{display:block;width:100%;overflow:visible}svg.track{height:34px}svg.axis{height:18px}svg.histogram{height:64px}
svg text{fill:var(--faint);font-size:11.5px}.grid{stroke:var(--grid)}.zero{stroke:var(--faint);stroke-dasharray:2 3}
.whisker{stroke-width:3;stroke-linecap:round;opacity:.55}.dot{stroke:var(--card);stroke-width:2}
.whisker.good{stroke:var(--good)}.whisker.bad{stroke:var(--bad)}.whisker.even{stroke:var(--even)}
.dot.good,.bar.good{fill:var(--good)}.dot.bad,.bar.bad{fill:var(--bad)}.dot.even,.bar.even{fill:var(--even)}
.bar.plain{fill:var(--soft)}.bar.faint{fill:var(--line)}main>section>ul{overflow-wrap:anywhere}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:12px;background:var(--card)}
table{border-collapse:collapse;width:100%;font-size:14px}
th,td{padding:9px 14px;text-align:right;border-bottom:1px solid var(--grid);vertical-align:middle;white-space:nowrap}
tr:last-child td,tr:last-child th{border-bottom:0}
thead th{color:var(--soft);font-weight:600;font-size:12.5px;background:var(--wash);vertical-align:bottom;
white-space:normal}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--card);font-weight:500}
thead th:first-child{background:var(--wash)}td.plot{min-width:170px;padding-block:2px}
td .mark{font-size:11px;margin-left:5px}.up{color:var(--good)}.down{color:var(--bad)}.best{font-weight:680}
td small{display:block;line-height:1.25}.best small{font-weight:400}
.key{display:inline-block;width:9px;height:9px;border-radius:50%;margin-right:8px;vertical-align:baseline}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(240px,1fr));gap:18px 26px}
.columns>div{min-width:0}.columns h4{margin:0 0 4px;font-size:13.5px;font-weight:600;overflow-wrap:anywhere}
details{background:var(--card);border:1px solid var(--line);border-radius:12px;margin:10px 0}
summary{cursor:pointer;padding:13px 18px;list-style:none;display:flex;gap:14px;align-items:baseline}
summary::-webkit-details-marker{display:none}summary::before{content:"";flex:none;width:7px;height:7px;
border-right:2px solid var(--faint);border-bottom:2px solid var(--faint);transform:rotate(-45deg) translateY(-2px)}
details[open] summary::before{transform:rotate(45deg) translateY(-2px)}
summary .ask{flex:1;min-width:0;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
summary .score{color:var(--soft);white-space:nowrap;font-size:13.5px}
.talk{padding:2px 18px 18px;display:grid;gap:12px}
.said{border-left:3px solid var(--line);padding:2px 0 2px 14px;min-width:0}
.said p{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;max-height:22em;overflow-y:auto}
.said .by{color:var(--faint);font-size:12.5px;font-weight:600;margin-bottom:1px}.said .by span{font-weight:400}
.tree,.tree ul{list-style:none;margin:0;padding-left:20px}.tree{padding-left:0}.tree li{padding:3px 0}
.tree ul{border-left:1px solid var(--line);margin-left:5px}
.tag{display:inline-block;background:var(--wash);color:var(--soft);border-radius:5px;padding:0 7px;font-size:12px;
margin-left:8px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:6px 22px;margin:0}dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere;min-width:0}
footer{color:var(--faint);font-size:13px;padding-top:44px}
@media (max-width:640px){main{padding:0 16px 56px}header{padding-top:32px}h1{font-size:26px}.card{padding:16px}
.forest{grid-template-columns:1fr auto;column-gap:12px}.forest .plot{grid-column:1/-1;order:3}
.forest .number{order:2}.forest .who{order:1;padding:8px 0 0}
.forest .group{display:grid;grid-column:1/-1;grid-template-columns:1fr auto;column-gap:12px;align-items:end}
th,td{padding:8px 11px}dl{grid-template-columns:1fr;gap:2px}dd{margin-bottom:8px}
summary{flex-wrap:wrap;gap:4px 12px}summary .ask{white-space:normal}th:first-child,td:first-child{max-width:44vw;
white-space:normal;box-shadow:1px 0 0 var(--grid)}}
@media print{nav{display:none}details{break-inside:avoid}}
""" + "".join(
    f".whisker.c{n}{{stroke:var(--c{n})}}.dot.c{n},.bar.c{n}{{fill:var(--c{n})}}.key.c{n}{{background:var(--c{n})}}"
    for n in range(8)
)
