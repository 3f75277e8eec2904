//! The page's style sheet: one column, system type, colours as custom properties with a dark set, and a print form.

pub(super) const PAGE: &str = "\
:root{--paper:#f6f5f1;--card:#fff;--ink:#1c1c1a;--muted:#66655f;--line:#e2e1db;--accent:#1f66c1;--good:#0b7a3b;\
--warn:#8a5a00;--warn-paper:#fff6e0}\
@media screen and (prefers-color-scheme:dark){:root{--paper:#121211;--card:#1b1b1a;--ink:#efeeea;--muted:#a5a49c;\
--line:#32322f;--accent:#7fb2f5;--good:#57c98a;--warn:#f0c46a;--warn-paper:#2c2514}}\
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,\
\"Segoe UI\",Roboto,\"Helvetica Neue\",Arial,sans-serif}main{max-width:1140px;margin:0 auto;padding:36px 24px 48px}\
header{margin-bottom:24px;border-bottom:1px solid var(--line);padding-bottom:18px}h1{font-size:27px;line-height:1.2;\
letter-spacing:-.01em;margin:0;overflow-wrap:anywhere}header p{margin:6px 0 0;color:var(--muted);overflow-wrap:anywhere}\
h2{font-size:19px;margin:36px 0 12px}h3{font-size:15px;margin:24px 0 8px}p{max-width:75ch;margin:0 0 12px;white-space:pre-line}\
.notice{max-width:none;background:var(--warn-paper);border-left:3px solid var(--warn);padding:10px 14px;border-radius:0 6px 6px 0}\
.highlights{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:14px;margin:0 0 16px}\
.highlights div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px;display:flex;\
flex-direction:column}.highlights span{color:var(--muted);font-size:13px}.highlights b{font-size:26px;line-height:1.25;\
font-weight:650;letter-spacing:-.01em;overflow-wrap:anywhere}.highlights small{color:var(--muted);font-size:12.5px}\
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(310px,1fr));column-gap:32px;margin:0 0 16px;\
background:var(--card);border:1px solid var(--line);border-radius:10px;padding:0 18px;overflow:hidden;grid-auto-flow:row dense}.facts div{display:flex;\
justify-content:space-between;gap:16px;padding:8px 0;border-top:1px solid var(--line);margin-top:-1px}\
.facts dt{color:var(--muted);flex:none}.facts dd{margin:0;text-align:right;overflow-wrap:anywhere;min-width:0;\
font-variant-numeric:tabular-nums}figure{margin:0}.figures{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));\
gap:14px;margin:0 0 16px}.figures figure{background:var(--card);border:1px solid var(--line);border-radius:10px;\
padding:14px 16px 10px}.figures .wide{grid-column:1/-1}.figures .plot{--plot-paper:var(--card);--plot-ink:var(--ink);\
--plot-muted:var(--muted);margin:0 auto}.figures figure:not(.wide):last-child:nth-child(odd):first-child{grid-column:1/-1}\
.table{overflow:auto;max-height:560px;background:var(--card);border:1px solid var(--line);border-radius:10px;margin:0 0 16px}\
table{border-collapse:collapse;width:100%;font-size:14px}th,td{text-align:left;padding:7px 16px;border-bottom:1px solid \
var(--line);vertical-align:top}tbody tr:last-child td{border-bottom:0}th{position:sticky;top:0;background:var(--card);\
color:var(--muted);font-weight:600;font-size:13px;white-space:nowrap}td{overflow-wrap:anywhere}.n{text-align:right;\
font-variant-numeric:tabular-nums;white-space:nowrap}pre{margin:0;font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,\
\"DejaVu Sans Mono\",monospace;white-space:pre-wrap;overflow-wrap:anywhere}.code{margin:0 0 16px}.code figcaption{\
color:var(--muted);font-size:13px;margin-bottom:4px}.code pre{background:var(--card);border:1px solid var(--line);\
border-radius:10px;padding:12px 16px}.sample{background:var(--card);border:1px solid var(--line);border-radius:10px;\
margin:0 0 12px;overflow:hidden}.sample .prompt{padding:12px 16px;border-bottom:1px solid var(--line)}.sample>div{display:flex;\
flex-wrap:wrap}.sample section{flex:1 1 240px;padding:10px 16px 12px;min-width:0}.sample h4{margin:0 0 3px;font-size:12.5px;\
font-weight:600;color:var(--muted)}.sample i{font-style:normal;color:var(--good);margin-left:6px}.sample em{color:var(--muted)}\
footer{margin-top:36px;padding-top:14px;border-top:1px solid var(--line);color:var(--muted);font-size:13px}\
.facts .long dd{font-size:13.5px}@media (min-width:720px){.facts .long{grid-column:span 2}}@media screen and (max-width:760px){.wide{overflow-x:auto}.wide .plot{max-width:none;width:680px}.figures{grid-template-columns:minmax(0,1fr)}main{padding:22px 14px 36px}}\
@page{margin:14mm}@media print{:root{--paper:#fff}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}body{font-size:12px}main{max-width:none;padding:0}.table{max-height:none;overflow:visible}\
th{position:static}.figures figure,.sample,.highlights,.code{break-inside:avoid}h2,h3{break-after:avoid}tr{break-inside:avoid}}\n";
