//! Small f32 matrix products over strided slices: dst <- beta * A B, or dst + beta * A B.

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

/// Where the result goes: row-major, `stride` entries from row to row.
///
/// A raw pointer, so that several threads can fill disjoint columns of one buffer.
#[derive(Clone, Copy)]
pub(crate) struct Target {
    start: *mut f32,
    len: usize,
    stride: usize,
}

// SAFETY: a `Target` is only a place; `product` is unsafe and demands that concurrent writers take disjoint entries.
unsafe impl Send for Target {}
// SAFETY: as above.
unsafe impl Sync for Target {}

impl Target {
    /// The whole of `out`.
    pub(crate) fn new(out: &mut [f32], stride: usize) -> Self {
        Self { start: out.as_mut_ptr(), len: out.len(), stride }
    }
}

/// dst[m, n] <- (dst if `accumulate`) + beta * a[m, k] b[k, n]; on several threads if `parallel` and large enough.
///
/// # Safety
/// The buffer behind `dst` is alive, and no other thread reads or writes the m x n entries meanwhile.
pub(crate) unsafe fn product(
    (m, n, k): (usize, usize, usize),
    dst: Target,
    accumulate: bool,
    a: Matrix<'_>,
    b: Matrix<'_>,
    beta: f32,
    parallel: bool,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!((m - 1) * dst.stride + n <= dst.len, "matrix product: target too short");
    assert!(
        k == 0 || (a.last(m, k) < a.data.len() && b.last(k, n) < b.data.len()),
        "matrix product: operand too short"
    );
    let parallelism = if parallel && m * n * k >= 1 << 20 { Parallelism::Rayon(0) } else { Parallelism::None };
    // SAFETY: bounds asserted above; exclusive access to the target is the caller's promise.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.start,
            1,
            dst.stride as isize,
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
            parallelism,
        );
    }
}

/// `product` into a slice of its own, rows `stride` entries apart, on this thread.
pub(crate) fn multiply(
    size: (usize, usize, usize),
    dst: &mut [f32],
    stride: usize,
    accumulate: bool,
    a: Matrix<'_>,
    b: Matrix<'_>,
    beta: f32,
) {
    let target = Target::new(dst, stride);
    // SAFETY: `dst` is borrowed mutably for the call.
    unsafe { product(size, target, accumulate, a, b, beta, false) }
}
