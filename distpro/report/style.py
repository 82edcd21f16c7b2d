"""The style of the page: one column, system fonts, light or dark like the reader's system."""

CSS = """\
:root {
  color-scheme: light dark;
  --ink: #1d2430; --muted: #68707c; --grid: #e2e5ea; --paper: #fefefe; --soft: #f4f5f8;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ec; --muted: #9aa3af; --grid: #2b313b; --paper: #14171c; --soft: #1d2128; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 var(--sans); }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
.title { margin: 0; color: var(--muted); }
h1 { text-wrap: balance; margin: 4px 0 12px; max-width: 30em; font-size: clamp(22px, 3vw, 30px); line-height: 1.25; }
h2 { margin: 48px 0 12px; font-size: 20px; }
h3 { margin: 0 0 4px; font-size: 15px; }
h3.apart { margin-top: 28px; }
p { margin: 8px 0; max-width: 50em; }
.lead { margin: 0 0 16px; max-width: 46em; font-size: 17px; color: var(--muted); }
.note, figcaption { margin: 8px 0 0; max-width: 58em; color: var(--muted); font-size: 14px; }
pre { margin: 0; padding: 10px 14px; background: var(--soft); border-radius: 6px; font: 13px/1.5 var(--mono);
  white-space: pre-wrap; overflow-wrap: anywhere; }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 0 6px 28px; border-bottom: 1px solid var(--grid); text-align: right; }
table { white-space: nowrap; }
th:first-child, td:first-child { padding-left: 0 !important; text-align: left; }
th { white-space: normal; color: var(--muted); font-weight: 500; font-size: 14px; vertical-align: bottom; }
tr.main td { font-weight: 650; }
.results { min-width: min(100%, 720px); }

figure { margin: 0; }
svg { display: block; width: 100%; height: auto; font-family: var(--sans); }
svg.narrow { display: none; }
svg * { stroke-linejoin: round; }
svg .line:hover path { stroke-width: 4 !important; }

.side { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 24px 40px; }
.moments { margin-top: 28px; }
.moments section { max-width: 420px; }
.moments table { width: 100%; font-size: 14px; }
.moments th, .moments td { padding: 4px 0 4px 12px; }
.moments td:last-child { width: 45%; }
td i { display: block; height: 9px; background: var(--muted); opacity: 0.6; }

dl { margin: 0; font-size: 15px; }
dl div { display: flex; gap: 16px; justify-content: space-between; padding: 4px 0;
  border-bottom: 1px solid var(--grid); }
dt { color: var(--muted); flex: none; max-width: 50%; overflow-wrap: anywhere; }
dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
details { margin-top: 24px; }
summary { cursor: pointer; font-weight: 600; }
details dl { columns: 300px; column-gap: 40px; margin-top: 8px; font: 13px/1.5 var(--mono); }
details dl div { break-inside: avoid; }

@media (max-width: 640px) {
  main { padding: 24px 16px 48px; }
  svg.wide { display: none; }
  svg.narrow { display: block; }
  table { font-size: 14px; }
  th, td { padding-left: 14px; }
  td:first-child { white-space: normal; }
}
"""
