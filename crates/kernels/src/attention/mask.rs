//! Which keys a query sees: ranges from causality and windows, equality of segment ids within them.

use super::{AttentionSpec, Dims, Segments};
use std::ops::Range;

/// What a tile of queries sees of a tile of keys.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Visible {
    /// Nothing: the tile is skipped.
    Nothing,
    /// Every pair.
    All,
    /// The pairs with 0 in the mask; the others hold -inf.
    Some,
}

/// The visibility rules of one attention.
pub(super) struct Rules<'a> {
    dims: Dims,
    causal: bool,
    window: Option<usize>,
    segments: Option<&'a Segments>,
}

impl<'a> Rules<'a> {
    pub(super) fn new(dims: Dims, spec: &'a AttentionSpec) -> Self {
        Self { dims, causal: spec.causal, window: spec.window, segments: spec.segments.as_deref() }
    }

    /// Keys that query `i` may see by position.
    pub(super) fn range(&self, i: usize) -> Range<usize> {
        let Dims { tq, tk, .. } = self.dims;
        // One past the last causal key: i + 1 + (tk - tq), kept at 0 where that is negative.
        let aligned = (i + 1 + tk).saturating_sub(tq);
        let end = if self.causal { aligned.min(tk) } else { tk };
        let start = match self.window {
            // j > i + tk - tq - w, that is j >= (i + 1 + tk) - (tq + w).
            Some(w) => (i + 1 + tk).saturating_sub(tq.saturating_add(w)),
            None => 0,
        };
        start.min(end)..end
    }

    /// Keys that some query of `queries` may see by position.
    pub(super) fn span(&self, queries: &Range<usize>) -> Range<usize> {
        if queries.is_empty() {
            return 0..0;
        }
        self.range(queries.start).start..self.range(queries.end - 1).end
    }

    /// Whether query `i` of sequence `b` sees key `j`, position allowing.
    fn same_segment(&self, b: usize, i: usize, j: usize) -> bool {
        self.segments.is_none_or(|s| {
            let id = s.query[b * self.dims.tq + i];
            id != Segments::PADDING && id == s.key[b * self.dims.tk + j]
        })
    }

    /// Whether query `i` of sequence `b` sees key `j`.
    pub(super) fn sees(&self, b: usize, i: usize, j: usize) -> bool {
        self.range(i).contains(&j) && self.same_segment(b, i, j)
    }

    /// Fills `mask` [queries, keys] with 0 and -inf if the tile is partly visible.
    pub(super) fn tile(&self, b: usize, queries: Range<usize>, keys: Range<usize>, mask: &mut [f32]) -> Visible {
        let width = keys.len();
        let mut seen = 0;
        if self.segments.is_none() {
            seen = queries.clone().map(|i| overlap(&self.range(i), &keys).len()).sum();
            if seen == 0 {
                return Visible::Nothing;
            }
            if seen == queries.len() * width {
                return Visible::All;
            }
        }
        let total = queries.len() * width;
        for (i, row) in queries.zip(mask.chunks_mut(width.max(1))) {
            let range = overlap(&self.range(i), &keys);
            row.fill(f32::NEG_INFINITY);
            for j in range {
                if self.same_segment(b, i, j) {
                    row[j - keys.start] = 0.0;
                    seen += usize::from(self.segments.is_some());
                }
            }
        }
        match seen {
            0 => Visible::Nothing,
            n if n == total => Visible::All,
            _ => Visible::Some,
        }
    }
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> Range<usize> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}
