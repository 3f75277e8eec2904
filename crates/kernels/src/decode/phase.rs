//! A step as phases for `cuda/kernels/decode.cu`, and its launch.

use super::ROWS;
use crate::cuda::graph::{Launches, SHARED};
use crate::cuda::{Arg, Gpu};
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{Result, bail};

/// Warps that multiply, threads of a block, values of a row of the ring, bytes of barriers, tiles whose sums wait for columns.
const WARPS: usize = 8;
const THREADS: usize = 512;
const RING_ROW: usize = 2048 + 32;
const ROOM: usize = 1024;
const BATCH: usize = 4;
/// Most stages of the rings, and bytes for what goes with rows of W.
const STAGES: usize = 16;
const BESIDE: usize = 16 << 10;
/// Words before the sums u.
const COUNTER: usize = 64;

/// What the blocks do in a phase.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Work {
    #[default]
    Enter,
    Product,
    Attend,
    Best,
}

/// One phase: `Phase` in `step.cuh`. Addresses, and 0 where there is none.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Phase {
    pub(super) w: u64,
    pub(super) beside: u64,
    pub(super) x: u64,
    pub(super) out: u64,
    pub(super) scaled: u64,
    pub(super) residual: u64,
    pub(super) a_next: u64,
    pub(super) gain: u64,
    pub(super) keys: u64,
    pub(super) values: u64,
    pub(super) work: Work,
    pub(super) w_stride: usize,
    pub(super) x_stride: usize,
    /// 0 where the results are what a product reads.
    pub(super) out_stride: usize,
    pub(super) d_in: usize,
    /// Groups of eight outputs.
    pub(super) groups: usize,
    /// Rows of W from gate to up.
    pub(super) second: usize,
    pub(super) ranks: usize,
    pub(super) most: usize,
    pub(super) next: usize,
    /// Values beside eight rows of W.
    pub(super) record: usize,
    pub(super) activation: usize,
    pub(super) norm: bool,
    pub(super) eps: f64,
    pub(super) scale: f64,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) together: usize,
    pub(super) capacity: usize,
    pub(super) window: usize,
    pub(super) vocab: usize,
    pub(super) half: usize,
    /// Warps that attend together, and their floats of shared memory in a block.
    pub(super) team: usize,
    pub(super) scratch: usize,
}

/// Two numbers of 32 bits.
fn pair(low: usize, high: usize) -> u64 {
    low as u32 as u64 | (high as u64) << 32
}

impl Phase {
    /// As in memory; the first tile is that of block `first`.
    fn words(&self, first: usize) -> [u64; 23] {
        let float = |v: f64| (v as f32).to_bits() as usize;
        [
            self.w,
            self.beside,
            self.x,
            self.out,
            self.scaled,
            self.residual,
            self.a_next,
            self.gain,
            self.keys,
            self.values,
            pair(self.work as usize, self.w_stride),
            pair(self.x_stride, self.out_stride),
            pair(self.d_in, self.groups),
            pair(self.second, first),
            pair(self.ranks, self.most),
            pair(self.next, self.record),
            pair(self.activation, usize::from(self.norm)),
            pair(float(self.eps), float(self.scale)),
            pair(self.heads, self.kv_heads),
            pair(self.head_dim, self.together),
            pair(self.capacity, self.window),
            pair(self.vocab, self.half),
            pair(self.team, 0),
        ]
    }
}

/// Values of a row of u: the ranks, the sum of squares, up to a multiple of eight.
pub(super) fn row_of_u(ranks: usize) -> usize {
    (ranks + 8) / 8 * 8
}

/// Values of m rows as products read them: `in_tiles` in the kernel.
pub(super) fn in_tiles(m: usize, columns: usize) -> usize {
    8 * rows_of_tile(m) * columns.next_multiple_of(32)
}

/// Addresses by row: ids, places and first places u32; and of cosines and sines f32.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows {
    pub(super) ids: u64,
    pub(super) places: u64,
    pub(super) firsts: u64,
    pub(super) rotary: (u64, u64),
}

/// Phases on the device, and what they are launched with.
pub(super) struct Step {
    _phases: CudaSlice<u64>,
    /// A counter, then the sums u of three phases in turn.
    sums: CudaSlice<u32>,
    u_size: usize,
    m: usize,
    blocks: usize,
    shared: usize,
    token: Arg,
}

impl Step {
    /// None where the shared memory of a processor does not hold what goes with the weights.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub(super) fn new(gpu: &Gpu, m: usize, phases: &[Phase], rows: &Rows) -> Result<Option<Self>> {
        debug_assert!((1..=ROWS).contains(&m));
        let blocks = gpu.processors as usize;
        let (mut words, mut first) = (Vec::with_capacity(23 * phases.len()), 0);
        for phase in phases {
            words.extend(phase.words(first));
            first = (first + phase.groups) % blocks;
        }
        let most = |of: fn(&Phase) -> usize| phases.iter().map(of).max().unwrap_or(0);
        let u_size = m * row_of_u(most(|p| p.ranks.max(p.next)));
        let record = most(|p| p.record);
        let records = (BESIDE / (4 * record).max(1)).clamp(2, 8);
        let sums = 64 * rows_of_tile(m);
        let scratch = (2 * WARPS * sums).max(most(|p| p.scratch)).next_multiple_of(4);
        let fixed = ROOM + 4 * (records * record + scratch + 2 * u_size + 2 * BATCH * sums);
        let stage = 2 * 8 * RING_ROW;
        let stages = (SHARED.saturating_sub(fixed) / stage).min(STAGES);
        if stages < 2 {
            return Ok(None);
        }
        let phases_on = gpu.stream.clone_htod(&words).w()?;
        let sums = gpu.zeros::<u32>(COUNTER + 3 * u_size)?;
        let counter = gpu.address(&sums);
        let token = [
            gpu.address(&phases_on),
            counter,
            counter + 4 * COUNTER as u64,
            rows.ids,
            rows.places,
            rows.firsts,
            rows.rotary.0,
            rows.rotary.1,
            pair(phases.len(), m),
            pair(u_size, stages),
            pair(records, record),
            pair(scratch, 0),
        ];
        let token = Arg::Long(Box::new(token));
        let shared = fixed + stages * stage;
        Ok(Some(Self { _phases: phases_on, sums, u_size, m, blocks, shared, token }))
    }

    /// Launches the step.
    ///
    /// # Errors
    /// If the driver refuses.
    pub(super) fn launch(&self, on: &Launches<'_>) -> Result<()> {
        on.zero(on.gpu.address(&self.sums), self.sums.len() * size_of::<u32>())?;
        let name = match rows_of_tile(self.m) {
            1 => "decode_8",
            2 => "decode_16",
            _ => "decode_32",
        };
        on.launch(name, ((self.blocks, 1, 1), THREADS, self.shared), std::slice::from_ref(&self.token))
    }

    /// What the last launch added up in phase `number` for the next product of so many ranks, row by row.
    ///
    /// # Errors
    /// If the driver refuses, or there are more ranks than were added.
    pub(super) fn added(&self, gpu: &Gpu, number: usize, ranks: usize) -> Result<Vec<f32>> {
        let stride = row_of_u(ranks);
        if self.m * stride > self.u_size {
            bail!("decoder: {ranks} ranks of {} values", self.u_size)
        }
        let all = gpu.stream.clone_dtoh(&self.sums).w()?;
        let from = COUNTER + (number + 1) % 3 * self.u_size;
        let rows = all[from..from + self.m * stride].chunks(stride);
        Ok(rows.flat_map(|row| row[..ranks].iter().map(|bits| f32::from_bits(*bits))).collect())
    }
}

/// Eights of rows that a kernel is made for.
fn rows_of_tile(m: usize) -> usize {
    m.div_ceil(8).next_power_of_two()
}
