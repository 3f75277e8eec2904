//! Small f32 matrix products over strided slices, on this thread: dst <- beta * A B, or dst + beta * A B.

use gemm::Parallelism;

/// A matrix within a slice: entry (i, j) at `i * rows_apart + j * cols_apart`.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    data: &'a [f32],
    rows_apart: usize,
    cols_apart: usize,
}

impl<'a> Matrix<'a> {
    /// Row-major with `stride` entries from row to row.
    pub(crate) fn rows(data: &'a [f32], stride: usize) -> Self {
        Self { data, rows_apart: stride, cols_apart: 1 }
    }

    /// The transpose.
    pub(crate) fn t(self) -> Self {
        Self { data: self.data, rows_apart: self.cols_apart, cols_apart: self.rows_apart }
    }

    fn last(&self, rows: usize, cols: usize) -> usize {
        (rows - 1) * self.rows_apart + (cols - 1) * self.cols_apart
    }
}

/// dst[m, n] <- (dst if `accumulate`) + beta * a[m, k] b[k, n]; rows of `dst` are `stride` entries apart.
pub(crate) fn multiply(
    (m, n, k): (usize, usize, usize),
    dst: &mut [f32],
    stride: usize,
    accumulate: bool,
    a: Matrix<'_>,
    b: Matrix<'_>,
    beta: f32,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!((m - 1) * stride + n <= dst.len(), "matrix product: target too short");
    assert!(
        k == 0 || (a.last(m, k) < a.data.len() && b.last(k, n) < b.data.len()),
        "matrix product: operand too short"
    );
    // SAFETY: bounds asserted above; `dst` is borrowed mutably for the call.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            1,
            stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.cols_apart as isize,
            a.rows_apart as isize,
            b.data.as_ptr(),
            b.cols_apart as isize,
            b.rows_apart as isize,
            1.0,
            beta,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}
