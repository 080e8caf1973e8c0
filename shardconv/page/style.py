"""How a page looks: one style sheet, in light and dark, on a phone and on paper. Plots take their colours from here too."""

STYLE = """
:root { color-scheme: light dark;
  --ground: #f6f7f8; --card: #ffffff; --ink: #1b1f24; --soft: #59616c; --rule: #8b94a0; --grid: #e3e6ea;
  --main: #2463a9; --fill: #2463a926; --second: #b2541a; --other: #8f9baa; --good: #1a7a46; --bad: #bd2f27; --unsure: #8a6100; }
@media (prefers-color-scheme: dark) { :root {
  --ground: #14171a; --card: #1c2025; --ink: #e7eaee; --soft: #a3acb8; --rule: #737d8a; --grid: #30363d;
  --main: #74aeee; --fill: #74aeee2e; --second: #eda063; --other: #78838f; --good: #53c78b; --bad: #f58478; --unsure: #e2b64a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.25rem 1rem 3rem; max-width: 62rem; background: var(--ground); color: var(--ink);
  font: 0.9375rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.35rem; line-height: 1.3; margin: 0 0 0.25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 0.6rem; }
h3 { font-size: 1rem; margin: 0; }
p { margin: 0.25rem 0; }
.paths, footer, figcaption p, .explained { color: var(--soft); font-size: 0.875rem; overflow-wrap: anywhere; }
.verdict { margin: 1rem 0; padding: 0.75rem 1rem; background: var(--card); border: 1px solid var(--grid); border-left: 0.4rem solid;
  border-radius: 0.4rem; overflow-wrap: anywhere; }
.verdict strong { font-size: 1.25rem; }
.verdict p:not(:first-child) { color: var(--ink); }
.equal { color: var(--good); } .differs { color: var(--bad); } .unchecked { color: var(--unsure); }
.problems { padding-left: 1.25rem; } .problems li { margin: 0.6rem 0; overflow-wrap: anywhere; white-space: pre-line; }
.problems span { display: block; color: var(--soft); }
.card, figure { background: var(--card); border: 1px solid var(--grid); border-radius: 0.4rem; padding: 0.9rem 1rem; margin: 0; }
.plots { columns: 24rem; column-gap: 1rem; margin: 1rem 0; } .plots figure { break-inside: avoid; margin-bottom: 1rem; }
.card { margin: 1rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.875rem; width: 100%; }
th, td { text-align: left; font-weight: normal; padding: 0.2rem 0.9rem 0.2rem 0; vertical-align: top; }
thead th { color: var(--soft); border-bottom: 1px solid var(--grid); vertical-align: bottom; }
tbody th { color: var(--soft); }
.card > ul { padding-left: 1.1rem; margin: 0.6rem 0 0; font-size: 0.875rem; overflow-wrap: anywhere; }
.card > ul.problems { margin: 0; font-size: inherit; }
.facts th { width: 8.5rem; white-space: nowrap; } .facts td { overflow-wrap: anywhere; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; padding-right: 0.2rem; padding-left: 0.7rem; }
details { margin-top: 0.5rem; font-size: 0.875rem; } summary { color: var(--soft); cursor: pointer; }
details .wide { max-height: 20rem; overflow: auto; margin-top: 0.4rem; }
svg { display: block; width: 100%; height: auto; margin-top: 0.6rem;
  font: 11px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
svg text { fill: var(--soft); font-variant-numeric: tabular-nums; } svg .label { fill: var(--ink); } svg .alarm { fill: var(--bad); }
.grid { stroke: var(--grid); } .rule { stroke: var(--rule); }
.bar { fill: var(--main); } .other { fill: var(--other); } .over { fill: var(--bad); }
.area { fill: var(--fill); } .line { fill: none; stroke: var(--main); stroke-width: 1.75; stroke-linejoin: round; }
.second { fill: none; stroke: var(--second); stroke-width: 1.75; stroke-dasharray: 1 3.5; stroke-linecap: round; }
.bound { fill: none; stroke: var(--second); stroke-width: 1.5; stroke-dasharray: 5 3; }
.limit { stroke: var(--ink); stroke-width: 2; }
.diagonal { stroke: var(--second); stroke-width: 1.25; }
.divergence { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 2 2; }
.dots { stroke: var(--main); stroke-width: 3.5; stroke-linecap: round; fill: none; }
.scatter .dots { stroke-width: 2.5; stroke-opacity: 0.7; }
.key { display: flex; flex-wrap: wrap; gap: 0.1rem 1.1rem; font-size: 0.8125rem; margin-top: 0.5rem; }
.key i { display: inline-block; width: 1.3rem; height: 0; margin-right: 0.4rem; vertical-align: middle; border-top: 2px solid var(--main); }
.key i.bar, .key i.other { border-top-width: 0.6rem; width: 0.9rem; } .key i.other { border-color: var(--other); }
.key i.bound { border-top: 2px dashed var(--second); } .key i.second { border-top: 2px dotted var(--second); }
.key i.limit { width: 0; height: 0.9rem; border-top: 0; border-left: 2px solid var(--ink); }
.key i.diagonal { border-color: var(--second); }
.key i.dot { width: 0.4rem; height: 0.4rem; border: 0; border-radius: 50%; background: var(--main); }
.card > details + table { margin-top: 0.6rem; }
footer { margin-top: 2rem; }
@media (max-width: 32rem) { .facts th { width: 6.4rem; padding-right: 0.5rem; white-space: normal; } svg { font-size: 12.5px; } }
@media print { body { max-width: none; padding: 0; background: none; font-size: 10pt; } .card, figure, .verdict { break-inside: avoid; }
  h2 { break-after: avoid; } .plots { columns: auto; display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; align-items: start; }
   summary { display: none; } svg { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
