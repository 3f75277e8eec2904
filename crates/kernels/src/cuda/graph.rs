//! Launches that are recorded once and replayed as one, of kernels whose blocks wait for each other.

use super::{Arg, Gpu, Grid};
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{result, sys};
use candle_core::{Result, bail};
use std::ffi::c_void;
use std::sync::Arc;

/// The most shared memory that a block of compute capability 9 has.
pub(crate) const SHARED: usize = 227 << 10;

/// Where kernels of one step are launched: on the device's stream, or into a graph.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Launches<'a> {
    pub(crate) gpu: &'a Gpu,
    stream: sys::CUstream,
}

impl<'a> Launches<'a> {
    /// On the device's stream.
    pub(crate) fn now(gpu: &'a Gpu) -> Self {
        Self { gpu, stream: gpu.stream.cu_stream() }
    }

    /// Launches a kernel all of whose blocks run at once.
    ///
    /// # Errors
    /// If there is no such kernel, or the driver refuses the launch, as when the device has no room for all blocks.
    pub(crate) fn launch(&self, name: &'static str, (blocks, threads, shared): Grid, args: &[Arg]) -> Result<()> {
        let function = self.gpu.function(name, 0)?;
        use sys::CUfunction_attribute_enum as Attribute;
        if shared > 48 << 10 {
            function.set_attribute(Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, SHARED as i32).w()?;
        }
        let mut pointers: Vec<*mut c_void> = args.iter().map(Arg::pointer).collect();
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_COOPERATIVE,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { pad: [0; 64] },
        };
        attribute.value.cooperative = 1;
        let config = sys::CUlaunchConfig {
            gridDimX: blocks.0 as u32,
            gridDimY: blocks.1 as u32,
            gridDimZ: blocks.2 as u32,
            blockDimX: threads as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared as u32,
            hStream: self.stream,
            attrs: &raw mut attribute,
            numAttrs: 1,
        };
        self.gpu.stream.context().bind_to_thread().w()?;
        // SAFETY: the callers pass the arguments that the kernel of that name takes, in its order; addresses are of memory that
        // lives as long as the stream or the graph may read it.
        unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                function.cu_function(),
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .result()
        .w()
    }

    /// Makes `bytes` bytes zero.
    ///
    /// # Errors
    /// If the driver refuses.
    pub(crate) fn zero(&self, at: u64, bytes: usize) -> Result<()> {
        // SAFETY: the callers own that much memory there.
        unsafe { result::memset_d8_async(at, 0, bytes, self.stream) }.w()
    }
}

/// A stream of its own, since the device's default stream cannot be recorded. Destroyed at the end.
struct Recorder(sys::CUstream);

impl Drop for Recorder {
    fn drop(&mut self) {
        // SAFETY: the stream was created by `Graph::record` and is used nowhere else.
        let _ = unsafe { result::stream::destroy(self.0) };
    }
}

/// Recorded launches.
pub(crate) struct Graph {
    gpu: Arc<Gpu>,
    graph: sys::CUgraph,
    exec: sys::CUgraphExec,
}

// SAFETY: the driver ties a graph to no thread, and `launch` takes the graph exclusively.
unsafe impl Send for Graph {}

impl Graph {
    /// Records what `launches` launches.
    ///
    /// # Errors
    /// If a launch fails or the driver refuses the graph.
    pub(crate) fn record(gpu: &Arc<Gpu>, launches: impl FnOnce(&Launches<'_>) -> Result<()>) -> Result<Self> {
        gpu.stream.context().bind_to_thread().w()?;
        let recorder = Recorder(result::stream::create(result::stream::StreamKind::NonBlocking).w()?);
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream lives until the end of this function.
        unsafe { result::stream::begin_capture(recorder.0, mode) }.w()?;
        let launched = launches(&Launches { gpu, stream: recorder.0 });
        // SAFETY: as above; the recording is ended whatever the launches gave.
        let graph = unsafe { result::stream::end_capture(recorder.0) };
        launched?;
        let graph = graph.w()?;
        if graph.is_null() {
            bail!("the CUDA driver recorded no graph")
        }
        // SAFETY: the graph is what the driver just made.
        match unsafe { result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)) } {
            Ok(exec) => Ok(Self { gpu: gpu.clone(), graph, exec }),
            Err(error) => {
                // SAFETY: as above; nothing else has it.
                let _ = unsafe { result::graph::destroy(graph) };
                Err(error).w()
            }
        }
    }

    /// Launches all of it on the device's stream.
    ///
    /// # Errors
    /// If the driver refuses.
    pub(crate) fn launch(&mut self) -> Result<()> {
        self.gpu.stream.context().bind_to_thread().w()?;
        // SAFETY: the graph lives as long as `self`, which is borrowed exclusively.
        unsafe { result::graph::launch(self.exec, self.gpu.stream.cu_stream()) }.w()
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: both were made in `record`; the driver keeps them until a launch that runs has ended.
        unsafe {
            let _ = result::graph::exec_destroy(self.exec);
            let _ = result::graph::destroy(self.graph);
        }
    }
}
