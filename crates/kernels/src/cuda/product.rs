//! Products of bf16 matrices through cuBLASLt, each shape with the algorithm that was the fastest when it was first met.
//!
//! Equation: out = alpha a b (+ add); the library counts by columns, so it is asked for out^T = b^T a^T (+ add^T)
//! Shapes:   a [m, k], b [k, n], either stored as its transpose if so marked; out, add [m, n] in bf16 or f32
//! Cost:     2 m n k FLOPs, sums in f32; the first product of a shape costs up to 64 more of them

mod plan;

use super::{Gpu, View};
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublaslt::{result, sys};
use candle_core::cuda_backend::cudarc::driver::{self, CudaSlice};
use candle_core::{Error, Result, bail};
use plan::{Add, Algorithm, Call, Key, Outcome, Plan, Preference};
use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::PoisonError;

/// Bytes that an algorithm may use beside its operands.
const WORKSPACE: usize = 64 << 20;
/// Algorithms tried on the first use of a shape.
const CANDIDATES: usize = 16;
/// FLOPs below which the library's own first choice is taken untimed.
const SMALL: f64 = 1e8;

/// A matrix [rows, cols] as stored: bf16, `stride` values a row; `transposed`: the product reads its transpose.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Operand {
    pub(crate) view: View,
    pub(crate) transposed: bool,
}

/// Where a product goes: bf16, or f32 with `stride` values a row.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Out {
    Bf16(View),
    F32 { at: u64, stride: usize },
}

/// out [m, n] = alpha a b, where a is [m, k] and b is [k, n] after transposition, plus the matrix `add` (address, stride)
/// of the output's type if there is one; it may be the output itself.
///
/// # Errors
/// If rows overlap, or the library has no algorithm for the operands.
pub(crate) fn multiply(
    gpu: &Gpu,
    (m, n, k): (usize, usize, usize),
    a: Operand,
    b: Operand,
    out: Out,
    add: Option<(u64, usize)>,
    alpha: f32,
) -> Result<()> {
    if m == 0 || n == 0 {
        return Ok(());
    }
    let (to, stride, single) = match out {
        Out::Bf16(view) => (view.at, view.stride, false),
        Out::F32 { at, stride } => (at, stride, true),
    };
    let place = match add {
        None => Add::Nothing,
        Some((at, _)) if at == to => Add::InPlace,
        Some(_) => Add::Apart,
    };
    let (from, from_stride) = add.unwrap_or((to, stride));
    let call = Call { a: a.view.at, b: b.view.at, add: from, out: to, alpha };
    let key = Key {
        size: (m, n, k),
        transposed: (a.transposed, b.transposed),
        strides: [a.view.stride, b.view.stride, from_stride, stride],
        aligned: call.addresses().map(|at| 1 << at.trailing_zeros().min(4)),
        single,
        add: place,
    };
    if place == Add::InPlace && m > 1 && from_stride != stride {
        bail!("{key}: an addend in the output's place has rows of {from_stride} values, the output of {stride}")
    }
    if k == 0 {
        return empty(gpu, &key, &call);
    }
    gpu.products.lock().unwrap_or_else(PoisonError::into_inner).run(gpu, key, call)
}

/// The library, and what it decided for each kind of product.
pub(crate) struct Products {
    handle: sys::cublasLtHandle_t,
    workspace: Option<(CudaSlice<u8>, u64)>,
    plans: HashMap<Key, Plan>,
}

// SAFETY: the handle and the descriptors belong to no thread; everything that uses them takes `&mut Products`, through a mutex.
unsafe impl Send for Products {}

impl Drop for Products {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed nowhere else. A failure leaves nothing to do.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

impl Products {
    /// The library on the current context.
    ///
    /// # Errors
    /// If the library cannot be initialised.
    pub(crate) fn new() -> Result<Self> {
        let handle = result::create_handle().map_err(|e| Error::Msg(format!("cuBLASLt cannot be initialised: {e}")))?;
        Ok(Self { handle, workspace: None, plans: HashMap::new() })
    }

    fn run(&mut self, gpu: &Gpu, key: Key, call: Call) -> Result<()> {
        gpu.stream.context().bind_to_thread().w()?;
        if let Some(plan) = self.plans.get(&key) {
            return self.launch(gpu, plan, &plan.algorithm, &call).map_err(|e| key.failed("the product", e));
        }
        // Within a graph nothing can be timed, nor memory allocated that outlives it: such a decision is not kept.
        let open = driver::sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        let capturing = gpu.stream.capture_status().w()? != open;
        if self.workspace.is_none() && !capturing {
            let memory = gpu.alloc::<u8>(WORKSPACE)?;
            let at = gpu.address(&memory);
            self.workspace = Some((memory, at));
        }
        let (m, n, k) = key.size;
        let timed = !capturing && 2.0 * m as f64 * n as f64 * k as f64 >= SMALL;
        let mut plan = Plan::new(&key).map_err(|e| key.failed("the descriptors", e))?;
        let candidates = self.heuristic(&key, &plan, if timed { CANDIDATES } else { 1 });
        let candidates = candidates.map_err(|e| key.failed("the choice of an algorithm", e))?;
        let Some(first) = candidates.first().copied() else { bail!("{key}: cuBLASLt has no algorithm") };
        plan.algorithm = if timed { self.fastest(gpu, &key, &plan, call, candidates)?.unwrap_or(first) } else { first };
        self.launch(gpu, &plan, &plan.algorithm, &call).map_err(|e| key.failed("the product", e))?;
        if !capturing {
            self.plans.insert(key, plan);
        }
        Ok(())
    }

    /// Up to `count` algorithms, in the order the library expects of them.
    fn heuristic(&self, key: &Key, plan: &Plan, count: usize) -> Outcome<Vec<Algorithm>> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        use sys::cublasLtReductionScheme_t as Scheme;
        let preference = Preference(result::create_matmul_pref()?);
        let workspace = if self.workspace.is_some() { WORKSPACE } else { 0 };
        // Parts of a sum that was split over k meet in f32, never in bf16.
        let scheme = if key.single {
            Scheme::CUBLASLT_REDUCTION_SCHEME_MASK
        } else {
            Scheme::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE
        };
        let [a, b, add, out] = key.aligned;
        let words = [
            (Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, scheme as u32),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, b),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, a),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, add),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, out),
        ];
        let limit = Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let mut found = Vec::<sys::cublasLtMatmulHeuristicResult_t>::with_capacity(count);
        let mut returned = 0;
        // SAFETY: the attributes are a u64 and u32s, read during the calls; the library writes at most `count` results and
        // says how many.
        unsafe {
            result::set_matmul_pref_attribute(preference.0, limit, (&raw const workspace).cast(), size_of::<usize>())?;
            for (attribute, word) in &words {
                result::set_matmul_pref_attribute(
                    preference.0,
                    *attribute,
                    (&raw const *word).cast(),
                    size_of::<u32>(),
                )?;
            }
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                plan.product.0,
                plan.b.0,
                plan.a.0,
                plan.add().0,
                plan.out.0,
                preference.0,
                count as i32,
                found.as_mut_ptr(),
                &raw mut returned,
            )
            .result()?;
            found.set_len(usize::try_from(returned).unwrap_or(0).min(count));
        }
        Ok(found
            .into_iter()
            .filter(|f| f.state.result().is_ok() && f.workspaceSize <= workspace)
            .map(|f| f.algo)
            .collect())
    }

    /// The fastest of the algorithms on the operands themselves; None where none runs or the time cannot be taken.
    fn fastest(
        &self,
        gpu: &Gpu,
        key: &Key,
        plan: &Plan,
        mut call: Call,
        candidates: Vec<Algorithm>,
    ) -> Result<Option<Algorithm>> {
        let Some((_, workspace)) = &self.workspace else { return Ok(None) };
        // In place, each trial would add to the output once more: they run on other memory with the same rows.
        let mut scratch = None;
        if key.add == Add::InPlace {
            let ((m, n, _), stride) = (key.size, key.strides[3]);
            let Ok(memory) = gpu.alloc::<u8>(((m - 1) * stride + n) * key.bytes() + 256) else { return Ok(None) };
            call.out = gpu.address(&memory) + call.out % 256;
            call.add = call.out;
            scratch = Some(memory);
        }
        let mut running: Vec<(Algorithm, f32)> = candidates.into_iter().map(|a| (a, f32::INFINITY)).collect();
        running.retain(|(algorithm, _)| self.launch(gpu, plan, algorithm, &call).is_ok());
        let event = || gpu.stream.context().new_event(Some(driver::sys::CUevent_flags::CU_EVENT_DEFAULT)).w();
        let (begin, end) = (event()?, event()?);
        for _ in 0..3 {
            for (algorithm, best) in &mut running {
                // Writing the workspace takes long enough for all of the launches to be in the stream before the first event,
                // and leaves the same second-level cache to every algorithm.
                // SAFETY: the workspace has that many bytes, and no product needs them from one launch to the next.
                unsafe { driver::result::memset_d8_async(*workspace, 0, WORKSPACE, gpu.stream.cu_stream()) }.w()?;
                begin.record(&gpu.stream).w()?;
                self.launch(gpu, plan, algorithm, &call).map_err(|e| key.failed("the product", e))?;
                end.record(&gpu.stream).w()?;
                *best = best.min(begin.elapsed_ms(&end).w()?);
            }
            let least = running.iter().map(|(_, t)| *t).fold(f32::INFINITY, f32::min);
            running.retain(|(_, t)| *t <= 1.1 * least);
        }
        drop(scratch);
        Ok(running.into_iter().min_by(|x, y| x.1.total_cmp(&y.1)).map(|(algorithm, _)| algorithm))
    }

    fn launch(&self, gpu: &Gpu, plan: &Plan, algorithm: &Algorithm, call: &Call) -> Outcome<()> {
        let pointer = |at: u64| at as usize as *mut c_void;
        let beta = if plan.adds { 1.0f32 } else { 0.0 };
        let (workspace, bytes) = self.workspace.as_ref().map_or((null_mut(), 0), |(_, at)| (pointer(*at), WORKSPACE));
        // SAFETY: the caller's operands are as the plan describes them, the scalars are read during the call, and the
        // workspace lives as long as the library.
        unsafe {
            result::matmul(
                self.handle,
                plan.product.0,
                (&raw const call.alpha).cast(),
                (&raw const beta).cast(),
                pointer(call.b),
                plan.b.0,
                pointer(call.a),
                plan.a.0,
                pointer(call.add),
                plan.add().0,
                pointer(call.out),
                plan.out.0,
                algorithm,
                workspace,
                bytes,
                gpu.stream.cu_stream().cast(),
            )
        }
    }
}

/// A product over no terms: what is added, or zeros.
fn empty(gpu: &Gpu, key: &Key, call: &Call) -> Result<()> {
    let ((rows, cols, _), [.., from, to]) = (key.size, key.strides);
    let (width, from, to) = (cols * key.bytes(), from.max(cols) * key.bytes(), to.max(cols) * key.bytes());
    gpu.stream.context().bind_to_thread().w()?;
    let stream = gpu.stream.cu_stream();
    let device = driver::sys::CUmemorytype::CU_MEMORYTYPE_DEVICE;
    let copy = driver::sys::CUDA_MEMCPY2D {
        srcXInBytes: 0,
        srcY: 0,
        srcMemoryType: device,
        srcHost: null_mut(),
        srcDevice: call.add,
        srcArray: null_mut(),
        srcPitch: from,
        dstXInBytes: 0,
        dstY: 0,
        dstMemoryType: device,
        dstHost: null_mut(),
        dstDevice: call.out,
        dstArray: null_mut(),
        dstPitch: to,
        WidthInBytes: width,
        Height: rows,
    };
    // SAFETY: the caller's output has `rows` rows of `width` bytes at that pitch, and what is added has them at its own.
    match key.add {
        Add::InPlace => Ok(()),
        Add::Apart => unsafe { driver::sys::cuMemcpy2DAsync_v2(&raw const copy, stream) }.result().w(),
        Add::Nothing => unsafe { driver::sys::cuMemsetD2D8Async(call.out, to, 0, width, rows, stream) }.result().w(),
    }
}
