//! How the library is told of a product, and what an algorithm for it depends on.

use candle_core::Error;
use candle_core::cuda_backend::cudarc::cublaslt::result::{self, CublasError};
use candle_core::cuda_backend::cudarc::cublaslt::sys;
use half::bf16;
use std::fmt;

/// What the library answers.
pub(super) type Outcome<T> = Result<T, CublasError>;
/// A choice of the library.
pub(super) type Algorithm = sys::cublasLtMatmulAlgo_t;

/// What there is to add to a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Add {
    Nothing,
    InPlace,
    Apart,
}

/// All that an algorithm depends on; strides and alignments (in bytes, at most 16) of a, b, add and out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) size: (usize, usize, usize),
    pub(super) transposed: (bool, bool),
    pub(super) strides: [usize; 4],
    pub(super) aligned: [u32; 4],
    pub(super) single: bool,
    pub(super) add: Add,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (m, n, k) = self.size;
        let mark = |t: bool| if t { " (stored transposed)" } else { "" };
        let (a, b) = (mark(self.transposed.0), mark(self.transposed.1));
        let out = if self.single { "f32" } else { "bf16" };
        write!(f, "product of [{m}, {k}]{a} and [{k}, {n}]{b} into {out}, strides {:?}", self.strides)
    }
}

impl Key {
    /// Bytes of a value of the output.
    pub(super) fn bytes(&self) -> usize {
        if self.single { size_of::<f32>() } else { size_of::<bf16>() }
    }

    pub(super) fn failed(&self, what: &str, error: CublasError) -> Error {
        Error::Msg(format!("{self}: cuBLASLt refuses {what}: {error}")).bt()
    }
}

/// The addresses and the factor of one product.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call {
    pub(super) a: u64,
    pub(super) b: u64,
    pub(super) add: u64,
    pub(super) out: u64,
    pub(super) alpha: f32,
}

impl Call {
    pub(super) fn addresses(&self) -> [u64; 4] {
        [self.a, self.b, self.add, self.out]
    }
}

/// How the library is told of a kind of product.
pub(super) struct Plan {
    pub(super) product: Product,
    pub(super) a: Layout,
    pub(super) b: Layout,
    pub(super) apart: Option<Layout>,
    pub(super) out: Layout,
    pub(super) adds: bool,
    pub(super) algorithm: Algorithm,
}

impl Plan {
    pub(super) fn new(key: &Key) -> Outcome<Self> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        use sys::cudaDataType as Type;
        let (m, n, k) = key.size;
        let [a, b, add, out] = key.strides;
        let stored = |rows, cols, transposed| if transposed { (cols, rows) } else { (rows, cols) };
        let single = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let product = Product(result::create_matmul_desc(single, Type::CUDA_R_32F)?);
        let transposed = [
            (Attribute::CUBLASLT_MATMUL_DESC_TRANSA, i32::from(key.transposed.1)),
            (Attribute::CUBLASLT_MATMUL_DESC_TRANSB, i32::from(key.transposed.0)),
        ];
        for (attribute, operation) in &transposed {
            let size = size_of::<i32>();
            // SAFETY: the attributes are the operations N = 0 and T = 1 as an i32, read during the call.
            unsafe { result::set_matmul_desc_attribute(product.0, *attribute, (&raw const *operation).cast(), size)? };
        }
        let to = if key.single { Type::CUDA_R_32F } else { Type::CUDA_R_16BF };
        Ok(Self {
            product,
            a: Layout::new(Type::CUDA_R_16BF, stored(m, k, key.transposed.0), a)?,
            b: Layout::new(Type::CUDA_R_16BF, stored(k, n, key.transposed.1), b)?,
            apart: if key.add == Add::Apart { Some(Layout::new(to, (m, n), add)?) } else { None },
            out: Layout::new(to, (m, n), out)?,
            adds: key.add != Add::Nothing,
            algorithm: Algorithm { data: [0; 8] },
        })
    }

    /// The layout of what is added; the output's own where the two are one, as the library wants it.
    pub(super) fn add(&self) -> &Layout {
        self.apart.as_ref().unwrap_or(&self.out)
    }
}

/// A matrix [rows, cols] by rows, which is [cols, rows] by columns.
pub(super) struct Layout(pub(super) sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(kind: sys::cudaDataType, (rows, cols): (usize, usize), stride: usize) -> Outcome<Self> {
        if rows > 1 && stride < cols {
            return Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE));
        }
        result::create_matrix_layout(kind, cols as u64, rows as u64, stride.max(cols) as i64).map(Self)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed nowhere else.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

pub(super) struct Product(pub(super) sys::cublasLtMatmulDesc_t);

impl Drop for Product {
    fn drop(&mut self) {
        // SAFETY: made by `Plan::new`, destroyed nowhere else.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

pub(super) struct Preference(pub(super) sys::cublasLtMatmulPreference_t);

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made by its only user, destroyed nowhere else.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}
