//! The charts' style sheet: colours by role as custom properties, with a dark set chosen for dark paper (not inverted).
//! Classes: `t` title, `l` label, `m` muted label, `g` grid, `b` base line, `sN` stroke, `fN` fill of colour N.

/// CSS of the charts, for a `<style>` element of the page that shows them. Every rule is below `.plot`.
pub const STYLE: &str = "\
.plot{--plot-paper:#fff;--plot-ink:#1c1c1a;--plot-muted:#66655f;--plot-grid:#e7e6e1;--plot-base:#b9b8b1;\
--plot-0:#2a78d6;--plot-1:#eb6834;--plot-2:#1a9c6e;--plot-3:#4a3aa7;--plot-4:#d99000;--plot-5:#d6589a;--plot-6:#008300;\
--plot-7:#e34948;--plot-on:#fff;--plot-hot:#2a78d6;--plot-cold:#d95926;font:11.5px system-ui,-apple-system,\"Segoe UI\",Roboto,\
\"Helvetica Neue\",Arial,sans-serif;max-width:100%;height:auto;display:block}\
@media screen and (prefers-color-scheme:dark){.plot{--plot-paper:#1b1b1a;--plot-ink:#efeeea;--plot-muted:#a5a49c;\
--plot-grid:#32322f;--plot-base:#5a5953;--plot-0:#4a95ee;--plot-1:#ea7444;--plot-2:#25b581;--plot-3:#9a8ff0;\
--plot-4:#d39a20;--plot-5:#dd6aa5;--plot-6:#3fa53f;--plot-7:#ea6b6b;--plot-on:#111;--plot-hot:#4a95ee;--plot-cold:#ea7444}}\
.plot text{fill:var(--plot-ink);font-variant-numeric:tabular-nums}.plot .t{font-size:14px;font-weight:600}\
.plot .m{fill:var(--plot-muted)}.plot .e{text-anchor:end}.plot .c{text-anchor:middle}.plot .w{fill:var(--plot-on)}\
.plot .g{stroke:var(--plot-grid);fill:none}.plot .b{stroke:var(--plot-base);fill:none}\
.plot path{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}\
.plot path.faint{stroke-width:1;stroke-opacity:.38}.plot path.fine{stroke-width:1.3}.plot path.dash{stroke-dasharray:6 4}\
.plot path.g,.plot path.b{stroke-width:1}.plot circle{stroke:var(--plot-paper);stroke-width:1}\
.plot .hit{fill:currentColor;fill-opacity:0}.plot .hit:hover{fill-opacity:.07}\
.plot .none{fill:none;stroke:var(--plot-grid)}.plot .hot{fill:var(--plot-hot)}.plot .cold{fill:var(--plot-cold)}\
.plot .s0{stroke:var(--plot-0)}.plot .s1{stroke:var(--plot-1)}.plot .s2{stroke:var(--plot-2)}\
.plot .s3{stroke:var(--plot-3)}.plot .s4{stroke:var(--plot-4)}.plot .s5{stroke:var(--plot-5)}\
.plot .s6{stroke:var(--plot-6)}.plot .s7{stroke:var(--plot-7)}\
.plot .f0{fill:var(--plot-0)}.plot .f1{fill:var(--plot-1)}.plot .f2{fill:var(--plot-2)}.plot .f3{fill:var(--plot-3)}\
.plot .f4{fill:var(--plot-4)}.plot .f5{fill:var(--plot-5)}.plot .f6{fill:var(--plot-6)}.plot .f7{fill:var(--plot-7)}\
@media print{.plot .hit{display:none}}";
