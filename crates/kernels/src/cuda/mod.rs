//! What all CUDA kernels share: the device's stream, compiled functions by name, memory of a stream, and launches.
//!
//! The kernels are in `cuda/kernels/*.cu`, one file per operation, compiled when the crate is. Everything runs in order on the
//! one stream that candle uses for the device, so memory freed while a kernel still reads it is reused only after it.

pub(crate) mod factors;
pub(crate) mod graph;
mod launch;
pub mod optimizer;
pub(crate) mod product;
pub(crate) mod rows;

pub(crate) use launch::{Arg, Grid, launch, launch_with};

use candle_core::cuda_backend::cudarc::driver::{CudaFunction, CudaModule, CudaSlice, CudaStream, DevicePtr, sys};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{CudaDType, CudaDevice, DeviceId, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, DType, Device, Layout, Result, Storage, Tensor, bail};
use half::bf16;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// A device with our kernels on it.
pub(crate) struct Gpu {
    pub(crate) device: CudaDevice,
    pub(crate) stream: Arc<CudaStream>,
    /// By the name of their file, with which the names of its kernels begin.
    modules: Vec<(&'static str, Arc<CudaModule>)>,
    functions: RwLock<HashMap<&'static str, CudaFunction>>,
    pub(crate) products: Mutex<product::Products>,
    /// Zeros between launches, where kernels that leave them so add up.
    zeros: Mutex<Option<CudaSlice<f32>>>,
    /// Compute capability, as 90.
    pub(crate) capability: i32,
    /// Streaming multiprocessors.
    pub(crate) processors: i32,
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gpu").field("device", &self.device).field("capability", &self.capability).finish()
    }
}

impl Gpu {
    /// The device of a tensor, with our kernels loaded on first use.
    ///
    /// # Errors
    /// If the tensor is not on a CUDA device, or the driver refuses the kernels.
    pub(crate) fn of(device: &Device) -> Result<Arc<Self>> {
        static GPUS: OnceLock<Mutex<HashMap<DeviceId, Arc<Gpu>>>> = OnceLock::new();
        let device = device.as_cuda_device()?;
        let mut gpus = GPUS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gpu) = gpus.get(&device.id()) {
            return Ok(gpu.clone());
        }
        let gpu = Arc::new(Self::load(device)?);
        gpus.insert(device.id(), gpu.clone());
        Ok(gpu)
    }

    fn load(device: &CudaDevice) -> Result<Self> {
        use sys::CUdevice_attribute_enum as Attribute;
        let stream = device.cuda_stream();
        let context = stream.context().clone();
        keep_freed_memory(device)?;
        let load = |image: &[u8]| context.load_module(Ptx::from_binary(image.to_vec())).w();
        let modules = IMAGES.iter().map(|(name, image)| Ok((*name, load(image)?)));
        let attribute = |a| context.attribute(a).w();
        Ok(Self {
            modules: modules.collect::<Result<_>>()?,
            functions: RwLock::default(),
            products: Mutex::new(product::Products::new()?),
            zeros: Mutex::default(),
            capability: 10 * attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?
                + attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            processors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            device: device.clone(),
            stream,
        })
    }

    /// The kernel of that name, allowed `shared` bytes of shared memory.
    fn function(&self, name: &'static str, shared: u32) -> Result<CudaFunction> {
        if let Some(function) = self.functions.read().unwrap_or_else(PoisonError::into_inner).get(name) {
            return Ok(function.clone());
        }
        let own = self.modules.iter().filter(|(file, _)| name.starts_with(file)).max_by_key(|(file, _)| file.len());
        let Some((_, module)) = own else { bail!("no CUDA kernel is called {name}") };
        let function = module.load_function(name).w()?;
        if shared > 48 << 10 {
            let most = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(most, shared as i32).w()?;
        }
        self.functions.write().unwrap_or_else(PoisonError::into_inner).insert(name, function.clone());
        Ok(function)
    }

    /// Memory for `len` values, whatever is in it.
    pub(crate) fn alloc<T: CudaDType + candle_core::cuda_backend::cudarc::driver::DeviceRepr>(
        &self,
        len: usize,
    ) -> Result<CudaSlice<T>> {
        // SAFETY: every kernel that is given the memory writes it before anything reads it.
        unsafe { self.stream.alloc::<T>(len.max(1)).w() }
    }

    /// Memory for `len` zeros.
    pub(crate) fn zeros<T>(&self, len: usize) -> Result<CudaSlice<T>>
    where
        T: candle_core::cuda_backend::cudarc::driver::DeviceRepr
            + candle_core::cuda_backend::cudarc::driver::ValidAsZeroBits,
    {
        self.stream.alloc_zeros::<T>(len.max(1)).w()
    }

    /// A tensor over memory that a kernel wrote.
    pub(crate) fn tensor<T: CudaDType>(&self, data: CudaSlice<T>, shape: &[usize]) -> Tensor {
        let storage = CudaStorage::wrap_cuda_slice(data, self.device.clone());
        Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
    }

    /// Where memory of this stream begins.
    pub(crate) fn address<T>(&self, data: &CudaSlice<T>) -> u64 {
        data.device_ptr(&self.stream).0
    }
}

/// The address of a contiguous tensor's first value.
///
/// # Errors
/// If the tensor is strided, of another type or on another device.
pub(crate) fn address<T: CudaDType>(tensor: &Tensor) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { bail!("a tensor on {:?} for a CUDA kernel", tensor.device()) };
    address_of::<T>(storage, layout)
}

/// The same, from the storage of a tensor.
///
/// # Errors
/// If the layout is strided or the storage of another type.
pub(crate) fn address_of<T: CudaDType>(storage: &CudaStorage, layout: &Layout) -> Result<u64> {
    let Some((start, _)) = layout.contiguous_offsets() else {
        bail!("kernel given a strided tensor of shape {:?}: call contiguous() first", layout.shape())
    };
    let slice = storage.as_cuda_slice::<T>()?;
    let stream = storage.device.cuda_stream();
    Ok(slice.device_ptr(&stream).0 + (start * size_of::<T>()) as u64)
}

/// A matrix of bf16 as the kernels take it: its rows may have gaps between them.
///
/// # Errors
/// If the tensor is no matrix, its columns are strided, or it is of another type or on another device.
pub(crate) fn matrix(tensor: &Tensor) -> Result<View> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { bail!("a tensor on {:?} for a CUDA kernel", tensor.device()) };
    let (&[_, columns], &[stride, step]) = (layout.dims(), layout.stride()) else {
        bail!("a tensor of shape {:?} for a CUDA kernel that takes a matrix", layout.shape())
    };
    if step != 1 && columns > 1 {
        bail!("a CUDA kernel was given a matrix with strided columns: {layout:?}")
    }
    let slice = storage.as_cuda_slice::<bf16>()?;
    let stream = storage.device.cuda_stream();
    Ok(View::new(slice.device_ptr(&stream).0 + (layout.start_offset() * size_of::<bf16>()) as u64, stride))
}

/// Whether a tensor is f32, contiguous and on a CUDA device: what kernels over flat values take.
pub fn is_flat(tensor: &Tensor) -> bool {
    tensor.device().is_cuda() && tensor.dtype() == DType::F32 && tensor.is_contiguous()
}

/// A matrix of bf16 in device memory, row by row, `stride` values from one row to the next.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View {
    /// Address of the first value.
    pub(crate) at: u64,
    /// Values from one row to the next.
    pub(crate) stride: usize,
}

impl View {
    /// Rows of `stride` values without gaps.
    pub(crate) fn new(at: u64, stride: usize) -> Self {
        Self { at, stride }
    }

    /// The columns from `first` on.
    pub(crate) fn columns(self, first: usize) -> Self {
        Self { at: self.at + (first * size_of::<bf16>()) as u64, ..self }
    }
}

/// Keeps memory that a stream freed in its pool: without this it goes back to the driver at each synchronisation.
fn keep_freed_memory(device: &CudaDevice) -> Result<()> {
    let pool = pool(device)?;
    let mut all = u64::MAX;
    let attribute = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the attribute is a u64, read during the call.
    unsafe { sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut all).cast()) }.result().w()
}

/// The pool that the device's streams allocate from.
fn pool(device: &CudaDevice) -> Result<sys::CUmemoryPool> {
    let context = device.cuda_stream().context().clone();
    context.bind_to_thread().w()?;
    let mut pool = std::ptr::null_mut();
    // SAFETY: the pool is written during the call and belongs to the device.
    unsafe { sys::cuDeviceGetDefaultMemPool(&raw mut pool, context.cu_device()) }.result().w()?;
    Ok(pool)
}

/// The most memory in use at once on a CUDA device since the process began, in bytes; None for other devices.
///
/// # Errors
/// If the driver refuses.
pub fn peak_memory(device: &Device) -> Result<Option<u64>> {
    let Device::Cuda(device) = device else { return Ok(None) };
    let mut peak = 0u64;
    let attribute = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
    // SAFETY: the attribute is a u64, written during the call.
    unsafe { sys::cuMemPoolGetAttribute(pool(device)?, attribute, (&raw mut peak).cast()) }.result().w()?;
    Ok(Some(peak))
}

/// Memory of a CUDA device that nobody holds, in bytes; None for other devices.
///
/// # Errors
/// If the driver refuses.
pub fn free_memory(device: &Device) -> Result<Option<u64>> {
    let Device::Cuda(device) = device else { return Ok(None) };
    let (free, _) = device.cuda_stream().context().mem_get_info().w()?;
    Ok(Some(free as u64))
}
